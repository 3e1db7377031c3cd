"""What leaves a log for good, what stays, and folding that needs no more memory than one file."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import ConfigError, DataError, StoreError
from limaml.interactions import log as log_module
from limaml.interactions import log_compact
from limaml.interactions.log import InteractionLog
from limaml.interactions.log_manifest import Manifest

NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
DAY = 86_400


def events(*rows: tuple[str, int]) -> pl.DataFrame:
    """Members and times, in seconds since 1970."""
    return pl.DataFrame(rows, schema={"user": pl.String, "time": pl.Int64}, orient="row")


Rows = list[tuple[str, int]]
Write = Callable[[Path, Manifest], None]


@settings(max_examples=25)
@given(
    appends=st.lists(
        st.tuples(st.booleans(), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 8)), max_size=12)),
        min_size=1,
        max_size=5,
    ),
    last=st.none() | st.integers(1, 4),
    days=st.none() | st.integers(1, 8),
)
def test_a_row_stays_if_both_rules_keep_it(
    tmp_path_factory: pytest.TempPathFactory, appends: list[tuple[bool, Rows]], last: int | None, days: int | None
) -> None:
    """Against sorting plain lists."""
    log = InteractionLog(tmp_path_factory.mktemp("log"), "user", 3)
    at = int(NOW.timestamp())
    whole: Rows = []
    for number, (stream, rows) in enumerate(appends):
        timed = [(user, at - age * DAY) for user, age in rows]
        log.append(events(*timed), key=None if stream else str(number), positions={"s": number} if stream else None)
        whole += timed
    young = [(user, time) for user, time in whole if days is None or time > at - days * DAY]
    if last is None and days is None:
        with pytest.raises(ConfigError, match="Nothing says which interactions stay"):
            log.retain("time")
        return
    age = None if days is None else dt.timedelta(days=days)
    rule = {"newer_than": age, "last": last, "now": NOW, "unit": "s"}
    if whole and not young:
        with pytest.raises(DataError, match=r"newer than .* nothing was removed"):
            log.retain("time", **rule)  # type: ignore[arg-type]
        assert log.rows == len(whole)
        return
    expected: Rows = []
    for user in "abcdef":
        own = sorted((row for row in whole if row[0] == user), key=lambda row: row[1])  # stable, as the log's order is
        own = own if last is None else own[-last:]
        expected += [row for row in own if row in young]
    before = log.read()
    told = log.retain("time", dry_run=True, **rule)  # type: ignore[arg-type]
    assert log.read().equals(before)
    done = log.retain("time", **rule)  # type: ignore[arg-type]
    assert told == done and (done.rows, done.removed) == (len(whole), len(whole) - len(expected))
    assert log.rows == log.verify() == len(expected)
    assert sorted(log.read().rows() if log.rows else []) == sorted(expected)
    assert log.retain("time", **rule).removed == 0  # type: ignore[arg-type]
    for number, (stream, rows) in enumerate(appends):  # nothing comes back
        if not stream:
            log.append(events(*[(user, at - age * DAY) for user, age in rows]), key=str(number))
    assert log.rows == len(expected)


def test_of_equal_times_the_later_appended_stays(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user", 2)
    frame = pl.DataFrame({"user": ["a"] * 5, "time": [5, 5, 1, 5, 9], "n": range(5)})
    log.append(frame)
    log.append(frame.with_columns(pl.col("n") + 5), positions={"s": 1})
    log.retain("time", last=3)
    assert log.read()["n"].to_list() == [4, 8, 9]
    assert [(n, part["n"].to_list()) for n, part in log.since(0)] == [(1, [4]), (2, [8, 9])]


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (pl.Series([NOW - dt.timedelta(days=d) for d in (1, 99)]), None),
        (
            pl.Series([(NOW - dt.timedelta(days=d)).replace(tzinfo=None) for d in (1, 99)], dtype=pl.Datetime("ms")),
            None,
        ),
        (pl.Series([(NOW - dt.timedelta(days=d)).date() for d in (1, 99)]), None),
        (pl.Series([int((NOW - dt.timedelta(days=d)).timestamp()) * 1000 for d in (1, 99)]), "ms"),
        (pl.Series([int((NOW - dt.timedelta(days=d)).timestamp()) for d in (1, 99)], dtype=pl.Int32), "s"),
    ],
)
def test_an_age_in_any_kind_of_time(tmp_path: Path, times: pl.Series, unit: str | None) -> None:
    log = InteractionLog(tmp_path, "user", 2)
    log.append(pl.DataFrame({"user": [1, 2], "time": times}))
    log.retain("time", newer_than=dt.timedelta(days=90), now=NOW, unit=unit)  # type: ignore[arg-type]
    assert log.read()["user"].to_list() == [1]


def test_stopped_at_any_step_a_retention_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops it is a fault at the n-th write of the manifest, before anything is renamed."""
    frame = pl.DataFrame({"user": [n % 20 for n in range(400)], "n": range(400)})
    expected = frame.filter(pl.col("n") >= 400 - 20 * 3)
    for step in range(1, 6):
        log = InteractionLog(tmp_path / str(step), "user", 4)
        log.append(frame[:300])
        log.append(frame[300:], positions={"s": 1})
        calls = 0
        write = log_module.write_manifest

        def failing(path: Path, manifest: Manifest, step: int = step, write: Write = write) -> None:
            nonlocal calls
            calls += 1
            if calls == step:
                raise StoreError("the disk is gone")
            write(path, manifest)

        with monkeypatch.context() as patch:
            patch.setattr(log_module, "write_manifest", failing)
            with pytest.raises(StoreError, match="the disk is gone"):
                log.retain("n", last=3)
        there = log.read()
        assert log.verify() == there.height > expected.height
        assert set(expected["n"]) <= set(there["n"]) and there["n"].is_unique().all()
        named = {file.path for file in log.contents().files}
        assert {path.relative_to(log.folder).as_posix() for path in (log.folder / "data").glob("*/*")} == named
        assert log.retain("n", last=3).removed == there.height - expected.height
        assert log.read().sort("n").equals(expected)


def test_what_cannot_be_meant_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user", 2)
    log.append(pl.DataFrame({"user": ["a", "b"], "time": [1, 2], "text": ["x", "y"]}))
    month = dt.timedelta(days=30)
    for settings_, message in [
        (("nothing", None, 1, None), "no column 'nothing'"),
        (("text", None, 1, None), "'text' is String, which is no time"),
        (("time", None, 0, None), "`last` is 0"),
        (("time", -month, None, "s"), "give an age above zero"),
        (("time", month, None, None), "say what it counts since 1970"),
        (("time", month, None, "s"), "No interaction of the log .* is newer"),
    ]:
        time, age, last, unit = settings_
        with pytest.raises((ConfigError, DataError), match=message):
            log.retain(time, newer_than=age, last=last, unit=unit)  # type: ignore[arg-type]
    log.append(pl.DataFrame({"user": ["a", "b"], "time": [3, None], "text": ["x", "y"]}))
    with pytest.raises(DataError, match=r"has no time in 1 row\(s\)"):
        log.retain("time", last=1)
    assert log.rows == log.verify() == 4


def test_a_log_that_keeps_no_row_of_a_bucket_keeps_its_columns(tmp_path: Path) -> None:
    log = InteractionLog(tmp_path, "user", 4)
    at = int(NOW.timestamp())
    log.append(events(*[(f"u{i}", at - (i % 3) * 40 * DAY) for i in range(30)]))
    done = log.retain("time", newer_than=dt.timedelta(days=1), now=NOW, unit="s")
    assert (done.rows, done.removed) == (30, 20)
    assert log.read().height == 10 and log.read().schema == log.schema


@settings(max_examples=12)
@given(
    sizes=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=1, max_size=10),
    file_bytes=st.sampled_from([1, 3000, 2**26]),
    tail_bytes=st.sampled_from([1, 2500, 2**26]),
)
def test_folding_in_any_portions_changes_no_row_and_no_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[bool, int]], file_bytes: int, tail_bytes: int
) -> None:
    """Tails older, newer and between whole files, folded with room for all of them, for a few, or for one at a time."""
    log = InteractionLog(tmp_path_factory.mktemp("log"), "user", 2)
    start = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_compact, "FILE_BYTES", file_bytes)
        patch.setattr(log_compact, "TAIL_BYTES", tail_bytes)
        for number, (stream, size) in enumerate(sizes):
            rows = events(*[(f"u{n % 7}", n) for n in range(start, start + size)])
            log.append(rows, positions={"s": number} if stream else None)
            start += size
            if number % 4 == 3:
                log.compact()
        before, since = log.read(), [(n, part.rows()) for n, part in log.since(0)]
        log.compact()
        assert log.tails == 0
        assert log.read().equals(before)
        assert [(n, part.rows()) for n, part in log.since(0)] == since
        steps = 0
        while log.compact().rows:  # what was written in portions may be folded once more, but not for ever
            steps += 1
            assert steps < 6
        assert log.read().equals(before)
    assert log.verify() == log.rows == start
