"""Rows that come later fit the rows that are kept, value for value, or are refused by column and row."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import DataError
from limaml.cli.align import aligned

INTEGERS = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt32]


@settings(max_examples=60)
@given(values=st.lists(st.one_of(st.none(), st.integers(-300, 300)), min_size=1), kind=st.sampled_from(INTEGERS))
def test_an_integer_is_kept_or_refused(values: list[int | None], kind: type[pl.DataType]) -> None:
    frame = pl.DataFrame({"x": pl.Series(values, dtype=pl.Int64)})
    low, high = kind.min(), kind.max()  # type: ignore[attr-defined]
    low, high = pl.select(low).item(), pl.select(high).item()
    bad = [i for i, value in enumerate(values) if value is not None and not low <= value <= high]
    if bad:
        with pytest.raises(DataError, match=rf"Column 'x' of it is Int64 and holds {values[bad[0]]} in row {bad[0]},"):
            aligned(frame, {"x": kind()}, "it")
    else:
        found, extra = aligned(frame, {"x": kind()}, "it")
        assert found.schema == {"x": kind}
        assert found["x"].to_list() == values
        assert extra == []


@settings(max_examples=60)
@given(values=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(-9, 9).map(float)), min_size=1))
def test_a_float_becomes_an_integer_only_if_it_is_one(values: list[float | None]) -> None:
    frame = pl.DataFrame({"x": pl.Series(values, dtype=pl.Float64)})
    if all(value is None or value.is_integer() for value in values):
        assert aligned(frame, {"x": pl.Int64()}, "it")[0]["x"].to_list() == values
    else:
        with pytest.raises(DataError, match="Column 'x'"):
            aligned(frame, {"x": pl.Int64()}, "it")


def test_all_problems_are_said_at_once_and_other_columns_are_named() -> None:
    frame = pl.DataFrame({"user": ["7", "x"], "more": [1, 2], "when": ["2024-01-05", "2024-01-06"]})
    with pytest.raises(DataError, match=r"holds 'x' in row 1(.|\n)*no column 'item'"):
        aligned(frame, {"user": pl.Int64(), "item": pl.Int64()}, "it")
    found, extra = aligned(frame.head(1), {"when": pl.Date(), "user": pl.Int32()}, "it")
    assert extra == ["more"]
    assert found.columns == ["when", "user"]
    assert found["user"].to_list() == [7]
    assert str(found["when"][0]) == "2024-01-05"


def test_numbers_become_the_text_that_names_the_same_task() -> None:
    frame = pl.DataFrame({"user": [42.0, 7.0]})
    assert aligned(frame, {"user": pl.String()}, "it")[0]["user"].to_list() == ["42", "7"]
    nested = pl.DataFrame({"user": [[1], [2]]})
    with pytest.raises(DataError, match="row 0"):
        aligned(nested, {"user": pl.String()}, "it")


def test_nan_where_an_integer_is_wanted_is_missing() -> None:
    frame = pl.DataFrame({"x": [1.0, float("nan")]})
    assert aligned(frame, {"x": pl.Int64()}, "it")[0]["x"].to_list() == [1, None]
