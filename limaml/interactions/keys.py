"""Task keys: the one text by which training, the store and a request name the same task.

A key of one column is that column's value as canonical text. A compound key joins its parts with `|`; a `|` or a
backslash inside a part is escaped by a backslash, so that keys can be taken apart again and two tasks never share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.columns import Codes, canonical_text, factorise, missing_column

if TYPE_CHECKING:  # the schema brings torch, which those who only name tasks (the log) do without
    from limaml.interactions.schema import Task

__all__ = ["join_key", "split_key", "task_keys"]


def join_key(parts: Sequence[str]) -> str:
    """The key of a task whose key columns hold `parts`."""
    if len(parts) == 1:
        return parts[0]
    return "|".join(part.replace("\\", "\\\\").replace("|", "\\|") for part in parts)


def split_key(key: str, width: int = 1) -> tuple[str, ...]:
    """The `width` parts that `join_key` made `key` of."""
    if width == 1:
        return (key,)
    parts: list[str] = [""]
    characters = iter(key)
    for character in characters:
        if character == "|":
            parts.append("")
        else:
            parts[-1] += next(characters, "") if character == "\\" else character
    if len(parts) != width:
        raise DataError(f"The task key {key!r} has {len(parts)} part(s), but its task is named by {width} columns.")
    return tuple(parts)


def task_keys(frame: pl.DataFrame, task: Task) -> tuple[list[str], Codes]:
    """The distinct keys of `task` in order of first appearance, and for each row `[rows]` which of them it has.

    Raises `DataError` where a key column is missing, holds no value, or holds something that cannot name a task.
    """
    problems = [
        missing_column(column, f"part of the key of task '{task.name}'", frame.columns)
        for column in task.columns
        if column not in frame.columns
    ]
    if problems:
        raise DataError("\n".join(problems))
    keys = frame.select(task.columns)
    for column, dtype in keys.schema.items():
        if dtype.is_nested() or dtype == pl.Binary:
            raise DataError(f"Column '{column}' is of type {dtype} and cannot name a task; use numbers or text.")
    codes, first = factorise(keys)
    parts = [canonical_text(keys[column].gather(first)) for column in task.columns]
    for column, part in zip(task.columns, parts, strict=True):
        if part.null_count():
            row = int(first[part.is_null().arg_max() or 0])
            raise DataError(
                f"Column '{column}' names no '{task.name}' in row {row} (rows count from 0). Remove the rows without "
                "a task key, or give them one."
            )
    texts = parts[0].to_list() if len(parts) == 1 else [join_key(row) for row in zip(*parts, strict=True)]
    # -0.0 and 0.0, say, are two values with one text
    again, distinct = factorise(pl.Series(texts, dtype=pl.String))
    return [texts[i] for i in distinct], again[codes] if len(codes) else np.zeros(0, np.int64)
