"""Windows hold what reading the whole log gives: same counts, same rows, same order, whatever came in which way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.embeddings.window_database import WindowDatabase
from limaml.embeddings.windows import Layout, Windows
from limaml.errors import ConfigError
from limaml.interactions import Schema, clean
from limaml.interactions.index import sort_order
from limaml.interactions.keys import task_keys
from limaml.interactions.log import InteractionLog
from limaml.interactions.schema import Task
from limaml.store import environment

TYPES = {
    "user": pl.String, "item": pl.Int64, "time": pl.Int64, "click": pl.Int8, "tags": pl.List(pl.String), "x": pl.Float64
}  # fmt: skip
USER, ITEM = Task(name="user", columns=("user",)), Task(name="item", columns=("item",))
TAGS: list[list[str] | None] = [None, [], ["a"], ["a", "b"]]


def table(rows: list[tuple[int, ...]]) -> pl.DataFrame:
    """Rows of few values each, so that there are ties, duplicates and late ones."""
    return pl.DataFrame(
        [
            (f"u{user}", item, time, click, TAGS[tags], None if click else float("nan"))
            for user, item, time, click, tags in rows
        ],
        schema=TYPES,
        orient="row",
    )


def schema_of(tasks: tuple[Task, ...]) -> Schema:
    return Schema.model_validate({"tasks": [t.model_dump() for t in tasks], "labels": ["click"], "time": "time"})


def expected(log: InteractionLog, schema: Schema, task: Task, keep: int | None) -> dict[str, tuple[int, pl.DataFrame]]:
    """Task key → number of interactions and the last `keep` rows, as embedding everything anew sees them."""
    frame, _ = clean(log.read(), schema)
    order, _, _ = sort_order(frame, schema)
    frame = frame[order]
    keys, codes = task_keys(frame, task)
    rows = {key: frame.filter(pl.Series(codes == i)) for i, key in enumerate(keys)}
    return {key: (own.height, own if keep is None else own.tail(keep)) for key, own in rows.items()}


def assert_equal(windows: Windows, log: InteractionLog, schema: Schema, keep: int | None) -> None:
    for task in schema.tasks:
        wanted = expected(log, schema, task, keep)
        keys = [*wanted, "nobody"]
        held = windows.read(task.name, keys)
        assert held.count.tolist() == [*(count for count, _ in wanted.values()), 0]
        whole = pl.concat([pl.DataFrame(schema=TYPES), *(rows for _, rows in wanted.values())])
        assert held.frame.equals(whole)
        sizes = np.bincount(held.owner, minlength=len(keys)).tolist()
        assert sizes == [*(rows.height for _, rows in wanted.values()), 0]
        assert held.newest.tolist() == [*(rows["time"][-1] for _, rows in wanted.values()), 0]
        assert windows.count(task.name) == len(wanted)
        newer = {key for key, (_, rows) in wanted.items() if rows["time"][-1] > 3}
        assert set(windows.newer_than(task.name, 3)) == newer


ROW = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 6), st.integers(0, 1), st.integers(0, 3))


@settings(max_examples=10)
@given(
    appends=st.lists(
        st.tuples(st.sampled_from(["file", "stream", "catch up", "fold", "rebuild"]), st.lists(ROW, max_size=12)),
        min_size=1,
        max_size=8,
    ),
    keep=st.sampled_from([1, 2, 3, None]),
    both=st.booleans(),
)
def test_windows_are_what_the_log_gives(
    tmp_path_factory: pytest.TempPathFactory,
    appends: list[tuple[str, list[tuple[int, ...]]]],
    keep: int | None,
    both: bool,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    schema = schema_of((USER, ITEM) if both else (USER,))
    log = InteractionLog(folder / "log", "user", buckets=3)
    log.append(table([(0, 0, 3, 1, 2)]))
    with Windows(folder / "windows", log, Layout.of(schema, keep)) as windows:
        for number, (what, rows) in enumerate(appends):
            before = log.position
            log.append(table(rows), positions={"s": number} if what == "stream" else None)
            if what == "fold":
                log.compact()
            if what == "catch up":
                caught = windows.position == before
                done = windows.catch_up()
                assert done.position == log.position
                if caught and log.position > before:
                    old, _ = clean(log.read(through=before), schema) if before else (table([]), None)
                    now, _ = clean(log.read(), schema)
                    assert done.rebuilt or done.duplicates == len(table(rows)) - (now.height - old.height)
                    assert_equal(windows, log, schema, keep)
            if what == "rebuild":
                assert windows.rebuild().rows == log.rows
        windows.catch_up()
        assert_equal(windows, log, schema, keep)
        assert windows.catch_up().rows == 0


@settings(max_examples=6)
@given(parts=st.lists(st.lists(ROW, min_size=1, max_size=6), min_size=1, max_size=6), both=st.booleans())
def test_what_changed_since_an_append_is_known(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[tuple[int, ...]]], both: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    schema = schema_of((USER, ITEM) if both else (USER,))
    log = InteractionLog(folder / "log", "user", buckets=2)
    with Windows(folder / "windows", log, Layout.of(schema, 2)) as windows:
        for number, rows in enumerate(parts):
            log.append(table(rows), key=str(number))
            if number % 2:
                windows.catch_up()
        windows.catch_up()
        for again in (False, True):
            for position in range(len(parts) + 1):
                old = clean(log.read(through=position), schema)[0] if position else table([])
                new = clean(pl.concat([old, *(part for n, part in log.since(position))]), schema)[0][old.height :]
                for task in schema.tasks:
                    assert set(windows.changed_since(task.name, position)) == set(task_keys(new, task)[0])
            if not again:
                windows.rebuild()


def run(folder: Path, keep: int | None = 2) -> tuple[InteractionLog, Schema, Layout]:
    schema = schema_of((USER, ITEM))
    return InteractionLog(folder / "log", "user", buckets=2), schema, Layout.of(schema, keep)


def test_a_late_row_is_looked_up_in_the_log(tmp_path: Path) -> None:
    log, schema, layout = run(tmp_path)
    log.append(table([(0, item, time, 1, 0) for time in range(6) for item in range(2)]))
    with Windows(tmp_path / "windows", log, layout) as windows:
        assert windows.catch_up().rebuilt == "there were no windows yet"
        log.append(
            table([(0, 0, 1, 1, 0), (0, 0, 1, 0, 0)])
        )  # one that is known, hidden by the window; one that is new
        done = windows.catch_up()
        assert (done.rows, done.duplicates, done.reread) == (2, 1, 1)
        assert_equal(windows, log, schema, 2)
        log.append(table([(0, 0, 9, 1, 0)]))
        assert windows.catch_up().reread == 0


def test_longer_windows_and_more_task_types_are_made_from_the_log(tmp_path: Path) -> None:
    log, schema, layout = run(tmp_path)
    log.append(table([(n % 3, n % 2, n % 5, 1, n % 4) for n in range(40)]))
    one = schema_of((USER,))
    with Windows(tmp_path / "windows", log, Layout.of(one, 2)) as windows:
        windows.catch_up()
        windows.settle("v1", 1)
        with pytest.raises(ConfigError, match="There are no windows of 'item'"):
            windows.read("item", ["1"])
    with Windows(tmp_path / "windows", log, layout) as windows:
        assert "a model needs longer windows" in windows.catch_up().rebuilt
        assert_equal(windows, log, schema, 2)
        assert (windows.refreshed("v1"), windows.refreshed("v2")) == (1, None)
    with Windows(tmp_path / "windows", log, Layout.of(one, 1)) as windows:  # what holds more serves as well
        assert windows.catch_up().rebuilt == ""
        assert windows.read("user", ["u0"], most=1).frame.height == 1
        assert windows.layout.keep == 2
    with pytest.raises(ConfigError, match="orders interactions by 'time' and another by 'when'"):
        Windows(tmp_path / "windows", log, Layout(layout.tasks, "when", 2))
    assert str(tmp_path / "windows") not in environment._open  # what was refused is closed


def test_windows_of_another_log_are_not_used(tmp_path: Path) -> None:
    log, schema, layout = run(tmp_path)
    log.append(table([(0, 0, 1, 1, 0)]))
    with Windows(tmp_path / "windows", log, layout) as windows:
        windows.catch_up()
        windows.settle("v1", 1)
    other = InteractionLog(tmp_path / "other", "user", buckets=2)
    other.append(table([(1, 1, 2, 1, 0)]))
    with Windows(tmp_path / "windows", other, layout) as windows:
        assert windows.catch_up().rebuilt == "the windows are those of another log"
        assert_equal(windows, other, schema, 2)
        assert windows.refreshed("v1") is None


def test_two_who_catch_up_at_once_take_each_row_in_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, schema, layout = run(tmp_path)
    log.append(table([(n % 3, n % 2, n % 5, 1, n % 4) for n in range(20)]))
    with Windows(tmp_path / "windows", log, layout) as one, Windows(tmp_path / "windows", log, layout) as other:
        one.catch_up()
        log.append(table([(n % 3, n % 2, 5 + n % 3, 0, n % 4) for n in range(9)]))
        put, raced = WindowDatabase.put, []

        def after_the_other(self: WindowDatabase, *arguments: object) -> bool:
            if self is one._database and not raced:
                raced.append(other.catch_up().rows)
            return put(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(WindowDatabase, "put", after_the_other)
        assert one.catch_up().rows == 0  # the other one was faster
        assert raced == [9]
        assert_equal(one, log, schema, 2)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what of a file is in memory is said by Linux alone")
def test_making_windows_holds_no_more_of_their_file_than_a_bucket_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, members = InteractionLog(tmp_path / "log", "user", buckets=8), 2000
    users = [f"u{n}" for n in range(members)]
    log.append(pl.DataFrame({"user": users, "time": range(members), "click": 1, "said": ["x" * 3000] * members}))
    file, held = tmp_path / "windows" / "data.mdb", list[int]()
    buckets = InteractionLog.buckets

    def watched(self: InteractionLog, **options: Any) -> Iterator[Any]:
        for each in buckets(self, **options):
            held.append(in_memory(file))
            yield each

    monkeypatch.setattr(InteractionLog, "buckets", watched)
    with Windows(tmp_path / "windows", log, Layout.of(schema_of((USER,)), 3)) as windows:
        windows.catch_up()
        assert len(held) == 8
        assert max(held) < 0.1 * file.stat().st_size
        assert windows.read("user", users).count.tolist() == [1] * members
        assert in_memory(file) > max(held)  # what is looked at is seen


def in_memory(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(f" {file.resolve()}")
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_keys_of_any_length(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path / "log", "user", buckets=2)
    schema = schema_of((USER,))
    users = ["ü" * 300, "ü" * 300 + "x", "short", ""]
    log.append(pl.DataFrame({"user": users * 2, "time": range(8), "click": [1] * 8}))
    with Windows(tmp_path / "windows", log, Layout.of(schema, 3)) as windows:
        windows.catch_up()
        assert windows.read("user", users).count.tolist() == [2, 2, 2, 2]
        assert sorted(windows.changed_since("user", 0)) == sorted(users)


@settings(max_examples=6)
@given(rows=st.lists(ROW, min_size=1, max_size=25), user=st.integers(0, 2))
def test_a_forgotten_task_leaves_all_windows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]], user: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    log, schema, layout = run(folder, keep=3)
    log.append(table(rows))
    with Windows(folder / "windows", log, layout) as windows:
        windows.catch_up()
        epoch, items = windows.epoch, [str(item) for item in range(3)]
        before = windows.read("item", items)
        log.mark_forgotten("user", ["user"], [f"u{user}"])
        windows.forget("user", [f"u{user}"])
        log.forget("user", ["user"], [f"u{user}"])
        assert windows.epoch != epoch
        assert windows.read("user", [f"u{user}"]).count.tolist() == [0]
        after = windows.read("item", items)
        kept = before.frame.filter(pl.col("user") != f"u{user}")
        assert after.frame.equals(kept)
        log.append(table([(0, 0, 9, 1, 1), (1, 1, 9, 1, 1), (2, 2, 9, 1, 1)]))
        windows.catch_up()
        assert f"u{user}" not in windows.read("item", items).frame["user"].to_list()
        windows.rebuild()
        assert_equal(windows, log, schema, 3)
