"""A large side table is looked up part by part, with the same result, in the memory of one part."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import DataError
from limaml.interactions import side_parts
from limaml.interactions.log import InteractionLog
from limaml.interactions.side_tables import SideTables


def keep(folder: Path, key: str, table: pl.DataFrame) -> Path:
    """A folder of side tables with one table, as a run keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write_parquet(folder / "0.parquet")
    (folder / "tables.json").write_text(json.dumps({key: "0.parquet"}))
    return folder


def small(patch: pytest.MonkeyPatch, held: int = 2**20) -> None:
    """Every table is large, and has several parts."""
    patch.setattr(side_parts, "LARGE_BYTES", 0)
    patch.setattr(side_parts, "PART_BYTES", 300)
    patch.setattr(side_parts, "HELD_BYTES", held)
    patch.setattr(side_parts, "BATCH_ROWS", 7)


Key = st.none() | st.integers(-5, 40)


@settings(max_examples=15)
@given(
    keys=st.lists(Key, min_size=1, max_size=40, unique=True),
    asked=st.lists(Key, max_size=30),
    text=st.booleans(),
    two=st.booleans(),
    held=st.sampled_from([1, 2**20]),
)
def test_parts_give_what_the_whole_table_gives(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[int | None],
    asked: list[int | None],
    text: bool,
    two: bool,
    held: int,
) -> None:
    table = pl.DataFrame({"user": pl.Series(keys, dtype=pl.Int64), "age": [float(n) for n in range(len(keys))]})
    table = table.with_columns(
        kind=pl.col("user").cast(pl.String).fill_null("none").cast(pl.Categorical),
        same=pl.lit(1),
        user=pl.col("user").cast(pl.String) if text else "user",
    )
    frame = pl.DataFrame(
        {"user": pl.Series(asked, dtype=pl.Int64), "n": range(len(asked)), "same": 2},
        schema_overrides={"n": pl.Int64, "same": pl.Int32},
    )
    key = "user"
    if two:
        key = "user+site"
        table = table.with_columns(site=pl.lit("a|b"))
        frame = frame.with_columns(site=pl.when(pl.col("n") % 3 > 0).then(pl.lit("a|b")).otherwise(pl.lit("b")))
    side = keep(tmp_path_factory.mktemp("run") / "side", key, table)
    wanted = {"age", "kind", f"same_of_{key}"}
    whole = SideTables(side).join(frame, wanted)
    with pytest.MonkeyPatch.context() as patch:
        small(patch, held)
        parted = SideTables(side)
        assert parted.join(frame, wanted).equals(whole)
        assert parted.join(frame[::-1], wanted).equals(whole[::-1])
        assert (side / "0.parquet.parts" / "of.json").exists()


def test_a_bucket_of_the_log_needs_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, held=1)
    users = pl.DataFrame({"user": range(500), "age": range(500)})
    side = SideTables(keep(tmp_path / "side", "user", users))
    log = InteractionLog(tmp_path / "log", "user", 64)
    log.append(pl.DataFrame({"user": [n * 7 % 500 for n in range(2000)]}))
    read: list[int] = []
    bucket = InteractionLog.bucket

    def counted(self: InteractionLog, number: int, **given: object) -> pl.DataFrame:
        read.append(number)
        return bucket(self, number, **given)  # type: ignore[arg-type]

    rows = 0
    for _, frame in log.buckets():
        monkeypatch.setattr(InteractionLog, "bucket", counted)
        read.clear()
        joined = side.join(frame, {"age"})
        assert len(read) <= 1
        monkeypatch.setattr(InteractionLog, "bucket", bucket)
        assert joined["age"].equals(joined["user"].alias("age"))
        rows += joined.height
    assert rows == 2000
    assert InteractionLog(tmp_path / "side" / "0.parquet.parts").bucket_count >= 4


def test_a_table_that_is_replaced_or_loses_rows_is_parted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    users = pl.DataFrame({"user": range(100), "age": range(100)})
    side = keep(tmp_path / "side", "user", users)
    tables = SideTables(side)
    asked = pl.DataFrame({"user": [5, 99]})
    assert tables.join(asked, {"age"})["age"].to_list() == [5, 99]
    keep(side, "user", users.with_columns(pl.col("age") + 1000).filter(pl.col("user") != 99))
    assert tables.join(asked, {"age"})["age"].to_list() == [1005, None]
    side_parts.forget_parts(side / "0.parquet")
    assert not (side / "0.parquet.parts").exists()
    assert SideTables(side).join(asked, {"age"})["age"].to_list() == [1005, None]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    side = keep(tmp_path / "side", "user", pl.DataFrame({"user": [*range(50), 7], "age": range(51)}))
    with pytest.raises(DataError, match="several rows for one 'user'"):
        SideTables(side).join(pl.DataFrame({"user": [7]}), {"age"})
    with pytest.raises(DataError, match="no column 'user'"):
        SideTables(side).join(pl.DataFrame({"member": [7]}), {"age"})


@pytest.mark.parametrize("kind", [pl.Int64, pl.String])
def test_many_rows_are_given_what_few_are(tmp_path: Path, kind: type[pl.DataType]) -> None:
    table = pl.DataFrame({"user": pl.int_range(500, eager=True).cast(kind), "age": pl.int_range(500, eager=True) * 1.5})
    side = SideTables(keep(tmp_path / "side", "user", table))
    asked = (pl.int_range(9000, eager=True) * 37 % 700).cast(kind)
    frame = pl.DataFrame(
        {"n": range(9000), "user": pl.Series(asked).set(pl.Series([n % 11 == 0 for n in range(9000)]), None)}
    )
    pieces = pl.concat([side.join(frame[start : start + 1000], ["age"]) for start in range(0, 9000, 1000)])
    assert side.join(frame, ["age"]).equals(pieces)
    assert 0 < pieces["age"].null_count() < 9000
