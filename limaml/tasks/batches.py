"""Batches of tasks for the outer loop: which rows are support and which are query, as flat indices.

`cross_fit` (the default) deals a task's training rows into two parts that are each other's support and query, so that
every row is a query once and no row is ever in its own support (one coin per row and epoch). `time_cut` takes a random moment of each task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limaml.tasks.windows import TaskRows
from limaml.types import Rows

__all__ = ["TaskBatch", "cross_fit", "task_batches", "time_cut"]


@dataclass(frozen=True)
class TaskBatch:
    """Tasks with their support and query rows."""

    tasks: Tensor  # [tasks] int64, positions in the table of the task type
    support: Rows
    query: Rows

    def of(self, chosen: Tensor) -> TaskBatch:
        """The part of the batch that belongs to the `chosen` tasks, `[tasks]` bool."""
        place = torch.cumsum(chosen, 0) - 1

        def only(rows: Rows) -> Rows:
            kept = chosen[rows.owner]
            return Rows(rows.rows[kept], place[rows.owner[kept]])

        return TaskBatch(self.tasks[chosen], only(self.support), only(self.query))

    def judging(self, rows: Tensor | None) -> TaskBatch:
        """The same tasks on the same support, with those query rows alone that are among `rows` `[rows]` bool; None: all."""
        if rows is None:
            return self
        kept = rows[self.query.rows]
        return TaskBatch(self.tasks, self.support, Rows(self.query.rows[kept], self.query.owner[kept]))


def cross_fit(grouped: TaskRows, tasks: Tensor, coin: Tensor, side: bool, max_support: int | None = None) -> TaskBatch:
    """Each task's rows that fell on `side` of the `coin` `[rows]` bool are its support, the others its query."""
    all_rows = grouped.of_tasks(tasks)
    chosen = coin[all_rows.rows] == side
    support = Rows(all_rows.rows[chosen], all_rows.owner[chosen])
    query = Rows(all_rows.rows[~chosen], all_rows.owner[~chosen])
    return TaskBatch(tasks, _capped(support, len(tasks), max_support), query)


def time_cut(
    grouped: TaskRows,
    tasks: Tensor,
    generator: torch.Generator,
    max_support: int | None = None,
    *,
    earliest: float = 0.0,
) -> TaskBatch:
    """A random moment per task, behind this share of its rows: what is older is support, the rest is query."""
    all_rows = grouped.of_tasks(tasks)
    size = grouped.size[tasks]
    share = earliest + (1 - earliest) * torch.rand(len(tasks), generator=generator)
    older = torch.floor(share * (size + 1)).long().clamp(max=size)
    rank = torch.arange(len(all_rows)) - (torch.cumsum(size, 0) - size)[all_rows.owner]
    before = rank < older[all_rows.owner]
    support = Rows(all_rows.rows[before], all_rows.owner[before])
    return TaskBatch(
        tasks, _capped(support, len(tasks), max_support), Rows(all_rows.rows[~before], all_rows.owner[~before])
    )


def _capped(rows: Rows, tasks: int, most_recent: int | None) -> Rows:
    """The most recent rows of each owner. Rows of one owner are oldest first, as `TaskRows` gives them."""
    if most_recent is None or not len(rows):
        return rows
    size = torch.bincount(rows.owner, minlength=tasks)
    behind = torch.cumsum(size, 0)[rows.owner] - torch.arange(len(rows))  # 1 for the newest row of each owner
    kept = behind <= most_recent
    return Rows(rows.rows[kept], rows.owner[kept])


def task_batches(tasks: Tensor, size: Tensor, rows_per_batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffle `tasks` and cut them into batches of about `rows_per_batch` rows, by each task's `size` in rows.

    Batches are bounded by rows, not by tasks: a heavy task makes its batch shorter, not slower.
    """
    order = tasks[torch.randperm(len(tasks), generator=generator)]
    batch = torch.div(torch.cumsum(size[order], 0) - 1, rows_per_batch, rounding_mode="floor")
    yield from torch.split(order, torch.unique_consecutive(batch, return_counts=True)[1].tolist())
