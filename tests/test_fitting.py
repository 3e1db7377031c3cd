"""An encoder that was fitted on rows in parts is the one that all rows give at once."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import DataError
from limaml.interactions import Encoder, Schema
from limaml.interactions.codecs import Scaling
from limaml.interactions.encode import EncoderFit

FEATURES: list[dict[str, Any]] = [
    {"name": "kind", "kind": "categorical", "min_count": 2},
    {"name": "price", "kind": "numeric"},
    {"name": "tags", "kind": "tokens", "min_count": 2},
    {"name": "seen", "kind": "sequence"},
    {"name": "vector", "kind": "vector"},
    {"name": "size", "kind": "categorical", "side": "item"},
    {"name": "weight", "kind": "numeric", "side": "item"},
    {"name": "city", "kind": "categorical", "side": "user", "min_count": 2},
    {"name": "age", "kind": "numeric", "side": "user"},
    {"name": "code", "kind": "categorical", "buckets": 8},
]


def schema(*features: dict[str, Any]) -> Schema:
    described = {"tasks": ["user", "item"], "labels": ["y"], "time": "t", "features": list(features or FEATURES)}
    return Schema.model_validate(described)


NUMBERS = st.none() | st.integers(-(10**6), 10**6).map(lambda n: n / 7) | st.just(math.nan)
ROW = st.fixed_dictionaries(
    {
        "user": st.integers(0, 5),
        "item": st.integers(0, 4),
        "t": st.integers(0, 8),
        "y": st.integers(0, 1),
        "kind": st.none() | st.sampled_from([0.0, 1.0, 2.0, 2.5]),
        "price": NUMBERS,
        "tags": st.none() | st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
        "seen": st.none() | st.lists(st.integers(0, 3), max_size=3),
        "vector": st.none() | st.lists(st.floats(-10, 10), min_size=2, max_size=2),
        "size": st.none() | st.sampled_from(["s", "m", "l"]),
        "weight": NUMBERS,
        "city": st.none() | st.sampled_from(["x", "y"]),
        "age": NUMBERS,
        "code": st.none() | st.integers(0, 100),
    }
)
TYPES = {
    "kind": pl.Float64,
    "price": pl.Float64,
    "tags": pl.List(pl.String),
    "seen": pl.List(pl.Int64),
    "vector": pl.List(pl.Float64),
    "size": pl.String,
    "weight": pl.Float64,
    "city": pl.String,
    "age": pl.Float64,
    "code": pl.Int64,
}


def assert_alike(one: Encoder, other: Encoder) -> None:
    """Vocabularies equal; means and deviations up to the rounding of sums."""
    assert one.schema == other.schema and one.codecs.keys() == other.codecs.keys()
    for name, codec in one.codecs.items():
        again = other.codecs[name]
        if not isinstance(codec, Scaling):
            assert codec == again, name
            continue
        assert isinstance(again, Scaling) and again.indicator == codec.indicator, name
        # a mean is a sum of numbers of both signs: its error is measured against their size
        for pair in zip(codec.mean + codec.deviation, again.mean + again.deviation, strict=True):
            assert math.isclose(*pair, rel_tol=1e-11, abs_tol=1e-11 * max(1.0, *map(abs, codec.deviation))), name


@settings(max_examples=40)
@given(st.lists(ROW, min_size=1, max_size=40), st.integers(1, 4))
def test_parts_give_the_encoder_of_all_rows(rows: list[dict[str, Any]], parts: int) -> None:
    frame = pl.DataFrame(rows, schema_overrides=TYPES)
    pieces = [frame.filter(pl.col("user") % parts == part) for part in range(parts)]
    whole = Encoder.fit(pl.concat(pieces), schema())
    fit = EncoderFit(schema())
    for piece in pieces:
        fit.add(piece)
    assert_alike(fit.encoder(), whole)


def test_one_part_is_the_fit_of_its_rows_to_the_last_bit() -> None:
    frame = pl.DataFrame(
        {"user": [1, 1, 2], "item": [1, 2, 2], "t": [1, 2, 3], "y": [0, 1, 1], "price": [0.1, 0.7, 1.3]}
    )
    fit = EncoderFit(schema({"name": "price", "kind": "numeric"}))
    fit.add(frame)
    assert fit.encoder() == Encoder.fit(frame, schema({"name": "price", "kind": "numeric"}))


def test_the_latest_value_of_a_second_type_is_found_across_parts() -> None:
    feature = {"name": "size", "kind": "categorical", "side": "item"}
    part = {"item": [7, 7], "y": [0, 1]}
    fit = EncoderFit(schema(feature))
    fit.add(pl.DataFrame({"user": [1, 1], "t": [5, 9], "size": ["s", None], **part}))
    fit.add(pl.DataFrame({"user": [2, 2], "t": [6, 1], "size": ["l", "m"], **part}))
    codec = fit.encoder().codecs["size"]
    assert codec.to_json()["values"] == ["l"]  # of time 6: that of 9 tells nothing


def test_an_order_within_a_part_does_not_tell_the_latest_value() -> None:
    feature = {"name": "size", "kind": "categorical", "side": "item"}
    frame = pl.DataFrame({"user": [1], "item": [1], "t": ["monday"], "y": [0], "size": ["s"]})
    fit = EncoderFit(schema(feature))
    fit.add(frame)
    with pytest.raises(DataError, match=r"the latest features of 'item'.*Use numbers or dates as the time"):
        fit.add(frame)


def test_vectors_of_two_widths_in_two_parts_are_refused() -> None:
    fit = EncoderFit(schema({"name": "vector", "kind": "vector"}))
    rows = {"user": [1], "item": [1], "t": [1], "y": [0]}
    fit.add(pl.DataFrame({**rows, "vector": [[1.0, 2.0]]}))
    with pytest.raises(DataError, match=r"its lists are of lengths \[2, 3\]"):
        fit.add(pl.DataFrame({**rows, "vector": [[1.0, 2.0, 3.0]]}))


def test_many_values_are_counted_together_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limaml.interactions.fitting._HELD", 10)
    feature = {"name": "kind", "kind": "categorical", "min_count": 3}
    fit = EncoderFit(schema(feature))
    for user in range(6):
        rows = {"user": [user] * 8, "item": [0] * 8, "t": range(8), "y": [0, 1] * 4}
        fit.add(pl.DataFrame({**rows, "kind": [user, *range(7)]}))
    assert fit.encoder().codecs["kind"].to_json()["values"] == list(range(7))
