"""The checker finds what it is there for: it is shown a whole store, and the same with each kind of fault put in."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import polars as pl
import pytest

import limaml
from tests.store.format import Embedding, check_of, read_run

from .checker import check, check_log
from .processes import FULL, KILL, Nursery
from .raw import read_lmdb
from .world import MODEL, TASK, World, counted


@pytest.fixture(scope="module")
def published(world: World, born: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions; the newer one refreshed with the first of two halves of the later clicks."""
    run = world.copy(tmp_path_factory.mktemp("published") / "run")
    born.do("embed", run)
    born.do("embed", run)
    half, _ = world.pieces(run / "pieces", 2)
    born.do("refresh", run, half)
    return run


def looked(run: Path, world: World, **changed: Any) -> int:
    half, _ = world.pieces(run / "pieces", 2)
    known = counted(world, [half])
    given = {"least": known, "most": known, "promised": "v000002-" + world.digest[:8], "settled": True, **changed}
    return check(read_lmdb(run / "store"), world, **given)


def test_a_whole_store_passes(published: Path, world: World) -> None:
    assert looked(published, world) > 2 * 2 * 34
    half, other = (pl.read_parquet(file) for file in world.pieces(published / "pieces", 2))
    check_log(published / "log", world, half)
    for sure, maybe in ((half.head(0), None), (pl.concat([half, other]), None), (half.head(3), other)):
        with pytest.raises(AssertionError, match="the log has lost"):
            check_log(published / "log", world, sure, maybe)


def test_what_was_promised_is_asked_for(published: Path, world: World) -> None:
    with pytest.raises(AssertionError, match=r"v000003 was promised, v000002-\w+ is served"):
        looked(published, world, promised="v000003")
    with pytest.raises(AssertionError, match=r"knows \d+ from \d+ clicks .* possible were"):
        looked(published, world, least=world.all, most=world.all)
    none = dict.fromkeys(world.members, 0)
    with pytest.raises(AssertionError, match=r"possible were"):
        looked(published, world, least=none, most=none)


def other_vector(one: Embedding, other: Embedding, where: bytes) -> bytes:
    body = one.value[:20] + other.value[20:-4] + bytes(4)
    return body[:-4] + struct.pack("<I", check_of(body, one.raw, where))


def lose(file: Any, found: list[Embedding]) -> None:
    """As if it had been erased."""
    struct.pack_into("<Q", file, found[3].span, 2**64 - 1)
    put(file, found[3], bytes(len(found[3].value)))


def flip(file: Any, found: list[Embedding]) -> None:
    raw = found[3].value
    put(file, found[3], raw[:22] + bytes([raw[22] ^ 1]) + raw[23:])


def misplace(file: Any, found: list[Embedding]) -> None:
    put(file, found[3], found[4].value)


def mix(file: Any, found: list[Embedding]) -> None:
    """A vector of another member under a header and a check that are right: only the model of the world tells."""
    put(file, found[3], other_vector(found[3], found[4], struct.pack(">IH", 1, 0)))


def put(file: Any, place: Embedding, value: bytes) -> None:
    file[place.offset : place.offset + len(value)] = value


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lose, r"has lost \d+"),
        (lose, r"says Tally\(count=3\d"),
        (flip, "another check than its bytes"),
        (misplace, "another check than its bytes"),
        (mix, "a vector that is off by"),
    ],
)
def test_faults_in_values_are_found(
    published: Path, world: World, tmp_path: Path, fault: Callable[[Any, list[Embedding]], None], message: str
) -> None:
    run = Path(shutil.copytree(published, tmp_path / "run"))
    (path,) = (run / "store" / "runs").glob("000001-0-*")
    found = list(read_run(path))
    content = bytearray(path.read_bytes())
    fault(content, found)
    path.write_bytes(content)
    with pytest.raises(AssertionError, match=message):
        looked(run, world)


def test_values_of_no_version_are_found(published: Path, world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(published, tmp_path / "run"))
    with lmdb.open(str(run / "store"), max_dbs=8, map_size=2**30) as environment:
        values = environment.open_db(b"embeddings")
        with environment.begin(write=True) as txn:
            raw = next(value for key, value in txn.cursor(values) if key[6:7] == b"\x00")
            name, where = b"anybody", struct.pack(">IH", 77, 0)
            checked = raw[:-4] + struct.pack("<I", check_of(raw, name, where))
            txn.put(where + b"\x00" + name, checked, db=values)
    with pytest.raises(AssertionError, match="version number 77 has values"):
        looked(run, world)
    (run / "store" / "runs" / "000078-0-feed").touch()
    with pytest.raises(AssertionError, match=r"nothing explains .*000078-0-feed"):
        looked(run, world)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, raw: None if key.startswith(b"ready/") else raw, "its mark says False"),
        (
            lambda key, raw: None if b"record/model/v000002" in key else raw,
            r"version number 2 has values .* but no record",
        ),
        (lambda key, raw: raw.replace(b'"ready"', b'"writing"'), "its mark says True"),
        (lambda key, raw: raw.replace(b'"count":3', b'"count":5') if b"totals/" in key else raw, "says Tally"),
        (lambda key, raw: b"v000009-00000000" if key.startswith(b"current/") else raw, "is served, ready are"),
    ],
)
def test_faults_in_documents_are_found(
    published: Path, world: World, tmp_path: Path, change: Callable[[bytes, bytes], bytes | None], message: str
) -> None:
    run = Path(shutil.copytree(published, tmp_path / "run"))
    with lmdb.open(str(run / "store"), max_dbs=8, map_size=2**30) as environment:
        catalog = environment.open_db(b"catalog")
        with environment.begin(write=True, db=catalog) as txn:
            for key, raw in list(txn.cursor()):
                changed = change(key, raw)
                txn.delete(key) if changed is None else txn.put(key, changed)
    with pytest.raises(AssertionError, match=message):
        looked(run, world)


def test_who_was_forgotten_is_asked_for(published: Path, world: World) -> None:
    half, _ = (pl.read_parquet(file) for file in world.pieces(published / "pieces", 2))
    member = str(half[TASK][0])
    with pytest.raises(AssertionError, match=f"has {member}, who was forgotten"):
        looked(published, world, gone={member})
    with pytest.raises(AssertionError, match="rows of who was forgotten"):
        check_log(published / "log", world, half, gone={member})
    there = check_log(published / "log", world, half, going={member})
    assert there.sort(there.columns).equals(half.sort(half.columns))
    check_log(published / "log", world, half.filter(pl.col(TASK) != int(member)), half, going={member}, parts=True)
    with pytest.raises(AssertionError, match="rows that nobody sent"):
        check_log(published / "log", world, half.filter(pl.col(TASK) != int(member)), going={member})


def test_who_is_being_forgotten_may_be_anywhere_or_nowhere(published: Path, world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(published, tmp_path / "run"))
    member = world.members[3]
    with limaml.open_store(run / "store") as store:
        store.forget(TASK, [member])
    with pytest.raises(AssertionError, match=f"has lost {member}"):
        looked(run, world)
    looked(run, world, going={member})
    looked(run, world, gone={member})


def test_a_version_of_another_model_is_held_to_that_model(published: Path, world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(published, tmp_path / "run"))
    with lmdb.open(str(run / "store"), max_dbs=8, map_size=2**30) as environment:
        catalog = environment.open_db(b"catalog")
        with environment.begin(write=True, db=catalog) as txn:
            for key, raw in list(txn.cursor()):
                if key.startswith(b"record/"):
                    txn.put(key, raw.replace(world.digest.encode(), world.other_digest.encode()))
    with pytest.raises(AssertionError, match="off by inf"):
        looked(run, world)


def test_a_process_ends_and_a_disk_is_full_where_they_should(world: World, born: Nursery, tmp_path: Path) -> None:
    """`preload.c` itself: without it the other tests would kill nobody, and pass."""
    if not born.counting:
        pytest.skip("no C compiler: processes are killed by time alone")
    run = world.copy(tmp_path / "run")
    whole = born.run("embed", run)
    assert whole.code == 0 and whole.seen > 30, whole
    assert born.run("embed", run, at=whole.seen // 2, how=KILL).killed
    assert born.run("embed", run, at=10**6, how=KILL).code == 0
    full = born.run("embed", run, at=3, how=FULL)
    assert full.code == 2 and "No space left" in full.said, full
    listed = born.do("store", "list", run, clock=-40 * 86400)
    assert listed.count(MODEL) >= 2
