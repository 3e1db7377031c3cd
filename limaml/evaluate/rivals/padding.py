"""Rows of tasks laid out `[tasks, longest]`, for methods that give each task weights of its own (`torch.func.vmap`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from limaml.types import Rows

__all__ = ["alike", "padded"]


def padded(rows: Rows, tasks: int) -> tuple[Tensor, Tensor]:
    """Places in `rows` `[tasks, longest]` (0 where there is none), and which of them are there."""
    size = torch.bincount(rows.owner, minlength=tasks)
    begin = torch.cumsum(size, 0) - size
    at = torch.arange(max(1, int(size.max()) if tasks else 1))
    there = at < size[:, None]
    return torch.where(there, begin[:, None] + at, 0), there


def alike(size: Tensor, cells: int, each: int = 0) -> Iterator[Tensor]:
    """The tasks in chunks of about equal `size` `[tasks]` in rows, each of at most `cells` padded rows, or one task.

    A task takes `each` rows' room beside its rows. The smallest tasks come first.
    """
    order = torch.argsort(size, stable=True)
    sizes = (size[order] + each).tolist()
    start = 0
    for end in range(len(sizes)):
        if end > start and (end + 1 - start) * sizes[end] > cells:
            yield order[start:end]
            start = end
    if len(sizes):
        yield order[start:]
