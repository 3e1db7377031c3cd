"""Indexing and encoding: expected values are worked out here row by row, in plain Python."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import DataError
from limaml.interactions.codecs import CLIP, Hashing, Scaling, Vocabulary, codec_from_json, encode_values
from limaml.interactions.columns import canonical_text, factorise
from limaml.interactions.encode import Encoder
from limaml.interactions.index import index_interactions, label_values, shuffled, time_values
from limaml.interactions.keys import join_key, split_key, task_keys
from limaml.interactions.schema import Feature, Label, Schema, Task
from limaml.types import ROW, FeatureKind, FeatureSpec

SOME = settings(max_examples=60)


def schema(*features: dict[str, object], **others: object) -> Schema:
    return Schema.model_validate({"tasks": ["user"], "labels": ["y"], "time": "t", "features": features, **others})


def table(n: int = 6) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user": ["a", "b", "a", "c", "b", "a"],
            "y": [1, 0, 1, 0, 1, 0],
            "t": [5, 3, 1, 2, 6, 4],
            "item": [10, 11, 10, 12, 11, 13],
            "age": [30, None, 30, 50, 40, 30],
        }
    ).head(n)


# ---------------------------------------------------------------- columns and keys


@SOME
@given(st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "", "é"])), max_size=30))
def test_factorise_numbers_values_in_order_of_first_appearance(values: list[str | None]) -> None:
    codes, first = factorise(pl.Series(values, dtype=pl.String))
    seen = list(dict.fromkeys(values))
    assert codes.tolist() == [seen.index(value) for value in values]
    assert first.tolist() == [values.index(value) for value in seen]


@SOME
@given(st.lists(st.sampled_from([1.0, -0.0, 0.0, math.nan, None, math.inf]), min_size=1, max_size=20))
def test_factorise_is_the_same_for_short_and_long_columns(values: list[float | None]) -> None:
    short = pl.Series(values, dtype=pl.Float64)
    padded = pl.concat([short, pl.repeat(short[0], 600, dtype=pl.Float64, eager=True)])
    codes, first = factorise(short)
    long_codes, long_first = factorise(padded)
    assert codes.tolist() == long_codes[: len(values)].tolist()
    assert first.tolist() == long_first.tolist()


@SOME
@given(
    st.lists(st.lists(st.integers(-3, 60), min_size=3, max_size=3), min_size=1, max_size=30),
    st.sampled_from([1, 10**6, 2**56, 2**57]),
    st.sampled_from([pl.Int64, pl.Int8, pl.UInt64]),
)
def test_factorise_is_the_same_for_integers_near_and_far(
    rows: list[list[int]], far: int, dtype: type[pl.DataType]
) -> None:
    small = [[abs(a), b, c] for a, b, c in rows] * 20  # long enough for places in an array
    frame = pl.DataFrame({"a": pl.Series([row[0] for row in small], dtype=dtype)}).with_columns(
        b=pl.Series([row[1] * far for row in small], dtype=pl.Int64), c=pl.Series([row[2] for row in small])
    )
    for columns in (["a"], ["b"], ["a", "c"], ["c", "b", "a"]):
        part = frame.select(columns)
        codes, first = factorise(part)
        seen = list(dict.fromkeys(part.rows()))
        assert [seen[code] for code in codes] == part.rows()
        assert [part.row(row) for row in first] == seen
        assert all(part.rows().index(part.row(row)) == row for row in first)


def test_factorise_compares_lists_and_several_columns() -> None:
    codes, first = factorise(pl.Series([[1.0, 2.0], [1.0, 2.0], None, [], [1.0, 3.0]]))
    assert codes.tolist() == [0, 0, 1, 2, 3]
    assert first.tolist() == [0, 2, 3, 4]
    codes, _ = factorise(pl.DataFrame({"a": [1, 1, 2, 1], "b": ["x", "y", "x", "x"]}))
    assert codes.tolist() == [0, 1, 2, 0]


def test_one_text_for_one_thing_however_it_was_read() -> None:
    assert canonical_text(pl.Series([42])).to_list() == ["42"]
    assert canonical_text(pl.Series([42.0, 0.5, 1e300, math.nan, None, -0.0])).to_list() == [
        "42",
        "0.5",
        "1e+300",
        None,
        None,
        "0",
    ]
    assert canonical_text(pl.Series([True, None])).to_list() == ["true", None]
    assert canonical_text(pl.Series([datetime.date(2020, 1, 2)])).to_list() == ["2020-01-02"]
    assert canonical_text(pl.Series(["042"])).to_list() == ["042"]


@SOME
@given(st.lists(st.text(alphabet="ab|\\é ", max_size=6), min_size=1, max_size=4))
def test_compound_keys_can_be_taken_apart(parts: list[str]) -> None:
    assert split_key(join_key(parts), len(parts)) == tuple(parts)


@SOME
@given(st.lists(st.tuples(st.text(alphabet="a|\\", max_size=3), st.text(alphabet="a|\\", max_size=3)), max_size=12))
def test_two_compound_tasks_never_share_a_key(pairs: list[tuple[str, str]]) -> None:
    frame = pl.DataFrame(
        {"p": [p for p, _ in pairs], "q": [q for _, q in pairs]}, schema={"p": pl.String, "q": pl.String}
    )
    keys, codes = task_keys(frame, Task(name="p+q", columns=("p", "q")))
    assert len(keys) == len(set(keys)) == len(set(pairs))
    assert [split_key(keys[code], 2) for code in codes] == pairs


def test_a_key_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(DataError, match="2 part"):
        split_key("a|b", 3)


def test_a_task_key_must_be_there_and_must_be_a_scalar() -> None:
    task = Task.model_validate("user")
    with pytest.raises(DataError, match=r"Column 'user' names no 'user' in row 1"):
        task_keys(pl.DataFrame({"user": [1, None]}), task)
    with pytest.raises(DataError, match="cannot name a task"):
        task_keys(pl.DataFrame({"user": [[1], [2]]}), task)
    with pytest.raises(DataError, match="Did you mean 'User'"):
        task_keys(pl.DataFrame({"User": [1]}), task)


# ---------------------------------------------------------------- time, labels, order


def test_rows_are_sorted_by_time_and_ties_keep_the_tables_order() -> None:
    frame = pl.DataFrame({"user": ["a", "b", "c", "a"], "y": [0, 1, 1, 0], "t": [2, 1, 2, 1]})
    found = index_interactions(frame, schema())
    assert found.source_row is not None
    assert found.source_row.tolist() == [1, 3, 0, 2]
    assert found.time.tolist() == [1, 1, 2, 2]
    assert found.time_unit == "integer"
    assert found.labels.tolist() == [[1.0], [0.0], [0.0], [1.0]]
    assert found.ids["user"] == ["b", "a", "c"]
    assert found.index["user"].tolist() == [0, 1, 1, 2]
    assert found.weights.tolist() == [1.0] * 4
    assert found.count("user") == 3
    assert found.count(ROW) == 1
    assert found.sides == {"user": {}, ROW: {}}


@pytest.mark.parametrize(
    ("values", "expected", "unit"),
    [
        ([3, 1, 2], [3, 1, 2], "integer"),
        ([3.0, 1.0, 2.0], [3, 1, 2], "integer"),
        ([0.5, 0.1, 0.5], [2, 1, 2], "order"),
        (["b", "a", "b"], [2, 1, 2], "order"),
        ([datetime.date(1970, 1, 2), datetime.date(1970, 1, 1)], [86_400_000_000, 0], "us"),
        ([datetime.datetime(1970, 1, 1, 0, 0, 1, 5)], [1_000_005], "us"),
    ],
)
def test_times_of_every_type_become_integers(values: list[object], expected: list[int], unit: str) -> None:
    time, found = time_values(pl.Series("t", values))
    assert time.tolist() == expected
    assert found == unit
    assert time.dtype == np.int64


def test_a_zone_is_taken_into_account() -> None:
    moment = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    time, _ = time_values(pl.Series("t", [moment]).dt.convert_time_zone("Europe/Berlin"))
    assert time.tolist() == [int(moment.timestamp() * 1e6)]


def test_a_missing_or_orderless_time_is_refused() -> None:
    with pytest.raises(DataError, match=r"no time in 1 row\(s\), the first is row 1"):
        time_values(pl.Series("t", [1.0, math.nan]))
    with pytest.raises(DataError, match="cannot be ordered"):
        time_values(pl.Series("t", [[1]]))
    with pytest.raises(DataError, match="64 bits"):
        time_values(pl.Series("t", [2**63], dtype=pl.UInt64))


@SOME
@given(st.integers(0, 200), st.integers(0, 2**31))
def test_a_shuffle_is_a_permutation_fixed_by_its_seed(rows: int, seed: int) -> None:
    order = shuffled(rows, seed)
    assert sorted(order.tolist()) == list(range(rows))
    assert order.tolist() == shuffled(rows, seed).tolist()


def test_shuffles_do_not_depend_on_the_machine_and_look_random() -> None:
    def mixed(x: int) -> int:  # the same arithmetic with integers of Python
        for _ in range(2):
            x = (x + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
        return x

    expected = sorted(range(50), key=lambda row: mixed((row + 9 * 0x9E3779B97F4A7C15) % 2**64))
    assert shuffled(50, 9).tolist() == expected
    n = 4000
    for seed in (0, 1, 2):
        order = shuffled(n, seed)
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.06  # 4 standard errors
        assert abs(np.corrcoef(order, shuffled(n, seed + 1))[0, 1]) < 0.06


def test_without_time_a_seeded_shuffle_stands_in() -> None:
    one = index_interactions(table(), schema(time=None, seed=3))
    assert one.source_row is not None
    assert one.source_row.tolist() == shuffled(6, 3).tolist()
    assert one.time.tolist() == list(range(6))
    assert one.time_unit == "order"


@pytest.mark.parametrize(
    ("rule", "column", "expected"),
    [
        ("v >= 4", [3, 4, None], [0.0, 1.0, None]),
        ("v >= 4", [3.5, 4.0, math.nan], [0.0, 1.0, None]),
        ("v == yes", ["yes", "no", None], [1.0, 0.0, None]),
        ("v != 'no'", ["yes", "no"], [1.0, 0.0]),
        ("v == 1", ["1", "2"], [1.0, 0.0]),
        ("v == true", ["True", "False"], [1.0, 0.0]),
        ("v == true", [True, False], [1.0, 0.0]),
        ("v", [True, False], [1.0, 0.0]),
        ("v", [2, 7], [2.0, 7.0]),
    ],
)
def test_labels_and_rules(rule: str, column: list[object], expected: list[float | None]) -> None:
    frame = pl.DataFrame({"v": column})
    assert label_values(frame, Label.model_validate(rule)).to_list() == expected


@pytest.mark.parametrize(
    ("rule", "column", "message"),
    [
        ("v", ["a", "b"], "Use a rule"),
        ("v >= 4", ["a", "b"], "text has no '>='"),
        ("v == yes", [1, 2], "cannot be compared with the text 'yes'"),
        ("v >= 4", [[1], [2]], "a rule compares"),
        ("w", [1, 2], "There is no column 'w'"),
    ],
)
def test_labels_that_cannot_be_read_say_why(rule: str, column: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_values(pl.DataFrame({"v": column}), Label.model_validate(rule))


def test_several_labels_weights_and_offsets() -> None:
    frame = table().with_columns(z=pl.Series([None, 1, 0, 1, 0, 1]), w=pl.Series([1.0, 2, 3, 4, 5, 6]), o=pl.lit(0.25))
    found = index_interactions(frame, schema(labels=["y", "z"], weight="w", offset="o"))
    assert found.labels.shape == (6, 2)
    assert found.labels[:, 0].tolist() == [1, 0, 0, 0, 1, 1]
    assert math.isnan(found.labels[4, 1])
    assert found.weights.tolist() == [3, 4, 2, 6, 1, 5]
    assert found.offset is not None
    assert found.offset.tolist() == [0.25] * 6
    with pytest.raises(DataError, match="finite and not negative"):
        index_interactions(frame.with_columns(w=pl.lit(-1.0)), schema(weight="w"))


def test_several_task_types_and_compound_keys() -> None:
    frame = table().with_columns(kind=pl.Series(["x", "x", "y", "x", "x", "y"]))
    tasks = ["user", "item", {"name": "pair", "columns": ["user", "kind"]}]
    found = index_interactions(frame, schema(tasks=tasks))
    assert found.ids["item"] == ["10", "12", "11", "13"]
    assert found.ids["pair"] == ["a|y", "c|x", "b|x", "a|x"]
    assert found.index["pair"].tolist() == [0, 1, 2, 0, 3, 2]


def test_an_empty_table_is_indexed_and_encoded() -> None:
    described = schema({"name": "item", "kind": "categorical"}, {"name": "age", "kind": "numeric", "side": "user"})
    encoder = Encoder.fit(table(), described)
    found = encoder.encode(table(0))
    assert len(found) == 0
    assert found.count("user") == found.count(ROW) == 0
    assert found.sides[ROW]["item"].shape == (0,)
    assert found.sides["user"]["age"].shape == (0, 1)


# ---------------------------------------------------------------- fitting on training rows


def test_only_training_rows_leave_a_trace_and_the_mask_is_in_order_of_time() -> None:
    described = schema({"name": "item", "kind": "categorical"}, {"name": "age", "kind": "numeric", "side": "user"})
    # in order of time: items 10 12 11 13 10 11, users a c b a a b, ages 30 50 - 30 30 40
    train = torch.tensor([True, True, True, False, False, False])
    encoder = Encoder.fit(table(), described, train)
    assert encoder.codecs["item"] == Vocabulary("integer", (10, 11, 12))
    assert encoder.codecs["age"] == Scaling((40.0,), (10.0,), indicator=True)  # users a 30, c 50, b unknown
    found = encoder.encode(table())
    rows = found.sides[ROW]["item"][found.index[ROW]]
    assert rows.tolist() == [2, 4, 3, 1, 2, 3]
    users = found.sides["user"]["age"]
    assert found.ids["user"] == ["a", "c", "b"]
    assert users.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]  # b: 40, from its latest row


@settings(max_examples=40)
@given(st.data())
def test_rows_outside_the_mask_never_change_the_encoder(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 15))
    times = data.draw(st.permutations(range(n)))
    values = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    numbers = data.draw(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=n, max_size=n))
    users = data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    described = schema(
        {"name": "v", "kind": "categorical", "min_count": 2},
        {"name": "x", "kind": "numeric"},
        {"name": "u", "kind": "numeric", "side": "user", "column": "x"},
    )
    frame = pl.DataFrame(
        {"user": users, "y": [0] * n, "t": times, "v": values, "x": pl.Series(numbers, dtype=pl.Float64)}
    )
    train = torch.tensor(mask)
    order = np.argsort(times, kind="stable")
    outside = pl.Series([not mask[list(order).index(i)] for i in range(n)])
    changed = frame.with_columns(
        v=pl.when(outside).then(pl.col("v") + 100).otherwise(pl.col("v")),
        x=pl.when(outside).then(7e6).otherwise(pl.col("x")),
    )
    assert Encoder.fit(frame, described, train) == Encoder.fit(changed, described, train)
    kept = frame.filter(~outside)
    assert Encoder.fit(frame, described, train) == Encoder.fit(kept, described)


def test_a_mask_of_the_wrong_shape_or_type_is_refused() -> None:
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(6)):
        with pytest.raises(DataError, match="must be Boolean of shape"):
            Encoder.fit(table(), schema(), mask)


def test_rare_values_count_rows_on_the_row_side_and_tasks_on_the_task_side() -> None:
    frame = pl.DataFrame(
        {
            "user": ["a"] * 5 + ["b", "c"],
            "y": [1, 0, 1, 0, 1, 0, 1],
            "t": range(7),
            "zip": ["1"] * 5 + ["2", "2"],
            "item": ["p", "p", "q", "r", "r", "r", "s"],
        }
    )
    described = schema(
        {"name": "zip", "kind": "categorical", "side": "user", "min_count": 2},
        {"name": "item", "kind": "categorical", "min_count": 2},
    )
    encoder = Encoder.fit(frame, described)
    assert encoder.codecs["zip"] == Vocabulary("text", ("2",))  # five rows, but one member, has "1"
    assert encoder.codecs["item"] == Vocabulary("text", ("p", "r"))
    assert encoder.encode(frame).sides["user"]["zip"].tolist() == [1, 2, 2]
    assert encoder.specs[0] == FeatureSpec("zip", FeatureKind.CATEGORICAL, "user", 3)


def test_a_task_takes_its_latest_known_value() -> None:
    frame = pl.DataFrame(
        {"user": ["a", "a", "a", "b"], "y": [0, 1, 0, 1], "t": [3, 1, 2, 0], "c": [None, "old", "new", None]}
    )
    described = schema({"name": "c", "kind": "categorical", "side": "user"})
    encoder = Encoder.fit(frame, described)
    found = encoder.encode(frame)
    assert encoder.codecs["c"] == Vocabulary("text", ("new",))
    assert dict(zip(found.ids["user"], found.sides["user"]["c"].tolist(), strict=True)) == {"a": 2, "b": 0}


# ---------------------------------------------------------------- encodings


def test_null_is_0_and_what_training_has_not_seen_is_1() -> None:
    encoder = Encoder.fit(table(), schema({"name": "item", "kind": "categorical"}))
    found = encoder.encode_features(pl.DataFrame({"item": [10, None, 99, 13]}), ROW)
    assert found["item"].tolist() == [2, 0, 1, 5]
    assert found["item"].dtype == torch.int64


def test_a_request_may_send_numbers_as_text_and_text_as_numbers() -> None:
    integers, texts = Vocabulary("integer", (2, 10, 42)), Vocabulary("text", ("02460", "42"))
    assert integers.ids(pl.Series(["42", "042", "x", None, "10"])).tolist() == [4, 1, 1, 0, 3]
    assert integers.ids(pl.Series([42.0, 2.5, math.nan])).tolist() == [4, 1, 0]
    assert texts.ids(pl.Series([42, 2460])).tolist() == [3, 1]
    assert Vocabulary("float", (0.5, 2.0)).ids(pl.Series(["0.50", "2"])).tolist() == [2, 3]


@given(
    known=st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=40).map(sorted),
    kind=st.sampled_from(["signed", "unsigned", "float", "text"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_ids_of_many_values_are_those_of_each(known: list[int], kind: str, seed: int) -> None:
    """Many are searched for at once, few are looked up one by one."""
    rng = np.random.default_rng(seed)
    some = [*known, 0, 1, 7, 2**53, 2**63 - 1, None]
    values = [some[place] for place in rng.integers(0, len(some), 700)]
    column = {
        "signed": pl.Series(values, dtype=pl.Int64),
        "unsigned": pl.Series([None if v is None else abs(v) * 2 % 2**64 for v in values], dtype=pl.UInt64),
        "float": pl.Series([None if v is None else float(v) / 2 for v in values], dtype=pl.Float64),
        "text": pl.Series([None if v is None else str(v) for v in values], dtype=pl.String),
    }[kind]
    vocabulary = Vocabulary("integer", tuple(known))
    each = np.concatenate([vocabulary.ids(column[start : start + 100]) for start in range(0, 700, 100)])
    np.testing.assert_array_equal(vocabulary.ids(column), each)


def test_columns_of_whole_floats_are_read_as_integers() -> None:
    frame = table().with_columns(pl.col("age").cast(pl.Float64))
    encoder = Encoder.fit(frame, schema({"name": "age", "kind": "categorical"}))
    assert encoder.codecs["age"] == Vocabulary("integer", (30, 40, 50))


@SOME
@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=30),
    st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), max_size=10),
)
def test_numbers_are_standardised_by_training_and_clipped(train: list[float | None], test: list[float | None]) -> None:
    frame = pl.DataFrame(
        {
            "user": ["a"] * len(train),
            "y": [0] * len(train),
            "t": range(len(train)),
            "x": pl.Series(train, dtype=pl.Float64),
        }
    )
    encoder = Encoder.fit(frame, schema({"name": "x", "kind": "numeric"}))
    known = np.array([value for value in train if value is not None])
    mean = known.mean() if len(known) else 0.0
    deviation = known.std() if len(known) and known.std() > 1e-12 * max(abs(mean), 1) else 1.0
    encoded = encoder.encode_features(pl.DataFrame({"x": pl.Series(test, dtype=pl.Float64)}), ROW)["x"]
    has_nulls = None in train
    assert encoder.specs[0].size == 1 + has_nulls
    assert encoded.shape == (len(test), 1 + has_nulls)
    for value, row in zip(test, encoded.tolist(), strict=True):
        far = value is not None and abs(value) > 1e9  # quotients of larger ones may lie beyond all numbers
        scaled = 0.0 if value is None else math.copysign(CLIP, value) if far else (value - mean) / deviation
        expected = min(max(scaled, -CLIP), CLIP)
        assert row[0] == pytest.approx(expected, abs=1e-3)
        if has_nulls:
            assert row[1] == float(value is None)


def test_nan_is_missing_and_infinity_is_clipped_at_serving_but_refused_in_training() -> None:
    frame = table().with_columns(x=pl.Series([1.0, 3.0, math.nan, 1.0, 3.0, 2.0]))
    described = schema({"name": "x", "kind": "numeric"})
    encoder = Encoder.fit(frame, described)
    sent = pl.DataFrame({"x": [math.nan, math.inf, -math.inf]})
    assert encoder.encode_features(sent, ROW)["x"].tolist() == [[0.0, 1.0], [6.0, 0.0], [-6.0, 0.0]]
    with pytest.raises(DataError, match="infinite numbers"):
        Encoder.fit(frame.with_columns(x=pl.lit(math.inf)), described)


def test_vectors_are_standardised_by_column() -> None:
    vectors = [[0.0, 1.0, 5.0], [2.0, 1.0, 7.0], None, [0.0, 1.0, 5.0], [2.0, 1.0, 7.0], [1.0, 1.0, 6.0]]
    for column in (
        pl.Series("v", vectors),
        pl.Series("v", vectors, dtype=pl.Array(pl.Float32, 3)),
        pl.Series("v", [None if v is None else " ".join(map(str, v)) for v in vectors]),
    ):
        encoder = Encoder.fit(table().with_columns(column), schema({"name": "v", "kind": "vector"}))
        known = np.array([v for v in vectors if v is not None])
        deviation = known.std(axis=0)
        deviation[1] = 1.0
        encoded = encoder.encode_features(column.to_frame(), ROW)["v"]
        expected = np.array(
            [[0.0] * 3 if v is None else (np.array(v) - known.mean(axis=0)) / deviation for v in vectors]
        )
        assert encoded.dtype == torch.float32
        assert np.allclose(encoded.numpy(), expected, atol=1e-6)
        assert encoder.specs == (FeatureSpec("v", FeatureKind.VECTOR, ROW, 3),)


def test_vectors_of_different_widths_are_refused() -> None:
    described = schema({"name": "v", "kind": "vector"})
    ragged = table(2).with_columns(v=pl.Series([[1.0], [1.0, 2.0]]))
    with pytest.raises(DataError, match=r"lists are of lengths \[1, 2\]"):
        Encoder.fit(ragged, described)
    encoder = Encoder.fit(ragged.head(1), described)
    with pytest.raises(DataError, match="width 1, and finds one of width 2"):
        encoder.encode_features(ragged, ROW)


WORDS = st.lists(st.one_of(st.sampled_from(["a", "b", "c", "d", "zz"])), max_size=7)


@SOME
@given(
    st.lists(st.one_of(st.none(), WORDS), min_size=1, max_size=8),
    st.sampled_from(["tokens", "sequence"]),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 2),
)
def test_lists_keep_the_first_of_a_set_and_the_last_of_a_sequence(
    lists: list[list[str] | None], kind: str, length: int, as_text: bool, min_count: int
) -> None:
    column = pl.Series("l", lists, dtype=pl.List(pl.String))
    if as_text:
        column = column.list.join(" | ")
    feature = {"name": "l", "kind": kind, "length": length, "separator": "|", "min_count": min_count}
    frame = pl.DataFrame({"user": ["u"] * len(lists), "y": [0] * len(lists), "t": range(len(lists))}).with_columns(
        column
    )
    encoder = Encoder.fit(frame, schema(feature))
    counts: dict[str, int] = {}
    for entry in lists:
        for word in set(entry or ()):
            counts[word] = counts.get(word, 0) + 1
    known = sorted(word for word, count in counts.items() if count >= min_count)
    assert encoder.codecs["l"] == Vocabulary("text", tuple(known))
    encoded = encoder.encode_features(column.to_frame(), ROW)["l"]
    for entry, row in zip(lists, encoded.tolist(), strict=True):
        ids = [2 + known.index(word) if word in known else 1 for word in entry or ()]
        ids = list(dict.fromkeys(ids))[:length] if kind == "tokens" else ids[-length:]
        assert row == ids + [0] * (length - len(ids))
    assert encoder.specs[0] == FeatureSpec("l", FeatureKind(kind), ROW, 2 + len(known), length)


def test_lists_of_numbers_and_nulls_inside_lists() -> None:
    frame = table(3).with_columns(l=pl.Series([[5, None, 7], [], [7, 5, 5]]))
    encoder = Encoder.fit(frame, schema({"name": "l", "kind": "tokens", "length": 3}))
    assert encoder.codecs["l"] == Vocabulary("integer", (5, 7))
    assert encoder.encode_features(frame, ROW)["l"].tolist() == [[2, 3, 0], [0, 0, 0], [3, 2, 0]]


def test_hash_buckets_are_stable_across_processes_and_never_unseen() -> None:
    hashing = Hashing("item", 1000)
    values = ["é", "42", "", "a" * 500]
    ids = hashing.ids(pl.Series(values)).tolist()
    assert all(2 <= i < hashing.size == 1002 for i in ids)
    assert hashing.ids(pl.Series([42, None])).tolist() == [ids[1], 0]
    script = (
        "import polars as pl; from limaml.interactions.codecs import Hashing;"
        f"print(Hashing('item', 1000).ids(pl.Series({values!r})).tolist())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert json.loads(other.stdout) == ids
    assert Hashing("other", 1000).ids(pl.Series(values)).tolist() != ids


def test_hashes_spread_evenly() -> None:
    ids = Hashing("x", 16).ids(pl.Series(range(16_000)))
    counts = np.bincount(ids - 2, minlength=16)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared with 15 degrees of freedom: p < 1e-4


def test_the_row_side_holds_each_distinct_encoding_once() -> None:
    n = 1000
    items = np.arange(n) % 7
    frame = pl.DataFrame(
        {
            "user": np.arange(n) % 50,
            "y": np.arange(n) % 2,
            "t": np.arange(n)[::-1],
            "item": items,
            "words": [["w", str(item)] for item in items],
            "price": items * 1.5,
        }
    )
    described = schema(
        {"name": "item", "kind": "categorical"},
        {"name": "words", "kind": "tokens", "length": 2},
        {"name": "price", "kind": "numeric"},
    )
    encoder = Encoder.fit(frame, described)
    found = encoder.encode(frame)
    assert found.count(ROW) == 7
    assert found.source_row is not None
    direct = encoder.encode_features(frame[found.source_row.numpy()], ROW)
    for name, values in direct.items():
        assert torch.equal(found.sides[ROW][name][found.index[ROW]], values)
    unseen = encoder.encode(frame.with_columns(item=pl.col("item") + 100))
    assert unseen.sides[ROW]["item"].unique().tolist() == [1]


def test_tasks_that_training_has_not_seen_are_just_tasks() -> None:
    described = schema({"name": "age", "kind": "numeric", "side": "user"})
    encoder = Encoder.fit(table(3), described)
    found = encoder.encode(table().with_columns(user=pl.lit("new")))
    assert found.ids["user"] == ["new"]
    assert found.sides["user"]["age"].shape == (1, 2)


def test_features_of_which_nothing_is_known() -> None:
    described = schema(
        {"name": "item", "kind": "categorical", "side": "user"},
        {"name": "age", "kind": "numeric", "side": "user"},
        {"name": "v", "kind": "vector", "side": "user"},
        {"name": "l", "kind": "tokens", "side": "user", "length": 2},
        {"name": "h", "kind": "categorical", "side": "user", "buckets": 5, "column": "item"},
    )
    frame = table().with_columns(v=pl.Series([[1.0, 2.0]] * 6), l=pl.lit("a b"))
    frame = frame.with_columns(age=pl.when(pl.col("user") == "b").then(None).otherwise(pl.col("age")))
    found = Encoder.fit(frame, described).unknown_features("user", 2)
    assert {name: values.tolist() for name, values in found.items()} == {
        "item": [0, 0],
        "age": [[0.0, 1.0]] * 2,
        "v": [[0.0, 0.0]] * 2,
        "l": [[0, 0]] * 2,
        "h": [0, 0],
    }


def test_wrong_types_and_missing_columns_are_named() -> None:
    cases = [
        ("numeric", pl.Series(["x"] * 6), "as numeric and finds type String"),
        ("categorical", pl.Series([[1]] * 6), "an id is a number"),
        ("tokens", pl.Series([1] * 6), "needs a list column"),
        ("vector", pl.Series(["a b"] * 6), "not all its entries are numbers"),
    ]
    for kind, column, message in cases:
        with pytest.raises(DataError, match=message):
            Encoder.fit(table().with_columns(f=column), schema({"name": "f", "kind": kind}))
    with pytest.raises(DataError, match=r"'itm'.*Did you mean 'item'"):
        Encoder.fit(table(), schema({"name": "itm", "kind": "categorical"}))
    encoder = Encoder.fit(table(), schema({"name": "item", "kind": "categorical"}))
    with pytest.raises(DataError, match="no column 'item'"):
        encoder.encode_features(pl.DataFrame({"other": [1]}), ROW)
    with pytest.raises(DataError, match="no side 'seller'"):
        encoder.encode_features(table(), "seller")


# ---------------------------------------------------------------- persistence


@SOME
@given(
    st.one_of(
        st.builds(
            lambda values: Vocabulary("integer", tuple(sorted(values))),
            st.sets(st.integers(-(2**63), 2**63 - 1), max_size=9),
        ),
        st.builds(lambda values: Vocabulary("text", tuple(sorted(values))), st.sets(st.text(max_size=5), max_size=9)),
        st.builds(
            lambda values: Vocabulary("float", tuple(sorted(values))),
            st.sets(st.floats(allow_nan=False, allow_infinity=False), max_size=9),
        ),
        st.builds(Hashing, st.text(max_size=5), st.integers(1, 10**6)),
        st.builds(
            lambda pairs, flag: Scaling(tuple(m for m, _ in pairs), tuple(d for _, d in pairs), flag),
            st.lists(st.tuples(st.floats(-1e300, 1e300), st.floats(1e-300, 1e300)), min_size=1, max_size=4),
            st.booleans(),
        ),
    )
)
def test_codecs_come_back_from_json_exactly(codec: Vocabulary | Hashing | Scaling) -> None:
    assert codec_from_json(json.loads(json.dumps(codec.to_json()))) == codec


def test_an_encoder_comes_back_from_json_exactly() -> None:
    frame = table().with_columns(
        text=pl.Series(["1", "2", "1", "x", None, "y"]), g=pl.Series(["a|b", "a", "", None, "b", "c"])
    )
    frame = frame.with_columns(z=pl.col("t") * 10.5)
    described = schema(
        {"name": "item", "kind": "categorical", "min_count": 2},
        {"name": "text", "kind": "categorical"},
        {"name": "hashed", "column": "text", "kind": "categorical", "buckets": 7},
        {"name": "g", "kind": "tokens", "separator": "|", "length": 3},
        {"name": "age", "kind": "numeric", "side": "user"},
        labels=["y", "z >= 40", "z == true"],
    )
    encoder = Encoder.fit(frame, described)
    again = Encoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert again == encoder
    assert again.specs == encoder.specs
    one, two = encoder.encode(frame), again.encode(frame)
    for side, features in one.sides.items():
        for name, values in features.items():
            assert torch.equal(values, two.sides[side][name])


@pytest.mark.parametrize(
    "break_it",
    [
        lambda data: data.update(format=99),
        lambda data: data.update(schema={"tasks": []}),
        lambda data: data.update(codecs=3),
        lambda data: data["codecs"].pop("item"),
        lambda data: data["codecs"].update(item={"codec": "vocabulary", "kind": "integer", "values": ["1"]}),
        lambda data: data["codecs"].update(
            item={"codec": "scaling", "mean": [1.0], "deviation": [], "indicator": False}
        ),
    ],
)
def test_json_that_is_no_encoder_is_refused(break_it: object) -> None:
    data = Encoder.fit(table(), schema({"name": "item", "kind": "categorical"})).to_json()
    break_it(data)  # type: ignore[operator]
    with pytest.raises(DataError):
        Encoder.from_json(data)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="has buckets, which need no vocabulary"):
        schema({"name": "item", "kind": "categorical", "buckets": 5, "min_count": 2})
    with pytest.raises(ValueError, match="is numeric and has no ids"):
        schema({"name": "age", "kind": "numeric", "buckets": 5})
    with pytest.raises(ValueError, match="would be shown what it has to predict"):
        schema({"name": "o", "kind": "numeric"}, offset="o")


def test_a_table_of_many_rows_is_encoded_by_its_distinct_values() -> None:
    n = 200_000
    items = (np.arange(n) * 7919) % 500
    frame = pl.DataFrame(
        {"user": np.arange(n) % 1000, "y": np.arange(n) % 2, "t": np.arange(n), "item": items}
    ).with_columns(words=pl.lit("the ") + pl.col("item").cast(pl.String) + " word")
    described = schema({"name": "item", "kind": "categorical"}, {"name": "words", "kind": "tokens", "length": 4})
    found = Encoder.fit(frame, described).encode(frame)
    assert found.count(ROW) == 500
    assert torch.equal(found.sides[ROW]["item"][found.index[ROW]] - 2, torch.from_numpy(items))


def test_encode_values_takes_an_empty_column() -> None:
    feature = Feature.model_validate({"name": "l", "kind": "tokens", "length": 3})
    assert encode_values(feature, Vocabulary("text", ()), pl.Series([], dtype=pl.List(pl.String))).shape == (0, 3)
