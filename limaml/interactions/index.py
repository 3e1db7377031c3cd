"""From a table to interactions that nothing has been fitted for: who, when, and with what outcome.

Rows are put in order of time (rows that tie keep the table's order), each task type's keys are numbered, labels and
weights become tensors. Splits are made on this; features come later, from an `Encoder` fitted on the training rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.errors import DataError
from limaml.interactions.columns import Codes, canonical_text, is_number, missing_column, show, without_nan
from limaml.interactions.keys import task_keys
from limaml.interactions.schema import Label, Operator, Schema
from limaml.types import ROW, Interactions

__all__ = ["index_interactions", "label_values", "shuffled", "sort_order", "time_values"]

_COMPARE: dict[Operator, Callable[[pl.Series, object], pl.Series]] = {
    ">=": lambda column, value: column >= value,
    ">": lambda column, value: column > value,
    "<=": lambda column, value: column <= value,
    "<": lambda column, value: column < value,
    "==": lambda column, value: column == value,
    "!=": lambda column, value: column != value,
}


def index_interactions(frame: pl.DataFrame, schema: Schema) -> Interactions:
    """Who, when and with what outcome, for every row of `frame`: no row is dropped, no feature is encoded.

    The sides of the result have no features; `index[ROW]` is all 0. `source_row` says where in `frame` a row stood.
    Entries of a task type are numbered in order of their first appearance in time. Labels that are null or NaN are
    NaN. Raises `DataError` where a column is missing or of the wrong type, or where a task key, a time, a weight or an
    offset is missing.
    """
    order, time, unit = sort_order(frame, schema)
    columns = {column for task in schema.tasks for column in task.columns} | {lab.column for lab in schema.labels}
    columns |= {column for column in (schema.weight, schema.offset) if column is not None}
    ordered = frame.select(column for column in frame.columns if column in columns)[order]
    ids: dict[str, list[str]] = {}
    index: dict[str, Tensor] = {}
    for task in schema.tasks:
        keys, codes = task_keys(ordered, task)
        ids[task.name] = keys
        index[task.name] = torch.from_numpy(codes)
    index[ROW] = torch.zeros(len(order), dtype=torch.int64)
    heads = [label_values(ordered, label).fill_null(float("nan")).to_numpy() for label in schema.labels]
    return Interactions(
        sides={side: {} for side in index},
        index=index,
        ids=ids,
        labels=torch.from_numpy(np.stack(heads, axis=1).astype(np.float32)),
        weights=_amounts(ordered, schema.weight, "the weight of each row", torch.ones(len(order))),
        time=torch.from_numpy(time),
        time_unit=unit,
        offset=None if schema.offset is None else _amounts(ordered, schema.offset, "the offset of each logit"),
        source_row=torch.from_numpy(order),
    )


def sort_order(frame: pl.DataFrame, schema: Schema) -> tuple[Codes, Codes, str]:
    """The rows of `frame` in order of time: positions `[rows]`, ascending times `[rows]` int64, the times' unit.

    Without a time column the order is `shuffled` by the schema's seed and the times are 0, 1, 2, ….
    """
    if schema.time is None:
        return shuffled(frame.height, schema.seed), np.arange(frame.height, dtype=np.int64), "order"
    if schema.time not in frame.columns:
        raise DataError(missing_column(schema.time, "the time", frame.columns))
    time, unit = time_values(frame[schema.time])
    order = np.argsort(time, kind="stable").astype(np.int64)
    return order, time[order], unit


def shuffled(rows: int, seed: int) -> Codes:
    """A permutation of `rows` positions that depends on nothing but `rows` and `seed`: not on platform or version."""
    with np.errstate(over="ignore"):
        x = np.arange(rows, dtype=np.uint64) + np.uint64(seed % 2**63) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):  # splitmix64's finaliser; once leaves traces of neighbouring seeds
            x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return np.argsort(x, kind="stable").astype(np.int64)


def time_values(column: pl.Series) -> tuple[Codes, str]:
    """A column of times as int64 `[rows]`, and their unit.

    Dates and datetimes become microseconds since 1970 in UTC (`"us"`; one without a zone is taken to be UTC). Integers,
    and floats without a fraction, are kept (`"integer"`). Anything else that can be ordered becomes its dense rank
    (`"order"`), which means nothing outside this table. Raises `DataError` where a time is missing.
    """
    times = without_nan(column)
    if times.null_count():
        row = int(times.is_null().arg_max() or 0)
        raise DataError(
            f"Column '{column.name}' has no time in {times.null_count()} row(s), the first is row {row} (rows count "
            "from 0). Remove these rows, or name another column as the time."
        )
    dtype = times.dtype
    if isinstance(dtype, pl.Datetime):
        if dtype.time_zone is not None:
            times = times.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return times.cast(pl.Datetime("us")).cast(pl.Int64).to_numpy().copy(), "us"
    if dtype == pl.Date:
        return times.cast(pl.Datetime("us")).cast(pl.Int64).to_numpy().copy(), "us"
    if dtype == pl.Duration:
        return times.cast(pl.Duration("us")).cast(pl.Int64).to_numpy().copy(), "order"
    if dtype.is_integer():
        try:
            return times.cast(pl.Int64).to_numpy().copy(), "integer"
        except pl.exceptions.PolarsError as error:
            raise DataError(f"Column '{column.name}' holds times that do not fit 64 bits.") from error
    if dtype.is_float():
        if bool((times.is_finite() & (times == times.floor()) & (times.abs() < 2**53)).all()):
            return times.cast(pl.Int64).to_numpy().copy(), "integer"
        return times.rank("dense").cast(pl.Int64).to_numpy().copy(), "order"
    if dtype == pl.String or dtype == pl.Time or dtype.is_decimal():
        return times.rank("dense").cast(pl.Int64).to_numpy().copy(), "order"
    raise DataError(f"Column '{column.name}' is of type {dtype} and cannot be ordered in time; use numbers or dates.")


def label_values(frame: pl.DataFrame, label: Label) -> pl.Series:
    """What `label` says of each row, as Float64 `[rows]`; null where the column holds nothing."""
    if label.column not in frame.columns:
        raise DataError(missing_column(label.column, f"label '{label.name}'", frame.columns))
    column = without_nan(frame[label.column])
    where = f"Label '{label.name}' reads column '{label.column}', which is of type {column.dtype}"
    if label.operator is None:
        if not is_number(column.dtype):
            raise DataError(
                f"{where}; a label is a number. Use a rule that says which values count as 1, such as "
                f"\"{label.column} == '{_example(column)}'\"."
            )
        return column.cast(pl.Float64)
    value = label.value
    if is_number(column.dtype):
        if isinstance(value, str):
            raise DataError(f"{where}, and cannot be compared with the text {show(value)}. Compare it with a number.")
        column, value = column.cast(pl.Float64), float(value if value is not None else 0)
    elif isinstance(column.dtype, pl.String | pl.Categorical | pl.Enum):
        if label.operator not in ("==", "!="):
            raise DataError(f"{where}; text has no '{label.operator}'. Use == or !=, or make the column numbers first.")
        column = column.cast(pl.String)
        if isinstance(value, bool):  # True may have been written as "True" or "true"
            column = column.str.to_lowercase()
        value = _as_text(value)
    else:
        raise DataError(f"{where}; a rule compares numbers, Booleans or text.")
    return _COMPARE[label.operator](column, value).cast(pl.Float64)


def _as_text(value: float | str | bool | None) -> str:
    return value if isinstance(value, str) else str(canonical_text(pl.Series([value]))[0])


def _example(column: pl.Series) -> object:
    return next(iter(column.drop_nulls().head(1).to_list()), "yes")


def _amounts(frame: pl.DataFrame, name: str | None, role: str, default: Tensor | None = None) -> Tensor:
    """A column of finite numbers as float32 `[rows]`; weights may not be negative."""
    if name is None:
        assert default is not None
        return default
    if name not in frame.columns:
        raise DataError(missing_column(name, role, frame.columns))
    if not is_number(frame[name].dtype):
        raise DataError(f"Column '{name}' is wanted as {role} and is of type {frame[name].dtype}; it must be numbers.")
    values: NDArray[np.float64] = frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    if not np.isfinite(values).all() or (default is not None and (values < 0).any()):
        least = "finite and not negative" if default is not None else "finite"
        bad = values[~np.isfinite(values) | ((values < 0) & (default is not None))][0]
        raise DataError(f"Column '{name}' is wanted as {role} and holds {bad}; every value must be {least}.")
    return torch.from_numpy(values.astype(np.float32))
