"""The disk is full, at any write of a publisher or a refresher: a sentence, and all that was there is there; then room again."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

import limaml
from limaml.store import LmdbStore

from .checker import check, check_log
from .conftest import FULL as LONG
from .processes import FULL, Nursery
from .raw import read_lmdb
from .world import MODEL, World, counted


@pytest.mark.parametrize("name", ["embed", "refresh"])
def test_a_disk_that_is_full_at_any_write(name: str, world: World, run: Path, born: Nursery) -> None:
    if not born.counting:
        pytest.skip("no C compiler: nothing can be put between the process and its disk")
    pieces = world.pieces(run / "pieces", 3)
    born.do("embed", run)
    born.do("refresh", run, pieces[0])
    command = ["embed", run] if name == "embed" else ["refresh", run, pieces[1]]
    first = counted(world, pieces[:1])
    calls = world.copy(run / "twin")  # another run folder tells how many writes there are
    born.do("embed", calls)
    born.do("refresh", calls, pieces[0])
    writes = born.run(*[calls if part == run else part for part in command], at=10**6, how=FULL).seen
    assert writes > 5
    places = range(1, writes + 1) if LONG else sorted(random.Random(3).sample(range(1, writes + 1), 5))
    refused = 0
    for place in places:
        ended = born.run(*command, at=place, how=FULL)
        assert ended.code in (0, 2), ended
        assert "Traceback" not in ended.said, ended
        if ended.code == 2:
            refused += 1
            assert "full" in ended.said or "No space left" in ended.said, ended
        there = check_log(run / "log", world, pl.read_parquet(pieces[0]), pl.read_parquet(pieces[1]))
        known = world.clicks(there)
        check(read_lmdb(run / "store"), world, least=first, most=known, promised="v000001")
        if ended.code == 0 and name == "refresh":
            break  # too late a write to matter: it is in
    assert refused
    born.do(*command)
    expected = first if name == "embed" else counted(world, pieces[:2])
    check(read_lmdb(run / "store"), world, least=expected, most=expected, promised="v000001")


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of so many kilobytes, where this user may make one."""
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_really_full(world: World, run: Path, born: Nursery, tmp_path: Path) -> None:
    """Ballast leaves a few kilobytes, more each time. What is refused leaves what was; what finds room is done."""
    piece = world.pieces(run / "pieces", 3)[0]
    with small_disk(tmp_path / "disk", 1500) as disk:
        here = world.copy(disk / "run")
        born.do("embed", here)
        least, promised, refused = counted(world, []), 1, dict.fromkeys(("embed", "refresh"), 0)
        for free in (0, 4, 8, 16, 32, None):
            if free is not None:
                now = os.statvfs(disk)
                (disk / "ballast").write_bytes(b"x" * max(0, now.f_bavail * now.f_bsize - free * 1024))
            for command in (["refresh", here, piece], ["embed", here]):
                ended = born.run(*command)
                assert ended.code == 0 or (ended.code == 2 and free is not None), ended
                assert "Traceback" not in ended.said, ended
                refused[command[0]] += ended.code == 2
                there = check_log(here / "log", world, world.later.head(0), pl.read_parquet(piece))
                known = world.clicks(there)
                if ended.code == 0:
                    least = known
                    promised += command[0] == "embed"
                check(read_lmdb(here / "store"), world, least=least, most=known, promised=f"v{promised:06d}")
            (disk / "ballast").unlink(missing_ok=True)
        assert all(refused.values()), refused
        known = counted(world, [piece])
        check(read_lmdb(here / "store"), world, least=known, most=known, promised="v000002", settled=True)


def test_a_map_that_is_full_grows(world: World, run: Path, born: Nursery) -> None:
    """Published into a map of 64 KiB, which LMDB says is full again and again."""
    trained = limaml.load_model(run / "model")
    tables = {"user_id": world.folder / "users.parquet", "item_id": world.folder / "items.parquet"}
    data = trained.encoder.encode(limaml.join_tables(world.past, tables).frame)
    with LmdbStore(run / "store", map_size=2**16, buffer_bytes=2000) as store:
        for _ in range(6):
            limaml.publish(store, MODEL, trained, run / "model", data)
        size = store.size().file_bytes
    assert size > 2**16
    none = dict.fromkeys(world.members, 0)
    check(read_lmdb(run / "store"), world, least=none, most=none, promised="v000006", settled=True)
