"""Times that mean something only beside all others, as of text or of a shuffle: worked out once, for the whole log.

What reads the log bucket by bucket finds them here, one file a bucket, in the order of its rows. Dates and integers need
none of this: each says by itself when it was.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl

from limaml.errors import StoreError
from limaml.interactions import InteractionLog, Schema
from limaml.interactions.atomic_files import written
from limaml.interactions.index import shuffled, time_values

__all__ = ["TIME", "is_clock", "with_times", "write_times"]

TIME = "\x1ftime"
"""The column that stands in for the time; no column of a source that a person wrote is called so."""

_UNIT = "unit"


def is_clock(schema: Schema, columns: pl.Schema) -> bool:
    """Whether each time says by itself when it was."""
    kind = None if schema.time is None else columns.get(schema.time)
    return kind is not None and (kind.is_integer() or kind == pl.Date or isinstance(kind, pl.Datetime))


def write_times(folder: Path, log: InteractionLog, schema: Schema, through: int) -> str:
    """Write the time of each row of the log; returns their unit. Holds one column of the whole log, for a moment."""
    unit = folder / _UNIT
    if unit.exists():
        return unit.read_text(encoding="utf-8")
    heights, columns = [], []
    for _, frame in log.buckets(through=through):
        heights.append(frame.height)
        if schema.time is not None and frame.height:
            columns.append(frame[schema.time])
    if schema.time is None:
        times, name = np.empty(sum(heights), np.int64), "order"
        times[shuffled(len(times), schema.seed)] = np.arange(len(times))
    else:
        times, name = time_values(pl.concat(columns)) if columns else (np.zeros(0, np.int64), "order")
    start = 0
    for bucket, height in enumerate(heights):
        path = folder / f"{bucket:05d}.npy"
        with written(path):
            np.save(path, times[start : start + height])
        start += height
    beside = folder / f".{_UNIT}.{os.getpid()}"
    with written(unit):
        beside.write_text(name, encoding="utf-8")
        beside.replace(unit)
    return name


def with_times(frame: pl.DataFrame, folder: Path, bucket: int) -> pl.DataFrame:
    """The rows of a bucket with their times in the column `TIME`."""
    path = folder / f"{bucket:05d}.npy"
    try:
        times = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(
            f"The times of bucket {bucket} in {path} cannot be read ({error}). Remove {folder.parent} and begin again."
        ) from error
    if len(times) != frame.height:
        raise StoreError(
            f"{path} has the times of {len(times)} rows, but bucket {bucket} has {frame.height}: the log was changed "
            f"meanwhile. Remove {folder.parent} and begin again."
        )
    return frame.with_columns(pl.Series(TIME, times))
