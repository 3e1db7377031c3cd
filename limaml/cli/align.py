"""New rows in the types of the rows that are kept: a CSV file of today fits a log that began as Parquet."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from limaml.errors import DataError
from limaml.interactions.columns import canonical_text, missing_column, show

__all__ = ["aligned"]


def aligned(frame: pl.DataFrame, types: Mapping[str, pl.DataType], what: str) -> tuple[pl.DataFrame, list[str]]:
    """`frame` with the columns and types of `types`, no value changed; and the columns that are not in `types`.

    `what` names the frame in messages. Raises one `DataError` for all columns that are missing and all values that a
    type cannot hold, each with its row.
    """
    problems, columns = [], []
    for name, kind in types.items():
        if name not in frame.columns:
            problems.append(missing_column(name, f"a column of {what}", frame.columns))
            continue
        values = frame[name]
        found = _cast(values, kind)
        changed = values.is_not_null() & found.is_null()
        if values.dtype.is_float() and kind.is_integer():
            changed = values.is_not_null() & (found.cast(values.dtype) != values).fill_null(True) & ~values.is_nan()
        if changed.any():
            row = int(changed.arg_max() or 0)
            problems.append(
                f"Column '{name}' of {what} is {values.dtype} and holds {show(values[row])} in row {row}, which is no "
                f"{kind}, the type of the rows that are kept ({int(changed.sum())} such rows). Write it in that type."
            )
        columns.append(found.alias(name))
    if problems:
        raise DataError("\n".join(problems))
    return pl.DataFrame(columns), [name for name in frame.columns if name not in types]


def _cast(values: pl.Series, kind: pl.DataType) -> pl.Series:
    """`values` in the type `kind`, null where that cannot be."""
    if values.dtype == kind:
        return values
    if kind == pl.String:
        return canonical_text(values) if not values.dtype.is_nested() else pl.Series([None] * len(values), dtype=kind)
    try:
        if values.dtype == pl.String and kind == pl.Date:
            return values.str.to_date(strict=False)
        if values.dtype == pl.String and isinstance(kind, pl.Datetime):
            return values.str.to_datetime(time_unit=kind.time_unit, time_zone=kind.time_zone, strict=False)
        return values.cast(kind, strict=False)
    except pl.exceptions.PolarsError:
        return pl.Series([None] * len(values), dtype=kind)
