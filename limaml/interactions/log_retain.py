"""What a log keeps: rows that are young enough, and each task's last ones."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from limaml.errors import ConfigError, DataError
from limaml.interactions.columns import missing_column
from limaml.interactions.log_files import LogFiles
from limaml.interactions.log_manifest import File, Manifest

__all__ = ["Retained", "Retention", "TimeUnit", "cut"]

TimeUnit = Literal["s", "ms", "us", "ns"]
_PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_ROW = "\x1frow"


@dataclass(frozen=True)
class Retained:
    """What a retention did, or would do."""

    rows: int  # that were in the log
    removed: int


@dataclass(frozen=True)
class Retention:
    """The rule: see `InteractionLog.retain`."""

    time: str
    task_columns: Sequence[str]
    newer_than: dt.timedelta | None
    last: int | None
    now: dt.datetime | None
    unit: TimeUnit | None

    @property
    def columns(self) -> list[str]:
        """Columns that the rule reads."""
        return list(dict.fromkeys([self.time, *(self.task_columns if self.last is not None else ())]))

    def check(self, files: LogFiles, manifest: Manifest) -> None:
        """Refuse what cannot be meant, before anything is removed."""
        if self.newer_than is None and self.last is None:
            raise ConfigError(
                "Nothing says which interactions stay. Give an age (newer_than), a number for each task (last), or both."
            )
        if self.last is not None and self.last < 1:
            raise ConfigError(f"`last` is {self.last}; keep at least 1 interaction of each task, or forget the task.")
        if self.newer_than is not None and self.newer_than <= dt.timedelta(0):
            raise ConfigError(f"`newer_than` is {self.newer_than}; give an age above zero, such as 90 days.")
        schema = files.schema(manifest.files)
        if schema is None:
            return
        if self.time not in schema:
            raise DataError(missing_column(self.time, "the time of each interaction", list(schema)))
        kind = schema[self.time]
        if not (isinstance(kind, pl.Datetime) or kind == pl.Date or kind.is_integer()):
            raise DataError(
                f"Column '{self.time}' is {kind}, which is no time. Name a column of dates, times or integers."
            )
        if self.newer_than is not None and kind.is_integer() and self.unit is None:
            raise ConfigError(
                f"Column '{self.time}' is {kind}: say what it counts since 1970 (unit: s, ms, us or ns), or an age means nothing."
            )
        if not kind.is_integer() and self.unit is not None:
            raise ConfigError(f"Column '{self.time}' is {kind} and needs no unit. Leave `unit` out.")
        nulls, young, rows = 0, 0, 0
        for file in manifest.files:
            times = files.columns([file], [self.time])
            nulls, rows = nulls + times[self.time].null_count(), rows + times.height
            young += int(times.select(self._young(kind).sum()).item() or 0) if self.newer_than is not None else 1
        if nulls:
            raise DataError(
                f"Column '{self.time}' of the log in {files.folder} has no time in {nulls} row(s): it cannot be said how old these "
                "are. Name a column that has a time in every row."
            )
        if rows and not young:
            raise DataError(
                f"No interaction of the log in {files.folder} is newer than {self._border():%Y-%m-%d %H:%M} UTC: nothing would be "
                f"left, and nothing was removed. Check the age, and the unit of column '{self.time}'."
            )

    def _border(self) -> dt.datetime:
        now = self.now or dt.datetime.now(dt.UTC)
        return (now if now.tzinfo else now.replace(tzinfo=dt.UTC)) - (self.newer_than or dt.timedelta(0))

    def _young(self, kind: pl.DataType) -> pl.Expr:
        border = self._border()
        if kind.is_integer():
            passed = border - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
            at = (passed // dt.timedelta(microseconds=1)) * _PER_SECOND[self.unit or "s"] // 10**6
            return pl.col(self.time) > at
        if isinstance(kind, pl.Datetime) and kind.time_zone is not None:
            return pl.col(self.time) > border
        return pl.col(self.time).cast(pl.Datetime("us")) > border.replace(tzinfo=None)

    def mask(self, frame: pl.DataFrame) -> pl.Series:
        """Which rows `[rows]` of one bucket stay; `frame` holds all of them, in the log's order."""
        keep = pl.Series([True]).new_from_index(0, frame.height)
        if self.newer_than is not None:
            keep &= frame.select(self._young(frame.schema[self.time])).to_series()
        if self.last is not None:
            newest_first = frame.with_row_index(_ROW).sort(self.time, maintain_order=True).reverse()
            place = newest_first.select(_ROW, place=pl.int_range(pl.len()).over(self.task_columns)).sort(_ROW)["place"]
            keep &= place < self.last
        return keep


def cut(files: LogFiles, own: Sequence[File], keep: pl.Series, *, keep_one: bool) -> list[File]:
    """The files `own` without the rows that do not stay; `keep_one`: one stays though it is empty, for its columns."""
    result: list[File] = []
    start = 0
    for number, file in enumerate(own):
        mask = keep[start : start + file.rows]
        start += file.rows
        if mask.all():
            result.append(file)
        elif mask.any() or (keep_one and number == len(own) - 1 and not result):
            result.append(files.write(files.read(file).filter(mask), file.bucket, file.first, file.last))
    return result
