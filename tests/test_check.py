"""The check finds each defect that is planted here, names its row, and finds nothing in a sound table."""

from __future__ import annotations

import datetime
import math
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import DataError
from limaml.interactions.check import CheckReport, Dropped, check, clean
from limaml.interactions.leaks import leak_remarks
from limaml.interactions.schema import Schema

NOW = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC)


def schema(*features: dict[str, object], **others: object) -> Schema:
    described = {"tasks": ["user"], "labels": ["y"], "time": "t", "features": features, **others}
    return Schema.model_validate(described)


def sound(n: int = 40) -> pl.DataFrame:
    i = np.arange(n)
    return pl.DataFrame(
        {
            "user": i % 5,
            "item": i % 7,
            "y": (i * 7 % 11 < 5).astype(int),
            "t": i,
            "age": (i % 5) * 10.0,
            "tags": [["a"], ["b", "c"]] * (n // 2),
        }
    )


AGE = {"name": "age", "kind": "numeric", "side": "user"}
ITEM = {"name": "item", "kind": "categorical"}
TAGS = {"name": "tags", "kind": "tokens"}


def problems(frame: pl.DataFrame, described: Schema, **others: object) -> list[str]:
    return [str(finding) for finding in check(frame, described, now=NOW, **others).problems]  # type: ignore[arg-type]


def remarks(frame: pl.DataFrame, described: Schema) -> list[str]:
    return [str(finding) for finding in check(frame, described, now=NOW).remarks]


def test_a_sound_table_has_nothing_to_report() -> None:
    report = check(sound(), schema(AGE, ITEM, TAGS, row="item"))
    assert report == CheckReport((), ())
    report.raise_if_bad()


def test_all_problems_are_raised_at_once() -> None:
    frame = sound().with_columns(
        user=pl.when(pl.col("t") == 3).then(None).otherwise(pl.col("user")),
        y=pl.when(pl.col("t") == 4).then(math.nan).otherwise(pl.col("y").cast(pl.Float64)),
        age=pl.when(pl.col("t") == 6).then(99.0).otherwise(pl.col("age")),
    )
    report = check(frame, schema(AGE, {"name": "itme", "kind": "categorical"}, {"name": "tags", "kind": "numeric"}))
    with pytest.raises(DataError) as error:
        report.raise_if_bad()
    text = str(error.value)
    assert "There are 5 problems" in text
    assert "Did you mean 'item'" in text
    assert "names no 'user' in 1 row(s), the first is row 3" in text
    assert "no label (null or NaN) in 1 row(s), the first is row 4" in text
    assert "as numeric, but it is of type List" in text
    assert "varies inside 1 task(s): user 1 has 10.0 and, in row 6, 99.0" in text
    by_row = {finding.row: finding.column for finding in report.problems}
    assert by_row[3] == "user"
    assert by_row[4] == "y"
    assert by_row[6] == "age"


def test_an_empty_table_and_missing_columns() -> None:
    assert "no rows" in problems(sound().head(0), schema())[0]
    found = problems(pl.DataFrame({"usr": [1, 2]}), schema(ITEM, row="item", weight="w"))
    assert len(found) == 5  # user, y, item (once), t, w
    assert "Did you mean 'usr'" in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": pl.Series([None, *range(39)])}, r"no time in 1 row\(s\), the first is row 0"),
        ({"t": pl.Series([[1]] * 40)}, "cannot be ordered in time"),
        ({"y": pl.lit(1)}, r"is 1 in every row: there is nothing to learn.*sample negatives"),
        ({"y": pl.lit(0)}, "is 0 in every row"),
        ({"y": pl.col("t") % 5 + 1}, r'has a binary loss but is 2 in row 1, and 5 values in all.*"y >= 5", or loss'),
        ({"y": pl.lit("yes")}, r"of type String; a label is a number.*\"y == 'yes'\""),
        ({"y": pl.lit(math.inf)}, "is infinite in 40 row"),
        ({"age": pl.lit(-math.inf)}, "is infinite in 40 row"),
        ({"age": pl.lit("old")}, r"as numeric, but it is of type String \('old' in row 0\)"),
        ({"item": pl.Series([[1]] * 40)}, "as categorical, but it is of type List"),
        ({"tags": pl.lit(1)}, "as tokens, but it is of type Int32"),
        ({"user": pl.Series([[1]] * 40)}, "cannot name a task"),
    ],
)
def test_each_defect_is_found_alone(change: dict[str, pl.Series | pl.Expr], message: str) -> None:
    found = problems(sound().with_columns(**change), schema(AGE, ITEM, TAGS))
    assert len(found) == 1
    assert re.search(message, found[0]), found[0]


def test_an_id_is_no_number() -> None:
    for column in ("item", "user"):
        found = problems(sound(), schema({"name": column, "kind": "numeric"}, row="item"))
        assert any("ids that are close have nothing in common" in text for text in found)


def test_vectors_must_be_of_one_width_and_finite() -> None:
    vector = {"name": "v", "kind": "vector"}
    ragged = sound().with_columns(v=pl.Series([[1.0, 2.0]] * 39 + [[1.0]]))
    assert "2 entries in most rows, 1 in row 39" in problems(ragged, schema(vector))[0]
    infinite = sound().with_columns(v=pl.Series([[1.0, math.inf]] * 40))
    assert "holds inf, which is no finite number" in problems(infinite, schema(vector))[0]
    assert problems(sound().with_columns(v=pl.Series([[1.0, 2.0]] * 39 + [None])), schema(vector)) == []


def test_weights_and_offsets_are_finite_numbers() -> None:
    frame = sound().with_columns(w=pl.Series([1.0] * 7 + [-1.0] * 33), o=pl.Series([-1.0] * 39 + [None]))
    found = problems(frame, schema(weight="w", offset="o"))
    assert "'w' is -1.0 in row 7 (33 such row(s))" in found[0]
    assert "'o' is None in row 39" in found[1]


# ---------------------------------------------------------------- times


def test_times_after_the_bound_or_after_now() -> None:
    days = pl.date_range(datetime.date(2024, 5, 1), datetime.date(2024, 6, 9), eager=True)
    frame = sound().with_columns(t=days)
    found = problems(frame, schema())
    assert len(found) == 1
    assert "8 time(s) after now" in found[0]
    assert "the first is 2024-06-02 in row 32" in found[0]
    assert problems(frame.head(32), schema()) == []
    assert problems(frame.head(32), schema(), until=datetime.date(2024, 6, 1)) == []
    assert (
        "1 time(s) after the bound" in problems(frame.head(32), schema(), until=datetime.datetime(2024, 5, 31, 12))[0]
    )
    assert "30 time(s) after the bound of the split (9)" in problems(sound(), schema(), until=9)[0]
    assert "give a number" in problems(sound(), schema(), until=datetime.date(2024, 1, 1))[0]
    assert "give a date" in problems(frame.head(32), schema(), until=5)[0]


@pytest.mark.parametrize("scale", [1, 1000, 10**6, 10**9])
def test_an_epoch_in_the_future_is_remarked_on(scale: int) -> None:
    start = int(NOW.timestamp()) - 38
    frame = sound().with_columns(t=(pl.col("t") + start) * scale)
    found = remarks(frame, schema())
    assert len(found) == 1
    assert "1 of its times would be in the future" in found[0]
    assert "in row 39" in found[0]
    assert remarks(frame.head(39), schema()) == []


# ---------------------------------------------------------------- labels and constancy


def test_one_missing_label_of_several_is_a_remark_and_all_missing_a_problem() -> None:
    frame = sound().with_columns(z=pl.Series([None, *([0, 1] * 20)])[:40])
    described = schema(labels=["y", "z"])
    assert problems(frame, described) == []
    assert (
        "Label 'z' is missing in 1 row(s) that have another label, the first is row 0" in remarks(frame, described)[0]
    )
    bare = frame.with_columns(y=pl.when(pl.col("t") == 0).then(None).otherwise(pl.col("y")))
    assert "Column 'y', 'z' has no label (null or NaN) in 1 row(s), the first is row 0" in problems(bare, described)[0]


def test_squared_loss_takes_any_number() -> None:
    frame = sound().with_columns(y=pl.col("t") % 5 + 1)
    assert problems(frame, schema(labels=[{"name": "y", "column": "y", "loss": "squared"}])) == []


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([None, "p", "q"])), min_size=1, max_size=12))
def test_a_task_feature_may_be_unknown_but_not_vary(rows: list[tuple[str, str | None]]) -> None:
    n = len(rows)
    frame = pl.DataFrame(
        {
            "user": [u for u, _ in rows],
            "c": pl.Series([c for _, c in rows], dtype=pl.String),
            "y": [i % 2 for i in range(n)],
            "t": range(n),
        }
    )
    report = check(frame, schema({"name": "c", "kind": "categorical", "side": "user"}))
    varying = {u for u in "ab" if len({c for v, c in rows if v == u and c is not None}) > 1}
    found = [finding for finding in report.problems if finding.column == "c"]
    assert len(found) == bool(varying)
    if found:
        assert found[0].count == len(varying)
        assert found[0].row is not None
        user, value = rows[found[0].row]
        assert user in varying
        first = next(c for u, c in rows if u == user and c is not None)
        assert value is not None
        assert first != value
        assert f"user {user} has '{first}' and, in row {found[0].row}, '{value}'" in str(found[0])


def test_lists_may_be_task_features_and_long_ones_are_counted() -> None:
    tags = {"name": "tags", "kind": "tokens", "side": "user", "length": 2}
    assert "varies inside 5 task(s)" in problems(sound(), schema(tags))[0]
    frame = sound().with_columns(tags=pl.Series([["a", "b", "c"]] * 3 + [["a", "a", "b"]] * 37))
    found = remarks(frame, schema({**tags, "side": "row"}))
    assert "more than 2 entries in 3 row(s), the first is row 0 with 3; the first 2 are used" in found[0]
    sequence = remarks(frame, schema({**tags, "side": "row", "kind": "sequence"}))
    assert "in 40 row(s)" in sequence[0]
    assert "the last 2 are used" in sequence[0]


def test_a_column_of_nulls_is_remarked_on() -> None:
    frame = sound().with_columns(age=pl.lit(None, dtype=pl.Float64))
    assert "holds nothing at all" in remarks(frame, schema(AGE))[0]


# ---------------------------------------------------------------- duplicates and cleaning


def test_exact_duplicates_are_counted_and_dropped_when_asked_and_attempts_stay() -> None:
    frame = pl.concat(
        [
            sound(),
            sound()[5:8],
            sound()[5:6].with_columns(t=pl.lit(99, dtype=pl.Int64)),
            sound()[9:10].with_columns(item=pl.lit(7, dtype=pl.Int64)),
        ]
    )
    found = remarks(frame, schema(ITEM))
    assert len(found) == 1
    assert found[0].startswith(
        "3 row(s) are exact duplicates of an earlier row, the time included; the first is row 40"
    )
    kept, dropped = clean(frame, schema(ITEM))
    assert dropped == Dropped(duplicates=3)
    assert str(dropped) == "3 row(s) dropped: 3 exact duplicates."
    assert kept.equals(pl.concat([frame[:40], frame[43:]]))
    assert clean(frame, schema(ITEM), duplicates=False)[0].equals(frame)


def test_without_a_time_equal_rows_may_be_attempts_and_stay() -> None:
    frame = pl.concat([sound(), sound()[5:8]])
    found = remarks(frame, schema(time=None))
    assert "3 row(s) equal an earlier row in every column, the first is row 40" in found[0]
    assert "they are kept" in found[0]
    kept, dropped = clean(frame, schema(time=None))
    assert kept.equals(frame)
    assert dropped.total == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from([None, "a", "b"])), min_size=1, max_size=14
    )
)
def test_cleaning_keeps_the_first_of_each(rows: list[tuple[int, int, str | None]]) -> None:
    frame = pl.DataFrame(
        {"user": [r[0] for r in rows], "t": [r[1] for r in rows], "x": pl.Series([r[2] for r in rows], dtype=pl.String)}
    ).with_columns(y=pl.lit(1))
    kept, dropped = clean(frame, schema())
    assert kept.select("user", "t", "x").rows() == list(dict.fromkeys(rows))
    assert dropped.duplicates == len(rows) - len(set(rows))
    assert clean(kept, schema())[1].total == 0


def test_cleaning_counts_each_reason() -> None:
    frame = pl.DataFrame(
        {"user": [1, None, 1, 2, 2], "y": [1.0, 1.0, math.nan, 0.0, 0.0], "t": [1, 2, 3, None, 5]}, strict=False
    )
    kept, dropped = clean(frame, schema(), unlabelled=True, keyless=True, timeless=True)
    assert dropped == Dropped(unlabelled=1, keyless=1, timeless=1)
    assert dropped.total == frame.height - kept.height == 3
    assert kept["t"].to_list() == [1, 5]
    assert "1 without a task key, 1 without a time, 1 without a label" in str(dropped)


def test_cleaning_a_table_without_its_columns_is_refused() -> None:
    with pytest.raises(DataError, match="There is 1 problem"):
        clean(sound().drop("t"), schema(), timeless=True)


# ---------------------------------------------------------------- leaks


def leaky(n: int = 4000) -> pl.DataFrame:
    random = np.random.default_rng(5)
    y = random.integers(0, 2, n)
    return pl.DataFrame(
        {
            "user": random.integers(0, 200, n),
            "y": y,
            "t": np.arange(n),
            "copy": y * 2.0 - random.random(n) * 0.1,
            "against": -y + random.random(n) * 0.5,
            "code": np.where(random.random(n) < 0.995, y, 1 - y).astype(str),
            "bent": np.where(y == 1, 5, random.choice([1, 9], n)),
            "honest": y + random.normal(size=n),
            "unique": np.arange(n),
            "rare": random.integers(0, n // 2, n),
        }
    )


def test_columns_that_give_the_label_away_are_named() -> None:
    kinds = {"copy": "numeric", "against": "numeric", "code": "categorical", "bent": "numeric", "honest": "numeric"}
    kinds |= {"unique": "categorical", "rare": "categorical"}
    features = [{"name": name, "kind": kind} for name, kind in kinds.items()]
    described = schema(*features)
    found = leak_remarks(leaky(), described, described.features, 100_000)
    assert [column for column, _ in found] == ["copy", "against", "code", "bent"]
    report = check(leaky(), described)
    assert report.ok
    assert any(
        "Column 'code' alone predicts label 'y' with an AUC of 0.99" in str(finding) for finding in report.remarks
    )


def test_leaks_of_a_number_are_found_by_correlation() -> None:
    frame = leaky().with_columns(y=pl.col("honest") * 3, twice=pl.col("honest") * -6 + 1)
    described = schema(
        {"name": "twice", "kind": "numeric"},
        {"name": "rare", "kind": "categorical"},
        labels=[{"name": "y", "column": "y", "loss": "squared"}],
    )
    assert [column for column, _ in leak_remarks(frame, described, described.features, 2000)] == ["twice"]


def test_an_id_with_a_few_rows_of_its_own_is_no_leak() -> None:
    n = 6000
    random = np.random.default_rng(0)
    frame = pl.DataFrame({"user": range(n), "t": range(n), "y": random.integers(0, 2, n), "id": np.arange(n) // 2})
    described = schema({"name": "id", "kind": "categorical"})
    assert leak_remarks(frame, described, described.features, n) == []
