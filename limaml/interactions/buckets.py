"""Interactions in buckets of which a few are in memory at a time: what training reads, be it a table or a log.

All rows of one task of the first type are in one bucket. A table in memory is one bucket; a log has as many as it was made
with, and each is joined with the side tables and cleaned when it is read, as a table is before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import polars as pl

from limaml.errors import ConfigError, DataError
from limaml.interactions.check import clean
from limaml.interactions.log import InteractionLog
from limaml.interactions.schema import Schema
from limaml.interactions.side_tables import SideTables

__all__ = ["Buckets", "LogBuckets", "OneBucket", "rows_needed"]


class Buckets(Protocol):
    """Rows that are read bucket by bucket. The rows of a bucket never change, nor does their order."""

    @property
    def count(self) -> int:
        """Number of buckets, at least 1."""
        ...

    @property
    def rows(self) -> int:
        """Number of rows in all of them; about, where reading would drop some."""
        ...

    def read(self, number: int) -> pl.DataFrame:
        """The rows of bucket `number`, joined and clean."""
        ...


@dataclass(frozen=True)
class OneBucket:
    """A table that is in memory."""

    frame: pl.DataFrame
    count: int = 1

    @property
    def rows(self) -> int:
        return self.frame.height

    def read(self, number: int) -> pl.DataFrame:
        return self.frame


@dataclass(frozen=True)
class LogBuckets:
    """The buckets of an interaction log, as it was at append `through`.

    Of the `side` tables only those columns are joined that the schema reads. Exact duplicates are dropped: equal rows are rows of
    one task, and so of one bucket.
    """

    log: InteractionLog
    schema: Schema
    through: int
    side: SideTables = field(default_factory=lambda: SideTables(None))

    def __post_init__(self) -> None:
        if self.log.task_columns != self.schema.tasks[0].columns:
            raise ConfigError(
                f"The log in {self.log.folder} is partitioned by {list(self.log.task_columns)}, but the first task is named by "
                f"{list(self.schema.tasks[0].columns)}: a task's rows would stand in several buckets. Name first the task that "
                "the log is partitioned by."
            )
        if not self.log.rows:
            raise DataError(f"The log in {self.log.folder} has no rows. Append interactions to it first.")

    @property
    def count(self) -> int:
        return self.log.bucket_count

    @property
    def rows(self) -> int:
        return self.log.rows

    def read(self, number: int) -> pl.DataFrame:
        frame = self.log.bucket(number, through=self.through)
        return clean(self.side.join(frame, wanted_columns(self.schema)), self.schema)[0]


def wanted_columns(schema: Schema) -> set[str]:
    """The columns that a schema reads."""
    named = {column for task in schema.tasks for column in task.columns} | {label.column for label in schema.labels}
    named |= {feature.column for feature in schema.features}
    return named | {name for name in (schema.time, schema.row, schema.weight, schema.offset) if name is not None}


def rows_needed(frame: pl.DataFrame, key: str, path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The rows of a side table that `frame` has keys of; its key and `columns` of it, or all."""
    names = [key] if key in frame.columns else key.split("+")
    types = pl.read_parquet_schema(path)
    table = pl.scan_parquet(path)
    if columns is not None:
        table = table.select([*names, *columns])
    if _same_types(frame, types, names):
        table = table.join(frame.lazy().select(names).unique(), on=names, how="semi", maintain_order="left")
    return table.collect()


def _same_types(frame: pl.DataFrame, types: Mapping[str, pl.DataType], names: Sequence[str]) -> bool:
    """Whether keys can be matched as they are; others are compared as text, by whoever joins them."""
    return all(name in frame.columns and name in types and frame.schema[name] == types[name] for name in names)
