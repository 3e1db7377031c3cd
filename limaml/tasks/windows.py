"""Which rows belong to which task, in time order: the one index that supports, queries and batches are cut from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limaml.types import Rows

__all__ = ["TaskRows", "flat_ranges"]


def flat_ranges(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges `start[i] … start[i] + length[i]`: their elements, and the `i` each came from."""
    owner = torch.repeat_interleave(torch.arange(len(length)), length)
    before = torch.cumsum(length, 0) - length
    return torch.arange(len(owner)) - before[owner] + start[owner], owner


@dataclass(frozen=True)
class TaskRows:
    """The rows of each task, oldest first.

    Task `t` owns `rows[offset[t]:offset[t + 1]]`; rows are positions in `Interactions`, which is sorted by time.
    """

    rows: Tensor  # [rows] int64
    offset: Tensor  # [tasks + 1] int64

    @staticmethod
    def of(index: Tensor, tasks: int, among: Tensor | None = None) -> TaskRows:
        """Group rows by their task `index` `[rows]`, only those where `among` `[rows]` bool is true if given."""
        rows = torch.arange(len(index)) if among is None else among.nonzero().flatten()
        owner = index[rows]
        order = torch.sort(owner, stable=True).indices
        size = torch.bincount(owner, minlength=tasks)
        return TaskRows(rows[order], torch.cat([size.new_zeros(1), torch.cumsum(size, 0)]))

    @property
    def size(self) -> Tensor:
        """Number of rows of each task, `[tasks]`."""
        return self.offset[1:] - self.offset[:-1]

    def of_tasks(self, tasks: Tensor, most_recent: int | None = None) -> Rows:
        """All rows of the given tasks, or the `most_recent` ones of each. `owner` counts within `tasks`."""
        size = self.size[tasks]
        kept = size if most_recent is None else size.clamp(max=most_recent)
        position, owner = flat_ranges(self.offset[tasks] + size - kept, kept)
        return Rows(self.rows[position], owner)
