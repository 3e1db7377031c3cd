"""Windows of buckets: which buckets are in memory together, in which order, epoch after epoch.

A *window* is a few buckets of tasks that are trained on as if they were all there is: tasks are shuffled and batched inside of it.
Which buckets share a window, and the order of windows, is drawn anew in every epoch. Buckets hold tasks by a hash, so that
any of them are a random sample of the tasks; an epoch on a part of the tasks reads a part of the buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["BucketWindows", "Window"]

ROWS = 2_000_000  # of a window, where nobody says how many buckets it has


@dataclass(frozen=True)
class Window:
    """Buckets that are in memory together."""

    buckets: tuple[int, ...]  # ascending
    seed: int | None = None  # of what is drawn inside; None: what draws epochs draws on
    tasks: int | None = None  # most tasks of the first type that are trained on; None: all


@dataclass(frozen=True)
class BucketWindows:
    """Windows of `size` of `count` buckets."""

    count: int
    size: int

    @staticmethod
    def of(count: int, rows: int, size: int | None) -> BucketWindows:
        """Windows of `size` buckets; None: as many as hold about two million of the `rows` in all of them."""
        return BucketWindows(count, min(count, size or max(1, ROWS * count // max(rows, 1))))

    @property
    def single(self) -> bool:
        """Whether one window holds everything."""
        return self.size >= self.count

    def ascending(self, among: Sequence[int] | None = None) -> list[tuple[int, ...]]:
        """The buckets `among` all, or all, in order, cut into windows."""
        return _cut(sorted(range(self.count) if among is None else among), self.size)

    def sample(self, wanted: int | None, seed: int) -> tuple[int, ...]:
        """So many buckets, at most all of them, ascending; drawn from `seed` alone. None: all."""
        if wanted is None or wanted >= self.count:
            return tuple(range(self.count))
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return tuple(sorted(order[:wanted].tolist()))

    def epoch(self, generator: torch.Generator, tasks: int, most: int | None = None) -> list[Window]:
        """The windows of one epoch; of the `tasks` that there are, about `most` are in it.

        Where one window holds everything, it is that one and nothing is drawn.
        """
        if most is not None and most >= tasks:
            most = None
        if self.single:
            return [Window(tuple(range(self.count)), None, most)]
        taken = self._taken(tasks, most)
        order = torch.randperm(self.count, generator=generator).tolist()[:taken]
        cut = [tuple(sorted(some)) for some in _cut(order, self.size)]
        seeds = torch.randint(2**62, (len(cut),), generator=generator).tolist()
        limits = [None if most is None else math.ceil(most * len(some) / taken) for some in cut]
        return [Window(*entry) for entry in zip(cut, seeds, limits, strict=True)]

    def per_epoch(self, tasks: int, most: int | None = None) -> int:
        """How many windows `epoch` gives."""
        return 1 if self.single else math.ceil(self._taken(tasks, most) / self.size)

    def _taken(self, tasks: int, most: int | None) -> int:
        """Buckets of an epoch."""
        return self.count if most is None or most >= tasks else math.ceil(self.count * most / tasks)


def _cut(numbers: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]
