"""The ids that a reader of the log asks for, in the types that the log has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from limaml.errors import DataError

__all__ = ["wanted_ids"]


def wanted_ids(
    task_ids: Sequence[object], columns: Sequence[str], known: pl.Schema | None, folder: Path
) -> pl.DataFrame:
    """The asked ids as a frame with the task `columns`, each of the type that the log in `folder` has (`known`).

    Raises `DataError` for an id that has not one value per column, or is no integer where the log has integers.
    """
    rows = [tuple(i) if isinstance(i, tuple | list) else (i,) for i in task_ids]
    for position, row in enumerate(rows):
        if len(row) != len(columns):
            raise DataError(
                f"Task id {position}, {task_ids[position]!r}, has {len(row)} values, but a task of this log is "
                f"named by {len(columns)}: {list(columns)}. Give one value per column."
            )
    series = []
    for place, column in enumerate(columns):
        values = [row[place] for row in rows]
        if known is None or known[column] == pl.String:
            series.append(pl.Series(column, [None if v is None else str(v) for v in values], pl.String))
            continue
        numbers = []
        for position, value in enumerate(values):
            try:
                if isinstance(value, float | bool):
                    raise ValueError
                numbers.append(int(str(value)))
            except ValueError:
                raise DataError(
                    f"Task id {position}, {value!r}, is not an integer, but column '{column}' of the log in "
                    f"{folder} is {known[column]}. Give integers."
                ) from None
        # an id beyond the column's range becomes null: it cannot be in the log
        wide = pl.Series(column, [n if n.bit_length() < 120 else None for n in numbers], pl.Int128)
        series.append(wide.cast(known[column], strict=False))
    return pl.DataFrame(series).drop_nulls().unique(maintain_order=True)
