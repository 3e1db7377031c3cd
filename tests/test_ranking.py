"""Ranking all candidates: the metrics against other definitions of them, and what methods are asked to rank."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from limaml import load_config, make_interactions
from limaml.config import ImplicitConfig
from limaml.errors import DataError
from limaml.evaluate.bootstrap import ALL, task_weights
from limaml.evaluate.compare import compare
from limaml.evaluate.ranking import RANKING_METRICS, Ranked, rank_tasks
from limaml.evaluate.ranking_problem import ranking_problem
from limaml.evaluate.ranking_summary import rank_bootstrap, summarise_ranked
from limaml.interactions.implicit import CHOSEN, prepare_implicit
from limaml.tasks import Split, split_by_new_tasks, split_by_task_order
from limaml.types import Interactions

HALF = st.integers(-3, 3).map(lambda value: value / 2)  # few values: ties are common


@st.composite
def lists(draw: st.DrawFn, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = draw(st.integers(1, most))
    scores = np.array(draw(st.lists(HALF, min_size=size, max_size=size)))
    kinds = np.array(draw(st.lists(st.sampled_from("nnpm"), min_size=size, max_size=size)))
    return scores, kinds == "p", kinds == "m"


def one(scores: np.ndarray, chosen: np.ndarray, masked: np.ndarray, cutoffs: tuple[int, ...]) -> dict[str, float]:
    found = rank_tasks(scores[None], chosen[None], masked[None], cutoffs)
    return {name: float(values[0]) for name, values in found.items()}


@given(lists(7), st.integers(1, 8))
@settings(max_examples=60)
def test_metrics_are_means_over_all_orders_of_ties(case: tuple[np.ndarray, ...], k: int) -> None:
    scores, chosen, masked = case
    found = one(scores, chosen, masked, (k,))
    kept = np.flatnonzero(~masked)
    positives = set(np.flatnonzero(chosen & ~masked))
    if not positives:
        assert all(np.isnan(value) for value in found.values())
        return
    sums = np.zeros(3)
    orders = 0
    for order in itertools.permutations(kept):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        orders += 1
        ranks = [rank for rank, item in enumerate(order, start=1) if item in positives]
        ideal = sum(1 / np.log2(r + 1) for r in range(1, min(k, len(ranks)) + 1))
        sums += (
            sum(1 / np.log2(r + 1) for r in ranks if r <= k) / ideal,
            sum(r <= k for r in ranks) / len(ranks),
            1 / ranks[0],
        )
    np.testing.assert_allclose([found[f"ndcg_{k}"], found[f"recall_{k}"], found["mrr"]], sums / orders, atol=1e-12)


@given(lists(60), st.integers(1, 70))
@settings(max_examples=100)
def test_ndcg_is_that_of_scikit_learn(case: tuple[np.ndarray, ...], k: int) -> None:
    scores, chosen, masked = case
    kept = ~masked
    if kept.sum() < 2 or not chosen[kept].any():
        return
    expected = ndcg_score(chosen[kept][None].astype(float), scores[kept][None], k=k)
    assert one(scores, chosen, masked, (k,))[f"ndcg_{k}"] == pytest.approx(expected, abs=1e-12)


def test_each_task_is_ranked_for_itself_and_scores_must_be_numbers() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    chosen = np.array([[True, False, False], [True, False, False]])
    none = np.zeros((2, 3), bool)
    np.testing.assert_allclose(rank_tasks(scores, chosen, none)["mrr"], [1.0, 1 / 3])
    masked = np.array([[False] * 3, [False, False, True]])  # what was chosen before takes no place in the list
    np.testing.assert_allclose(rank_tasks(scores, chosen, masked)["mrr"], [1.0, 1 / 2])
    scores[1, 2] = np.nan
    assert rank_tasks(scores, chosen, masked)["mrr"][1] == 1 / 2  # nobody looks at a masked score
    with pytest.raises(DataError, match="the first that of candidate 2 for task 1"):
        rank_tasks(scores, chosen, none)


def ranked(method: str, seed: int, tasks: np.ndarray, shift: float) -> Ranked:
    generator = np.random.default_rng((seed, len(method)))
    values = {name: np.clip(generator.random(len(tasks)) + shift, 0, 1) for name in RANKING_METRICS}
    values["mrr"][:3] = np.nan
    support = np.arange(len(tasks)) + 1
    return Ranked("set", "warm", seed, method, tasks, support, np.ones(len(tasks), np.int64), values)


def test_replicates_are_means_over_drawn_members() -> None:
    tasks = [np.arange(0, 20), np.arange(5, 30)]
    items = [ranked(m, s, tasks[s], 0.2 * (m == "better")) for s in (0, 1) for m in ("base", "better")]
    draws = rank_bootstrap(items, replicates=70, seed=3)
    weights = task_weights(30, range(70), 3)
    for item in items:
        for replicate in (0, 63, 64, 69):
            for metric in ("ndcg_10", "mrr"):
                weight = weights[replicate, item.task]
                known = ~np.isnan(item.values[metric])
                expected = weight[known] @ item.values[metric][known] / weight[known].sum()
                place = draws.methods.index(item.method), 0, RANKING_METRICS.index(metric), 1 + replicate
                assert draws.values[item.seed][place] == pytest.approx(expected)
        quarter = item.support <= len(item.task) / 4
        assert draws.of_seed(item.seed, item.method, "q1", "ndcg_10") == pytest.approx(
            item.values["ndcg_10"][quarter].mean()
        )
    summary = summarise_ranked(items, replicates=70)
    delta = summary.delta("set", "warm", "better", "base", ALL, "recall_10")
    assert delta is not None
    assert delta.verdict == "better"
    worse = ranked("worse", 0, tasks[0], 0.0)
    with pytest.raises(DataError, match="disagree on 'positives'"):
        summarise_ranked([items[0], Ranked(*list(vars(worse).values())[:6], worse.positives + 1, worse.values)])


# ---- what is asked ------------------------------------------------------------------------------------------------------


def clicks(tasks: int = 40, items: int = 30) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    made = make_interactions(tasks=tasks, items=items, seed=1)
    return made.interactions, made.users, made.items


def divide(protocol: str, share: float = 0.3) -> Callable[[Interactions], Split]:
    def split(data: Interactions) -> Split:
        if protocol == "warm":
            return split_by_task_order(data, "user_id", share=share)
        return split_by_new_tasks(data, "user_id", seed=0, share=share)

    return split


@pytest.mark.parametrize("protocol", ["warm", "new_tasks"])
@pytest.mark.parametrize("time", ["timestamp", None])
def test_questions_are_all_candidates_without_answers(protocol: str, time: str | None) -> None:
    interactions, users, items = clicks()
    prepared = prepare_implicit(
        interactions, task=["user_id"], row="item_id", time=time, label="click", task_features=users, row_features=items
    )
    assert prepared.frame[CHOSEN].unique().to_list() == [1]
    assert not prepared.frame.select("user_id", "item_id").is_duplicated().any()
    settings = ImplicitConfig(negatives=2)
    problem, _, asked = ranking_problem(prepared.frame, prepared.schema, divide(protocol), settings, 0)
    data, split = problem.data, problem.split
    tests = split.test.nonzero().flatten()
    members, candidates = asked.chosen.shape
    assert len(tests) == members * candidates
    assert torch.equal(tests, torch.arange(len(data) - len(tests), len(data)))  # behind all others, in order
    assert data.labels[tests].isnan().all()
    assert int(data.time[tests].min()) > int(data.time[: tests[0]].max())
    assert torch.equal(data.index["user_id"][tests], asked.tasks.repeat_interleave(candidates))
    assert not (asked.chosen & asked.masked).any()
    assert (asked.chosen.sum(1) > 0).all()
    assert torch.equal(asked.masked.sum(1), asked.support)
    # features of a candidate are those its item had in the interactions
    features = data.index["row"]
    assert torch.equal(features[tests], features[asked.items].repeat(members))
    learned = split.support.nonzero().flatten()
    assert {0.0, 1.0} == set(data.labels[learned, 0].tolist())
    assert data.offset is not None
    assert (data.offset[tests] == 0).all()
    if protocol == "new_tasks":
        new = set(asked.tasks.tolist())
        assert not new & set(data.index["user_id"][split.train].tolist())
    # the answers are the later positives: none of them is learned from as one, and each is a true one
    real = set(prepared.frame.select("user_id", "item_id").iter_rows())
    row_of_item = {int(features[p]): i for i, p in enumerate(asked.items)}
    positives = learned[data.labels[learned, 0] == 1]
    pairs = {(int(data.index["user_id"][p]), row_of_item[int(features[p])]) for p in positives}
    where = {int(t): i for i, t in enumerate(asked.tasks)}
    for task, item in pairs:
        if task in where:
            assert asked.masked[where[task], item]
            assert not asked.chosen[where[task], item]
    assert len(pairs) + int(asked.chosen.sum()) <= len(real)


def test_a_negative_is_no_choice_of_its_member_until_then() -> None:
    interactions, users, items = clicks()
    prepared = prepare_implicit(
        interactions, task=["user_id"], row="item_id", time="timestamp", label="click", row_features=items
    )
    assert users.height
    for seed in (0, 1):
        problem, _, asked = ranking_problem(
            prepared.frame, prepared.schema, divide("warm"), ImplicitConfig(negatives=3, sampling="popularity"), seed
        )
        data = problem.data
        features, owner, label = data.index["row"], data.index["user_id"], data.labels[:, 0]
        train = problem.split.train.nonzero().flatten().tolist()
        first: dict[int, int] = {}
        chosen: dict[tuple[int, int], int] = {}
        for row in train:
            if label[row] == 1:
                first.setdefault(int(features[row]), int(data.time[row]))
                chosen.setdefault((int(owner[row]), int(features[row])), int(data.time[row]))
        negatives = [row for row in train if label[row] == 0]
        assert len(negatives) > 50
        for row in negatives:
            assert first[int(features[row])] <= int(data.time[row])
            assert chosen.get((int(owner[row]), int(features[row])), 2**62) > int(data.time[row])
        assert "Candidates" in " ".join(asked.notes)


@pytest.mark.parametrize("time", ["timestamp", None])
def test_the_first_choice_of_an_item_weighs_nothing(time: str | None) -> None:
    """An item is known from then on: that this one is a positive is no news. Where nothing has a time, nothing is first."""
    interactions, _, items = clicks()
    prepared = prepare_implicit(
        interactions, task=["user_id"], row="item_id", time=time, label="click", row_features=items
    )
    problem, _, asked = ranking_problem(prepared.frame, prepared.schema, divide("warm"), ImplicitConfig(negatives=2), 0)
    data = problem.data
    features, label, train = data.index["row"], data.labels[:, 0], problem.split.train.nonzero().flatten()
    if time is None:
        assert (data.weights[train] == 1).all()
        return
    first: dict[int, int] = {}
    for row in train.tolist():
        if label[row] == 1:
            first[int(features[row])] = min(first.get(int(features[row]), 2**62), int(data.time[row]))
    news = [label[row] == 1 and first[int(features[row])] == int(data.time[row]) for row in train.tolist()]
    assert torch.equal(data.weights[train] == 0, torch.tensor(news))
    assert sum(news) >= len(first)
    assert "weigh nothing" in " ".join(asked.notes)


def test_more_members_than_may_be_scored_are_sampled_and_counted() -> None:
    interactions, _, items = clicks()
    prepared = prepare_implicit(interactions, task=["user_id"], row="item_id", label="click", row_features=items)
    settings = ImplicitConfig(negatives=1, scores=200)
    problem, _, asked = ranking_problem(prepared.frame, prepared.schema, divide("warm"), settings, 0)
    members, candidates = asked.chosen.shape
    assert members == 200 // candidates
    assert int(problem.split.test.sum()) == members * candidates
    assert any(f"A sample of {members} of the" in note for note in asked.notes)


def test_columns_of_an_occasion_are_left_out_and_a_task_of_one_is_refused() -> None:
    interactions, _, items = clicks()
    hours = np.random.default_rng(0).integers(0, 24, interactions.height)
    frame = interactions.with_columns(pl.Series("device", np.where(hours < 12, "phone", "tv")))
    prepared = prepare_implicit(
        frame, task=["user_id"], row="item_id", time="timestamp", label="click", row_features=items
    )
    assert "device" not in [feature.name for feature in prepared.schema.features]
    assert any("['device'] differ within one 'item_id'" in note for note in prepared.notes)
    two = prepare_implicit(
        frame, task=["user_id", "device"], row="item_id", time="timestamp", label="click", row_features=items
    )
    with pytest.raises(DataError, match="the task 'device' differs within one 'item_id'"):
        ranking_problem(two.frame, two.schema, divide("warm"), ImplicitConfig(negatives=1), 0)
    with pytest.raises(DataError, match="give it as the row"):
        prepare_implicit(frame, task=["user_id"], row=None)
    with pytest.raises(DataError, match="no positives by the rule 'click > 1'"):
        prepare_implicit(frame, task=["user_id"], row="item_id", label="click > 1")


def test_every_kind_of_model_is_compared_by_ranking(tmp_path: Path) -> None:
    interactions, users, items = clicks(25, 20)
    prepared = prepare_implicit(
        interactions, task=["user_id"], row="item_id", time="timestamp", label="click", task_features=users,
        row_features=items,
    )  # fmt: skip
    table = tmp_path / "table.parquet"
    prepared.frame.write_parquet(table)
    config = load_config(
        None,
        [
            *("compare.methods=[base,wide_and_deep,limaml_newton]", "compare.seeds=1", "compare.implicit.negatives=2"),
            *("train.epochs=1", "model.dim=4", "model.hidden=[8]", "compare.replicates=20", "compare.protocols=[warm]"),
        ],
    )
    compared = compare(table, prepared.schema, config, dataset="clicks", workers=1)
    assert compared.predictions == ()
    summary = summarise_ranked(compared.ranked, replicates=20)
    assert {run.method for run in summary.runs} == {"base", "wide_and_deep", "limaml_newton"}
    assert all(0 <= run.recall_10 <= run.recall_20 <= 1 for run in summary.runs if run.bucket == ALL)  # type: ignore[attr-defined]
    assert any("Candidates: the" in note for note in compared.notes)
    json.dumps(summary.as_json(), allow_nan=False)
