"""Which rows each row may look back on: its task's most recent rows before it, by the same rules for every method.

A history is a range of a list of rows in which each task's rows lie together, oldest first; so it is two numbers for each
row, and nothing is copied.

| row                            | its history                                                        |
|--------------------------------|--------------------------------------------------------------------|
| to be judged                   | the support rows of its task                                       |
| of a support                   | those support rows of its task that are strictly older than it     |
| of training, `past`            | those training rows of its task that are strictly older than it    |
| of training, `cross_fit`       | training rows of its task on the other side of a coin              |

Rows that tie in time are not in each other's history. No row's own label is in its history, nor, except by `cross_fit`, that
of any later row. Rows whose order means nothing (`time_unit` "order") take `cross_fit`, as the personalised model does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limaml.tasks import Split, TaskRows, flat_ranges
from limaml.types import Interactions

__all__ = ["Lookback", "strictly_older"]


def strictly_older(grouped: TaskRows, time: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """For each of `grouped.rows`: where the range of its task's `most` last strictly older rows starts, and its length."""
    owner = torch.repeat_interleave(torch.arange(len(grouped.size)), grouped.size)
    at = time[grouped.rows]
    place = torch.arange(len(at))
    new = torch.ones(len(at), dtype=torch.bool)
    new[1:] = (at[1:] != at[:-1]) | (owner[1:] != owner[:-1])
    end = torch.cummax(torch.where(new, place, 0), 0).values if len(at) else place  # the first of those that tie
    start = torch.maximum(grouped.offset[owner], end - most)
    return start, end - start


class Lookback:
    """The histories of all rows of `data` in one task type, of `most` rows at most.

    `rows` is the list that histories are ranges of; `start` and `length` are `[rows of data]`. A row that is neither of
    `split` nor a support row has none.
    """

    def __init__(self, data: Interactions, task: str, split: Split, most: int, *, crossed: bool = False) -> None:
        self.data, self.task, self.split, self.most = data, task, split, most
        self.crossed = crossed or data.time_unit == "order"
        index, entries = data.index[task], data.count(task)
        support = TaskRows.of(index, entries, split.support)
        self.train = TaskRows.of(index, entries, split.train)
        self.rows = torch.cat([self.train.rows, support.rows])
        self.start, self.length = (torch.zeros(len(data), dtype=torch.int64) for _ in range(2))
        behind = len(self.train.rows)
        self._put(support.rows, *strictly_older(support, data.time, most), behind)
        test = split.test.nonzero().flatten()
        self._put(test, *self._newest(support, test), behind)
        self._put(self.train.rows, *strictly_older(self.train, data.time, most), 0)

    def _put(self, rows: Tensor, start: Tensor, length: Tensor, behind: int) -> None:
        self.start[rows], self.length[rows] = start + behind, length

    def _newest(self, grouped: TaskRows, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The newest of a task's rows in `grouped`, for each of `rows`."""
        owner = self.data.index[self.task][rows]
        length = grouped.size[owner].clamp(max=self.most)
        return grouped.offset[owner] + grouped.size[owner] - length, length

    def redraw(self, generator: torch.Generator) -> None:
        """Throw the coins anew, where training rows look back across a coin."""
        if self.crossed:
            self.cross(torch.rand(len(self.data), generator=generator) < 0.5)

    def cross(self, coin: Tensor, *, own_side: bool = False) -> None:
        """Training rows look back on the rows of their task on the other side of the `coin` `[rows of data]` bool, or
        with `own_side` on those on their own side that are strictly older."""
        index, entries = self.data.index[self.task], self.data.count(self.task)
        sides = [TaskRows.of(index, entries, self.split.train & (coin == side)) for side in (True, False)]
        self.rows[: len(self.train.rows)] = torch.cat([side.rows for side in sides])
        behind = [0, len(sides[0].rows)]
        for i, side in enumerate(sides):
            if own_side:
                self._put(side.rows, *strictly_older(side, self.data.time, self.most), behind[i])
            else:
                other = 1 - i
                self._put(side.rows, *self._newest(sides[other], side.rows), behind[other])

    def flat(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All rows of the histories of the rows `[n]`, oldest first, and which of the `n` each belongs to."""
        place, owner = flat_ranges(self.start[rows], self.length[rows])
        return self.rows[place], owner

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same `[n, longest]`, the newest first, and which of them are there `[n, longest]`."""
        start, length = self.start[rows], self.length[rows]
        age = torch.arange(max(1, int(length.max()) if len(rows) else 1))
        there = age < length[:, None]
        place = torch.where(there, (start + length - 1)[:, None] - age, 0)
        if not len(self.rows):
            return place, there
        return self.rows[place], there
