"""The interaction log: exactly once, hash-partitioned, and safe from crashes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import ConfigError, DataError, StoreError
from limaml.interactions.atomic_files import locked
from limaml.interactions.digest import ContentDigest, content_digest
from limaml.interactions.log import InteractionLog, buckets_for, task_bucket


def frame(rows: int = 100, tasks: int = 17, start: int = 0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [(i * 7) % tasks for i in range(rows)],
            "item_id": [f"item {i % 5}" for i in range(rows)],
            "time": range(start, start + rows),
            "tags": [["a", "b"][: i % 3] for i in range(rows)],
        }
    )


def as_set(table: pl.DataFrame) -> pl.DataFrame:
    return table.sort("time", "user_id")


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path / "log", "user_id", buckets=4)
    done = log.append(frame())
    assert (done.rows, done.new, done.already) == (100, 100, 0)
    assert as_set(log.read()).equals(as_set(frame()))
    assert log.rows == 100
    assert log.verify() == 100


def test_the_same_source_again_changes_nothing(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id")
    log.append(frame())
    before = (tmp_path / "manifest.json").read_bytes()
    again = log.append(frame())
    assert (again.rows, again.new, again.already) == (100, 0, 100)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert log.rows == 100


def test_a_file_and_a_frame_with_the_same_rows_are_the_same_source(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path / "log", "user_id")
    frame().write_parquet(tmp_path / "new.parquet", row_group_size=13)
    assert log.append(tmp_path / "new.parquet", batch_rows=30).new == 100
    assert log.append(frame()).already == 100
    assert log.append(tmp_path / "new.parquet").already == 100
    assert as_set(log.read()).equals(as_set(frame()))


def test_csv_takes_the_types_of_the_log(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path / "log", "user_id")
    first = pl.DataFrame({"user_id": ["007", "x"], "time": [1.0, 2.0]})
    log.append(first)
    (tmp_path / "more.csv").write_text("time,user_id\n3,007\n4,8\n")
    assert log.append(tmp_path / "more.csv").new == 2
    assert log.read(["007"])["time"].to_list() == [1.0, 3.0]
    assert log.read(["8"])["time"].to_list() == [4.0]


def test_equal_batches_with_keys_are_two_batches(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id")
    assert log.append(frame(), key="offsets 0-99").new == 100
    assert log.append(frame(), key="offsets 100-199").new == 100
    assert log.append(frame(), key="offsets 0-99").already == 100
    with pytest.raises(DataError, match=r"Key 'offsets 0-99' was appended before with other content"):
        log.append(frame(start=5), key="offsets 0-99")
    assert log.rows == log.verify() == 200


def test_read_opens_only_the_buckets_of_the_tasks(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=8)
    log.append(frame())
    for bucket in range(8):
        if bucket != task_bucket(3, 8):
            for file in (tmp_path / "data" / f"bucket-{bucket:04d}").glob("*"):
                file.unlink()
    assert log.read([3]).equals(frame().filter(pl.col("user_id") == 3))
    assert log.read(["3", 3, 10**40, -(2**70)]).equals(frame().filter(pl.col("user_id") == 3))
    with pytest.raises(DataError, match=r"bucket-\d{4}.*is missing"):
        log.read()


def test_a_task_named_by_two_columns(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, ["user_id", "item_id"], buckets=5)
    log.append(frame())
    wanted = frame().filter(pl.col("user_id") == 7, pl.col("item_id") == "item 1")
    assert wanted.height
    assert log.read([(7, "item 1"), (999, "nobody")]).equals(wanted)
    with pytest.raises(DataError, match="has 1 values, but a task of this log is named by 2"):
        log.read([7])


def test_buckets_partition_the_tasks(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=6)
    log.append(frame(60))
    log.append(frame(60, start=1000))
    seen: dict[int, int] = {}
    total = 0
    for number, part in log.buckets():
        assert part.columns == frame().columns
        total += part.height
        for user in part["user_id"].unique():
            assert seen.setdefault(user, number) == number == task_bucket(user, 6)
        assert part["time"].is_sorted()  # append order, source order inside
        assert log.bucket(number).equals(part)
        assert log.bucket(number, through=1).equals(part.head((part["time"] < 1000).sum()))
    assert total == 120
    with pytest.raises(ConfigError, match="has buckets 0 to 5, and no 6"):
        log.bucket(6)


def test_the_bucket_of_a_task_never_changes() -> None:
    assert [task_bucket(k, 16) for k in (1, "1", "member-42", "ü" * 500)] == [1, 1, 12, 5]
    assert task_bucket(("a|b", "c"), 1 << 60) != task_bucket(("a", "b|c"), 1 << 60)
    assert task_bucket(("a", "b"), 1 << 60) == task_bucket("a|b", 1 << 60)


@settings(max_examples=25)
@given(ids=st.lists(st.text(max_size=500), min_size=1, max_size=20), buckets=st.integers(1, 9))
def test_any_text_is_an_id(tmp_path_factory: pytest.TempPathFactory, ids: list[str], buckets: int) -> None:
    log = InteractionLog(tmp_path_factory.mktemp("log"), "member", buckets)
    table = pl.DataFrame({"member": ids, "n": range(len(ids))})
    log.append(table)
    for member in set(ids):
        assert log.read([member]).equals(table.filter(pl.col("member") == member))


@settings(max_examples=30)
@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.text(max_size=3),
            st.none() | st.floats(),
            st.none() | st.lists(st.none() | st.integers(0, 3), max_size=3),
            st.none() | st.datetimes(),
            st.none() | st.booleans(),
        ),
        min_size=1,
        max_size=8,
    ),
    cut=st.integers(0, 8),
)
def test_the_digest_knows_content_and_nothing_else(rows: list[tuple[object, ...]], cut: int) -> None:
    schema = {"t": pl.String, "f": pl.Float64, "l": pl.List(pl.Int32), "d": pl.Datetime("us"), "b": pl.Boolean}
    table = pl.DataFrame(rows, schema=schema, orient="row")
    batched = ContentDigest()
    batched.update(table[:cut])
    batched.update(table[cut:])
    assert batched.hexdigest() == content_digest(table)
    assert content_digest(table.cast({"t": pl.Categorical, "l": pl.List(pl.Int64)})) == content_digest(table)
    for column in table.columns:
        with_null = table.with_columns(pl.when(pl.int_range(pl.len()) > 0).then(column).alias(column))
        changed = table[column][0] is not None
        assert (content_digest(with_null) != content_digest(table)) == changed
        assert content_digest(table.rename({column: "other"})) != content_digest(table)


def test_the_digest_tells_apart_what_looks_alike() -> None:
    tables = [
        {"a": ["ab", "c"]},
        {"a": ["a", "bc"]},
        {"a": ["abc", ""]},
        {"a": ["abc", None]},
        {"a": [["abc", ""], None]},
        {"a": [["abc"], [""]]},
        {"a": [["abc", ""], []]},
        {"a": [1, 0]},
        {"a": [1, None]},
        {"a": [True, False]},
        {"a": [1.0, 0.0]},
        {"a": ["1", "0"]},
        {"a": [datetime(1970, 1, 1), None]},
        {"a": [datetime(1970, 1, 1, tzinfo=UTC), None]},
        {"a": [{"x": 1}, {"x": 0}]},
        {"a": [{"y": 1}, {"y": 0}]},
    ]
    assert len({content_digest(pl.DataFrame(t)) for t in tables}) == len(tables)


def test_nulls_and_wrong_kinds_of_id_are_refused_with_the_row(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path / "log", ["user_id", "kind"])
    bad = pl.DataFrame({"user_id": ["a", "b", None, None], "kind": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(DataError) as raised:
        log.append(bad)
    assert "'user_id' of the frame has 2 nulls, the first in row 2" in str(raised.value)
    assert "'kind' of the frame is Float64" in str(raised.value)
    assert log.rows == 0
    good = pl.DataFrame({"user_id": ["a"] * 50 + [None], "kind": [1] * 51})
    good.write_parquet(tmp_path / "late.parquet")
    with pytest.raises(DataError, match=r"late\.parquet has 1 nulls, the first in row 50"):
        log.append(tmp_path / "late.parquet", batch_rows=20)
    assert log.rows == 0
    assert not list((tmp_path / "log" / "data").glob("*/*"))  # the first batches leave nothing


def test_schema_drift_names_every_column(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id")
    log.append(frame())
    drifted = frame(start=7).drop("item_id").with_columns(pl.col("time").cast(pl.String), price=pl.lit(1))
    with pytest.raises(DataError) as raised:
        log.append(drifted)
    message = str(raised.value)
    assert "Column 'item_id' (String)" in message
    assert "Column 'time' is String in the frame, but Int64" in message
    assert "Column 'price'" in message
    assert log.rows == 100
    with pytest.raises(DataError, match="Task column 'user_id' is missing"):
        log.append(frame(start=9).drop("user_id"))
    # another order of the columns, and a column without values, are no drift
    log.append(frame(start=9).with_columns(item_id=pl.lit(None)).select(reversed(frame().columns)))
    assert log.rows == 200


def test_damaged_files_are_named(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=2)
    log.append(frame())
    victim = sorted((tmp_path / "data").glob("*/*"))[0]
    content = bytearray(victim.read_bytes())
    victim.write_bytes(content[:-5])
    with pytest.raises(DataError, match=rf"{victim.name} has {len(content) - 5} bytes, but {len(content)}"):
        log.read()
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DataError, match=rf"{victim.name} is not what was written"):
        log.verify()
    (tmp_path / "manifest.json").write_text('{"format": 1, "task_col')
    with pytest.raises(DataError, match=r"manifest\.json, cannot be read"):
        log.read()
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="has format 99"):
        InteractionLog(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has data but no manifest"):
        InteractionLog(tmp_path)
    with pytest.raises(DataError, match=r"has data but no manifest"):
        InteractionLog(tmp_path, "user_id")


def test_settings_that_contradict_the_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no log"):
        InteractionLog(tmp_path)
    InteractionLog(tmp_path, "user_id", 4).append(frame())
    assert InteractionLog(tmp_path).task_columns == ("user_id",)
    assert InteractionLog(tmp_path).bucket_count == 4
    with pytest.raises(ConfigError, match="partitioned by"):
        InteractionLog(tmp_path, "item_id")
    with pytest.raises(ConfigError, match="has 4 buckets, not 5"):
        InteractionLog(tmp_path, "user_id", 5)
    with pytest.raises(ConfigError, match="at least 1 bucket"):
        InteractionLog(tmp_path / "x", "user_id", 0)


def test_an_empty_log_and_an_empty_append(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id")
    assert log.read().is_empty()
    assert log.read([1]).is_empty()
    assert log.append(frame()[:0]).new == 0
    assert log.append(frame()).new == 100
    assert log.read([12345]).schema == frame().schema


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path / "log", "user_id")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "a.xlsx").write_bytes(b"")
    for name, message in [("a.parquet", "cannot be read"), ("a.xlsx", "cannot read"), ("b.csv", "There is no file")]:
        with pytest.raises(DataError, match=message):
            log.append(tmp_path / name)
    assert log.rows == 0


def test_two_appenders_take_turns_or_one_says_so(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id")
    log.append(frame())
    with locked(tmp_path / ".lock", 1), pytest.raises(StoreError, match="Another process is writing"):
        log.append(frame(start=50), wait_s=0.05)
    assert log.append(frame(start=50), wait_s=0.05).new == 100


# the package's table of contents brings torch, which the log does not need: left out, the process starts at once
BARE = """
import importlib.util, sys, types, polars as pl
root = importlib.util.find_spec("limaml").submodule_search_locations[0]
for name, folder in (("limaml", root), ("limaml.interactions", root + "/interactions")):
    package = types.ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
"""
APPENDER = """
from limaml.interactions.log import InteractionLog
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
log = InteractionLog(folder, "user_id", buckets=4)
print("ready", flush=True)
for n in range(first, last):
    log.append(pl.DataFrame({"user_id": [f"u{i % 9}" for i in range(40)], "time": range(n * 40, n * 40 + 40)}))
    print(n, flush=True)
"""


def start_bare(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A script that says when it is ready, in a process of its own that has `pl` and `sys`."""
    command = [sys.executable, "-c", BARE + script, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def start_appender(folder: Path, first: int, last: int) -> subprocess.Popen[bytes]:
    return start_bare(APPENDER, folder, first, last)


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    processes = [start_appender(tmp_path, 0, 8), start_appender(tmp_path, 4, 12)]
    for process in processes:
        with process:
            assert process.wait(60) == 0
    assert sorted(InteractionLog(tmp_path).read()["time"]) == list(range(12 * 40))


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX signal")
def test_killed_at_any_moment_and_appended_again_is_exactly_once(tmp_path: Path) -> None:
    lottery = random.Random(3)
    interrupted = False
    for _ in range(5):
        process = start_appender(tmp_path, 0, 200)
        assert process.stdout is not None
        for _ in range(lottery.randrange(1, 40)):  # so many were appended, known ones too
            process.stdout.readline()
        time.sleep(lottery.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        with process:
            process.wait(30)
        log = InteractionLog(tmp_path, "user_id", 4)
        times = sorted(log.read()["time"].to_list()) if log.rows else []
        assert times == list(range(len(times)))  # whole appends, none twice, none missing
        assert len(times) % 40 == 0
        assert log.verify() == len(times)
        interrupted |= 0 < len(times) < 200 * 40
    assert interrupted
    with start_appender(tmp_path, 0, len(times) // 40 + 3) as process:
        assert process.wait(60) == 0
    log = InteractionLog(tmp_path)
    assert sorted(log.read()["time"].to_list()) == list(range(len(times) + 3 * 40))
    named = {file["path"] for file in json.loads((tmp_path / "manifest.json").read_text())["files"]}
    assert {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "data").glob("*/*")} == named


def test_files_that_no_manifest_names_are_ignored_and_then_removed(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=1)
    log.append(frame())
    orphan = tmp_path / "data" / "bucket-0000" / "00000001-0.parquet"
    frame(start=500).write_parquet(orphan)
    assert log.rows == log.read().height == 100
    log.append(frame())
    assert not orphan.exists()


@pytest.mark.parametrize(("rows", "buckets"), [(0, 16), (32_000_000, 16), (32_000_001, 32), (10**9, 512)])
def test_a_longer_log_begins_with_more_buckets(rows: int, buckets: int) -> None:
    assert buckets_for(rows) == buckets
