"""Raw columns as what the rest of the folder computes on: codes of distinct values, canonical text, the nearest name.

Work on a long column is done on its distinct values and gathered back, which is why `factorise` is the only function
here that looks at every row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

__all__ = [
    "canonical_text",
    "factorise",
    "is_list",
    "is_number",
    "joined_text",
    "missing_column",
    "nearest",
    "places_in",
    "show",
    "without_nan",
]

Codes = NDArray[np.int64]

_SHORT = 512
_ROOM = 8  # places for each row
_WIDE = (pl.UInt64, pl.UInt128, pl.Int128)
_NAN = object()  # NaN is not equal to itself, and would be a new value each time


def factorise(table: pl.Series | pl.DataFrame) -> tuple[Codes, Codes]:
    """Number the distinct values (of a table: the distinct rows) in order of their first appearance.

    Returns `codes` `[n]`, the number of each row's value, and `first` `[distinct]`, the row where each value first
    stands. Nulls are one value, NaNs are another; lists are compared element by element.
    """
    if isinstance(table, pl.Series) and len(table) <= _SHORT and not table.dtype.is_nested():
        return _factorise_short(table)
    frame = table.to_frame("value") if isinstance(table, pl.Series) else table
    if not frame.width or not frame.height:
        return np.zeros(frame.height, np.int64), np.arange(min(frame.height, 1), dtype=np.int64)
    other = any(not dtype.is_integer() or dtype in _WIDE for dtype in frame.dtypes) or any(frame.null_count().row(0))
    return _grouped(frame) if other else _factorise_integers(frame)


def _grouped(frame: pl.DataFrame) -> tuple[Codes, Codes]:
    """The same for values of any type."""
    names = [f"c{i}" for i in range(frame.width)]
    groups = (
        frame.rename(dict(zip(frame.columns, names, strict=True)))
        .with_row_index("row")
        .group_by(names, maintain_order=True)
        .agg(pl.col("row"))["row"]
    )
    rows = groups.explode().to_numpy().astype(np.int64)
    lengths = groups.list.len().to_numpy().astype(np.int64)
    codes = np.empty(frame.height, np.int64)
    codes[rows] = np.repeat(np.arange(len(lengths)), lengths)
    return codes, rows[np.cumsum(lengths) - lengths]


def _factorise_integers(frame: pl.DataFrame) -> tuple[Codes, Codes]:
    """The same for integers: where they lie close together they are places in an array, which is a few times as fast.
    Columns are taken in one after the other, each of them splitting the values so far."""
    codes, first = np.zeros(frame.height, np.int64), np.zeros(1, np.int64)
    for column in frame.iter_columns():
        values = column.to_numpy().astype(np.int64)
        least, most = int(values.min()), int(values.max())
        room = (most - least + 1) * len(first)
        if room >= 2**62:
            return _grouped(frame)
        places = codes * (most - least + 1) + (values - least)
        if room > _ROOM * frame.height:
            codes, first = _grouped(pl.DataFrame({"place": places}))
            continue
        found = np.full(room, frame.height)
        found[places[::-1]] = np.arange(frame.height - 1, -1, -1)  # the last assignment stays: the first row of each
        first = np.sort(found[found < frame.height])
        found[places[first]] = np.arange(len(first))
        codes = found[places]
    return codes, first


def _factorise_short(values: pl.Series) -> tuple[Codes, Codes]:
    """The same for a request's worth of values, where a query plan takes longer than the work."""
    known: dict[object, int] = {}
    codes, first = np.empty(len(values), np.int64), list[int]()
    for row, value in enumerate(values.to_list()):
        codes[row] = known.setdefault(_NAN if value != value else value, len(known))
        if codes[row] == len(first):
            first.append(row)
    return codes, np.array(first, dtype=np.int64)


def places_in(ascending: Codes, values: Codes) -> Codes:
    """The place of each of `values` in `ascending`, or of one beside which it would stand. They are searched in order:
    each is then found near the last one, and not in memory that no cache holds."""
    order = np.argsort(values)
    places = np.empty(len(values), np.int64)
    places[order] = np.searchsorted(ascending, values[order])
    return np.minimum(places, len(ascending) - 1)


def canonical_text(values: pl.Series) -> pl.Series:
    """Each value as the one text that stands for it wherever it is read: `42`, `42.0` and `"42"` are all `42`.

    Floats without a fraction are written as integers, because a null turns a column of integers into floats on its way
    through pandas; NaN becomes null. Times are ISO 8601.
    """
    dtype = values.dtype
    if dtype == pl.String:
        return values
    if dtype.is_float():
        finite = without_nan(values)
        whole = finite.is_finite() & (finite == finite.floor()) & (finite.abs() < 2**53)
        exact = pl.Series([None if value is None else repr(value) for value in finite.to_list()], dtype=pl.String)
        as_integer = finite.cast(pl.Int64, strict=False).cast(pl.String)
        return pl.select(pl.when(whole).then(as_integer).otherwise(exact)).to_series().alias(values.name)
    if dtype.is_temporal():
        return pl.Series(
            values.name,
            [None if v is None else v.isoformat() if hasattr(v, "isoformat") else str(v) for v in values.to_list()],
            dtype=pl.String,
        )
    return values.cast(pl.String)


def joined_text(texts: pl.Series) -> str:
    """All texts one behind the other, without any nulls."""
    return str(texts.str.join("").item()) if len(texts) else ""


def without_nan(values: pl.Series) -> pl.Series:
    """The column with NaN, which polars tells from null, made null: both mean that there is no value."""
    return values.fill_nan(None) if values.dtype.is_float() else values


def is_list(dtype: pl.DataType) -> bool:
    """Whether a value of this type is a list (of any or of one fixed length)."""
    return isinstance(dtype, pl.List | pl.Array)


def is_number(dtype: pl.DataType) -> bool:
    """Whether a value of this type can be put on a scale (a Boolean counts as 0 or 1)."""
    return dtype.is_numeric() or dtype == pl.Boolean


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a slip of."""
    options = list(known)
    folded = {option.casefold(): option for option in reversed(options)}
    matches = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def missing_column(name: str, role: str, columns: Sequence[str]) -> str:
    """The sentence for a column that the table lacks; `role` says what it was wanted for."""
    guess = nearest(name, columns)
    hint = f"Did you mean '{guess}'?" if guess else f"The columns are {', '.join(columns) or '(none)'}."
    return f"There is no column '{name}', which is wanted as {role}. {hint}"


def show(value: object, limit: int = 60) -> str:
    """A value as it is quoted in a message: its `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
