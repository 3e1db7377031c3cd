"""What the tests of the command line share: what a command left, and the files that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

SMALL = ["model.embedding_dim=4", "model.hidden=[8]", "model.dim=4", "model.factors=4", "train.rows_per_batch=512"]
"""Overrides that make training quick."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@dataclass(frozen=True)
class Tables:
    """Files of 60 members and 40 items: `past` and, later, `new` interactions; four members are in `new` alone."""

    folder: Path
    whole: pl.DataFrame
    options: tuple[str, ...]

    @property
    def past(self) -> Path:
        return self.folder / "past.parquet"

    @property
    def new(self) -> Path:
        return self.folder / "new.csv"
