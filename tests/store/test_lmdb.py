"""The embedded store: the conformance suite, and what only LMDB has: a map that fills, a file, processes, forks."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import limaml
import limaml.store
from limaml.errors import StoreError
from limaml.store import LmdbStore, Store, open_store
from limaml.store.batch import Layout
from limaml.store.environment import _open
from limaml.store.run_files import RunFile

from .conformance import StoreConformance, column, fill, release, values
from .format import COLD_TEXT, as_written, check_of, id_hash, read_run


class TestLmdb(StoreConformance):
    @pytest.fixture
    def open_empty(self, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Store]:
        # a tiny map and buffer, so that the whole suite grows the one and flushes the other
        path = tmp_path_factory.mktemp("lmdb") / "store"
        return lambda: LmdbStore(path, map_size=2**16, buffer_bytes=2000)

    @pytest.fixture(autouse=True)
    def everything_is_given_back(self) -> None:
        assert _open == {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


# The store alone, without what `import limaml` brings: processes start in a fraction of the time.
ALONE = f"""
import sys, types
sys.modules["limaml"] = types.ModuleType("limaml")
sys.modules["limaml"].__path__ = [{str(Path(limaml.__file__).parent)!r}]
"""


def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ALONE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE + code, *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=60)


# ------------------------------------------------------------------------------------------------------ addresses


def test_addresses(tmp_path: Path) -> None:
    spaced = tmp_path / "a store"
    open_store(spaced).close()
    with open_store(f"lmdb://{tmp_path}/a%20store", create=False) as store:
        assert isinstance(store, LmdbStore)
        assert store.path == spaced
    with pytest.raises(StoreError, match=r"scheme 'memcached://', which no store has; known are a path and lmdb://"):
        open_store("memcached://localhost")
    with pytest.raises(StoreError, match="There is no store at"):
        open_store(tmp_path / "none", create=False)
    for empty in ("", "lmdb://"):
        with pytest.raises(StoreError, match="lmdb:///path"):
            open_store(empty)
    with pytest.raises(StoreError, match=r"behind '\?'"):
        open_store("lmdb:///x?y=1")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="is not a store"):
        open_store(tmp_path / "thesis.txt")
    other = tmp_path / "other"
    with lmdb.open(str(other)) as environment, environment.begin(write=True) as txn:
        txn.put(b"k", b"v")
    with pytest.raises(StoreError, match="of another program"):
        open_store(other)
    with lmdb.open(str(other)) as environment, environment.begin() as txn:
        assert txn.stat()["entries"] == 1


def test_an_unknown_layout_is_refused(path: Path) -> None:
    open_store(path).close()
    with raw(path) as environment, environment.begin(write=True, db=environment.open_db(b"catalog")) as txn:
        txn.put(b"layout", b'{"layout": 99, "next": 1}')
    with pytest.raises(StoreError, match="layout 99"):
        open_store(path)
    assert _open == {}


# ------------------------------------------------------------------------------------------------ damage and growth


def raw(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), max_dbs=4, map_size=2**28)


@pytest.mark.parametrize("damage", ["cut", "flip", "swap", "extend", "lose"])
def test_a_damaged_upsert_is_named(path: Path, damage: str) -> None:
    with open_store(path) as store:
        version = release(store, 0.0, ["ann"]).version
        store.upsert("m", version, "member", ["ann", "bob", "cy"], np.ones((3, 3)), column(3, 2), column(3))
    with raw(path) as environment, environment.begin(write=True, db=environment.open_db(b"embeddings")) as txn:
        keys = [key for key, _ in txn.cursor()]
        bob = txn.get(keys[1])
        changed = {
            "cut": bob[:-5],
            "flip": bob[:22] + bytes([bob[22] ^ 4]) + bob[23:],
            "swap": txn.get(keys[0]),
            "extend": bob + b"x",
        }
        if damage == "lose":
            txn.delete(keys[1])
        else:
            txn.put(keys[1], changed[damage])
    with open_store(path) as store:
        assert values(store.get("m", "member", ["ann", "cy"])) == [1.0, 1.0]
        if damage == "lose":
            with pytest.raises(StoreError, match=r"has 2 embeddings .* where 3 with"):
                store.verify("m")
            return
        said_by_all_who_meet_it(store)


def said_by_all_who_meet_it(store: Store) -> None:
    for call in (
        lambda: store.get("m", "member", ["ann", "bob"]),
        lambda: store.verify("m"),
        lambda: store.upsert("m", store.describe("m").id, "member", ["bob"], np.ones((1, 3)), column(1, 9), column(1)),
    ):
        with pytest.raises(StoreError, match=r"member 'bob' in version v.* is damaged"):
            call()


def only_run(path: Path) -> Path:
    (found,) = (path / "runs").iterdir()
    return found


@pytest.mark.parametrize("damage", ["flip", "swap"])
def test_a_damaged_embedding_is_named(path: Path, damage: str) -> None:
    with open_store(path) as store:
        release(store, 1.0, ["ann", "bob", "cy"])
    found = {each.raw: each for each in read_run(only_run(path))}
    bob = found[b"bob"]
    changed = {"flip": bob.value[:22] + bytes([bob.value[22] ^ 4]) + bob.value[23:], "swap": found[b"ann"].value}
    with only_run(path).open("r+b") as file:
        file.seek(bob.offset)
        file.write(changed[damage])
    with open_store(path) as store:
        assert values(store.get("m", "member", ["ann", "cy"])) == [1.0, 1.0]
        said_by_all_who_meet_it(store)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=3015.5 / 3568, bit=7)  # the largest byte of the first hash: they descend then
def test_any_flipped_bit_of_a_file_that_holds_embeddings_is_found(path: Path, place: float, bit: int) -> None:
    if not path.exists():
        with open_store(path) as store:
            release(store, 1.0, [f"t{number}" for number in range(40)] + ["long" * 200])
    whole = only_run(path).read_bytes()
    at = int(place * len(whole))
    m, text_bytes, size = struct.unpack_from("<QQI", whole, 24)
    filling = 80 + m * size + text_bytes
    unread = 76 <= at < 80 or filling <= at < -(-(filling + 8) // 8) * 8  # zeros that fill
    only_run(path).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        with open_store(path) as store:
            if not unread:
                with pytest.raises(StoreError, match=r"damaged|is not as it was written"):
                    store.verify("m")
    finally:
        only_run(path).write_bytes(whole)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=0.26, bit=0)  # in the text, between two ids
def test_a_flipped_bit_is_found_where_something_was_erased(path: Path, place: float, bit: int) -> None:
    if not path.exists():
        with open_store(path) as store:
            release(store, 1.0, [f"t{number}" for number in range(40)] + ["é" * 9])
            store.forget("member", ["t3", "t39"])
    whole = only_run(path).read_bytes()
    m, text_bytes, size = struct.unpack_from("<QQI", whole, 24)
    filling = 80 + m * size + text_bytes
    spans = -(-(filling + 8) // 8) * 8
    at = 80 + int(place * (spans + 8 * m - 80))  # the hashes of what was erased stay, and are no one's
    only_run(path).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        with open_store(path) as store:
            if not filling <= at < spans:
                with pytest.raises(StoreError, match=r"damaged|is not as it was written"):
                    store.verify("m")
    finally:
        only_run(path).write_bytes(whole)


@pytest.mark.parametrize("kept", [0, 30, 100, -1])
def test_a_file_that_was_cut_off_is_said(path: Path, kept: int) -> None:
    with open_store(path) as store:
        release(store, 1.0)
    whole = only_run(path).read_bytes()
    only_run(path).write_bytes(whole[:kept])
    with open_store(path) as store:
        for call in (lambda: store.get("m", "member", ["a"]), lambda: store.verify("m")):
            with pytest.raises(StoreError, match=r"Version v.* of model 'm' is damaged: .*runs/000001-0-.*Roll back"):
                call()
        release(store, 2.0)
        assert values(store.get("m", "member", ["a"])) == [2.0]


def test_a_file_that_is_gone_is_said(path: Path) -> None:
    with open_store(path) as store:
        release(store, 1.0)
    only_run(path).unlink()
    with open_store(path) as store:
        for call in (lambda: store.get("m", "member", ["a"]), lambda: store.verify("m")):
            with pytest.raises(StoreError, match=r"A file of the store .* is gone: .*runs/000001"):
                call()


def test_damage_before_the_flip_stops_the_flip(path: Path) -> None:
    with open_store(path, buffer_bytes=1) as store:
        old = release(store, 1.0).version
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a", "b"], 2.0)
            (file,) = (path / "runs").glob(f"{int(publication.version[1:7]):06d}-*")
            found = {each.raw: each for each in read_run(file)}
            with file.open("r+b") as open_file:
                open_file.seek(found[b"b"].offset)
                open_file.write(bytes(len(found[b"b"].value)))
            with pytest.raises(StoreError, match=r"A file of task type 'member' in version .* is damaged"):
                publication.commit()
        assert store.current("m") == old


def test_files_that_nobody_named_go_with_their_version(path: Path) -> None:
    with open_store(path, buffer_bytes=1) as store:
        release(store, 1.0)
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a"], 2.0)
            version = publication.version
        left = path / "runs" / f"{int(version[1:7]):06d}-0-deadbeef"
        left.write_bytes(b"half a file")
        with store.publish("m", dims={"member": 3}, resume=True) as publication:
            assert publication.version == version
            assert not left.exists()
            assert publication.commit().counts == {"member": 1}
        left.write_bytes(b"half a file")
        release(store, 3.0)
        store.expire("m", keep=1)
        assert len(list((path / "runs").iterdir())) == 1


def test_the_map_grows_in_every_writing_step(path: Path) -> None:
    n = 3000
    ids = [f"t{number}" for number in range(n)]
    with LmdbStore(path, map_size=2**16) as store:
        with store.publish("m", dims={"member": 64}) as publication:
            publication.put("member", ids, np.ones((n, 64)), column(n), column(n))
            publication.commit(expected={"member": n})
        more = [f"u{number}" for number in range(n)]
        result = store.upsert("m", store.describe("m").id, "member", more, np.ones((n, 64)), column(n), column(n))
        assert result.applied == n
        assert store.verify("m") == {"member": 2 * n}
        assert store.environment.read(lambda txn: store.environment._env.info()["map_size"]) > 2**20


def test_another_process_grows_the_map(path: Path) -> None:
    code = """
import sys, numpy as np
from limaml.store import LmdbStore
n = 3000
with LmdbStore(sys.argv[1]) as store, store.publish("m", dims={"member": 64}) as publication:
    publication.put("member", [f"t{i}" for i in range(n)], np.ones((n, 64)), np.ones(n, int), np.ones(n, int))
    publication.commit()
"""
    with LmdbStore(path, map_size=2**16) as store, store.publish("other", dims={"member": 3}) as publication:
        fill(publication, ["a"], 1.0)
        publication.commit()
        assert run(code, path).returncode == 0
        assert values(store.get("m", "member", ["t2999"])) == [1.0]
        assert release(store, 2.0, model="third").counts == {"member": 3}


def test_a_full_disk_leaves_what_was_served(path: Path) -> None:
    code = """
import resource, sys, numpy as np
from limaml.store import LmdbStore
from limaml.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
with LmdbStore(sys.argv[1], buffer_bytes=50_000) as store:
    try:
        with store.publish("m", dims={"member": 64}) as publication:
            for start in range(0, 9000, 100):
                ids = [f"t{i}" for i in range(start, start + 100)]
                publication.put("member", ids, np.ones((100, 64)), np.ones(100, int), np.ones(100, int))
            publication.commit()
    except StoreError as error:
        print(error)
    assert store.get("m", "member", ["a"]).vectors[0, 0] == 1.0
"""
    with open_store(path) as store:
        old = release(store, 1.0).version
    done = run(code, path)
    assert done.returncode == 0, done.stderr
    assert "is full" in done.stdout
    with open_store(path) as store:
        assert store.current("m") == old
        assert store.verify("m") == {"member": 3}
        release(store, 2.0)
        assert values(store.get("m", "member", ["a"])) == [2.0]
        assert len(store.versions("m")) == 2


# ------------------------------------------------------------------------------------------------------- processes


PUBLISHER = """
import sys, numpy as np
from limaml.store import LmdbStore
n = 1500
ids = [f"t{i:05d}" for i in range(n)]
one = np.ones(n, np.int64)
with LmdbStore(sys.argv[1], map_size=2**18, buffer_bytes=40_000) as store:
    print("begun", flush=True)
    seed = int(sys.argv[2])
    while True:
        with store.publish("m", dims={"member": 8, "item": 4}, extra={"seed": seed}) as publication:
            for start in range(0, n, 300):
                part = slice(start, start + 300)
                publication.put("member", ids[part], np.full((300, 8), seed), one[part], one[part])
                publication.put("item", ids[part], np.full((300, 4), -seed), one[part], one[part])
            publication.put_cold("member", np.full(8, seed))
            print(publication.commit().version, flush=True)
        store.expire("m", keep=2)
        seed += 1
"""


def check_file(path: Path, n: int = 1500) -> tuple[str, int]:
    """An independent reading of the file, by its documented bytes alone: the current version and its seed."""
    with raw(path) as environment:
        catalog, embeddings = environment.open_db(b"catalog"), environment.open_db(b"embeddings")
        with environment.begin() as txn:
            version = txn.get(b"current/m", db=catalog).decode()
            record = json.loads(txn.get(f"record/m/{version}".encode(), db=catalog))
            assert record["state"] == "ready"
            seed = record["extra"]["seed"]
            totals = json.loads(txn.get(f"totals/m/{version}".encode(), db=catalog))["types"]
            for place, task_type in enumerate(("member", "item")):
                where = struct.pack(">IH", record["number"], place)
                (file,) = totals[task_type]["runs"]
                found = sorted(read_run(path / "runs" / file))
                assert [each.raw for each in found] == [b"t%05d" % row for row in range(n)]
                assert as_written(path / "runs" / file)
                for each in found:
                    check_value(each.value, each.raw, where, (8, 4)[place], (seed, -seed)[place])
                    assert struct.unpack("<Iq", each.value[4:16]) == (1, 1)
            for key, value in txn.cursor(embeddings):
                if key.startswith(struct.pack(">I", record["number"])):
                    assert key == struct.pack(">IH", record["number"], 0) + b"\x02"
                    check_value(value, COLD_TEXT, key[:6], 8, seed)
            return version, seed


def check_value(value: bytes, raw_id: bytes, where: bytes, dim: int, number: float) -> None:
    kind, dtype, found, _, _, scale = struct.unpack("<BBHIqf", value[:20])
    assert (kind, dtype, found, scale) == (2, 0, dim, 1.0)
    assert set(struct.unpack(f"<{dim}f", value[20 : 20 + 4 * dim])) == {number}
    assert struct.unpack("<I", value[-4:])[0] == check_of(value, raw_id, where)


def test_kill_9_of_a_publisher_leaves_a_whole_version(path: Path) -> None:
    choose = random.Random(5)
    seed, last = 0, ""
    for attempt in range(10):
        publisher = start(PUBLISHER, path, seed)
        assert publisher.stdout is not None
        publisher.stdout.readline()
        if attempt == 0:
            last = publisher.stdout.readline().strip()
        time.sleep(choose.random() * 0.12)
        os.kill(publisher.pid, signal.SIGKILL)
        confirmed = [line.strip() for line in publisher.stdout if line.endswith("\n")]
        publisher.wait()
        publisher.stdout.close()
        version, seed = check_file(path)
        assert version >= max([last, *confirmed])  # what was said to be published is, or something newer
        last, seed = version, seed + 1
    with open_store(path) as store:
        store.gc()
        store.expire("m", keep=1)
        assert [each.id for each in store.versions("m")] == [last]
        assert store.verify("m") == {"member": 1500, "item": 1500}
        assert store.size().keys == 3001
        assert len(list((path / "runs").iterdir())) == 2  # nothing is left of all that were killed
        release(store, 1.0)


def test_forgetting_that_was_killed_before_the_file_was_overwritten_is_completed(path: Path) -> None:
    code = """
import os, signal, sys
from limaml.store import LmdbStore, run_folder
run_folder.erase = lambda path, rows: os.kill(os.getpid(), signal.SIGKILL)
with LmdbStore(sys.argv[1]) as store:
    store.forget("member", ["bob"])
"""
    with open_store(path) as store, store.publish("m", dims={"member": 3}) as publication:
        publication.put("member", ["ann", "bob"], np.array([[1, 1, 1], [7.25, 7.25, 7.25]]), column(2), column(2))
        publication.commit()
    assert run(code, path).returncode == -signal.SIGKILL
    secret = struct.pack("<3f", 7.25, 7.25, 7.25)
    assert secret in only_run(path).read_bytes()
    with open_store(path) as store:
        assert secret not in only_run(path).read_bytes()
        assert b"bob" not in only_run(path).read_bytes()
        assert [each.raw for each in read_run(only_run(path))] == [b"ann"]
        assert store.get("m", "member", ["ann", "bob"]).found.tolist() == [True, False]
        assert store.verify("m") == {"member": 1}
        assert store.forgotten("member") == ["bob"]


def test_a_publication_larger_than_its_buffer_ends_in_one_file(path: Path) -> None:
    n = 3000
    ids = [f"t{number}" for number in range(n)]
    with LmdbStore(path, buffer_bytes=20_000) as store:
        with store.publish("m", dims={"member": 8}) as publication:
            for start in range(0, n, 100):
                publication.put("member", ids[start : start + 100], np.ones((100, 8)), column(100), column(100))
            publication.put("member", ids[:500], np.full((500, 8), 2.0), column(500, 2), column(500))
            assert len(list((path / "runs").iterdir())) > 10
            done = publication.commit(expected={"member": n})
        assert (done.applied, done.stale) == (n + 500, 0)
        assert len(list(read_run(only_run(path)))) == n
        assert values(store.get("m", "member", ids)) == [2.0] * 500 + [1.0] * (n - 500)


def test_a_large_put_is_the_same_as_many_small_ones(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limaml.store.publication._AT_ONCE", 1)
    rng = np.random.default_rng(0)
    ids = [f"t{number}" for number in rng.permutation(500)]
    vectors, count = rng.normal(size=(500, 5)).astype(np.float32), rng.integers(1, 9, 500)
    with open_store(path) as store:
        for dtype in ("float32", "float16", "int8"):
            with store.publish("m", dims={"member": 5}, dtype=dtype) as publication:
                publication.put(
                    "member", [*ids, ids[0]], np.vstack([vectors, vectors[:1]]), np.append(count, 0), column(501)
                )
                done = publication.commit()
            assert (done.applied, done.stale) == (500, 1)
            found = store.get("m", "member", ids)
            np.testing.assert_allclose(found.vectors, vectors, atol=0 if dtype == "float32" else 0.02)
            assert found.count.tolist() == count.tolist()


def test_a_version_of_an_older_layout_says_what_to_do(path: Path) -> None:
    open_store(path).close()
    with raw(path) as environment, environment.begin(write=True, db=environment.open_db(b"catalog")) as txn:
        txn.put(b"layout", b'{"layout": 2, "next": 1}')
    with pytest.raises(StoreError, match=r"has layout 2; this version of limaml knows 3: publish to a new store"):
        open_store(path)


def test_what_is_hidden_by_a_later_put_is_not_in_the_merged_file(path: Path) -> None:
    with LmdbStore(path, buffer_bytes=1) as store:
        with store.publish("m", dims={"member": 3}) as publication:
            for count in (1, 2):
                publication.put("member", ["ann", "bob"], np.full((2, 3), 10.0 + count), column(2, count), column(2))
                publication.put("member", [f"c{count}"], np.ones((1, 3)), column(1), column(1))
            publication.commit(expected={"member": 4})
        whole = only_run(path).read_bytes()
        assert as_written(only_run(path)) and sorted(each.raw for each in read_run(only_run(path))) == [
            b"ann",
            b"bob",
            b"c1",
            b"c2",
        ]
        assert struct.pack("<3f", 11, 11, 11) not in whole and whole.count(b"ann") == 1
        with store.read("m") as reader:
            assert [ids for ids, _ in reader.scan("member")] == [["c1", "ann", "bob", "c2"]]
        assert store.forget("member", ["ann"]).removed == {"m": {store.current("m"): 1}}
        assert store.verify("m") == {"member": 3} and not as_written(only_run(path))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=80))
def test_puts_in_any_pieces_end_in_the_highest_revisions(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int, int]]
) -> None:
    """`(task, count, where a piece ends)`: pieces within a batch, batches within a file, files that are merged."""
    best: dict[str, int] = {}
    with (
        LmdbStore(tmp_path_factory.mktemp("puts") / "store", buffer_bytes=400) as store,
        store.publish("m", dims={"member": 2}) as publication,
    ):
        piece: list[tuple[str, int]] = []
        for task, count, cut in [*puts, (99, 1, 2)]:
            piece.append((f"t{task}", count))
            if cut == 2:
                counts = np.array([each for _, each in piece])
                publication.put(
                    "member", [name for name, _ in piece], np.outer(counts, [1.0, -1.0]), counts, column(len(piece))
                )
                piece = []
        for task, count, _ in [*puts, (99, 1, 2)]:
            best[f"t{task}"] = max(count, best.get(f"t{task}", 0))
        done = publication.commit(expected={"member": len(best)})
        found = store.get("m", "member", list(best))
        assert dict(zip(best, found.count.tolist(), strict=True)) == best
        assert found.vectors[:, 1].tolist() == [-count for count in best.values()]
        assert done.applied + done.stale == len(puts) + 1
        with store.read("m") as reader:
            assert sorted(reader.ids("member")) == sorted(best)


def test_look_ups_after_many_upserts_are_those_of_a_dictionary(path: Path) -> None:
    n = 12_000  # of which each third is upserted: more than the first size of the marks holds
    ids, rng = [f"member-{number:09d}" for number in range(n)], np.random.default_rng(0)
    with open_store(path) as store:
        with store.publish("m", dims={"member": 2}) as publication:
            publication.put("member", ids[:-1000], np.zeros((n - 1000, 2)), column(n - 1000), column(n - 1000))
            version = publication.commit().version
        chosen = rng.permutation(n)[: n // 3 + 1000]
        for part in np.split(chosen, [10, 3000]):
            some = [ids[row] for row in part.tolist()]
            store.upsert("m", version, "member", some, np.ones((len(part), 2)), column(len(part), 2), column(len(part)))
        for rows in np.array_split(rng.permutation(n), 30):
            found = store.get("m", "member", [ids[row] for row in rows.tolist()])
            upserted = np.isin(rows, chosen)
            assert np.array_equal(found.vectors[:, 0], upserted)
            assert np.array_equal(found.found, upserted | (rows < n - 1000))
    with raw(path) as environment, environment.begin(db=environment.open_db(b"embeddings")) as txn:
        (marks,) = (value for key, value in txn.cursor() if key[6:] == b"\x03")
    bits = np.unpackbits(np.frombuffer(marks, np.uint8, offset=8), bitorder="little")
    assert len(bits) == 2**17 and int.from_bytes(marks[:8], "little") == bits.sum() < len(bits) / 8
    assert all(bits[id_hash(ids[row].encode()) >> 47] for row in chosen.tolist())


def test_of_two_publishing_processes_one_wins_and_the_other_says_so(path: Path) -> None:
    code = """
import sys, time, numpy as np
from limaml.store import LmdbStore
from limaml.errors import StoreError
with LmdbStore(sys.argv[1]) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with store.publish("m", dims={"member": 3}) as publication:
            time.sleep(0.5)
            publication.put("member", ["a"], np.ones((1, 3)), np.ones(1, int), np.ones(1, int))
            publication.commit()
            print("won")
    except StoreError as error:
        print(error)
"""
    open_store(path).close()
    both = [start(code, path, stdin=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        process.stdout.readline()
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0] for process in both)
    assert said[1] == "won\n"
    assert "Another publisher of model 'm' is at work (process " in said[0]
    with open_store(path) as store:
        assert len(store.versions("m")) == 1


def test_a_reader_in_another_process_holds_its_version_until_it_dies(path: Path) -> None:
    code = """
import sys
from limaml.store import LmdbStore
with LmdbStore(sys.argv[1]) as store, store.read("m") as reader:
    print("open", flush=True)
    sys.stdin.readline()
"""
    with open_store(path) as store:
        old = release(store, 1.0).version
        process = start(code, path, stdin=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        release(store, 2.0)
        assert store.expire("m", keep=1).held == (old,)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert store.expire("m", keep=1).removed == (old,)


def test_readers_in_other_processes_never_see_a_mix(path: Path) -> None:
    code = """
import sys, time
from limaml.store import LmdbStore
ids = [f"t{i}" for i in range(60)]
reads = 0
with LmdbStore(sys.argv[1], map_size=2**16) as store:
    print("open", flush=True)
    end = time.monotonic() + 1.0
    while time.monotonic() < end or reads <= 100:
        found = store.get("m", "member", ids)
        assert found.found.all() and len(set(found.vectors.ravel().tolist())) == 1, found
        assert int(found.version[1:7]) == found.vectors[0, 0], found
        reads += 1
print(reads)
"""
    ids = [f"t{number}" for number in range(60)]
    with LmdbStore(path, map_size=2**16) as store:
        release(store, 1.0, ids)
        process = start(code, path)
        assert process.stdout is not None
        process.stdout.readline()
        number = 1
        while process.poll() is None:
            number += 1
            release(store, float(number), ids)
            store.expire("m", keep=1)
        assert process.returncode == 0
        assert int(process.stdout.read()) > 100
        process.stdout.close()
        assert number > 3


def test_a_look_up_outlasts_versions_that_follow_each_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(path) as store, open_store(path) as writer:
        release(writer, 1.0)
        opened, behind = store.runs.opened, [2.0, 3.0, 4.0]

        def late(layout: Layout, names: Sequence[str]) -> tuple[RunFile, ...]:
            if behind:  # the version that was looked up is gone by the time that its file is
                release(writer, behind.pop(0))
                writer.expire("m", keep=1)
            return opened(layout, names)

        monkeypatch.setattr(store.runs, "opened", late)
        assert values(store.get("m", "member", ["a"])) == [4.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_both_sides_of_a_fork_go_on(path: Path) -> None:
    with LmdbStore(path, map_size=2**16) as store:
        release(store, 1.0)
        with store.read("m") as reader, store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a"], 2.0)
            child = os.fork()
            if child == 0:
                try:
                    assert values(reader.get("member", ["a"])) == [1.0]
                    assert values(store.get("m", "member", ["b"])) == [1.0]
                    release(store, 5.0, [f"t{number}" for number in range(3000)], model="child")
                    with pytest.raises(StoreError, match="belongs to process"):
                        publication.commit()
                    with pytest.raises(StoreError, match="Another publisher"):
                        store.publish("m", dims={"member": 3})
                    os._exit(0)
                except BaseException as error:
                    print(error, file=sys.stderr, flush=True)
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
            assert values(reader.get("member", ["a"])) == [1.0]
            assert values(store.get("child", "member", ["t2999"])) == [5.0]
            publication.commit()
        assert values(store.get("m", "member", ["a"])) == [2.0]


def test_the_store_needs_no_torch(path: Path) -> None:
    code = "import sys; from limaml.store import open_store; open_store(sys.argv[1]).close(); assert 'torch' not in sys.modules"
    assert run(code, path).returncode == 0


def test_exports() -> None:
    import limaml.store.contract as contract

    assert {*contract.__all__, "LmdbStore", "open_store"} <= set(dir(limaml.store))
