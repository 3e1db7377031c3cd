"""What a row may look back on, against loops over rows; and that no label leaks into it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rival_data import small_config, small_data, small_problem

from limaml.evaluate.rivals.history_methods import block_with_history
from limaml.evaluate.rivals.lookback import Lookback
from limaml.meta.losses import Losses
from limaml.tasks import Split, split_by_task_order
from limaml.types import Interactions


def histories(past: Lookback, rows: torch.Tensor) -> list[list[int]]:
    flat, owner = past.flat(rows)
    found: list[list[int]] = [[] for _ in rows]
    for row, at in zip(flat.tolist(), owner.tolist(), strict=True):
        found[at].append(row)
    padded, there = past.padded(rows)
    for i, mine in enumerate(found):  # the same rows in both layouts
        assert padded[i][there[i]].flip(0).tolist() == mine
    return found


def older(data: Interactions, mask: torch.Tensor, row: int, most: int, *, all_of_them: bool = False) -> list[int]:
    member = data.index["user"]
    mine = [
        other
        for other in range(len(data))
        if bool(mask[other]) and member[other] == member[row] and (all_of_them or data.time[other] < data.time[row])
    ]
    return mine[-most:]


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), most=st.integers(1, 12), rows=st.integers(2, 60))
def test_histories_are_those_of_a_loop(seed: int, most: int, rows: int) -> None:
    data = small_data(seed, rows)
    split = split_by_task_order(data, "user", share=0.3)
    every = torch.arange(rows)
    found = histories(Lookback(data, "user", split, most), every)
    for row in range(rows):
        assert found[row] == older(data, split.support, row, most, all_of_them=bool(split.test[row]))


@pytest.mark.parametrize("own_side", [False, True])
def test_a_coin_deals_histories_too(own_side: bool) -> None:
    data = small_data(3)
    split = split_by_task_order(data, "user", share=0.3)
    past = Lookback(data, "user", split, 7)
    coin = torch.rand(len(data), generator=torch.Generator().manual_seed(1)) < 0.5
    past.cross(coin, own_side=own_side)
    found = histories(past, torch.arange(len(data)))
    for row in split.train.nonzero().flatten().tolist():
        side = coin == (coin[row] if own_side else ~coin[row])
        assert found[row] == older(data, split.train & side, row, 7, all_of_them=not own_side)
    for row in split.test.nonzero().flatten().tolist():
        assert found[row] == older(data, split.support, row, 7, all_of_them=True)


def test_rows_without_an_order_look_across_a_coin_that_falls_anew() -> None:
    data = small_data(2, unit="order")
    past = Lookback(data, "user", split_by_task_order(data, "user"), 7)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(2):
        past.redraw(generator)
        seen.append(histories(past, torch.arange(len(data))))
    assert seen[0] != seen[1]
    ordered = Lookback(small_data(2), "user", split_by_task_order(data, "user"), 7)
    before = histories(ordered, torch.arange(len(data)))
    ordered.redraw(generator)
    assert histories(ordered, torch.arange(len(data))) == before


def test_members_without_support_have_no_history() -> None:
    data = small_data(1)
    member = int(data.index["user"][0])
    test = data.index["user"] == member
    split = Split("new_tasks", "user", ~test, ~test, test)
    assert histories(Lookback(data, "user", split, 5), test.nonzero().flatten()) == [[] for _ in range(int(test.sum()))]


@pytest.mark.parametrize("reading", ["mean", "attention"])
def test_no_own_or_later_label_is_read(reading: str) -> None:
    """A row's history vector does not change with its own label, with one that ties with it, or with a later one."""
    problem = small_problem()
    config = small_config()
    losses = Losses(problem.losses)
    torch.manual_seed(0)
    block, _ = block_with_history(problem, config, reading, losses, {})  # type: ignore[arg-type]
    block.eval()
    data = problem.data
    rows = problem.split.support.nonzero().flatten()
    before = block.reads[0](rows)
    row = int(rows[data.index["user"][rows] == data.index["user"].mode().values][0])  # the first of a long history
    data.labels[row] = 1 - torch.nan_to_num(data.labels[row])
    after = block.reads[0](rows)
    changed = rows[(before != after).any(1)]
    mine = data.index["user"][changed] == data.index["user"][row]
    assert bool(mine.all()) and bool((data.time[changed] > data.time[row]).all())
    assert len(changed)  # later rows do read it
