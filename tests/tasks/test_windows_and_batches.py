"""Windows, supports and queries, and batches: every row where it belongs, and nowhere else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limaml.tasks import TaskBatch, TaskRows, cross_fit, flat_ranges, task_batches, time_cut

owners = st.integers(1, 6).flatmap(
    lambda tasks: st.tuples(st.just(tasks), st.lists(st.integers(0, tasks - 1), max_size=40))
)


def rows_of(index: list[int], task: int, among: list[bool] | None = None) -> list[int]:
    return [row for row, owner in enumerate(index) if owner == task and (among is None or among[row])]


@settings(max_examples=100)
@given(ranges=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_flat_ranges(ranges: list[tuple[int, int]]) -> None:
    start, length = (torch.tensor([r[i] for r in ranges], dtype=torch.int64) for i in (0, 1))
    elements, owner = flat_ranges(start, length)
    assert elements.tolist() == [s + i for s, n in ranges for i in range(n)]
    assert owner.tolist() == [i for i, (_, n) in enumerate(ranges) for _ in range(n)]


@settings(max_examples=100)
@given(owned=owners, data=st.data())
def test_windows_are_the_most_recent_rows_oldest_first(owned: tuple[int, list[int]], data: st.DataObject) -> None:
    tasks, index = owned
    among = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=len(index), max_size=len(index))))
    grouped = TaskRows.of(
        torch.tensor(index, dtype=torch.int64), tasks, None if among is None else torch.tensor(among, dtype=torch.bool)
    )
    expected = [rows_of(index, task, among) for task in range(tasks)]
    assert grouped.size.tolist() == [len(rows) for rows in expected]
    wanted = data.draw(st.permutations(range(tasks)))[: data.draw(st.integers(0, tasks))]
    cap = data.draw(st.one_of(st.none(), st.integers(1, 8)))
    found = grouped.of_tasks(torch.tensor(wanted, dtype=torch.int64), cap)
    assert found.owner.tolist() == sorted(found.owner.tolist())
    for place, task in enumerate(wanted):
        mine = found.rows[found.owner == place].tolist()
        assert mine == (expected[task] if cap is None else expected[task][-cap:])


def split_of(batch: TaskBatch, tasks: int) -> list[tuple[list[int], list[int]]]:
    return [
        (batch.support.rows[batch.support.owner == i].tolist(), batch.query.rows[batch.query.owner == i].tolist())
        for i in range(tasks)
    ]


@settings(max_examples=100)
@given(owned=owners, seed=st.integers(0, 1000), cap=st.one_of(st.none(), st.integers(1, 5)), data=st.data())
def test_cross_fit_judges_every_row_once_and_never_on_itself(
    owned: tuple[int, list[int]], seed: int, cap: int | None, data: st.DataObject
) -> None:
    tasks, index = owned
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index))), dtype=torch.bool)
    grouped = TaskRows.of(torch.tensor(index, dtype=torch.int64), tasks, among)
    coin = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < 0.5
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    sides = {side: cross_fit(grouped, order, coin, side, cap) for side in (True, False)}
    judged = torch.cat([sides[True].query.rows, sides[False].query.rows])
    assert sorted(judged.tolist()) == among.nonzero().flatten().tolist()  # each training row exactly once
    for side, batch in sides.items():
        assert torch.equal(batch.tasks, order)
        assert batch.support.owner.tolist() == sorted(batch.support.owner.tolist())
        assert batch.query.owner.tolist() == sorted(batch.query.owner.tolist())
        for place, (support, query) in enumerate(split_of(batch, tasks)):
            assert not set(support) & set(query)
            mine = rows_of(index, int(order[place]), among.tolist())
            assert query == [row for row in mine if bool(coin[row]) != side]
            heads = [row for row in mine if bool(coin[row]) == side]
            assert support == (heads if cap is None else heads[-cap:])  # capped: the most recent ones


@settings(max_examples=100)
@given(owned=owners, seed=st.integers(0, 1000), cap=st.one_of(st.none(), st.integers(1, 5)))
def test_time_cut_has_the_past_in_the_support(owned: tuple[int, list[int]], seed: int, cap: int | None) -> None:
    tasks, index = owned
    grouped = TaskRows.of(torch.tensor(index, dtype=torch.int64), tasks)
    batch = time_cut(grouped, torch.arange(tasks), torch.Generator().manual_seed(seed), cap)
    whole = time_cut(grouped, torch.arange(tasks), torch.Generator().manual_seed(seed))
    for task, ((capped, query), (support, _)) in enumerate(
        zip(split_of(batch, tasks), split_of(whole, tasks), strict=True)
    ):
        assert support + query == rows_of(index, task)
        assert capped == (support if cap is None else support[-cap:])


def test_time_cuts_are_spread_over_the_whole_history() -> None:
    """With 4 rows there are 5 moments, all as likely: none of them (no support, no query) is left out."""
    grouped = TaskRows.of(torch.zeros(4, dtype=torch.int64), 1)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(1000):
        counts[len(time_cut(grouped, torch.zeros(1, dtype=torch.int64), generator).support)] += 1
    assert float(((counts - 200) ** 2 / 200).sum()) < 18.5  # χ² of 4 degrees of freedom, p = 0.001


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 30), max_size=20),
    rows_per_batch=st.integers(1, 40),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_batches_partition_the_tasks(sizes: list[int], rows_per_batch: int, seed: int, data: st.DataObject) -> None:
    size = torch.tensor(sizes, dtype=torch.int64)
    tasks = torch.tensor([task for task in range(len(sizes)) if data.draw(st.booleans())], dtype=torch.int64)

    def drawn() -> list[Tensor]:
        return list(task_batches(tasks, size, rows_per_batch, torch.Generator().manual_seed(seed)))

    batches = drawn()
    assert sorted(task for batch in batches for task in batch.tolist()) == tasks.tolist()
    assert all(len(batch) for batch in batches)
    for batch in batches:  # a batch is cut as soon as it is full, so it overflows by less than its first task
        assert int(size[batch].sum()) - int(size[batch].max()) <= rows_per_batch
    again = drawn()
    assert len(again) == len(batches) and all(torch.equal(a, b) for a, b in zip(again, batches, strict=True))


def test_batches_are_shuffled() -> None:
    tasks, size = torch.arange(50), torch.ones(50, dtype=torch.int64)
    one, other = (
        torch.cat(list(task_batches(tasks, size, 10, torch.Generator().manual_seed(seed)))) for seed in (0, 1)
    )
    assert not torch.equal(one, other)
    assert not torch.equal(one, tasks)
