"""Taking many sources in: from folders, globs and URLs, in bounded memory, each once, whatever is killed or damaged."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import ConfigError, DataError, StoreError
from limaml.interactions.key_hash import key_hash, key_hashes
from limaml.interactions.keys import join_key
from limaml.interactions.log import InteractionLog
from limaml.interactions.log_sources import found_sources
from tests.test_log import start_bare

FULL = os.environ.get("LIMAML_FAULTS") == "full"


def clicks(first: int, rows: int, tasks: int = 50) -> pl.DataFrame:
    """Rows that can be told apart by `n`."""
    n = pl.int_range(first, first + rows, eager=True)
    return pl.DataFrame({"user": (n * 7919) % tasks, "n": n, "text": n.cast(pl.String)})


def write(folder: Path, parts: int, rows: int = 100, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        clicks(start + part * rows, rows).write_parquet(folder / f"part-{part:03d}.parquet")
    return folder


def numbers(log: InteractionLog) -> list[int]:
    return sorted(log.read()["n"].to_list()) if log.rows else []


def test_folders_globs_and_files_are_one_list(tmp_path: Path) -> None:
    write(tmp_path / "in" / "day=1", 2)
    write(tmp_path / "in" / "day=2", 1, start=200)
    (tmp_path / "in" / "_SUCCESS").touch()
    (tmp_path / "in" / "_temporary").mkdir()
    (tmp_path / "in" / "_temporary" / "x.parquet").touch()
    (tmp_path / "in" / ".hidden.parquet").touch()
    clicks(300, 100).write_csv(tmp_path / "in" / "more.csv")
    everything = found_sources([tmp_path / "in"])
    assert [Path(name).name for name in everything] == [
        "part-000.parquet",
        "part-001.parquet",
        "part-000.parquet",
        "more.csv",
    ]
    assert found_sources([tmp_path / "in" / "day=*", tmp_path / "in"]) == everything
    assert found_sources([f"{tmp_path}/in/**/part-001.parquet"]) == [everything[1]]
    with pytest.raises(DataError, match=r"There is no .*\.csv.* file at .*nothing-\*"):
        found_sources([tmp_path / "nothing-*"])
    log = InteractionLog(tmp_path / "log", "user", 4)
    seen: list[tuple[int, int, int]] = []
    done = log.append_all([tmp_path / "in"], progress=lambda *at: seen.append(at))
    assert [one.new for one in done.values()] == [100] * 4
    assert seen[-1] == (400, 4, 4)
    assert numbers(log) == list(range(400))
    # small sources share files, and each has a number of its own
    assert len(log.contents().files) == 4
    assert [(n, part["n"].sort().to_list()) for n, part in log.since(2)] == [
        (3, list(range(200, 300))),
        (4, list(range(300, 400))),
    ]
    again = log.append_all([tmp_path / "in" / "day=2", tmp_path / "in"])
    assert sum(one.new for one in again.values()) == 0 and log.position == 4


@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    buffer=st.integers(1, 4000),
    batch=st.integers(1, 70),
    buckets=st.integers(1, 5),
)
def test_any_buffer_gives_the_same_log(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], buffer: int, batch: int, buckets: int
) -> None:
    """However little fits into memory, against one append for each source with all of it in memory."""
    folder = tmp_path_factory.mktemp("in")
    start = 0
    for number, size in enumerate(sizes):
        clicks(start, size, tasks=9).write_parquet(folder / f"{number}.parquet")
        start += size
    log, plain = InteractionLog(folder / "log", "user", buckets), InteractionLog(folder / "plain", "user", buckets)
    given_sources = sorted(folder.glob("*.parquet"))
    done = log.append_all([*given_sources, *given_sources], buffer_bytes=buffer, batch_rows=batch)
    expected = [plain.append(source) for source in given_sources]
    assert list(done.values()) == expected
    assert log.position == plain.position and log.verify() == plain.verify() == start
    assert log.read().equals(plain.read())
    for number in range(log.position + 1):
        assert [(n, part.to_dicts()) for n, part in log.since(number)] == [
            (n, part.to_dicts()) for n, part in plain.since(number)
        ]
    log.compact()
    assert log.read().equals(plain.read())
    assert sum(one.new for one in log.append_all(given_sources, buffer_bytes=buffer).values()) == 0


def test_a_known_source_larger_than_the_buffer_leaves_no_file(tmp_path: Path) -> None:
    clicks(0, 3000).write_parquet(tmp_path / "big.parquet")
    log = InteractionLog(tmp_path / "log", "user", 3)
    log.append(tmp_path / "big.parquet", buffer_bytes=10_000, batch_rows=500)
    files = sorted((tmp_path / "log" / "data").glob("*/*"))
    assert len(files) > 6
    assert log.append(tmp_path / "big.parquet", buffer_bytes=10_000, batch_rows=300).already == 3000
    assert sorted((tmp_path / "log" / "data").glob("*/*")) == files


def test_a_url_differs_from_a_path_in_nothing_else(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    write(tmp_path / "in" / "day=1", 2)
    clicks(200, 50).write_csv(tmp_path / "in" / "last.csv")
    memory.put(str(tmp_path / "in"), "/bucket/clicks", recursive=True)
    here, there = InteractionLog(tmp_path / "here", "user", 4), InteractionLog(tmp_path / "there", "user", 4)
    ours = here.append_all([tmp_path / "in"])
    for address in ("memory://bucket/clicks", "memory://bucket/clicks/**"):
        theirs = there.append_all([address])
        assert [one.digest for one in theirs.values()] == [one.digest for one in ours.values()]
    assert there.read().equals(here.read()) and there.rows == 250
    assert there.append("memory://bucket/clicks/last.csv").already == 50
    assert not list((tmp_path / "there" / "data" / "incoming").glob("*"))
    for address, message in [
        ("memory://bucket/other/", r"no .* file at memory://bucket/other/"),
        ("memory://bucket/none.parquet", r"memory://bucket/none\.parquet cannot be read \(FileNotFoundError"),
        (f"file://{tmp_path}/none.csv", r"none\.csv cannot be read"),
    ]:
        with pytest.raises(DataError, match=message):
            there.append_all([address])
    with pytest.raises(ConfigError, match=r"nope://x cannot be opened .*s3fs for s3://"):
        there.append_all(["nope://x"])
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_over_http(tmp_path: Path, loopback: str) -> None:
    write(tmp_path / "in", 1)
    log = InteractionLog(tmp_path / "log", "user", 2)
    assert log.append(f"{loopback}/in/part-000.parquet").new == 100
    with pytest.raises(DataError, match=r"missing\.parquet cannot be read"):
        log.append(f"{loopback}/in/missing.parquet")
    assert log.rows == 100


def test_truncated_files_are_named_before_anything_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "in", 4)
    for part in (1, 3):
        path = tmp_path / "in" / f"part-{part:03d}.parquet"
        path.write_bytes(path.read_bytes()[:-20])
    log = InteractionLog(tmp_path / "log", "user", 2)
    with pytest.raises(DataError) as raised:
        log.append_all([tmp_path / "in"])
    assert "part-001.parquet cannot be read" in str(raised.value)
    assert "part-003.parquet cannot be read" in str(raised.value)
    assert log.rows == 0 and not (tmp_path / "log" / "data").exists()


def test_a_fault_in_the_middle_keeps_the_sources_before_it(tmp_path: Path) -> None:
    write(tmp_path / "in", 4)
    bad = clicks(200, 100).with_columns(user=pl.when(pl.col("n") == 250).then(None).otherwise("user"))
    bad.write_parquet(tmp_path / "in" / "part-002.parquet")
    log = InteractionLog(tmp_path / "log", "user", 2)
    with pytest.raises(DataError, match=r"part-002\.parquet has 1 nulls, the first in row 50") as raised:
        log.append_all([tmp_path / "in"], batch_rows=30, buffer_bytes=1000)
    assert "The 2 of 4 sources before it were taken in" in str(raised.value)
    assert numbers(log) == list(range(200)) and log.verify() == 200
    write(tmp_path / "in", 4)
    assert sum(one.new for one in log.append_all([tmp_path / "in"]).values()) == 200
    assert numbers(log) == list(range(400))


APPENDER = """
from limaml.interactions.log import InteractionLog
log = InteractionLog(sys.argv[1], "user", 3)
print("ready", flush=True)
tell = lambda *at: print(*at, flush=True)
log.append_all([sys.argv[2]], batch_rows=500, buffer_bytes=int(sys.argv[3]), progress=tell)
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX signal")
def test_killed_at_any_moment_and_run_again_each_source_is_in_once(tmp_path: Path) -> None:
    write(tmp_path / "in", 30, rows=400)
    lottery, interrupted = random.Random(7), 0
    for _ in range(4):
        process = start_bare(APPENDER, tmp_path / "log", tmp_path / "in", 40_000)
        assert process.stdout is not None
        for _ in range(lottery.randrange(8, 30)):  # so many sources were read, known ones too
            process.stdout.readline()
        time.sleep(lottery.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        with process:
            process.wait(30)
        log = InteractionLog(tmp_path / "log", "user", 3)
        found = numbers(log)
        assert found == list(range(len(found))) and len(found) % 400 == 0
        assert log.verify() == len(found)
        interrupted += 0 < len(found) < 30 * 400
    with start_bare(APPENDER, tmp_path / "log", tmp_path / "in", 40_000) as process:
        assert process.wait(60) == 0
    assert numbers(log) == list(range(30 * 400))
    assert interrupted
    named = {file.path for file in log.contents().files}
    assert {path.relative_to(log.folder).as_posix() for path in (log.folder / "data").glob("*/*")} == named


def test_two_ingests_at_once_take_everything_once(tmp_path: Path) -> None:
    write(tmp_path / "in", 12, rows=300)
    processes = [start_bare(APPENDER, tmp_path / "log", tmp_path / "in", 5_000) for _ in range(2)]
    for process in processes:
        with process:
            assert process.wait(60) == 0
    assert numbers(InteractionLog(tmp_path / "log")) == list(range(12 * 300))


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("work", ["append", "compact", "retain"])
def test_a_disk_that_is_full_leaves_the_log_as_it_was(tmp_path: Path, work: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    try:
        write(tmp_path / "in", 1, rows=40_000, start=40_000)
        log = InteractionLog(disk / "log", "user", 3)
        for start in range(0, 40_000, 10_000):
            log.append(clicks(start, 10_000), positions={"s": start + 10_000})
        room = os.statvfs(disk)
        (disk / "ballast").write_bytes(b"x" * (room.f_bavail * room.f_bsize - 48 * 1024))

        def act() -> None:
            if work == "append":
                log.append_all([tmp_path / "in"])
            elif work == "compact":
                log.compact()
            else:
                log.retain("n", last=100)

        with pytest.raises(StoreError, match=r"could not be written .*See that the disk has room"):
            act()
        assert numbers(log) == list(range(40_000)) and log.verify() == 40_000
        (disk / "ballast").unlink()
        act()
        expected = {"append": 80_000, "compact": 40_000, "retain": 50 * 100}
        assert len(numbers(log)) == log.verify() == expected[work]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_one_task_with_very_many_rows(tmp_path: Path) -> None:
    rows = 10**7 if FULL else 10**5
    whole = pl.DataFrame(
        {"user": pl.select(pl.when(pl.int_range(rows) % 1000 == 0).then(pl.int_range(rows)).otherwise(7)).to_series()}
    )
    whole = whole.with_row_index("n")
    whole.write_parquet(tmp_path / "one.parquet")
    log = InteractionLog(tmp_path / "log", "user", 8)
    assert log.append(tmp_path / "one.parquet", buffer_bytes=rows * 4, batch_rows=rows // 7).new == rows
    assert log.compact().rows
    assert log.verify() == rows
    assert log.read([7])["n"].equals(whole.filter(pl.col("user") == 7)["n"])
    assert log.retain("n", last=10).removed == rows - rows // 1000 - 10
    assert log.read([7])["n"].equals(whole.filter(pl.col("user") == 7).tail(10)["n"])


IDS = st.one_of(
    st.text(max_size=12),
    st.integers(-(2**70), 2**70).map(str),
    st.text("0123456789-+ |\\", max_size=21),
    st.just("ü" * 500),
)


@settings(max_examples=100)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=20))
def test_hashes_of_columns_are_those_of_keys(rows: list[tuple[str, str]]) -> None:
    frame = pl.DataFrame(rows, schema={"a": pl.String, "b": pl.String}, orient="row")
    assert key_hashes(frame, ["a"]).tolist() == [key_hash(a) for a, _ in rows]
    assert key_hashes(frame, ["a", "b"]).tolist() == [key_hash(join_key(row)) for row in rows]


def test_hashes_of_integers() -> None:
    extremes = [-(2**63), -1, 0, 1, 2**63 - 1]
    frame = pl.DataFrame({"a": extremes})
    assert key_hashes(frame, ["a"]).tolist() == [key_hash(str(n)) for n in extremes]
    for kind in (pl.Int8, pl.UInt16, pl.UInt64, pl.Int128):
        small = pl.DataFrame({"a": pl.Series([0, 1, 100], dtype=kind)})
        assert key_hashes(small, ["a"]).tolist() == [key_hash(str(n)) for n in (0, 1, 100)]
    # splitmix64 as published, from the states 0 and 1
    assert [key_hash(text) for text in ("0", "1")] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]


@pytest.mark.parametrize(
    "ids",
    [
        pl.Series(["x" * 500, "ü" * 500, "x" * 499 + "y"]),
        pl.Series([-(2**63), 2**63 - 1, 0]),
        pl.Series([2**64 - 1], dtype=pl.UInt64),
    ],
)
def test_ids_of_any_length_and_size(tmp_path: Path, ids: pl.Series) -> None:
    log = InteractionLog(tmp_path, "user", 3)
    frame = pl.DataFrame({"user": ids, "n": range(len(ids))})
    log.append(frame)
    for number, one in enumerate(ids.to_list()):
        assert log.read([one])["n"].to_list() == [number]
