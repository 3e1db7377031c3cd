"""Splits: the support strictly precedes what it is judged on, ties included, and a leak does not go unnoticed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limaml.errors import ConfigError, DataError, LeakError
from limaml.tasks import (
    Split,
    TaskRows,
    check_no_leak,
    split_by_new_tasks,
    split_by_task_order,
    split_by_time,
)
from limaml.types import Interactions, Rows


def interactions(index: list[int], time: list[int], tasks: int | None = None) -> Interactions:
    tasks = max(index, default=-1) + 1 if tasks is None else tasks
    return Interactions(
        sides={},
        index={"user": torch.tensor(index, dtype=torch.int64)},
        ids={"user": [f"u{i}" for i in range(tasks)]},
        labels=torch.zeros(len(index), 1),
        weights=torch.ones(len(index)),
        time=torch.tensor(time, dtype=torch.int64),
        time_unit="integer",
    )


@st.composite
def tables(draw: st.DrawFn, least_tasks: int = 1) -> Interactions:
    tasks = draw(st.integers(least_tasks, 5))
    index = draw(st.lists(st.integers(0, tasks - 1), max_size=30))
    index = [*range(least_tasks), *index]
    latest = draw(st.sampled_from([2, 8, 1000]))  # many ties, some, hardly any
    time = sorted(draw(st.lists(st.integers(0, latest), min_size=len(index), max_size=len(index))))
    return interactions(index, time, tasks)


shares = st.sampled_from([0.01, 0.2, 0.25, 0.5, 0.75, 0.99])


def check_sides(data: Interactions, split: Split) -> None:
    """What holds for every split: parts do not meet, and within a task no support row is as late as a test row."""
    assert not (split.support & split.test).any()
    assert not (split.train & ~split.support).any()  # train ⊆ support
    index, tasks = data.index[split.task], data.count(split.task)
    every = torch.arange(tasks)
    check_no_leak(
        data,
        split.task,
        TaskRows.of(index, tasks, split.support).of_tasks(every),
        TaskRows.of(index, tasks, split.test).of_tasks(every),
        every,
    )
    for task in range(tasks):
        before, behind = data.time[split.support & (index == task)], data.time[split.test & (index == task)]
        if len(before) and len(behind):
            assert int(before.max()) < int(behind.min())


@settings(max_examples=100)
@given(data=tables(), share=shares, drop=st.booleans())
def test_task_order_takes_the_last_share_of_each_task(data: Interactions, share: float, drop: bool) -> None:
    among = torch.arange(len(data)) % 3 != 0 if drop else torch.ones(len(data), dtype=torch.bool)
    split = split_by_task_order(data, "user", share=share, among=among if drop else None)
    check_sides(data, split)
    assert torch.equal(split.train | split.test, among)  # nothing is lost
    assert torch.equal(split.train, split.support)
    tied = 0
    for task in range(data.count("user")):
        mine = (among & (data.index["user"] == task)).nonzero().flatten()
        wanted = math.floor(len(mine) * share + 0.5)
        cut = int(data.time[mine[len(mine) - wanted]]) if wanted else None
        expected = [row for row in mine.tolist() if cut is not None and int(data.time[row]) >= cut]
        assert split.test[mine].nonzero().flatten().tolist() == [mine.tolist().index(row) for row in expected]
        tied += len(expected) - wanted
    assert split.tied == tied


def test_ties_go_to_the_querys_side_and_are_counted() -> None:
    data = interactions([0] * 10, [0, 1, 2, 3, 4, 7, 7, 7, 7, 7])
    split = split_by_task_order(data, "user", share=0.2)
    assert split.test.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert split.tied == 3
    same = split_by_task_order(interactions([0] * 4, [5] * 4), "user", share=0.25)
    assert same.test.all() and not same.support.any() and same.tied == 3


def test_tiny_tasks() -> None:
    """A task of one or two rows has no last 20 %: it is training; a task of three gives one row."""
    data = interactions([0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5], tasks=4)
    split = split_by_task_order(data, "user")
    assert split.test.tolist() == [False] * 5 + [True]
    empty = split_by_task_order(interactions([], [], tasks=2), "user")
    assert not len(empty.test) and empty.tied == 0


@settings(max_examples=100)
@given(data=tables(least_tasks=2), share=shares, behind=shares, seed=st.integers(0, 100))
def test_new_tasks_are_never_trained_on(data: Interactions, share: float, behind: float, seed: int) -> None:
    split = split_by_new_tasks(data, "user", seed=seed, share=share, behind=behind)
    check_sides(data, split)
    assert (split.support | split.test).all()
    held = torch.zeros(data.count("user"), dtype=torch.bool)
    held[data.index["user"][~split.train]] = True
    assert torch.equal(split.train, ~held[data.index["user"]])  # a task is trained on whole, or not at all
    present = len(set(data.index["user"].tolist()))
    assert int(held.sum()) == min(max(1, round(share * present)), present - 1)
    again = split_by_new_tasks(data, "user", seed=seed, share=share, behind=behind)
    assert torch.equal(again.train, split.train) and torch.equal(again.test, split.test)


def test_another_seed_holds_out_other_tasks() -> None:
    data = interactions(list(range(40)) * 2, list(range(80)))
    masks = {tuple(split_by_new_tasks(data, "user", seed=seed).train.tolist()) for seed in range(5)}
    assert len(masks) == 5
    with pytest.raises(DataError, match="at least 2 of type 'user'"):
        split_by_new_tasks(interactions([0, 0], [0, 1]), "user", seed=0)


@settings(max_examples=50)
@given(data=tables(), cut=st.integers(-1, 10), length=st.one_of(st.none(), st.integers(1, 5)))
def test_time_split(data: Interactions, cut: int, length: int | None) -> None:
    split = split_by_time(data, "user", cut=cut, until=None if length is None else cut + length)
    check_sides(data, split)
    assert torch.equal(split.train, data.time < cut)
    end = torch.iinfo(torch.int64).max if length is None else cut + length
    assert torch.equal(split.test, (data.time >= cut) & (data.time < end))


def test_splits_of_splits_stay_inside() -> None:
    """Validation is cut out of the training rows of the outer split."""
    data = interactions([0] * 20 + [1] * 20, list(range(40)))
    outer = split_by_task_order(data, "user")
    inner = split_by_task_order(data, "user", share=0.15, among=outer.train)
    check_sides(data, inner)
    assert torch.equal(inner.train | inner.test, outer.train)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_shares_outside_0_and_1_are_refused(share: float) -> None:
    data = interactions([0, 0, 1, 1], [0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"share must lie between 0 and 1"):
        split_by_task_order(data, "user", share=share)
    with pytest.raises(ConfigError, match=r"share must lie between 0 and 1"):
        split_by_new_tasks(data, "user", seed=0, share=share)
    with pytest.raises(ConfigError, match=r"behind must lie between 0 and 1"):
        split_by_new_tasks(data, "user", seed=0, behind=share)
    with pytest.raises(ConfigError, match="not after its cut"):
        split_by_time(data, "user", cut=3, until=3)


# ---- the leak check -----------------------------------------------------------------------------------------------------


def test_a_split_whose_parts_meet_is_refused() -> None:
    one = torch.tensor([True, False])
    with pytest.raises(LeakError, match="'mine' of task 'user'"):
        Split("mine", "user", one, one, one)


def rows(pairs: list[tuple[int, int]]) -> Rows:
    return Rows(*(torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1)))


def test_a_leak_is_named() -> None:
    data = interactions([0, 1, 1, 0, 1], [10, 20, 30, 40, 50], tasks=2)
    tasks = torch.tensor([1, 0])  # owner 0 is u1
    check_no_leak(data, "user", rows([(1, 0), (0, 1)]), rows([(2, 0), (4, 0), (3, 1)]), tasks)
    with pytest.raises(LeakError, match=r"user:u1 reaches time 50.*row of time 30 \(row 2\); 1 query rows"):
        check_no_leak(data, "user", rows([(1, 0), (4, 0), (0, 1)]), rows([(2, 0), (3, 1)]), tasks)


def test_a_tie_is_a_leak() -> None:
    data = replace(interactions([0, 0], [5, 5]))
    with pytest.raises(LeakError, match="user:u0 reaches time 5"):
        check_no_leak(data, "user", rows([(0, 0)]), rows([(1, 0)]), torch.tensor([0]))
    check_no_leak(data, "user", Rows.empty(), rows([(1, 0)]), torch.tensor([0]))
    check_no_leak(data, "user", rows([(0, 0)]), Rows.empty(), torch.tensor([0]))


@settings(max_examples=100)
@given(data=tables(), seed=st.integers(0, 1000))
def test_the_check_finds_exactly_the_leaks(data: Interactions, seed: int) -> None:
    """Random supports and queries; the truth is found by looking at every pair of rows."""
    generator = torch.Generator().manual_seed(seed)
    part: Tensor = torch.randint(0, 3, (len(data),), generator=generator)
    index, tasks = data.index["user"], torch.arange(data.count("user"))
    support, query = (TaskRows.of(index, len(tasks), part == side).of_tasks(tasks) for side in (0, 1))
    leaks = any(
        int(index[s]) == int(index[q]) and int(data.time[s]) >= int(data.time[q])
        for s in support.rows.tolist()
        for q in query.rows.tolist()
    )
    if leaks:
        with pytest.raises(LeakError, match="do not strictly follow"):
            check_no_leak(data, "user", support, query, tasks)
    else:
        check_no_leak(data, "user", support, query, tasks)
