"""The report opens offline in a real browser, and every picture in it is drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limaml.errors import DataError
from limaml.evaluate.activity import activity_curve, activity_edges
from limaml.evaluate.embedding_map import EmbeddingMap, project
from limaml.evaluate.figures import Curve, gains_figure, method_styles
from limaml.evaluate.metrics import auc
from limaml.evaluate.pictures import Panel, Picture, comparison_pictures
from limaml.evaluate.predictions import Predictions, sigmoid
from limaml.evaluate.report import headlines, losses, write_report
from limaml.evaluate.summary import summarise
from limaml.types import LossKind

pytest.importorskip("plotly", reason="the report needs plotly (pip install 'limaml[report]')")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
METHODS = ("base", "wide_and_deep", "limaml_gradient", "limaml_newton")
HOSTILE = "</script><script>document.title='stolen'</script><b>&\"'"


def predictions(
    methods: tuple[str, ...] = METHODS,
    protocols: tuple[str, ...] = ("warm", "new_tasks"),
    *,
    seeds: int = 2,
    tasks: int = 60,
    loss: LossKind = LossKind.BINARY,
    harm: str = "",
) -> list[Predictions]:
    """Members with a level of their own. Methods know more and more of it; `harm` has it the wrong way round."""
    knowledge = dict(zip(METHODS, (0.0, 0.4, 0.6, 0.9), strict=True))
    result = []
    for protocol in protocols:
        for seed in range(seeds):
            rng = np.random.default_rng((seed, protocol == "warm"))
            support = rng.integers(0, 80, tasks)
            task = np.repeat(np.arange(tasks), 15)
            level, item = rng.normal(size=tasks)[task] * 1.5, rng.normal(size=len(task))
            truth = level + item
            label = truth if loss is LossKind.SQUARED else (rng.random(len(task)) < sigmoid(truth)).astype(float)
            for method in methods:
                known = -0.8 if method == harm else knowledge.get(method, 0.2)
                logit = item + known * level
                result.append(Predictions("toy", protocol, seed, method, task, support[task], label, logit, None, loss))
    return result


def curves(methods: tuple[str, ...] = METHODS, protocols: tuple[str, ...] = ("warm", "new_tasks")) -> list[Curve]:
    return [
        Curve("toy", protocol, seed, method, [1, 2, 3], [0.7, 0.6, 0.5], [0.7, 0.65, 0.66], best_epoch=2)
        for protocol in protocols
        for method in methods
        for seed in (0, 1)
    ]


def embedding_map(tasks: int = 50, ids: str = "user_id=") -> EmbeddingMap:
    rng = np.random.default_rng(0)
    mean = np.where(np.arange(tasks) % 10 == 0, np.nan, rng.random(tasks))
    names = [f"{ids}{i}" for i in range(tasks)]
    return EmbeddingMap("warm", "limaml_newton", rng.normal(size=(tasks, 4)), names, rng.integers(0, 300, tasks), mean)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed, so the report cannot be opened in a browser.")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    session.set_window_size(1200, 900)
    try:
        yield session
    finally:
        session.quit()


def look(browser: Any, path: Path) -> dict[str, Any]:
    """Open a report and say what is to be seen, after checking what must hold for each."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.documentElement.dataset.drawn"))
    seen: dict[str, Any] = browser.execute_script(
        """
        const plots = [...document.querySelectorAll('.plot')].map((plot) => {
          const marks = [...plot.querySelectorAll('.scatterlayer path.point, .scatterlayer path.js-line')]
            .filter((mark) => mark.getBBox().width + mark.getBBox().height > 0);
          const box = plot.querySelector('svg.main-svg')?.getBoundingClientRect();
          return {marks: marks.length, width: box?.width ?? 0, height: box?.height ?? 0,
                  label: plot.getAttribute('aria-label')};
        });
        return {plots, drawn: Number(document.documentElement.dataset.drawn), title: document.title,
                text: document.body.innerText,
                overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth};
        """
    )
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert path.as_uri() in urls  # the log does see requests
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {path.as_uri()}
    assert seen["drawn"] == len(seen["plots"])
    for plot in seen["plots"]:
        assert plot["marks"] > 0, plot
        assert plot["width"] > 200, plot
        assert plot["height"] > 200, plot
    assert seen["overflow"] <= 0
    return seen


def test_full_report_is_drawn(browser: Any, tmp_path: Path) -> None:
    items = predictions(harm="limaml_gradient")
    path = tmp_path / "out" / "report.html"
    write_report(
        path,
        summarise(items, replicates=60),
        items,
        curves=curves(),
        embedding_map=embedding_map(ids=HOSTILE),
        notes=["No time column was given: a seeded shuffle stands in for it.", HOSTILE],
        config={"train": {"rate": 1e-3, "loss": LossKind.BINARY, "out": Path("runs/demo")}, "text": HOSTILE},
        environment={"torch": "2.13"},
        command="limaml compare toy.csv --out runs/demo",
    )
    assert path.stat().st_size < 6e6
    assert not list(path.parent.glob("*.part"))
    seen = look(browser, path)
    # gains: 2 protocols × 2 baselines × 3 metrics; activity 2; learning 2 × 2; calibration 2; map 2
    assert len(seen["plots"]) == 12 + 2 + 4 + 2 + 2
    assert seen["title"] == "Personalisation on toy"
    text = seen["text"]
    assert text.index("Who loses, and where") < text.index("In short") < text.index("Results") < text.index("Who gains")
    assert re.search(r"LiMAML, gradient against base.*warm: AUC −0\.\d{4}", text)
    assert "a seeded shuffle stands in" in text
    assert "limaml compare toy.csv" in text
    assert HOSTILE in text


def test_report_fits_a_phone_and_the_dark(browser: Any, tmp_path: Path) -> None:
    items = predictions(protocols=("new_tasks",), seeds=1)
    write_report(tmp_path / "r.html", summarise(items, replicates=20), items, embedding_map=embedding_map())
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    try:
        seen = look(browser, tmp_path / "r.html")
        colours = browser.execute_script(
            "const plot = document.querySelector('.plot');"
            "return [getComputedStyle(document.body).backgroundColor, plot.layout.font.color]"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert all(plot["width"] <= 390 for plot in seen["plots"])
    assert colours == ["rgb(20, 23, 28)", "#a0a9b6"]


def test_one_method_one_protocol_and_a_picture_from_elsewhere(browser: Any, tmp_path: Path) -> None:
    import plotly.graph_objects as go

    items = predictions(("limaml_newton",), ("warm",), seeds=1)
    own = Picture(
        "Freshness", "How old the embeddings were.", (Panel("age", go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))),)
    )
    write_report(tmp_path / "r.html", summarise(items, replicates=10), items, extra=[own], title="Replay")
    seen = look(browser, tmp_path / "r.html")
    assert seen["title"] == "Replay"
    assert len(seen["plots"]) == 3  # activity, calibration and freshness: without a baseline nobody gains
    assert "Who gains" not in seen["text"]
    assert "How old the embeddings were." in seen["text"]


def test_undefined_metrics_and_empty_buckets(browser: Any, tmp_path: Path) -> None:
    """All labels positive: no AUC, GAUC or NE. All supports equal: three of four buckets are empty."""
    items = []
    for item in predictions(("base", "my_method"), ("warm",), seeds=1):
        ones, supports = np.ones(len(item)), np.full(len(item), 3)
        items.append(dataclasses.replace(item, label=ones, support=supports))
    summary = summarise(items, replicates=20)
    assert math.isnan(summary.runs[0].auc)
    pictures = comparison_pictures(summary, items)
    assert [p.title for p in pictures] == ["Who gains", "Calibration"]
    write_report(tmp_path / "r.html", summary, items)
    seen = look(browser, tmp_path / "r.html")
    assert "my method" in seen["text"]
    assert "GAUC" not in "".join(plot["label"] for plot in seen["plots"])
    assert "these rows leave it undefined: AUC (warm), GAUC (warm)." in seen["text"]


def test_squared_loss(browser: Any, tmp_path: Path) -> None:
    items = predictions(("base", "limaml_newton"), ("warm",), seeds=1, loss=LossKind.SQUARED)
    write_report(tmp_path / "r.html", summarise(items, replicates=20), items, curves=curves(("base",), ("warm",)))
    seen = look(browser, tmp_path / "r.html")
    assert "RMSE against the number of interactions" in seen["text"]
    assert "GAUC" not in seen["text"]


def test_too_few_tasks_are_called_anecdotes(tmp_path: Path) -> None:
    items = predictions(tasks=4)
    write_report(tmp_path / "r.html", summarise(items, replicates=20), items)
    assert "Nothing here is significant" in (tmp_path / "r.html").read_text("utf-8")


def test_losses_come_first_and_are_complete() -> None:
    items = predictions(harm="limaml_newton")
    summary = summarise(items, replicates=60)
    found = losses(summary)
    assert found[0].bucket == "all"
    assert {d.method for d in found if d.bucket == "all"} >= {"limaml_newton"}
    assert len(found) == sum(d.verdict == "worse" for d in summary.deltas)
    assert losses(summarise(predictions(("base", "limaml_newton")), replicates=60)) == []


def test_headlines_give_the_measured_numbers() -> None:
    items = predictions(protocols=("warm",))
    summary = summarise(items, replicates=30)
    mean = np.mean([auc(p.label, p.logit) for p in items if p.method == "limaml_newton"])
    base = np.mean([auc(p.label, p.logit) for p in items if p.method == "base"])
    sentence = next(s for s in headlines(summary) if s.startswith("LiMAML, Newton, warm"))
    assert f"AUC {mean:.4f}, +{mean - base:.4f} on base" in sentence


def test_gains_figure_shows_the_deltas() -> None:
    summary = summarise(predictions(), replicates=30)
    figure = gains_figure(summary, "toy", "warm", "base", "log_loss")
    assert [trace.name for trace in figure.data] == ["wide and deep IDs", "LiMAML, gradient", "LiMAML, Newton"]
    delta = summary.delta("toy", "warm", "limaml_newton", "base", "all", "log_loss")
    assert delta is not None
    assert figure.data[2].y[0] == delta.delta
    assert figure.data[2].y[0] + figure.data[2].error_y.array[0] == pytest.approx(delta.high)
    assert figure.layout.yaxis.autorange == "reversed"


def test_activity_curve_is_the_metric_of_each_bin() -> None:
    items = predictions(("base", "limaml_newton"), ("warm",), seeds=1)
    curve = activity_curve(items, bins=5, replicates=10)
    assert sum(curve.tasks) == 60
    for b, (low, high) in enumerate(zip(curve.low, curve.high, strict=True)):
        inside = (items[1].support >= low) & (items[1].support <= high)
        expected = auc(items[1].label[inside], items[1].logit[inside])
        assert curve.values["limaml_newton"][b].value == pytest.approx(expected)
    assert all(high < low for high, low in zip(curve.high, curve.low[1:], strict=False))
    np.testing.assert_array_equal(activity_edges(np.array([7, 7, 7]), 4), [])
    np.testing.assert_array_equal(activity_edges(np.arange(8), 4), [1, 3, 5])


def test_map_keeps_distances_of_flat_embeddings() -> None:
    """Points of a plane in 6 dimensions: two components show all of it, so distances survive."""
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(40, 2)) * [3, 1]
    directions = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    source = EmbeddingMap("warm", "m", flat @ directions.T + 5, [str(i) for i in range(40)], np.arange(40), np.ones(40))
    points = project(source)
    assert sum(points.explained) == pytest.approx(1)
    assert points.explained[0] > points.explained[1]
    drawn = np.stack([points.x, points.y], axis=1)
    distance = lambda v: np.linalg.norm(v[:, None] - v[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(distance(drawn), distance(flat), atol=1e-9)
    sample = project(source, limit=10)
    assert len(sample.rows) == 10
    np.testing.assert_array_equal(sample.rows, project(source, limit=10).rows)
    for shape in ((0, 4), (1, 4), (3, 1)):
        n = shape[0]
        small = project(EmbeddingMap("warm", "m", np.ones(shape), ["a"] * n, np.ones(n), np.ones(n)))
        np.testing.assert_allclose(small.x, 0, atol=1e-12)


def test_bad_parts_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 meta embeddings of 'm' are not finite, the first of task 'b'"):
        EmbeddingMap("warm", "m", [[0.0], [math.nan]], ["a", "b"], [1, 2], [0.5, 0.5])
    with pytest.raises(DataError, match="one id, support count and mean label per task"):
        EmbeddingMap("warm", "m", [[0.0], [1.0]], ["a"], [1, 2], [0.5, 0.5])
    with pytest.raises(DataError, match="lists of different lengths"):
        Curve("d", "warm", 0, "m", [1, 2], [0.5])


def test_unknown_methods_get_looks_of_their_own() -> None:
    styles = method_styles([*METHODS, "mine", "yours"])
    assert len({style.colour for style in styles.values()}) == 6
    assert len({style.symbol for style in styles.values()}) == 6
    assert styles["mine"].name == "mine"
