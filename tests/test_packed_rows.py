"""Rows as bytes: every type comes back, and bytes are equal exactly where rows are."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import DataError
from limaml.interactions.columns import factorise
from limaml.interactions.packed_rows import RowCodec


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


LISTS = st.lists(st.none() | st.integers(-5, 5), max_size=3)
KINDS: dict[str, tuple[pl.DataType, st.SearchStrategy[Any]]] = {
    "i8": (pl.Int8(), st.integers(-128, 127)),
    "u64": (pl.UInt64(), st.integers(0, 2**64 - 1)),
    "i64": (pl.Int64(), st.integers(-(2**63), 2**63 - 1)),
    "f32": (pl.Float32(), st.floats(width=32)),
    "f64": (pl.Float64(), st.floats()),
    "bool": (pl.Boolean(), st.booleans()),
    "date": (pl.Date(), st.dates()),
    "ms": (pl.Datetime("ms", "Europe/Paris"), st.datetimes(dt.datetime(1800, 1, 1), dt.datetime(2200, 1, 1))),
    "us": (pl.Datetime("us"), st.datetimes()),
    "duration": (pl.Duration("us"), st.timedeltas(dt.timedelta(-9999), dt.timedelta(9999))),
    "text": (pl.String(), st.text(max_size=4)),
    "bytes": (pl.Binary(), st.binary(max_size=4)),
    "ints": (pl.List(pl.Int64), LISTS),
    "floats": (pl.List(pl.Float32), st.lists(st.floats(width=32), max_size=3)),
    "vector": (pl.Array(pl.Float64, 2), st.lists(st.floats(), min_size=2, max_size=2)),
    "days": (pl.List(pl.Date), st.lists(st.dates(), max_size=2)),
    "texts": (pl.List(pl.String), st.lists(st.none() | st.text(max_size=3), max_size=3)),
    "deep": (pl.List(pl.List(pl.Int16)), st.lists(st.none() | LISTS, max_size=2)),
    "struct": (pl.Struct({"a": pl.Float64, "b": pl.String}), st.fixed_dictionaries({"a": maybe(st.floats()), "b": maybe(st.text(max_size=2))})),
    "nothing": (pl.Null(), st.none()),
}  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    names = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5, unique=True))
    rows = draw(st.integers(0, 6))
    columns = []
    for name in names:
        kind, values = KINDS[name]
        drawn = draw(st.lists(maybe(values), min_size=rows, max_size=rows))
        if isinstance(kind, pl.Datetime):
            columns.append(pl.Series(name, drawn, pl.Datetime("us")).cast(pl.Datetime(kind.time_unit)))
            columns[-1] = columns[-1].dt.replace_time_zone("UTC").dt.convert_time_zone(kind.time_zone or "UTC")
            columns[-1] = columns[-1] if kind.time_zone else columns[-1].dt.replace_time_zone(None)
        else:
            columns.append(pl.Series(name, drawn, dtype=kind))
    return pl.DataFrame(columns)


def joined(rows: list[bytes]) -> tuple[bytes, np.ndarray]:
    sizes = [len(row) for row in rows]
    return b"".join(rows), np.cumsum([0, *sizes[:-1]]) if rows else np.zeros(0, np.int64)


def same(one: Any, other: Any) -> bool:
    """Equal, NaN to NaN, however deep."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


@settings(max_examples=150)
@given(table=tables(), data=st.data())
def test_rows_come_back_in_any_order(table: pl.DataFrame, data: st.DataObject) -> None:
    codec = RowCodec(table.schema)
    rows = codec.pack(table)
    packed, starts = joined(rows)
    order = data.draw(st.permutations(range(table.height)))
    back = codec.unpack(packed, starts[list(order)])
    assert back.schema == table.schema
    assert same(back.rows(), table[list(order)].rows())
    some = data.draw(st.lists(st.sampled_from(table.columns), unique=True))
    assert same(codec.unpack(packed, starts, some).rows(), table.select(some).rows() if some else [])
    assert codec.pack(back) == [rows[i] for i in order]


@settings(max_examples=150)
@given(table=tables())
def test_bytes_are_equal_where_rows_are(table: pl.DataFrame) -> None:
    twice = pl.concat([table, table])
    rows = RowCodec(twice.schema).pack(twice)
    codes, _ = factorise(twice)
    known: dict[bytes, int] = {}
    assert [known.setdefault(row, len(known)) for row in rows] == codes.tolist()


def test_the_two_zeros_and_all_nans_are_one() -> None:
    table = pl.DataFrame({"f": [0.0, -0.0], "l": [[0.0], [-0.0]], "s": [{"a": 0.0}, {"a": -0.0}]})
    one, two = RowCodec(table.schema).pack(table)
    assert one == two


def test_types_without_a_packed_form_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"Column 'price' holds Decimal.*cannot keep it"):
        RowCodec(pl.Schema({"price": pl.Decimal(10, 2)}))
    with pytest.raises(DataError, match="Column 'parts' holds Binary inside lists or structs"):
        RowCodec(pl.Schema({"parts": pl.List(pl.Struct({"x": pl.Binary}))}))
