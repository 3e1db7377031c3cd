"""Redis and Valkey: the conformance suite on one server and on a cluster of three, and what only they have."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limaml.errors import StoreError
from limaml.store import RedisStore, Store, open_store
from limaml.store.batch import cold_value, prepare
from limaml.store.redis_server import parse_address
from limaml.store.version import layouts_of

from .conformance import StoreConformance, column, fill, release, values
from .format import COLD_TEXT
from .servers import Valkey, cluster, free_port, redis, tls_in_front_of, valkey
from .test_lmdb import check_value, run, start

fresh = itertools.count()


@pytest.fixture(scope="module")
def one() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture(scope="module")
def three() -> Iterator[list[Valkey]]:
    with cluster() as servers:
        yield servers


def address(server: Valkey, cache: Path | None = None, **options: object) -> str:
    options = {"prefix": f"t{next(fresh)}", "lease": 20, **({} if cache is None else {"cache": cache}), **options}
    return f"redis://127.0.0.1:{server.port}?" + "&".join(f"{name}={value}" for name, value in options.items())


class TestOneServer(StoreConformance):
    @pytest.fixture
    def open_empty(self, one: Valkey, tmp_path: Path) -> Callable[[], Store]:
        where = address(one, tmp_path / "cache")
        return lambda: RedisStore(where, buffer_bytes=2000)


class TestCluster(StoreConformance):
    @pytest.fixture
    def open_empty(self, three: list[Valkey], tmp_path: Path) -> Callable[[], Store]:
        where = address(three[0], tmp_path / "cache", cluster="true")
        return lambda: RedisStore(where, buffer_bytes=2000)


@pytest.fixture(params=["one", "three"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store on one server, and on a cluster."""
    servers = request.getfixturevalue(request.param)
    if isinstance(servers, list):
        return address(servers[0], tmp_path / "cache", cluster="true", lease=1)
    return address(servers, tmp_path / "cache", lease=1)


def raw(where: str) -> Any:
    given = parse_address(where)
    kind = redis.RedisCluster if given.cluster else redis.Redis
    return kind(host=given.nodes[0][0], port=given.nodes[0][1])


def buckets(where: str, number: int, place: int = 0) -> list[bytes]:
    """Keys of a task type's buckets, as the server has them."""
    pattern = f"{parse_address(where).prefix}:{{*}}:{number}:{place}"
    with raw(where) as client:
        return list(client.scan_iter(match=pattern, count=1000))


# ------------------------------------------------------------------------------------------------------ addresses


def test_addresses() -> None:
    given = parse_address(
        "rediss://ann:s%40:x@h1:7000,[::1],h2:7002?cluster=true&prefix=feed&timeout=1.5&lease=9&ca=/ca.pem"
    )
    assert given.nodes == (("h1", 7000), ("::1", 6379), ("h2", 7002))
    assert (given.tls, given.cluster, given.user, given.password) == (True, True, "ann", "s@:x")
    assert (given.prefix, given.timeout, given.lease, given.ca, given.db) == ("feed", 1.5, 9.0, "/ca.pem", 0)
    assert "s@" not in str(given) + repr(given)
    assert parse_address("redis://h/3").db == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("redis://h/x", "must end with the number of a database"),
        ("redis://h:port", "which is no host and port"),
        ("redis://h?prefix=", "option prefix="),
        ("redis://h?prefix={a}", "option prefix="),
        ("redis://h?timeouts=1", "option timeouts=1, which cannot be used. Known are cluster=true"),
        ("redis://h?buckets=0", "option buckets=0"),
        ("redis://h?timeout=0", "timeout=0; it must be a number of seconds from 0.05"),
        ("redis://h?timeout=nan", "timeout=nan; it must be a number"),
        ("redis://h#x", "behind '#'"),
        ("redis://h/1?cluster=true", "a cluster has 0 alone"),
        ("redis://h,i", "names 2 nodes; add"),
    ],
)
def test_bad_addresses(text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        open_store(text)


def test_a_secret_is_in_no_message() -> None:
    for text in ("redis://ann:secret@h?x=1", "redis://ann:secret@h/x", f"redis://ann:secret@127.0.0.1:{free_port()}"):
        with pytest.raises(StoreError) as found:
            open_store(text)
        assert "secret" not in str(found.value)


def test_without_the_client_the_command_is_named() -> None:
    code = """
import sys
sys.modules["redis"] = None
from limaml.store import open_store
try:
    open_store("redis://localhost")
except Exception as error:
    print(type(error).__name__, error)
"""
    assert "MissingExtra This needs the package 'redis', which is not installed. Type: pip install" in run(code).stdout


def test_users_and_their_passwords(one: Valkey) -> None:
    with redis.Redis(port=one.port) as client:
        client.execute_command("ACL", "SETUSER", "ann", "on", ">s@cret", "~ann*", "+@all", "-config")
    fine = f"redis://ann:s%40cret@127.0.0.1:{one.port}?prefix=ann"
    with open_store(fine) as store:
        release(store, 1.0)
    for wrong in (fine.replace("s%40cret", "guess"), fine.replace("=ann", "=other")):
        with pytest.raises(StoreError, match="refuses this user"):
            open_store(wrong)


def test_tls(one: Valkey, tmp_path: Path) -> None:
    with tls_in_front_of(one.port, tmp_path) as (port, authority):
        here = f"rediss://localhost:{port}?prefix=t{next(fresh)}&timeout=5"
        with open_store(f"{here}&ca={authority}") as store:
            release(store, 1.0)
            assert values(store.get("m", "member", ["a"])) == [1.0]
        with pytest.raises(StoreError, match=r"does not answer: .*certificate verify failed"):
            open_store(here)
        with pytest.raises(StoreError, match="does not answer"):
            open_store(here.replace("rediss", "redis"))


def test_create_is_asked_for(one: Valkey) -> None:
    here = address(one)
    with pytest.raises(StoreError, match="There is no store at redis://127"):
        open_store(here, create=False)
    open_store(here).close()
    open_store(here, create=False).close()


def test_stores_share_a_server_under_prefixes(one: Valkey) -> None:
    with open_store(address(one)) as left, open_store(address(one)) as right:
        release(left, 1.0)
        assert right.models() == []
        release(right, 2.0)
        assert values(left.get("m", "member", ["a"])) == [1.0]


def test_the_command_line(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    from limaml.cli import main

    with open_store(where) as store:
        first, second = release(store, 1.0).version, release(store, 2.0).version
    main(["store", "rollback", where, "--model", "m"])
    main(["store", "list", where])
    with open_store(where) as store:
        assert store.current("m") == first
    said = capsys.readouterr().out
    assert first in said
    assert second in said


def test_the_whole_chain(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embedding into Redis and scoring out of it gives what LMDB gives."""
    import polars as pl

    import limaml
    from limaml.cli import main

    made = limaml.make_interactions(tasks=40, items=30, mean_rows=15, seed=3)
    made.interactions.write_parquet(tmp_path / "rows.parquet")
    run = str(tmp_path / "run")
    options = ["--task", "user_id", "--row", "item_id", "--time", "timestamp", "--label", "click", "--out", run]
    small = ["model.embedding_dim=4", "model.hidden=[8]", "model.dim=4", "model.factors=4", "train.epochs=1"]
    main(["train", str(tmp_path / "rows.parquet"), *options, *small])
    main(["embed", run])
    main(["embed", run, "--store", where])
    for name, at in (("lmdb", []), ("redis", ["--store", where])):
        main(["score", run, str(tmp_path / "rows.parquet"), "--out", str(tmp_path / f"{name}.parquet"), *at])
    one, other = (pl.read_parquet(tmp_path / f"{name}.parquet").drop("version") for name in ("lmdb", "redis"))
    assert one["known"].all()
    assert one.equals(other)
    capsys.readouterr()
    for at in ([], ["--store", where]):
        main(["store", "estimate", run, "--tasks", "1000000", *at])
    assert capsys.readouterr().out.count("1,000,000 keys") == 2


# ------------------------------------------------------------------------------------------------ values and revisions


@pytest.mark.parametrize("order", range(2))
def test_revisions_are_compared_to_the_last_bit(where: str, order: int) -> None:
    """The scripts' numbers have 53 bits; event times 64, and may be negative."""
    extreme = [
        -(2**63),
        -(2**63) + 1,
        -(2**32) - 1,
        -(2**32),
        -1,
        0,
        1,
        2**31,
        2**32 - 1,
        2**32,
        2**53,
        2**53 + 1,
        2**63 - 1,
    ]
    extreme += [1_767_225_600_000_000_000, 1_767_225_600_000_000_001]
    revisions = [(count, when) for count in (0, 1, 2**31, 2**32 - 1) for when in extreme]
    random.Random(order).shuffle(revisions)
    with open_store(where) as store:
        version = release(store, 0.0, ["other"]).version
        best = None
        for count, when in revisions:
            result = store.upsert("m", version, "member", ["a"], np.ones((1, 3)), column(1, count), column(1, when))
            assert result.applied == (best is None or (count, when) > best)
            best = (count, when) if best is None else max(best, (count, when))
            found = store.get("m", "member", ["a"])
            assert (int(found.count[0]), int(found.event_time[0])) == best
        assert store.verify("m") == {"member": 2}


def test_a_bucket_larger_than_one_step_is_walked(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limaml.store.redis_values._SMALL", 7)
    n = 16 * 20
    ids = [f"t{number:05d}" for number in range(n)]
    with open_store(where) as store:
        with store.publish("m", dims={"member": 16}) as publication:
            publication.put("member", ids, np.ones((n, 16)), column(n), column(n))
            publication.commit(expected={"member": n})
        assert store.verify("m") == {"member": n}
        with store.read("m") as reader:
            assert sorted(reader.ids("member")) == ids
            assert sorted(name for names, _ in reader.scan("member", 7) for name in names) == ids
    assert len(buckets(where, 1)) == 16


def test_a_cluster_shares_the_buckets_evenly(three: list[Valkey], tmp_path: Path) -> None:
    here = address(three[0], tmp_path, cluster="true")
    with open_store(here) as store:
        release(store, 1.0, [f"t{number}" for number in range(2000)])
    held = []
    for server in three:
        with redis.Redis(port=server.port) as client:
            held.append(sum(key in client.keys(f"{parse_address(here).prefix}:*:1:0") for key in buckets(here, 1)))
    assert sum(held) == 16
    assert max(held) - min(held) <= 1


def test_a_store_keeps_the_buckets_it_was_begun_with(one: Valkey) -> None:
    here = address(one)
    for asked in ("buckets=3", "buckets=50", "timeout=5"):
        with open_store(f"{here}&{asked}") as store:
            version = release(store, 1.0, [f"t{number}" for number in range(100)]).version
            assert len(buckets(here, int(version[1:7]))) == 3
            assert store.verify("m") == {"member": 100}


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "evict"])
def test_damage_is_named(where: str, damage: str) -> None:
    with open_store(where) as store:
        version = release(store, 1.0, ["ann", "bob", "cy"]).version
        with raw(where) as client:
            (bucket,) = [key for key in buckets(where, 1) if client.hexists(key, b"\x00bob")]
            bob = client.hget(bucket, b"\x00bob")
            if damage == "lose":
                client.hdel(bucket, b"\x00bob")
            elif damage == "evict":
                client.delete(bucket)
            else:
                changed = bob[:-5] if damage == "cut" else bob[:22] + bytes([bob[22] ^ 4]) + bob[23:]
                client.hset(bucket, b"\x00bob", changed)
        if damage in ("lose", "evict"):
            with pytest.raises(StoreError, match=r"has [012] embeddings .* where 3 with"):
                store.verify("m")
            return
        assert values(store.get("m", "member", ["ann", "cy"])) == [1.0, 1.0]
        calls: list[Callable[[], object]] = [lambda: store.get("m", "member", ["bob"]), lambda: store.verify("m")]
        if damage == "cut":
            many = (np.ones((2, 3)), column(2, 9), column(2))
            calls.append(lambda: store.upsert("m", version, "member", ["bob", "new"], *many))
        for call in calls:
            with pytest.raises(StoreError, match=r"member 'bob' in version v.* is damaged"):
                call()


def test_damage_before_the_flip_stops_the_flip(where: str) -> None:
    with open_store(where) as store:
        old = release(store, 1.0).version
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a", "b"], 2.0)
            publication.written("member", [])
            with raw(where) as client:
                assert sum(client.hdel(key, b"\x00b") for key in buckets(where, 2)) == 1
            with pytest.raises(StoreError, match="has 1 embeddings"):
                publication.commit()
        assert store.current("m") == old


def test_a_removed_version_cannot_be_written_to(where: str) -> None:
    with open_store(where) as store, open_store(where) as other:
        version = release(store, 1.0).version
        record = other._record("m", version)  # type: ignore[attr-defined]
        layout = layouts_of(record)["member"]
        release(store, 2.0)
        store.expire("m", keep=1)
        late = prepare(layout, ["a", "z"], np.ones((2, 3)), column(2, 9), column(2, 9))
        with pytest.raises(StoreError, match="was removed: it cannot be written to"):
            other._values.write(late)  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match="was removed"):
            other._values.write_cold(layout, cold_value(layout, np.zeros(3)))  # type: ignore[attr-defined]
        assert buckets(where, 1) == []


def test_a_sweep_that_looked_before_the_commit_removes_nothing(where: str) -> None:
    with open_store(where) as store:
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a"], 1.0)
            seen = store._record("m", publication.version)  # type: ignore[attr-defined]
            done = publication.commit(activate=False)
        assert not store.remove_version(seen)  # type: ignore[attr-defined]
        store.activate("m", done.version)
        assert values(store.get("m", "member", ["a"])) == [1.0]


def test_a_full_server_leaves_what_was_served() -> None:
    with (
        valkey("--maxmemory", "6mb", "--maxmemory-policy", "noeviction") as server,
        open_store(address(server)) as store,
    ):
        old = release(store, 1.0).version
        n = 20000
        with store.publish("m", dims={"member": 64}) as publication:
            many = (np.ones((n, 64)), column(n), column(n))
            publication.put("member", [f"t{number}" for number in range(n)], *many)
            with pytest.raises(StoreError, match="is full"):
                publication.commit()
        assert store.current("m") == old
        assert values(store.get("m", "member", ["a"])) == [1.0]


# ---------------------------------------------------------------------------------------------------------- failures


PUBLISHER = """
import sys, time, numpy as np
from limaml.errors import StoreError
from limaml.store import open_store
n = 1500
ids = [f"t{i:05d}" for i in range(n)]
one = np.ones(n, np.int64)
with open_store(sys.argv[1], buffer_bytes=40_000) as store:
    print("begun", flush=True)
    seed = int(sys.argv[2])
    while True:
        try:
            publication = store.publish("m", dims={"member": 8, "item": 4}, extra={"seed": seed})
        except StoreError as error:
            assert "Another publisher" in str(error), error
            time.sleep(0.05)  # the one that was killed: its lease is not over yet
            continue
        with publication:
            for start in range(0, n, 300):
                part = slice(start, start + 300)
                publication.put("member", ids[part], np.full((300, 8), seed), one[part], one[part])
                publication.put("item", ids[part], np.full((300, 4), -seed), one[part], one[part])
            publication.put_cold("member", np.full(8, seed))
            print(publication.commit().version, flush=True)
        store.expire("m", keep=2)
        seed += 1
"""


def check_server(where: str, n: int = 1500) -> tuple[str, int]:
    """An independent reading by the documented keys and bytes alone: the current version and its seed."""
    prefix = parse_address(where).prefix
    with raw(where) as client:
        catalog = client.hgetall(f"{prefix}:{{{prefix}}}:catalog")
        version = catalog[b"current/m"].decode()
        record = json.loads(catalog[f"record/m/{version}".encode()])
        assert record["state"] == "ready"
        seed = record["extra"]["seed"]
        for place in range(2):
            found = set()
            for bucket in buckets(where, record["number"], place):
                for name, value in client.hgetall(bucket).items():
                    is_cold, lies = name == b"\x02", struct.pack(">IH", record["number"], place)
                    check_value(value, COLD_TEXT if is_cold else name[1:], lies, (8, 4)[place], (seed, -seed)[place])
                    count, event_time = struct.unpack("<Iq", value[4:16])
                    if name != b"\x02":
                        assert (count, event_time) == (1, 1)
                        found.add(name)
            assert found == {b"\x00t%05d" % number for number in range(n)}
        return version, seed


def test_kill_9_of_a_publisher_leaves_a_whole_version(where: str) -> None:
    choose = random.Random(7)
    seed, last = 0, ""
    for attempt in range(6):
        publisher = start(PUBLISHER, where, seed)
        assert publisher.stdout is not None
        lines = [publisher.stdout.readline() for _ in range(2)]  # begun, and one version
        last = max(last, lines[1].strip())
        time.sleep(choose.random() * 0.15)
        os.kill(publisher.pid, signal.SIGKILL)
        confirmed = [line.strip() for line in publisher.stdout if line.endswith("\n")]
        publisher.wait()
        publisher.stdout.close()
        version, seed = check_server(where)
        assert version >= max([last, *confirmed]), attempt  # what was said to be published is, or something newer
        last, seed = version, seed + 1
    with open_store(where) as store:
        wait_for(lambda: store.gc() is not None and all(each.state == "ready" for each in store.versions("m")))
        store.expire("m", keep=1)
        assert [each.id for each in store.versions("m")] == [last]
        assert store.verify("m") == {"member": 1500, "item": 1500}
        assert store.size().keys == 3001
        prefix = parse_address(where).prefix
        with raw(where) as client:  # nothing is left of all that were killed
            numbers = {key.split(b":")[2] for key in client.scan_iter(match=f"{prefix}:{{*}}:*:[01]*", count=1000)}
        assert numbers == {b"%d" % int(last[1:7])}
        wait_for(lambda: released(store))


def released(store: Store) -> bool:
    """Publishes, unless the lease of a publisher that was killed is not over yet."""
    try:
        release(store, 1.0)
    except StoreError as error:
        if "Another publisher" not in str(error):
            raise
        return False
    return True


def wait_for(done: Callable[[], bool]) -> None:
    """Polls; the test runner's patience is the only limit that counts."""
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_of_two_publishing_processes_one_wins_and_the_other_says_so(where: str) -> None:
    code = """
import sys, time, numpy as np
from limaml.store import open_store
from limaml.errors import StoreError
with open_store(sys.argv[1]) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with store.publish("m", dims={"member": 3}) as publication:
            time.sleep(0.7)
            publication.put("member", ["a"], np.ones((1, 3)), np.ones(1, int), np.ones(1, int))
            publication.commit()
            print("won")
    except StoreError as error:
        print(error)
"""
    where = where.replace("lease=1", "lease=20")
    open_store(where).close()
    both = [start(code, where, stdin=subprocess.PIPE) for _ in range(2)]
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
    with open_store(where) as store:
        assert len(store.versions("m")) == 1


def test_a_publisher_that_slept_through_its_lease_changes_nothing(where: str) -> None:
    code = """
import sys, numpy as np
from limaml.store import open_store
from limaml.errors import StoreError
with open_store(sys.argv[1]) as store:
    try:
        with store.publish("m", dims={"member": 3}) as publication:
            publication.put("member", ["a"], np.zeros((1, 3)), np.ones(1, int), np.ones(1, int))
            print("begun", flush=True)
            sys.stdin.readline()
            next(iter(publication._target.layouts.values()))
            publication.commit()
    except StoreError as error:
        print(error)
"""
    with open_store(where) as store:
        sleeper = start(code, where, stdin=subprocess.PIPE)
        assert sleeper.stdout is not None
        sleeper.stdout.readline()
        with pytest.raises(StoreError, match="Another publisher"):
            store.publish("m", dims={"member": 3})
        os.kill(sleeper.pid, signal.SIGSTOP)
        won: list[str] = []

        def publish() -> bool:
            with contextlib.suppress(StoreError):
                won.append(release(store, 5.0).version)
            return bool(won)

        wait_for(publish)
        os.kill(sleeper.pid, signal.SIGCONT)
        said, _ = sleeper.communicate("\n", timeout=60)
        assert "lease" in said
        assert "resume" in said
        assert [version.id for version in store.versions("m")] == won
        assert values(store.get("m", "member", ["a"])) == [5.0]


def test_the_pointer_flips_under_the_lease_alone(where: str) -> None:
    """Also when the publisher is cut off between its last check and the flip."""
    with open_store(where) as store:
        old = release(store, 1.0).version
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a"], 2.0)
            publication.written("member", [])
            prefix = parse_address(where).prefix
            with raw(where) as client:
                assert client.delete(f"{prefix}:{{{prefix}}}:catalog:lease:publish.m") == 1
            with pytest.raises(StoreError, match="lost its lease"):
                publication.commit()
        assert store.current("m") == old


def test_a_reader_in_another_process_holds_its_version_until_it_dies(where: str) -> None:
    code = """
import sys
from limaml.store import open_store
with open_store(sys.argv[1]) as store, store.read("m") as reader:
    print("open", flush=True)
    sys.stdin.readline()
"""
    with open_store(where) as store:
        old = release(store, 1.0).version
        process = start(code, where, stdin=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        release(store, 2.0)
        assert store.expire("m", keep=1).held == (old,)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        wait_for(lambda: store.expire("m", keep=1).removed == (old,))


def test_upserts_by_several_processes_in_any_order_end_in_one_state(where: str) -> None:
    code = """
import random, sys, numpy as np
from limaml.store import open_store
address, version, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
revisions = [(count, when) for count in range(6) for when in range(-3, 4)] * 2
random.Random(seed).shuffle(revisions)
with open_store(address) as store:
    for count, when in revisions:
        ids = ["shared", f"s{count}", f"w{when}"]
        vectors = np.tile([count, when, count + when], (3, 1)).astype(float)
        store.upsert("m", version, "member", ids, vectors, np.full(3, count), np.full(3, when), watermark=when)
"""
    with open_store(where) as store:
        version = release(store, 0.0, ["x"]).version
        writers = [start(code, where, version, seed) for seed in range(3)]
        for writer in writers:
            writer.communicate(timeout=120)
            assert writer.returncode == 0
        found = store.get("m", "member", ["shared", *(f"s{n}" for n in range(6)), *(f"w{n}" for n in range(-3, 4))])
        truth = [(5, 3), *((count, 3) for count in range(6)), *((5, when) for when in range(-3, 4))]
        assert list(zip(found.count.tolist(), found.event_time.tolist(), strict=True)) == truth
        assert found.vectors.tolist() == [[count, when, count + when] for count, when in truth]
        assert store.verify("m") == {"member": 15}
        assert store.describe("m").watermark == 3


def test_a_server_that_is_gone_is_a_sentence_and_one_that_comes_back_is_used_again(tmp_path: Path) -> None:
    with valkey() as server, open_store(address(server, tmp_path, timeout=1)) as store:
        release(store, 1.0)
        reader = store.read("m")
        for end in (server.kill, lambda: os.kill(server.process.pid, signal.SIGSTOP)):  # type: ignore[union-attr]
            end()
            for call in (
                lambda: store.get("m", "member", ["a"]),
                lambda: reader.get("member", ["a"]),
                lambda: release(store, 2.0),
                lambda: store.rollback("m"),
                lambda: open_store(f"redis://127.0.0.1:{server.port}?timeout=1"),
            ):
                with pytest.raises(StoreError, match=r"does not answer: .* See whether the server runs"):
                    call()
            if server.process is not None and server.process.poll() is None:
                os.kill(server.process.pid, signal.SIGCONT)
            else:
                server.start()
            wait_for(lambda: values(store.get("m", "member", ["a"])) == [1.0])
            assert values(reader.get("member", ["a"])) == [1.0]
        assert store.verify("m") == {"member": 3}
        assert values(store.get("m", "member", ["a"])) == [1.0]
        release(store, 3.0)


def test_a_publication_over_a_restart_is_resumed(tmp_path: Path) -> None:
    with valkey() as server, open_store(address(server, tmp_path, timeout=1)) as store:
        old = release(store, 1.0).version
        with store.publish("m", dims={"member": 3}) as publication:
            half = publication.version
            fill(publication, ["a", "b"], 2.0)
            publication.written("member", [])
            server.kill()
            with pytest.raises(StoreError, match="does not answer"):
                publication.commit()
            server.start()
        assert store.current("m") == old
        with store.publish("m", dims={"member": 3}, resume=True) as publication:
            assert publication.version == half
            assert publication.written("member", ["a", "c"]).tolist() == [True, False]
            fill(publication, ["c"], 2.0)
            publication.commit(expected={"member": 3})
        assert values(store.get("m", "member", ["a", "c"])) == [2.0, 2.0]


def test_a_cluster_that_lost_a_node_says_so_and_serves_again_when_it_is_back(tmp_path: Path) -> None:
    ids = [f"t{number}" for number in range(200)]
    with cluster() as servers, open_store(address(servers[0], tmp_path, cluster="true", timeout=1)) as store:
        release(store, 1.0, ids)
        servers[1].kill()
        with pytest.raises(StoreError, match="does not answer"):
            store.get("m", "member", ids)
        servers[1].start()

        def served() -> bool:
            with contextlib.suppress(StoreError):
                return values(store.get("m", "member", ids)) == [1.0] * 200
            return False

        wait_for(served)
        assert store.verify("m") == {"member": 200}
