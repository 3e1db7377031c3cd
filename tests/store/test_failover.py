"""A cluster whose servers die and whose slots move while it is written to; and what a look-up asks of a server."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limaml.errors import StoreError
from limaml.store import Store, open_store

from .conformance import column, fill, release, values
from .servers import cluster, redis, valkey, wait_until
from .test_redis import address, buckets

IDS = [f"t{number:03d}" for number in range(120)]


def patiently(work: Callable[[], Any]) -> Any:
    """Again until the cluster has found itself: each failure on the way must be a sentence."""
    until = time.monotonic() + 60
    while True:
        try:
            return work()
        except StoreError:
            assert time.monotonic() < until
            time.sleep(0.1)


def upsert(store: Store, version: str, ids: list[str], count: int) -> None:
    n = len(ids)
    store.upsert("m", version, "member", ids, np.full((n, 3), count), column(n, count), column(n, count))


def behind(store: Store, known: dict[str, int]) -> list[str]:
    """The check: which tasks the store has from less than is known to have been acknowledged."""
    found = store.get("m", "member", list(known))
    return [each for each, count in zip(known, found.count.tolist(), strict=True) if count < known[each]]


def test_what_a_dead_primary_took_along_is_found_and_comes_back_by_upserting_again(tmp_path: Path) -> None:
    with cluster(replicated=True) as servers:
        where = address(servers[0], tmp_path, cluster="true", timeout=1)
        with open_store(where) as store:
            version = release(store, 1.0, IDS).version
            upsert(store, version, IDS, 2)
            primary, replica = servers[1], servers[4]
            assert replica.process is not None
            with redis.Redis(port=primary.port) as client, redis.Redis(port=replica.port) as copy:
                wait_until(lambda: client.info("replication")["slave0"]["lag"] <= 1 and client.wait(1, 1000) == 1)
                offset = client.info("replication")["master_repl_offset"]
                wait_until(lambda: copy.info("replication")["slave_repl_offset"] >= offset)
                os.kill(replica.process.pid, signal.SIGSTOP)  # it falls behind
                client.execute_command("CLIENT", "KILL", "TYPE", "REPLICA")
            upsert(store, version, IDS, 3)  # acknowledged
            known = dict.fromkeys(IDS, 3)
            assert behind(store, known) == []
            primary.kill()
            os.kill(replica.process.pid, signal.SIGCONT)
            lost = patiently(lambda: behind(store, known))
            assert 0 < len(lost) < len(IDS)
            assert store.get("m", "member", lost).count.tolist() == [2] * len(lost)  # whole and older, not mixed
            patiently(lambda: store.verify("m"))
            patiently(lambda: upsert(store, version, lost, 3))
            assert behind(store, known) == []
            assert values(store.get("m", "member", IDS)) == [3.0] * len(IDS)
            assert patiently(lambda: store.verify("m")) == {"member": len(IDS)}


def test_a_primary_that_dies_while_a_version_is_published(tmp_path: Path) -> None:
    with cluster(replicated=True) as servers:
        where = address(servers[0], tmp_path, cluster="true", timeout=1, lease=2)
        with open_store(where) as store:
            old = release(store, 1.0, IDS).version
            with store.publish("m", dims={"member": 3}) as publication:
                half = publication.version
                fill(publication, IDS[:60], 2.0)
                publication.written("member", [])
                servers[2].kill()
                with contextlib.suppress(StoreError):
                    fill(publication, IDS[60:], 2.0)
                    publication.commit()
            served = patiently(lambda: set(values(store.get("m", "member", IDS))))
            assert served in ({1.0}, {2.0})
            if patiently(lambda: store.current("m")) == old:

                def again() -> None:
                    with store.publish("m", dims={"member": 3}, resume=True) as resumed:
                        assert resumed.version >= half
                        fill(resumed, IDS, 2.0)
                        resumed.commit(expected={"member": len(IDS)})

                patiently(again)
            assert set(values(store.get("m", "member", IDS))) == {2.0}
            assert store.verify("m") == {"member": len(IDS)}


def test_slots_move_while_the_store_is_written_and_read(tmp_path: Path) -> None:
    with cluster() as servers:
        where = address(servers[0], tmp_path, cluster="true", timeout=5)
        with open_store(where) as store, open_store(where) as mine:
            version = release(store, 1.0, IDS).version
            stop, failures, counts = threading.Event(), list[str](), [1]

            def write() -> None:
                while not stop.is_set():
                    try:
                        upsert(mine, version, IDS, counts[0] + 1)
                        counts[0] += 1
                    except StoreError as error:  # a sentence; what it was about is done again
                        failures.append(str(error))

            thread = threading.Thread(target=write)
            thread.start()
            with redis.Redis(port=servers[0].port) as source, redis.Redis(port=servers[1].port) as target:
                name = target.execute_command("CLUSTER", "MYID").decode()
                held = {source.cluster("KEYSLOT", key) for key in buckets(where, int(version[1:7]))}
                slots = sorted(slot for slot in held if slot < 16384 // 3)[:3]
                assert slots
                for slot in slots:
                    source.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", name)
                    wait_until(lambda slot=slot: not source.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot))  # type: ignore[misc]
            stop.set()
            thread.join()
            known = dict.fromkeys(IDS, counts[0])
            assert patiently(lambda: behind(store, known)) == []
            assert patiently(lambda: store.verify("m")) == {"member": len(IDS)}
            with redis.Redis(port=servers[1].port) as target:
                assert all(target.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) for slot in slots)


def test_a_look_up_is_one_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    send = redis.connection.AbstractConnection.send_packed_command

    def counted(self: Any, command: Any, check_health: bool = True) -> None:
        sent.append(command)
        send(self, command, check_health)

    with valkey() as server, open_store(address(server)) as store:
        release(store, 1.0, IDS)
        store.get("m", "member", IDS[:1])
        monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", counted)
        for asked in (IDS[:1], IDS[:100], [*IDS, "nobody"]):
            sent.clear()
            store.get("m", "member", asked)
            assert len(sent) == 1


def test_ids_are_listed_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not read whole before the first one is given."""
    with valkey() as server, open_store(address(server)) as store:
        release(store, 1.0, IDS)
        sent: list[Any] = []
        with store.read("m") as reader:
            send = redis.connection.AbstractConnection.send_packed_command

            def counted(self: Any, command: Any, check_health: bool = True) -> None:
                sent.append(command)
                send(self, command, check_health)

            monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", counted)
            ids = reader.ids("member")
            first = [next(ids)]
            assert len(sent) <= 3
            assert sorted([*first, *ids]) == IDS
            assert len(sent) >= 16
