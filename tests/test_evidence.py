"""The evidence runner: nothing is measured twice, nothing is tuned on test rows, and the page says what the files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import limaml
from benchmarks.evidence.ablations import variants_of
from benchmarks.evidence.bar import holm, lines, losses
from benchmarks.evidence.implicits import implicit_result, make_choices, rankings_of
from benchmarks.evidence.page import BEGIN, END, page, readme_table, with_table
from benchmarks.evidence.pictures import draw
from benchmarks.evidence.plan import MAIN, PROTOCOLS, Goal, Judging, Plan, Scale, goals_of, search, turn
from benchmarks.evidence.replays import replays_of
from benchmarks.evidence.results import read_results, result_of, write_result
from benchmarks.evidence.runner import run_plan
from benchmarks.evidence.sets import DataSet, Table, make_table, registered, sets_in
from benchmarks.evidence.svg import Mark, Series
from benchmarks.evidence.svg import lines as line_plot
from benchmarks.evidence.units import READINGS, Cache, Unit, trial_unit, unit_of, version_of
from benchmarks.evidence.write import in_order, write_results
from limaml.errors import ConfigError
from limaml.evaluate import bootstrap
from limaml.evaluate.tune import SPACE

ROOT = Path(__file__).parent.parent
SMALL = Scale(trials=3, seeds=2, ablation_seeds=1, ablation_sets=("made",), replay_seeds=1, replicates=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one set of its own, described beside it."""
    folder = tmp_path_factory.mktemp("data")
    made = limaml.make_interactions(tasks=12, items=12, seed=0)
    (folder / "made").mkdir()
    made.interactions.head(300).write_parquet(folder / "made/interactions.parquet")
    made.users.write_parquet(folder / "made/users.parquet")
    made.items.write_parquet(folder / "made/items.parquet")
    (folder / "made/set.yaml").write_text(
        "title: Made up\nlabel: click\ntime: timestamp\nclock: true\nmembers: [null, 6]\n"
    )
    return folder


@pytest.fixture(scope="module")
def table(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(sets_in(data)[0], data, None, tmp_path_factory.mktemp("tables"))


SKILL = {"base": 0.3, "wide_and_deep": 0.6, "limaml_gradient": 0.8, "limaml_newton": 1.2}


def answer(unit: Unit, cache: Cache) -> None:
    """In the place of a training: losses and predictions that depend on the unit, and on nothing else."""
    rng = np.random.default_rng(int(unit.key[:8], 16))
    result: dict[str, Any] = {"kind": unit.kind, "method": unit.method, "cpu_seconds": 1.0 + rng.random()}
    arrays: dict[str, Any] = {}
    if unit.epochs is None:
        result |= {"valid_loss": [0.9, 0.7 - 0.1 * SKILL[unit.method] + 0.05 * rng.random()], "epochs": 2}
    else:
        same = np.random.default_rng((unit.seed, unit.protocol == "warm"))  # the same rows for every method
        task = np.sort(same.integers(0, 40, 300))
        label = same.integers(0, 2, 300)
        support = task % 9
        logit = SKILL[unit.method] * (label - 0.5) + rng.normal(size=300)
        arrays = {"task": task, "support": support, "label": label, "logit": logit}
        arrays |= dict.fromkeys(unit.readings, logit)
        result |= {"epochs": unit.epochs}
    cache.write(unit.key, result, arrays)
    cache.add(unit.key, result)


def answered(goals: list[Judging], cache: Cache) -> list[Unit]:
    """Answer all units of a plan, in its order."""
    asked = []
    plan = Plan(goals)
    while unit := next(plan.open_units(cache), None):
        assert isinstance(unit, Unit)
        asked.append(unit)
        answer(unit, cache)
    return asked


@pytest.fixture(scope="module")
def measured(table: Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, list[Judging], list[Unit]]:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    goals = goals_of([table], SMALL, ["main", "ablations"])
    return cache, goals, answered(goals, cache)


@pytest.fixture(scope="module")
def result(table: Table, measured: tuple[Cache, list[Judging], list[Unit]]) -> dict[str, Any]:
    cache, goals, _ = measured
    made_on = {"machine": {"cpu": "a cpu", "cores": 2}, "versions": {"torch": "2", "limaml": "0"}}
    found: dict[str, Any] = json.loads(json.dumps({**result_of(table, goals, cache, SMALL), **made_on}))
    return found


def test_every_method_is_tried_as_often_and_tested_on_the_same_seeds(
    measured: tuple[Cache, list[Judging], list[Unit]],
) -> None:
    _, goals, asked = measured
    plain = [u for u in asked if u.method in MAIN]
    assert len({unit.key for unit in asked}) == len(asked)
    for method in MAIN:
        chosen = [g.chosen(measured[0]) for g in goals if g.method == method and g.variant is None]
        assert not isinstance(chosen[0], list)
        assert [dict(trial.settings) == {} for trial in chosen[0].trials] == [True, False, False]
        for trial in chosen[0].trials[1:]:
            assert set(trial.settings) == set(SPACE[method])
        first = [unit for unit in plain if unit.method == method]
        assert [unit.epochs is None for unit in first[: 2 * SMALL.trials]] == [True] * 2 * SMALL.trials
        assert {(u.protocol, u.seed) for u in first if u.epochs} >= {(p, s) for p in PROTOCOLS for s in range(2)}
    # breadth first: every method has its first seed before any has its second
    seeds = [unit.seed for unit in plain if unit.epochs is not None][: 4 * len(MAIN)]
    assert seeds == [0] * 2 * len(MAIN) + [1] * 2 * len(MAIN)


def test_a_run_cut_short_has_something_of_every_part(table: Table) -> None:
    goals: list[Goal] = [*rankings_of([table], SMALL), *replays_of([table], replace(SMALL, replay_seeds=5), ["replay"])]
    goals += goals_of([table], SMALL, ["main", "rivals", "ablations"])
    order = list(dict.fromkeys((goal.part, goal.first) for goal in sorted(goals, key=turn)))
    assert order[:2] == [("main", True), ("main", False)]
    assert order[2:6] == [(part, True) for part in ("rivals", "replay", "ablations", "implicit")]
    assert order[6:] == [(part, False) for part in ("rivals", "replay", "implicit")]


def test_validation_chooses_the_least_loss_and_its_epochs(
    table: Table, measured: tuple[Cache, list[Judging], list[Unit]]
) -> None:
    cache = measured[0]
    found = search(table, "limaml_newton", SMALL.trials, cache)
    assert not isinstance(found, list)
    assert found.loss == min(trial.loss for trial in found.trials if trial.loss is not None)
    units = [trial_unit(table, protocol, "limaml_newton", found.settings) for protocol in PROTOCOLS]
    losses = [min((cache.get(unit.key) or {})["valid_loss"]) for unit in units]
    assert found.loss == pytest.approx(np.mean(losses))
    assert found.epochs == {"warm": 2, "new_tasks": 2}


def test_a_failed_trial_is_passed_over(table: Table, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = search(table, "base", 2, cache)
    assert isinstance(first, list)
    for unit in first:
        cache.add(unit.key, {"error": "The loss is nan."})
    for unit in search(table, "base", 2, cache):  # type: ignore[union-attr]
        answer(unit, cache)
    found = search(table, "base", 2, cache)
    assert not isinstance(found, list)
    assert found.trials[0].error == "The loss is nan."
    assert found.settings == found.trials[1].settings


def test_a_key_is_of_what_the_result_depends_on(table: Table) -> None:
    unit = unit_of(table, "warm", "limaml_newton", 0, {"model.dim": 8}, 3)
    assert replace(unit, table="/elsewhere/table.parquet", dataset="renamed").key == unit.key
    same = unit_of(table, "warm", "limaml_newton", 0, {"model.dim": 8, "model.dropout": 0.0}, 3)
    assert same.key == unit.key  # what is set to its default is not set
    other = [
        replace(unit, rows="0"),
        replace(unit, protocol="new_tasks"),
        replace(unit, seed=1),
        replace(unit, epochs=4),
        replace(unit, readings=("int8",)),
        unit_of(table, "warm", "limaml_newton", 0, {"model.dim": 4}, 3),
        unit_of(table, "warm", "wide_and_deep", 0, {"model.dim": 8}, 3),
        unit_of(table.with_item_tasks(), "warm", "limaml_newton", 0, {"model.dim": 8}, 3),
    ]
    assert len({u.key for u in [unit, *other]}) == 1 + len(other)


def test_result_files_hold_what_the_bootstrap_says(
    result: Mapping[str, Any], measured: tuple[Cache, list[Judging], list[Unit]]
) -> None:
    cache, goals, _ = measured
    chosen = {g.method: g.chosen(cache) for g in goals if g.variant is None}
    units = [u for g in goals if g.variant is None for u in g.tests(chosen[g.method])]  # type: ignore[arg-type]
    draws = bootstrap([cache.predictions(u) for u in units if u.protocol == "warm"], replicates=SMALL.replicates)
    delta = draws.difference("limaml_newton", "wide_and_deep", "q1", "log_loss")
    found = result["protocols"]["warm"]["deltas"]["limaml_newton"]["wide_and_deep"]["q1"]["log_loss"]
    assert found[:3] == pytest.approx([delta.value, delta.low, delta.high], abs=1e-6)
    assert result["picked"] == "limaml_newton"
    assert {e["topic"] for e in result["ablations"]} >= {
        "inner steps",
        "stored as",
        "uncertainty",
        "tasks",
        "support age",
    }
    for entry in result["ablations"]:
        if entry["label"] in ("float16", "int8"):  # read from the same numbers here
            assert entry["protocols"]["warm"]["auc"]["delta"][:3] == [0, 0, 0]


def test_nothing_is_judged_again_where_nothing_has_changed(
    table: Table,
    result: dict[str, Any],
    measured: tuple[Cache, list[Judging], list[Unit]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, goals, _ = measured
    monkeypatch.setattr("benchmarks.evidence.results.judge", lambda *_: pytest.fail("It was judged again."))
    again = result_of(table, goals, cache, SMALL, before=result)
    assert again["protocols"] == result["protocols"]
    assert (
        again["ablations"] == result["ablations"]
    )  # also of variants that are the unchanged method, under their own names


def test_what_is_of_an_earlier_version_is_kept_and_named(
    table: Table, result: dict[str, Any], measured: tuple[Cache, list[Judging], list[Unit]], tmp_path: Path
) -> None:
    goals = measured[1]
    now = version_of("trial")
    assert result["measured_by"] == {"main": now, "ablations": now}
    assert "earlier version" not in page({"made": result})
    before = {**result, "measured_by": {"main": now - 1, "ablations": now}}
    kept = result_of(table, goals, Cache(tmp_path), SMALL, before)
    assert kept["protocols"] == result["protocols"]
    assert kept["ablations"] == result["ablations"]
    alone = goals_of([table], SMALL, ["main"]) + [g for g in goals if g.variant and g.variant.topic == "order"]
    assert result_of(table, alone, measured[0], SMALL, before)["ablations"] == [
        *(e for e in result["ablations"] if e["topic"] == "order"),
        *(e for e in result["ablations"] if e["topic"] != "order"),
    ]
    told = page({"made": kept})
    assert "Measured with an earlier version of the methods, and to be measured again: main (made)." in told


def test_what_was_measured_is_not_measured_again(data: Path, table: Table, tmp_path: Path) -> None:
    """Real trainings in worker processes: cut short, gone on with, and done again only where a result was lost."""
    goals = goals_of([table], replace(SMALL, trials=1, seeds=1), ["main"], ["base"])
    cache, told = Cache(tmp_path / "cache"), []
    assert not run_plan(Plan(goals), cache, workers=1, hours=0, tell=told.append)
    assert not told
    assert not run_plan(Plan(goals), cache, workers=1, tell=told.append)
    assert len(told) == 4  # two protocols, a search and a test each
    again = Cache(tmp_path / "cache")
    assert again.load() == 4
    goals = goals_of([table], replace(SMALL, trials=1, seeds=1), ["main"], ["base"])
    assert not list(Plan(goals).open_units(again))
    (path,) = write_results(
        [table], replace(SMALL, trials=1, seeds=1), tmp_path / "cache", tmp_path / "results", tmp_path, workers=1
    )
    content = json.loads(path.read_text())
    assert set(content["protocols"]["warm"]["methods"]) == {"base"}
    assert 0.3 < content["protocols"]["warm"]["methods"]["base"]["metrics"]["all"]["auc"][0] < 1
    assert (tmp_path / "made.html").exists()
    lost = next(unit for goal in goals for unit in goal.tests(goal.chosen(again)))  # type: ignore[arg-type]
    (tmp_path / f"cache/{lost.key}.json").unlink()
    after = Cache(tmp_path / "cache")
    after.load()
    fresh = goals_of([table], replace(SMALL, trials=1, seeds=1), ["main"], ["base"])
    assert [unit.key for unit in Plan(fresh).open_units(after)] == [lost.key]


def test_one_trained_model_is_read_in_other_ways(table: Table, tmp_path: Path) -> None:
    unit = unit_of(table, "warm", "limaml_newton", 0, {"model.dim": 4}, 1, READINGS)
    done = unit.run(tmp_path)
    assert done["epochs"] == 1
    assert "error" not in done
    logits = {name: Cache(tmp_path).predictions(unit, reading=name).logit for name in ("logit", *READINGS)}
    float16, int8 = (np.abs(logits[name] - logits["logit"]).max() for name in ("float16", "int8"))
    assert 0 < float16 < int8 < 0.1
    shrunk = logits["averaged"] / logits["logit"]
    assert ((shrunk > 0) & (shrunk < 1)).all()


def test_choices_are_ranked_and_shown(data: Path, table: Table, tmp_path: Path) -> None:
    choices = make_choices(table, data, None, tmp_path)
    assert 0 < choices.rows < table.rows
    assert choices.digest != table.digest
    scale = replace(SMALL, implicit_seeds=1)
    cache = Cache(tmp_path / "cache")
    plan = Plan(rankings_of([choices], scale, ["popularity", "base"]))
    while unit := next(plan.open_units(cache), None):
        cache.add(unit.key, unit.run(cache.folder))
    found = implicit_result(choices, cache, scale)
    assert found is not None
    for protocol in PROTOCOLS:
        methods = found["protocols"][protocol]["methods"]
        assert set(methods) == {"popularity", "base"}
        assert 0 < methods["popularity"]["metrics"]["ndcg_10"][0] < 1
    made_on = {"machine": {"cpu": "a cpu", "cores": 2}, "versions": {"torch": "2", "limaml": "0"}}
    result = {**result_of(table, [], cache, scale), **made_on, "implicit": found}
    assert f"{found['protocols']['warm']['methods']['base']['metrics']['mrr'][0]:.4f}" in page({"made": result})


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_the_step_down_correction(p_values: list[float | None]) -> None:
    found = holm(p_values)
    known = [p for p in p_values if p is not None]
    assert [p is None for p in found] == [p is None for p in p_values]
    for p, corrected in zip(p_values, found, strict=True):
        if p is not None:
            # by definition: the largest (m − k + 1) p_k over all p_k up to this one, k counted from 1 by size
            at_most = [q for q in sorted(known) if q <= p]
            assert corrected == pytest.approx(min(1, max((len(known) - k) * q for k, q in enumerate(at_most))))


def test_the_page_says_where_it_loses_first(result: dict[str, Any]) -> None:
    results = {"made": result}
    text = page(results, tuple(draw(results)))
    assert text.index("## Where LiMAML loses") < text.index("## What was demanded") < text.index("## Against")
    assert not losses(results)
    turned = json.loads(json.dumps(result))
    turned["picked"] = "limaml_gradient"
    for values in turned["protocols"]["warm"]["deltas"]["limaml_gradient"]["wide_and_deep"].values():
        values["auc"] = [-0.2, -0.3, -0.1, 0.001]
    lost = losses({"made": turned})
    assert [(d.protocol, d.other, d.metric) for d in lost] == [("warm", "wide_and_deep", "auc")]
    assert "| made | `warm` | `wide_and_deep` | AUC | −0.2000 [−0.3000, −0.1000] | p 0.001 |" in page({"made": turned})
    met = {line.demand: line.met for line in lines({"made": turned})}
    (never_worse,) = [met[d] for d in met if "never significantly worse" in d]
    assert never_worse is False


def test_numbers_of_the_page_are_those_of_the_file(result: dict[str, Any]) -> None:
    text = page({"made": result})
    for protocol in PROTOCOLS:
        for method in MAIN:
            value = result["protocols"][protocol]["methods"][method]["metrics"]["all"]["auc"][0]
            assert f"{value:.4f} / " in text
    delta = result["protocols"]["warm"]["deltas"]["limaml_newton"]["wide_and_deep"]["all"]["auc"]
    assert f"{delta[0]:+.4f} [{delta[1]:+.4f}, {delta[2]:+.4f}]".replace("-", "−") in readme_table({"made": result})
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", {"made": result}) == (
        f"a\n{BEGIN}\n{readme_table({'made': result})}\n{END}\nb"
    )


def test_pictures_are_svg(result: dict[str, Any]) -> None:
    drawn = draw({"made & co": result})
    assert set(drawn) == {"results-activity-warm.svg", "results-activity-new_tasks.svg"}
    other = line_plot(
        "a < b", [Series("s", [0, 1, 2], [Mark(-0.1 * k, -0.1 * k - 0.05, 0.0) for k in range(3)])], "x", "y"
    )
    for svg in [*drawn.values(), other]:
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_sets_are_found_by_name_and_by_their_own_description(data: Path, tmp_path: Path) -> None:
    assert [which.name for which in sets_in(data)] == ["made"]
    assert len(registered()) == 8
    with pytest.raises(ConfigError, match=r"no data set 'ml-100k' in .*There are \['made'\]"):
        sets_in(data, ["ml-100k"])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/set.yaml").write_text("title: odd\nlabell: click\n")
    with pytest.raises(ConfigError, match="does not describe the set 'odd': it needs title and label"):
        sets_in(tmp_path)


def test_ablations_are_those_that_a_set_can_have(table: Table) -> None:
    topics = {variant.topic for variant in variants_of(table)}
    untimed = replace(table, which=DataSet("x", "X", "click"))
    assert topics - {variant.topic for variant in variants_of(untimed)} == {"support age"}


def test_readme_and_page_are_what_the_result_files_give() -> None:
    results = in_order(read_results(ROOT / "benchmarks/results/evidence"))
    if not results:
        assert not (ROOT / "docs/results.md").exists()
        return
    drawn = draw(results)
    assert (ROOT / "docs/results.md").read_text("utf-8") == page(results, tuple(drawn))
    for name, svg in drawn.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == svg
    readme = (ROOT / "README.md").read_text("utf-8")
    assert BEGIN in readme
    assert with_table(readme, results) == readme


def test_result_files_are_read_as_they_were_written(result: dict[str, Any], tmp_path: Path) -> None:
    write_result(tmp_path, "made", result)
    assert read_results(tmp_path) == {"made": result}
