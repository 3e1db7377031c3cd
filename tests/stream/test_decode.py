"""Any bytes are a row of the log or a sentence, and no event depends on what it came with."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limaml.errors import ConfigError, DataError
from limaml.interactions.schema import Schema
from limaml.stream.convert import can_hold, to_column
from limaml.stream.decode import Decoder

NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)
TYPES: dict[str, pl.DataType] = {
    "user_id": pl.Int64(),
    "item_id": pl.String(),
    "at": pl.Datetime("us", "Europe/Berlin"),
    "click": pl.Int8(),
    "price": pl.Float64(),
    "tags": pl.List(pl.String),
    "note": pl.String(),
}
SCHEMA = Schema.model_validate(
    {
        "tasks": ["user_id"],
        "labels": ["click"],
        "row": "item_id",
        "time": "at",
        "features": [
            {"name": "price", "kind": "numeric"},
            {"name": "tags", "kind": "tokens"},
            {"name": "segment", "kind": "categorical", "side": "user_id"},  # of a side table: not in the log
        ],
    }
)
GOOD: dict[str, Any] = {
    "user_id": 7,
    "item_id": "a",
    "at": "2024-06-01T10:00:00Z",
    "click": 1,
    "price": 1.5,
    "tags": ["x", "y"],
}


def decoder(**options: Any) -> Decoder:
    return Decoder(TYPES, SCHEMA, now=lambda: NOW, **options)


def one(changes: dict[str, Any] | bytes, **options: Any) -> tuple[dict[str, Any] | None, str | None]:
    payload = changes if isinstance(changes, bytes) else json.dumps({**GOOD, **changes}).encode()
    done = decoder(**options).decode([payload])
    assert done.rows.schema == pl.Schema(TYPES)
    return (done.rows.to_dicts() or [None])[0], done.refused.get(0)


def test_a_good_event_is_a_row() -> None:
    row, refused = one({"extra": {"left": "out"}})
    assert refused is None
    assert row is not None and {**row, "at": row["at"].astimezone(datetime.UTC)} == {
        **GOOD,
        "at": datetime.datetime(2024, 6, 1, 10, tzinfo=datetime.UTC),
        "note": None,
    }


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"user_id": "42"}, {"user_id": 42}),
        ({"user_id": 42.0}, {"user_id": 42}),
        ({"item_id": 42}, {"item_id": "42"}),
        ({"item_id": 42.0}, {"item_id": "42"}),
        ({"item_id": None, "price": None, "tags": None}, {"item_id": None, "price": None, "tags": None}),
        ({"price": "2.5"}, {"price": 2.5}),
        ({"price": 3}, {"price": 3.0}),
        ({"tags": [1, None]}, {"tags": ["1", None]}),
        ({"tags": []}, {"tags": []}),
        ({"note": "kept"}, {"note": "kept"}),
    ],
    ids=str,
)
def test_a_value_that_means_the_same_is_taken(changes: dict[str, Any], row: dict[str, Any]) -> None:
    found, refused = one(changes)
    assert refused is None
    assert found is not None and {name: found[name] for name in row} == row


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (b"", "is empty"),
        (b"click!", "is no JSON"),
        (b"\xff\xfe", r"not UTF-8 \(byte 0\)"),
        (b"[1, 2]", "no object"),
        (b"[" * 100_000, "nested too deeply|no JSON"),
        (b'{"user_id": ' + b"9" * 5000 + b"}", "no JSON"),
        ({"user_id": None}, "'user_id' is null, but it is part of the key"),
        ({"user_id": "x"}, "'user_id' holds 'x', which is no integer"),
        ({"user_id": True}, "true and false are not"),
        ({"user_id": 2**70}, "out of the range of Int64"),
        ({"user_id": 1.5}, "no integer"),
        ({"item_id": {"a": 1}}, "'item_id' holds .* no text"),
        ({"item_id": "\ud800"}, "'item_id'"),
        ({"at": None}, "'at' is null"),
        ({"at": "yesterday"}, "no time such as"),
        ({"at": "9999-01-01T00:00:00Z"}, "too far"),
        ({"at": "2024-06-01T12:10:00Z"}, "lies in the future.*--max-ahead"),
        ({"at": 1717236000000}, "lies in the future.*--epoch|--epoch names"),
        ({"click": None}, "has no label"),
        ({"click": float("nan")}, "'click' holds nan"),
        ({"click": 2}, "must be 0 or 1"),
        ({"click": 300}, "out of the range of Int8"),
        ({"price": "cheap"}, "no number"),
        ({"tags": "x"}, "no list"),
        ({"tags": ["x", ["y"]]}, r"as entry 1 of a list, \['y'\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_event_is_refused_with_the_reason(changes: dict[str, Any] | bytes, why: str) -> None:
    row, refused = one(changes)
    assert row is None
    assert refused is not None
    assert re.search(why, refused), refused
    assert refused.endswith((".", ")"))


def test_a_column_that_the_model_uses_must_be_named() -> None:
    for column in ("user_id", "at", "click", "price"):
        payload = json.dumps({name: value for name, value in GOOD.items() if name != column}).encode()
        assert f"There is no column '{column}'" in decoder().decode([payload]).refused[0]


@pytest.mark.parametrize(("epoch", "number"), [("s", 1717236000), ("ms", 1717236000000), ("us", 1717236000000000)])
def test_numbers_are_times_in_the_unit_that_is_named(epoch: str, number: int) -> None:
    row, refused = one({"at": number}, epoch=epoch)
    assert refused is None and row is not None
    assert row["at"] == datetime.datetime(2024, 6, 1, 10, tzinfo=datetime.UTC)


def test_the_future_is_known_by_the_unit_of_the_log_where_times_are_integers() -> None:
    types = {**TYPES, "at": pl.Int64()}
    at = int(NOW.timestamp())

    def refused(value: int, latest: int | None) -> bool:
        made = Decoder(types, SCHEMA, now=lambda: NOW, latest=lambda: latest)
        return 0 in made.decode([json.dumps({**GOOD, "at": value}).encode()]).refused

    assert refused(at + 301, latest=at - 9999)
    assert not refused(at + 299, latest=at - 9999)
    assert refused((at + 301) * 1000, latest=(at - 9999) * 1000)
    assert not refused((at + 301) * 1000, latest=None)  # numbers that may be anything
    assert not refused(at * 1000, latest=12)


def test_what_the_model_cannot_read_is_found_row_by_row() -> None:
    def accepts(frame: pl.DataFrame) -> None:
        if (frame["price"] == 13).any():
            raise DataError("Thirteen cannot be read.")

    payloads = [json.dumps({**GOOD, "price": price}).encode() for price in (1, 13, 2, 3, 13)]
    done = decoder(accepts=accepts).decode(payloads)
    assert done.refused == dict.fromkeys((1, 4), "Thirteen cannot be read.")
    assert done.rows["price"].to_list() == [1.0, 2.0, 3.0] and list(done.places) == [0, 2, 3]


def test_a_log_that_events_cannot_fill_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="Column 'price' of the log is Duration"):
        Decoder({**TYPES, "price": pl.Duration()}, SCHEMA)
    with pytest.raises(ConfigError, match="only gives an order"):
        Decoder({**TYPES, "at": pl.String()}, SCHEMA)
    with pytest.raises(ConfigError, match="without --time"):
        Decoder(TYPES, Schema.model_validate({"tasks": ["user_id"], "labels": ["click"]}))
    with pytest.raises(ConfigError, match="one of s, ms, us, ns"):
        decoder(epoch="min")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
EVENTS = st.fixed_dictionaries({}, optional={name: JSON | st.just(value) for name, value in GOOD.items()})
PAYLOADS = st.one_of(
    st.binary(max_size=12),
    EVENTS.map(lambda event: json.dumps(event).encode()),
    EVENTS.map(lambda event: json.dumps({**GOOD, **event}).encode()),
    st.just(json.dumps(GOOD).encode()),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first draw builds tables
@given(st.lists(PAYLOADS, max_size=8))
def test_every_event_is_taken_or_refused_and_alone_as_among_others(payloads: list[bytes]) -> None:
    together = decoder().decode(payloads)
    assert sorted([*together.places, *together.refused]) == list(range(len(payloads)))
    assert together.rows.schema == pl.Schema(TYPES) and together.rows.height == len(together.places)
    taken = dict(zip(together.places, together.rows.to_dicts(), strict=True))
    for place, payload in enumerate(payloads):
        alone = decoder().decode([payload])
        assert alone.refused.get(0) == together.refused.get(place)
        assert str(alone.rows.to_dicts()) == str([taken[place]] if place in taken else [])


KINDS = [pl.Int8(), pl.UInt64(), pl.Float32(), pl.Float64(), pl.String(), pl.Boolean(), pl.Date(), pl.Datetime("ns")]
KINDS += [pl.Datetime("ms", "UTC"), pl.List(pl.Int16), pl.Array(pl.Float32, 2), pl.List(pl.Date)]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.lists(JSON, max_size=6))
def test_a_column_holds_what_it_can_and_says_the_rest(kind: pl.DataType, values: list[object]) -> None:
    assert can_hold(kind)
    column, problems = to_column("c", values, kind)
    assert column.dtype == kind and len(column) == len(values)
    assert all((values[place] is None) or (place in problems) for place in column.is_null().arg_true())
    assert all("'c'" in sentence for sentence in problems.values())
