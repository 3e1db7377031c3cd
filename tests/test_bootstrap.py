"""The bootstrap equals resampling by hand, and its intervals hold what they promise."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from limaml.errors import ConfigError, DataError
from limaml.evaluate import metrics
from limaml.evaluate.bootstrap import MIN_TASKS, bootstrap, task_weights
from limaml.evaluate.predictions import Predictions
from limaml.evaluate.summary import summarise, write_metrics
from limaml.evaluate.table import format_table, rich_table
from limaml.types import LossKind


def random_predictions(
    seed: int = 0,
    *,
    method: str = "m",
    skill: float = 1.0,
    tasks: int = 12,
    rows: int = 80,
    protocol: str = "warm",
    weighted: bool = False,
    loss: LossKind = LossKind.BINARY,
    decimals: int = 1,
) -> Predictions:
    """The same rows for every method of a seed; logits with many ties."""
    rng = np.random.default_rng(seed)
    task = rng.integers(0, tasks, rows) + (100 * seed if protocol == "new_tasks" else 0)
    label = rng.integers(0, 2, rows).astype(float) + (50 if loss is LossKind.SQUARED else 0)
    weight = rng.choice([0.5, 1.0, 2.0], rows) if weighted else None
    noise = np.random.default_rng((seed, 10_000 + round(skill * 1000))).normal(size=rows)
    logit = np.round(skill * label + noise, decimals)
    return Predictions("d", protocol, seed, method, task, task % 7, label, logit, weight, loss)


def by_hand(item: Predictions, rows: np.ndarray, copy: np.ndarray, metric: str) -> float:
    """`metric` on rows that were really repeated; each copy of a task is a task of its own."""
    task, label, logit, predicted = item.task[rows], item.label[rows], item.logit[rows], item.predicted[rows]
    weight = item.row_weight[rows]
    own = np.unique(np.stack([task.astype(np.int64), copy]), axis=1, return_inverse=True)[1].reshape(-1)
    return {
        "auc": lambda: metrics.auc(label, logit, weight),
        "gauc": lambda: metrics.gauc(own, label, logit, weight).value,
        "gauc_coverage": lambda: metrics.gauc(own, label, logit, weight).coverage,
        "log_loss": lambda: metrics.log_loss(label, logit, weight),
        "ne": lambda: metrics.normalised_entropy(label, logit, weight),
        "calibration": lambda: metrics.calibration(label, predicted, weight),
        "rmse": lambda: metrics.rmse(label, predicted, weight),
        "mae": lambda: metrics.mae(label, predicted, weight),
        "r2": lambda: metrics.r2(label, predicted, weight),
    }[metric]()


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(list(LossKind)), st.integers(1, 12), st.integers(1, 90))
def test_weights_equal_resampling_by_hand(seed: int, weighted: bool, loss: LossKind, tasks: int, rows: int) -> None:
    item = random_predictions(seed, tasks=tasks, rows=rows, weighted=weighted, loss=loss)
    parity = lambda support: support % 2  # noqa: E731
    draws = bootstrap([item], replicates=3, seed=seed, buckets=("even", "odd"), assign=parity)
    universe = np.unique(item.task)
    for replicate, weight in enumerate([np.ones(len(universe)), *task_weights(len(universe), range(3), seed)]):
        count = weight[np.searchsorted(universe, item.task)].astype(int)
        rows_drawn = np.repeat(np.arange(len(item)), count)
        copies = np.concatenate([np.arange(c) for c in count])
        for b, inside in enumerate((item.support >= 0, item.support % 2 == 0, item.support % 2 == 1)):
            keep = inside[rows_drawn]
            for k, metric in enumerate(draws.metrics):
                expected = by_hand(item, rows_drawn[keep], copies[keep], metric)
                found = draws.values[0, 0, b, k, replicate]
                np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9, err_msg=metric)


def test_rows_of_different_moments_are_not_ranked_with_each_other() -> None:
    item = random_predictions(3, tasks=8, rows=200)
    moment = np.random.default_rng(3).integers(0, 3, len(item))
    pair = item.task.astype(np.int64) * 3 + moment
    plain, cut = (bootstrap([each], replicates=20) for each in (item, dataclasses.replace(item, moment=moment)))
    whole = metrics.gauc(pair, item.label, item.logit, item.row_weight)
    assert cut.interval("m", "all", "gauc").value == pytest.approx(whole.value)
    assert cut.interval("m", "all", "gauc_coverage").value == pytest.approx(whole.coverage)
    assert cut.interval("m", "all", "gauc").value != plain.interval("m", "all", "gauc").value
    assert cut.interval("m", "all", "auc") == plain.interval("m", "all", "auc")
    drawn = task_weights(8, range(1), 0)[0][item.task.astype(np.int64)].astype(np.int64)  # the tasks are 0 … 7
    rows = np.repeat(np.arange(len(item)), drawn)
    copy = np.concatenate([np.arange(n) for n in drawn])
    again = metrics.gauc(pair[rows] * 100 + copy, item.label[rows], item.logit[rows], item.row_weight[rows])
    assert cut.values[0, 0, 0, cut.metrics.index("gauc"), 1] == pytest.approx(again.value)


def test_draws_do_not_depend_on_grouping_and_sum_to_the_number_of_tasks() -> None:
    together = task_weights(50, range(10), 3)
    np.testing.assert_array_equal(together, np.concatenate([task_weights(50, range(r, r + 1), 3) for r in range(10)]))
    np.testing.assert_array_equal(together.sum(axis=1), 50)
    assert not np.array_equal(together, task_weights(50, range(10), 4))


def test_differences_are_paired() -> None:
    items = [
        random_predictions(s, method=m, skill=k, tasks=40, rows=600)
        for s in (0, 1)
        for m, k in (("a", 1.0), ("b", 1.3))
    ]
    draws = bootstrap(items, replicates=200)
    difference = draws.difference("b", "a", "all", "log_loss")
    k = draws.metrics.index("log_loss")
    a, b = (draws.interval(m, "all", "log_loss") for m in "ab")
    assert difference.value == pytest.approx(b.value - a.value)
    np.testing.assert_allclose(
        (difference.low, difference.high),
        np.quantile((draws.values[:, 1, 0, k] - draws.values[:, 0, 0, k]).mean(axis=0)[1:], (0.025, 0.975)),
    )
    # nearly the same predictions: both vary a lot from draw to draw, but together
    close = [items[0], dataclasses.replace(items[0], method="close", logit=items[0].logit * 1.01)]
    draws = bootstrap(close, replicates=200)
    paired, own = draws.difference("close", "a", "all", "log_loss"), draws.interval("a", "all", "log_loss")
    assert 0 < paired.high - paired.low < 0.1 * (own.high - own.low)
    copies = [random_predictions(method=method, tasks=40, rows=600) for method in ("one", "two")]
    itself = bootstrap(copies, replicates=50)
    nothing = itself.difference("two", "one", "all", "auc")
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert not nothing.excludes_zero


def test_seeds_with_their_own_tasks_are_averaged() -> None:
    items = [random_predictions(s, protocol="new_tasks", tasks=30, rows=300) for s in range(3)]
    draws = bootstrap(items, replicates=100)
    expected = np.mean([metrics.auc(p.label, p.logit) for p in items])
    assert draws.interval("m", "all", "auc").value == pytest.approx(expected)
    assert draws.tasks[0, 0] == 90
    assert draws.of_seed(1, "m", "all", "auc") == pytest.approx(metrics.auc(items[1].label, items[1].logit))


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_intervals_cover_the_truth() -> None:
    """Positives score N(1, 1), negatives N(0, 1), each task adds a level N(0, 1) of its own to all its scores.

    Within a task the level cancels: GAUC is Φ(1/√2). Between tasks it does not: AUC tends to Φ(1/√(2 + 2)).
    """
    tasks, rows, worlds = 120, 12, 200
    truth = {"gauc": phi(1 / math.sqrt(2)), "auc": phi(1 / 2)}
    hits = dict.fromkeys(truth, 0)
    task = np.repeat(np.arange(tasks), rows)
    for world in range(worlds):
        rng = np.random.default_rng(world)
        label = np.tile(np.arange(rows) % 2, tasks).astype(float)
        score = rng.normal(size=tasks * rows) + label + rng.normal(size=tasks)[task]
        item = Predictions("d", "warm", 0, "m", task, task * 0, label, score)
        draws = bootstrap([item], replicates=150, seed=world, buckets=(), metrics=tuple(truth))
        for metric, value in truth.items():
            found = draws.interval("m", "all", metric)
            hits[metric] += found.low <= value <= found.high
    # 200 fair tries at 95 %: fewer than 179 or all 200 happen less than once in a thousand
    for metric, count in hits.items():
        assert 0.895 * worlds <= count < worlds, (metric, count)


def test_rows_of_a_task_stay_together() -> None:
    """Every row of a task has the task's own loss: the interval must be as wide as that of a mean over tasks."""
    tasks, rows = 60, 50
    level = np.random.default_rng(0).normal(size=tasks)
    task = np.repeat(np.arange(tasks), rows)
    item = Predictions("d", "warm", 0, "m", task, task * 0, level[task], 0.0 * task, loss=LossKind.SQUARED)
    found = bootstrap([item], replicates=2000).interval("m", "all", "mae")
    expected = 2 * 1.96 * np.abs(level).std() / math.sqrt(tasks)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_p_values_are_rarely_small_by_chance_and_always_where_one_method_is_better() -> None:
    """Under no difference a p-value below 0.1 comes about once in ten worlds; with one it is as small as can be."""

    def p_value(world: int, skill: float, replicates: int = 99) -> float:
        items = [random_predictions(world, method="one", skill=1.0, tasks=60, rows=600, decimals=6)]
        rng = np.random.default_rng((world, 1))
        logit = skill * items[0].label + rng.normal(size=600)
        items.append(dataclasses.replace(items[0], method="two", logit=logit))
        return bootstrap(items, replicates=replicates, buckets=(), metrics=["log_loss"]).p_value(
            "two", "one", "all", "log_loss"
        )

    by_chance = [p_value(world, 1.0) for world in range(100)]
    assert 0.02 < np.mean(np.array(by_chance) < 0.1) < 0.2
    assert 0.35 < np.mean(by_chance) < 0.65
    assert p_value(0, 6.0) == pytest.approx(2 / 100)
    one = random_predictions(method="one")
    assert (
        bootstrap([one, dataclasses.replace(one, method="two")], replicates=20).p_value("two", "one", "all", "auc") == 1
    )


def test_too_few_tasks_have_no_interval() -> None:
    few = random_predictions(tasks=MIN_TASKS - 1, rows=200)
    enough = random_predictions(tasks=MIN_TASKS, rows=200)
    assert math.isnan(bootstrap([few], replicates=50).interval("m", "all", "auc").low)
    assert bootstrap([enough], replicates=50).interval("m", "all", "auc").low < 1
    pair = [few, dataclasses.replace(few, method="n")]
    assert math.isnan(bootstrap(pair, replicates=50).p_value("n", "m", "all", "auc"))
    nothing = Predictions("d", "warm", 0, "m", [], [], [], [])
    assert math.isnan(bootstrap([nothing], replicates=5).interval("m", "all", "auc").value)


def test_settings_that_make_no_sense_are_refused() -> None:
    item = random_predictions()
    with pytest.raises(ConfigError, match="replicates=-1"):
        bootstrap([item], replicates=-1)
    with pytest.raises(ConfigError, match=r"Unknown metrics \['rmse'\]"):
        bootstrap([item], metrics=["rmse"])
    with pytest.raises(ConfigError, match="a bucket from 0 to 0"):
        bootstrap([item], buckets=("one",), assign=lambda support: support)
    with pytest.raises(DataError, match="one dataset and protocol"):
        bootstrap([item, random_predictions(protocol="new_tasks")])
    with pytest.raises(DataError, match="no predictions"):
        bootstrap([])
    with pytest.raises(ConfigError, match="Did you mean 'base'"):
        summarise([random_predictions(method="base")], baselines=["basse"])


@pytest.fixture(scope="module")
def comparison() -> list[Predictions]:
    skills = {"limaml_newton": 2.5, "base": 0.3, "wide_and_deep": 1.0, "broken": -0.5}
    return [
        random_predictions(seed, method=method, skill=skill, tasks=60, rows=900, protocol=protocol, decimals=4)
        for protocol in ("warm", "new_tasks")
        for seed in (0, 1)
        for method, skill in skills.items()
    ]


def test_summary_has_the_promised_shape(comparison: list[Predictions], tmp_path: Path) -> None:
    summary = summarise(comparison, replicates=60)
    write_metrics(summary, tmp_path / "out" / "metrics.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"), parse_constant=refuse)
    run_keys = {
        "dataset",
        "protocol",
        "seed",
        "method",
        "bucket",
        "auc",
        "gauc",
        "gauc_coverage",
        "log_loss",
        "ne",
        "n",
    }
    delta_keys = {"dataset", "protocol", "method", "baseline", "bucket", "metric", "delta", "low", "high"}
    assert all(run_keys <= set(run) for run in data["runs"])
    assert all(delta_keys <= set(delta) for delta in data["deltas"])
    assert len(data["runs"]) == 2 * 2 * 4 * 5
    assert {r["bucket"] for r in data["runs"]} == {"all", "q1", "q2", "q3", "q4"}
    # two methods against two baselines, and the stronger baseline against the weaker
    pairs = {(d["method"], d["baseline"]) for d in data["deltas"]}
    others = ("limaml_newton", "broken")
    assert pairs == {(m, b) for m in others for b in ("base", "wide_and_deep")} | {("wide_and_deep", "base")}
    for run in data["runs"]:
        item = next(
            p for p in comparison if (p.protocol, p.seed, p.method) == (run["protocol"], run["seed"], run["method"])
        )
        if run["bucket"] == "all":
            assert run["auc"] == pytest.approx(metrics.auc(item.label, item.logit))
            assert run["n"] == len(item)
        else:
            cut = [
                r["n"]
                for r in data["runs"]
                if r["bucket"] != "all" and all(r[k] == run[k] for k in ("protocol", "seed", "method"))
            ]
            assert sum(cut) == len(item)


def test_deltas_say_who_is_better(comparison: list[Predictions]) -> None:
    summary = summarise(comparison, replicates=60)
    better = summary.delta("d", "warm", "limaml_newton", "base", "all", "auc")
    assert better is not None
    assert better.delta > 0
    assert better.verdict == "better"
    loss = summary.delta("d", "warm", "limaml_newton", "base", "all", "log_loss")
    assert loss is not None
    assert loss.delta < 0
    assert loss.verdict == "better"
    worse = summary.delta("d", "new_tasks", "broken", "wide_and_deep", "all", "log_loss")
    assert worse is not None
    assert worse.delta > 0
    assert worse.verdict == "worse"


def test_tables_show_means_gains_and_verdicts(comparison: list[Predictions]) -> None:
    summary = summarise(comparison, replicates=60)
    text = format_table(summary)
    mean = np.mean(
        [metrics.auc(p.label, p.logit) for p in comparison if (p.protocol, p.method) == ("warm", "limaml_newton")]
    )
    line = next(line for line in text.splitlines() if line.startswith("limaml_newton"))
    assert f"{mean:.4f}" in line
    assert "✓" in text
    assert "✗" in text
    for width in (60, 160):
        console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
        with console.capture() as captured:
            console.print(rich_table(summary))
        assert "…" not in captured.get()
        assert captured.get().count("✗") == text.count("✗") - text.splitlines()[-1].count("✗") + 1


def test_squared_loss_and_undefined_metrics(tmp_path: Path) -> None:
    items = [
        random_predictions(method=m, skill=k, loss=LossKind.SQUARED) for m, k in (("base", 0.5), ("limaml_newton", 1.0))
    ]
    summary = summarise(items, replicates=40)
    assert summary.metrics("d") == ("rmse", "mae", "r2")
    assert next(r for r in summary.runs if r.bucket == "all").rmse == pytest.approx(
        metrics.rmse(items[0].label, items[0].logit)
    )
    write_metrics(summary, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))["runs"][0]["auc"] is None
    one_class = Predictions("d", "warm", 0, "base", ["a", "b"], [1, 2], [1, 1], [0.3, 0.1])
    single = summarise([one_class], replicates=10)
    assert math.isnan(single.runs[0].auc)
    assert "–" in format_table(single)
