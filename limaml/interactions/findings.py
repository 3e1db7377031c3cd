"""What a check found, as data: one sentence with the column, the row and the remedy, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

__all__ = ["Finding", "Found", "any_of", "first_row"]


@dataclass(frozen=True)
class Finding:
    """One thing found: which column (if it is about one), the first row that shows it (if rows do), and what to do."""

    text: str
    column: str | None = None
    row: int | None = None
    count: int = 1  # rows, or tasks, that show it

    def __str__(self) -> str:
        return self.text


Found = tuple[list[Finding], list[Finding]]
"""Problems and remarks."""


def any_of(masks: Iterable[pl.Series], height: int) -> pl.Series:
    """Rows `[height]` that are true in any mask."""
    total = pl.repeat(False, height, eager=True)
    for mask in masks:
        total = total | mask
    return total


def first_row(mask: pl.Series) -> int:
    """The first row that is true; 0 where none is."""
    return int(mask.arg_max() or 0)
