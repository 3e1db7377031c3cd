"""The schema found without configuration, on tables built so that the right choice is known."""

from __future__ import annotations

import datetime

import numpy as np
import polars as pl
import pytest

from limaml.errors import DataError
from limaml.interactions.check import check
from limaml.interactions.encode import Encoder
from limaml.interactions.infer import Inferred, infer_schema
from limaml.interactions.infer_kinds import Chosen, Left, choose_kind
from limaml.interactions.schema import Feature
from limaml.types import ROW, FeatureKind, LossKind

CATEGORICAL, NUMERIC, TOKENS, VECTOR = (
    FeatureKind.CATEGORICAL,
    FeatureKind.NUMERIC,
    FeatureKind.TOKENS,
    FeatureKind.VECTOR,
)
GENRES = ["Action", "Comedy", "Drama", "Film-Noir", "War", "Children's"]
NOUNS = ["River", "Moon", "Garden", "Letter", "Storm", "Winter", "Silence", "Mirror", "Harbour", "Road"]


def movies(members: int = 60, items: int = 120, seed: int = 1) -> pl.DataFrame:
    """Ratings of items by members, with what is known of both."""
    random = np.random.default_rng(seed)
    rows = members * 30
    users = pl.DataFrame(
        {
            "user_id": np.arange(members) + 1,
            "gender": random.choice(["F", "M"], members),
            "age": random.permutation(np.arange(members) + 15),
            "level": random.integers(1, 4, members),
            "zip": [f"{10_000 + 7 * (i // 3)}" if i < members // 2 else f"{20_000 + i}" for i in range(members)],
            "secret": [f"token{i}" for i in range(members)],
        }
    )
    titles = [f"The {NOUNS[i % 10]} of the {NOUNS[i // 10 % 10]}, part {i}" for i in range(items)]
    genres = [sorted(random.choice(GENRES, random.integers(1, 4), replace=False)) for _ in range(items)]
    things = pl.DataFrame(
        {
            "item_id": np.arange(items) * 3,
            "title": titles,
            "bars": ["|".join(g) for g in genres],
            "commas": [", ".join(g) for g in genres],
            "spaces": [" ".join(g) for g in genres],
            "listed": genres,
            "year": (1950 + random.integers(0, 70, items)),
            "decade": (1950 + 10 * random.integers(0, 7, items)),
            "brand_id": random.integers(100, 140, items),
            "price": random.gamma(2, 5, items),
            "vector": random.normal(size=(items, 4)).tolist(),
            "ragged": [[0.5] * (1 + i % 3) for i in range(items)],
            "released": [datetime.date(2000, 1, 1) + datetime.timedelta(days=i) for i in range(items)],
            "country": ["XX"] * items,
            "boolean": random.random(items) < 0.5,
            "person": [f"{NOUNS[i % 10]} {NOUNS[(i + 3) % 10]}" for i in range(items)],
        }
    )
    rated = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(members) + 1, 30),
            "item_id": random.integers(0, items, rows) * 3,
            "rating": random.integers(1, 6, rows),
            "timestamp": random.permutation(rows) + 10**9,
            "device": random.choice(["phone", "web", "tv"], rows),
            "position": random.integers(0, 100, rows),
            "orig_row": np.arange(rows),
            "my_fold": random.integers(0, 5, rows),
            "event": [f"e{i}" for i in range(rows)],
        }
    )
    return rated.join(users, on="user_id", how="left").join(things, on="item_id", how="left")


def inferred(frame: pl.DataFrame, **changes: object) -> Inferred:
    arguments: dict[str, object] = {"task": "user_id", "row": "item_id", "time": "timestamp", "label": "rating >= 4"}
    return infer_schema(frame, **(arguments | changes))  # type: ignore[arg-type]


def by_name(found: Inferred) -> dict[str, Feature]:
    return {feature.name: feature for feature in found.schema.features}


FRAME = movies()
FOUND = inferred(FRAME)


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("item_id", CATEGORICAL, ROW),
        ("device", CATEGORICAL, ROW),
        ("position", NUMERIC, ROW),
        ("gender", CATEGORICAL, "user_id"),
        ("age", NUMERIC, "user_id"),
        ("level", CATEGORICAL, "user_id"),
        ("zip", CATEGORICAL, "user_id"),
        ("bars", TOKENS, ROW),
        ("commas", TOKENS, ROW),
        ("spaces", TOKENS, ROW),
        ("listed", TOKENS, ROW),
        ("year", NUMERIC, ROW),
        ("decade", CATEGORICAL, ROW),
        ("brand_id", CATEGORICAL, ROW),
        ("price", NUMERIC, ROW),
        ("vector", VECTOR, ROW),
        ("boolean", CATEGORICAL, ROW),
        ("person", CATEGORICAL, ROW),
    ],
)
def test_kinds_and_sides(name: str, kind: FeatureKind, side: str) -> None:
    feature = by_name(FOUND)[name]
    assert (feature.kind, feature.side) == (kind, side)
    assert sum(f"'{name}' is " in note for note in FOUND.notes) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("user_id", "it names task 'user_id'"),
        ("title", "it is free text"),
        ("secret", "nearly every user_id has a value of its own"),
        ("orig_row", "each row has a value of its own"),
        ("event", "each row has a value of its own"),
        ("my_fold", "by its name it is bookkeeping"),
        ("ragged", "of 3 different widths"),
        ("released", "it is a moment in time"),
        ("country", "it holds one value in all rows"),
    ],
)
def test_what_is_left_out_is_said(name: str, reason: str) -> None:
    assert name not in by_name(FOUND)
    about = [note for note in FOUND.notes if note.startswith(f"Column '{name}' ")]
    assert len(about) == 1
    assert reason in about[0]


def test_every_column_is_spoken_of_once_and_settings_fit() -> None:
    for column in FRAME.columns:
        if column not in ("rating", "timestamp"):
            assert sum(note.startswith(f"Column '{column}' ") for note in FOUND.notes) == 1
    features = by_name(FOUND)
    assert "rating" not in features
    assert "timestamp" not in features
    assert features["item_id"].min_count == 2
    assert features["zip"].min_count == 3
    assert (features["bars"].separator, features["commas"].separator, features["spaces"].separator) == ("|", ",", " ")
    assert features["bars"].length == 3
    assert all(note.endswith(".") for note in FOUND.notes)


def test_what_is_found_passes_the_check_and_encodes() -> None:
    report = check(FRAME, FOUND.schema)
    assert report.ok
    encoder = Encoder.fit(FRAME, FOUND.schema)
    encoded = encoder.encode(FRAME)
    sizes = {spec.name: spec.size for spec in encoder.specs}
    assert sizes["bars"] == sizes["commas"] == sizes["spaces"] == sizes["listed"] == 2 + len(GENRES)
    assert sizes["vector"] == 4
    assert encoded.count("user_id") == 60
    zips = encoded.sides["user_id"]["zip"]
    assert (zips > 1).sum() == 30  # ten of them are shared by three members each


def test_a_column_that_varies_inside_a_task_is_a_row_feature_whatever_table_it_came_from() -> None:
    found = inferred(FRAME, task_columns=["gender", "device"])
    assert by_name(found)["gender"].side == "user_id"
    assert by_name(found)["device"].side == ROW
    assert any("it came with 'user_id', yet varies inside some of them" in note for note in found.notes)


def test_tasks_of_one_row_each_make_no_column_a_task_feature() -> None:
    frame = pl.DataFrame({"u": range(40), "y": [0, 1] * 20, "c": ["a", "b", "b", "a"] * 10})
    found = infer_schema(frame, task="u", label="y")
    assert by_name(found)["c"].side == ROW


def test_without_time_the_shuffle_is_said_and_an_order_is_pointed_out() -> None:
    found = inferred(FRAME, time=None, seed=7)
    assert found.schema.time is None
    assert found.schema.seed == 7
    assert any("a shuffle with seed 7 stands in" in note for note in found.notes)
    seq = FRAME.with_columns(seq=pl.int_range(pl.len()).over("user_id"))
    found = inferred(seq, time=None)
    assert "seq" not in by_name(found)
    assert any("pass it as the time" in note for note in found.notes if "'seq'" in note)


def test_several_tasks_and_compound_keys() -> None:
    frame = FRAME.with_columns(pair_level=pl.col("device") + pl.col("gender"))
    found = inferred(frame, task=["user_id", "item_id", "user_id+device"], task_columns={"user_id": ["gender"]})
    assert [task.columns for task in found.schema.tasks] == [("user_id",), ("item_id",), ("user_id", "device")]
    features = by_name(found)
    assert features["gender"].side == "user_id"
    assert features["device"].side == "user_id+device"
    assert features["pair_level"].side == "user_id+device"
    assert "user_id" not in features
    assert "item_id" not in features
    assert features["bars"].side == ROW  # of the item, which is also what is scored
    without_row = inferred(frame, task=["item_id"], row=None)
    assert by_name(without_row)["bars"].side == "item_id"


def test_weight_offset_and_excluded_columns_are_no_features() -> None:
    frame = FRAME.with_columns(w=pl.col("position") * 1.0, offset=pl.col("position") * -1.0)
    found = inferred(frame, weight="w", offset="offset", exclude=["gender"])
    assert {"w", "offset", "gender"}.isdisjoint(by_name(found))
    assert (found.schema.weight, found.schema.offset) == ("w", "offset")
    assert sum("is no feature: you excluded it" in note for note in found.notes) == 1


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("values", "loss", "operator", "value"),
    [
        ([0, 1, 1, 0], LossKind.BINARY, None, None),
        ([True, False, True, False], LossKind.BINARY, None, None),
        ([1, 2, 3, 5], LossKind.SQUARED, None, None),
        ([0.5, 2.0, 3.0, 5.0], LossKind.SQUARED, None, None),
        ([-1, 1, 1, -1], LossKind.BINARY, "==", 1.0),
        (["yes", "no", "no", "yes"], LossKind.BINARY, "==", "yes"),
    ],
)
def test_the_loss_follows_the_label(values: list[object], loss: LossKind, operator: str | None, value: object) -> None:
    frame = pl.DataFrame({"u": [1, 1, 2, 2], "y": values})
    (label,) = infer_schema(frame, task="u", label="y").schema.labels
    assert (label.loss, label.operator, label.value) == (loss, operator, value)


def test_a_rule_is_taken_as_it_is_and_its_share_is_said() -> None:
    frame = pl.DataFrame({"u": [1, 1, 2, 2], "y": [1, 2, 3, 4], "z": [0, 1, 0, 1]})
    found = infer_schema(frame, task="u", label=["y >= 4", "z"])
    assert [label.name for label in found.schema.labels] == ["y >= 4", "z"]
    assert any("true for 25.0 % of the rows" in note for note in found.notes)
    assert by_name(found) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["good", "bad", "bad", "good"], "needs a rule"),
        (["a", "b", "c", "d"], "needs a rule"),
        ([None] * 4, "holds no label at all"),
        ([[1]] * 4, "cannot be a label"),
    ],
)
def test_labels_that_need_a_rule_say_so(values: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        infer_schema(pl.DataFrame({"u": [1, 1, 2, 2], "y": values}), task="u", label="y")


def test_all_missing_columns_are_named_at_once() -> None:
    with pytest.raises(DataError) as error:
        infer_schema(FRAME, task="user", row="item", time="timestmp", label="ratng >= 4", task_columns=["gendr"])
    text = str(error.value)
    for guess in ("user_id", "item_id", "timestamp", "rating", "gender"):
        assert f"Did you mean '{guess}'?" in text
    with pytest.raises(DataError, match="the tasks are"):
        inferred(FRAME, task_columns={"seller": ["gender"]})
    with pytest.raises(DataError, match="at least one task"):
        infer_schema(FRAME, task=[], label="rating")


# ---------------------------------------------------------------- kinds one by one


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("n", pl.Series([1.0, 2.0, 1.0, None] * 9), CATEGORICAL),  # integers that went through pandas
        ("n", pl.Series([1.5, 2.0, 1.0, None]), NUMERIC),
        ("n", pl.Series(range(100)), NUMERIC),
        ("skill_id", pl.Series(list(range(50)) * 3), CATEGORICAL),
        ("t", pl.Series(["college student", "art teacher", "art student"] * 9), CATEGORICAL),
        ("l", pl.Series([[1], [2, 3], []]), TOKENS),
        ("v", pl.Series([[1.0, 2.0], [0.5, 1.0]], dtype=pl.Array(pl.Float64, 2)), VECTOR),
        ("c", pl.Series(["a", "b"] * 9, dtype=pl.Categorical), CATEGORICAL),
    ],
)
def test_kind_of_values(name: str, values: pl.Series, expected: FeatureKind) -> None:
    chosen = choose_kind(name, values, "row")
    assert isinstance(chosen, Chosen)
    assert chosen.kind is expected


def test_kinds_that_no_feature_has() -> None:
    for values in (pl.Series([{"a": 1}]), pl.Series([[[1]]]), pl.Series([b"x"]), pl.Series([datetime.time(1)])):
        assert isinstance(choose_kind("x", values, "row"), Left)


def test_the_length_of_tokens_covers_all_but_a_long_tail() -> None:
    short = choose_kind("l", pl.Series([["a"] * n for n in (1, 2, 9)]), "row")
    assert isinstance(short, Chosen)
    assert short.length == 9
    tail = choose_kind("l", pl.Series([["a"] * 20] * 995 + [["a"] * 500] * 5), "row")
    assert isinstance(tail, Chosen)
    assert tail.length == 20
