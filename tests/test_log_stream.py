"""What a stream asks of the log: positions, numbered appends, folding, and tasks that are forgotten."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import DataError
from limaml.interactions.log import InteractionLog
from tests.test_log import start_bare


def batch(first: int, rows: int, tasks: int = 7) -> pl.DataFrame:
    """Rows that can be told apart: `n` is first, first + 1, …."""
    numbers = range(first, first + rows)
    return pl.DataFrame(
        {"user_id": [f"u{(n * 5) % tasks}" for n in numbers], "item": [n % 3 for n in numbers], "n": list(numbers)},
        schema={"user_id": pl.String, "item": pl.Int64, "n": pl.Int64},
    )


def test_positions_are_kept_in_the_step_that_keeps_the_rows(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=3)
    assert log.positions() == {}
    done = log.append(batch(0, 10), positions={"kafka:t:0": 9, "kafka:t:1": 4})
    assert (done.rows, done.new, done.already) == (10, 10, 0)
    assert log.append(batch(0, 10), positions={"kafka:t:0": 9, "kafka:t:1": 4}).already == 10
    assert log.append(batch(5, 5), positions={"kafka:t:0": 7}).already == 5
    assert log.append(batch(0, 0), positions={"kafka:t:1": 8}).rows == 0  # nothing but poison in it
    assert log.append(batch(0, 10), positions={"kafka:t:0": 19}).new == 10  # equal rows at other positions are others
    with pytest.raises(DataError, match=r"ends at position 3 of 'kafka:t:1', but the log .* up to 8"):
        log.append(batch(30, 5), positions={"kafka:t:0": 25, "kafka:t:1": 3})
    assert InteractionLog(tmp_path).positions() == {"kafka:t:0": 19, "kafka:t:1": 8}
    assert log.rows == log.verify() == 20
    assert log.tails == 2


def test_a_stream_append_is_one_file(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=8)
    log.append(batch(0, 50), positions={"s": 50})
    assert [path.parent.name for path in (tmp_path / "data").glob("*/*")] == ["tail"]
    assert log.read(["u3"]).equals(batch(0, 50).filter(pl.col("user_id") == "u3"))


Step = tuple[str, int]


@settings(max_examples=12)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["file", "stream", "compact", "forget"]), st.integers(0, 12)), min_size=1, max_size=14
    )
)
def test_any_sequence_of_writes_reads_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    """Against a list of appends: read, since and buckets say what the list says, in its order."""
    log = InteractionLog(tmp_path_factory.mktemp("log"), "user_id", buckets=3)
    appends: dict[int, pl.DataFrame] = {}
    dead: set[str] = set()
    place, number = 0, 0
    for what, size in steps:
        if what in ("file", "stream"):
            rows = batch(place, size)
            place += size
            kept = rows.filter(~pl.col("user_id").is_in(sorted(dead)))
            done = log.append(rows, positions={"s": place} if what == "stream" else None)
            assert (done.new, done.forgotten) == (kept.height, size - kept.height)
            number += size > 0
            if size:
                appends[number] = kept
        elif what == "compact":
            before = log.read()
            log.compact()
            assert log.read().equals(before)
            assert log.tails == 0
        else:
            key = f"u{size % 7}"
            dead.add(key)
            expected = sum(part.filter(pl.col("user_id") == key).height for part in appends.values())
            assert log.forget("user_id", ["user_id"], [key]) == expected
            appends = {n: part.filter(pl.col("user_id") != key) for n, part in appends.items()}
    everything = pl.concat([batch(0, 0), *appends.values()])
    assert log.position == number
    assert log.verify() == log.rows == everything.height
    assert sorted(log.read()["n"].to_list() if log.rows else []) == sorted(everything["n"].to_list())
    for user in everything["user_id"].unique():
        assert log.read([user]).equals(everything.filter(pl.col("user_id") == user))
    for start in range(number + 1):
        found = list(log.since(start))
        expected_parts = {n: part for n, part in appends.items() if n > start and part.height}
        assert [n for n, _ in found] == sorted(expected_parts)
        for n, part in found:
            assert part.sort("n").equals(expected_parts[n].sort("n"))
            assert part["user_id"].equals(log.read(through=n).filter(pl.col("n").is_in(part["n"].implode()))["user_id"])
    if log.rows:
        through = log.read(through=number - 1) if number > 1 else batch(0, 0)
        assert sorted(through["n"]) == sorted(
            pl.concat([batch(0, 0), *(p for n, p in appends.items() if n < number)])["n"]
        )
        assert pl.concat([part for _, part in log.buckets()]).equals(log.read())


def test_folding_writes_each_row_a_logarithmic_number_of_times(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=2)
    log.append(batch(0, 2000))
    written = 0
    for step in range(32):
        log.append(batch(2000 + step * 20, 20), positions={"s": step + 1})
        written += log.compact().rows
    assert log.rows == log.verify() == 2000 + 32 * 20
    assert written < 8 * 32 * 20  # and not 32 · 2000
    assert len(list((tmp_path / "data").glob("*/*"))) < 20


def test_forgetting_another_task_type_looks_everywhere(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=4)
    log.append(batch(0, 40))
    log.append(batch(40, 20), positions={"s": 1})
    assert log.forget("item", ["item"], ["1"]) == 20
    assert 1 not in log.read()["item"].to_list()
    assert log.forget("item", ["item"], ["1"]) == 0  # done again, nothing more
    done = log.append(batch(60, 30))
    assert (done.new, done.forgotten) == (20, 10)
    assert log.forgotten() == {"item": frozenset({"1"})}
    assert log.recall("item", ["1", "2"]) == 1
    assert log.append(batch(90, 30)).forgotten == 0
    assert log.verify() == log.rows == 40 + 20 + 30


def test_a_log_that_lost_all_rows_keeps_its_columns(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id", buckets=2)
    log.append(batch(0, 3, tasks=1), positions={"s": 3})
    log.forget("user_id", ["user_id"], ["u0"])
    log.compact()
    assert log.read().schema == batch(0, 0).schema == log.schema
    with pytest.raises(DataError, match="Column 'n' is String"):
        log.append(batch(0, 3).with_columns(pl.col("n").cast(pl.String)))


def test_a_damaged_list_of_forgotten_tasks_stops_appends(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user_id")
    log.append(batch(0, 5))
    (tmp_path / "forgotten.json").write_text('{"format": 1')
    with pytest.raises(DataError, match=r"list of forgotten tasks, .*forgotten\.json, cannot be read"):
        log.append(batch(5, 5))
    assert log.rows == 5


FOLDER = """
from limaml.interactions.log import InteractionLog
log = InteractionLog(sys.argv[1], "user_id", buckets=3)
print("ready", flush=True)
n = log.positions().get("s", 0)
while True:
    numbers = range(n, n + 9)
    log.append(pl.DataFrame({"user_id": [f"u{i % 5}" for i in numbers], "n": list(numbers)}), positions={"s": n + 9})
    n += 9
    if n % 27 == 0:
        log.compact()
"""


def test_killed_while_it_streams_and_folds(tmp_path: Path) -> None:
    lottery = random.Random(5)
    seen = 0
    for _ in range(6):
        process = start_bare(FOLDER, tmp_path)
        reader = InteractionLog(tmp_path, "user_id", 3)
        end = time.monotonic() + lottery.uniform(0.02, 0.3)
        while time.monotonic() < end:  # a reader beside it sees whole appends, though files are folded away
            numbers = sorted(reader.read()["n"].to_list()) if reader.rows else []
            assert numbers == list(range(len(numbers))) and len(numbers) % 9 == 0
            since = [n for _, part in reader.since(0) for n in part["n"].to_list()]
            assert sorted(since) == list(range(len(since)))
        process.send_signal(signal.SIGKILL)
        with process:
            process.wait(30)
        log = InteractionLog(tmp_path)
        assert log.positions().get("s", 0) == log.rows == log.verify()
        assert sorted(log.read()["n"]) == list(range(log.rows))
        seen += log.rows > 0
    assert seen
