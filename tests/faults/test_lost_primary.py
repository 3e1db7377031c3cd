"""A primary of a cluster dies with writes that its replica never got: nothing is mixed, and all comes back from the log."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from redis.crc import key_slot
from store.servers import Valkey, cluster, redis, valkey, wait_until

from limaml.errors import StoreError
from limaml.store import Store, open_store

from .checker import check
from .conftest import FULL
from .processes import Nursery
from .raw import read_redis
from .world import MODEL, TASK, World, counted


def cut_off(primary: Valkey, replica: Valkey) -> None:
    """From now on the replica gets nothing, and the primary does not mind."""
    assert replica.process is not None
    os.kill(replica.process.pid, signal.SIGSTOP)
    with redis.Redis(port=primary.port) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "REPLICA")


def fail_over(servers: Sequence[Valkey], primary: Valkey, replica: Valkey) -> None:
    """Until every server that is left has heard of it: a client asks any one of them where the slots are."""
    primary.kill()
    assert replica.process is not None
    os.kill(replica.process.pid, signal.SIGCONT)
    for server in servers:
        if server is not primary:
            with redis.Redis(port=server.port) as client:
                wait_until(partial(knows_new_owner, client, primary.port))


def knows_new_owner(client: redis.Redis, gone: int) -> bool:
    """Whether a node believes the cluster to be whole, and its slots to be elsewhere than at the port `gone`."""
    whole = b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")
    return whole and all(first[1] != gone for _, _, first, *_ in client.execute_command("CLUSTER", "SLOTS"))


@pytest.mark.parametrize("place", range(3) if FULL else [1])
def test_writes_that_a_primary_took_with_it_come_back_from_the_log(
    place: int, world: World, run: Path, born: Nursery
) -> None:
    """Each of the three primaries in turn; one of them has the catalogue, whose loss takes a version out of sight."""
    files = world.pieces(run / "pieces", 3)
    with cluster(3, replicated=True) as servers:
        other = servers[(place + 1) % 3]
        address = f"redis://127.0.0.1:{other.port}?prefix=faults&cluster=true&lease=2&cache={run / 'cache'}"
        at = ["--store", address]
        born.do("embed", run, *at)
        born.do("refresh", run, files[0], *at)
        before, known = counted(world, files[:1]), counted(world, files[:2])
        cut_off(servers[place], servers[3 + place])
        born.do("refresh", run, files[1], *at)
        fail_over(servers, servers[place], servers[3 + place])

        contents = read_redis(address)
        check(contents, world, least=before, most=known, promised="v000001")
        with pytest.raises(AssertionError, match="possible were"):  # it did lose something
            check(contents, world, least=known, most=known, promised="v000001")
        until_done(born, "refresh", run, "--since", 0, *at)
        check(read_redis(address), world, least=known, most=known, promised="v000001")
        until_done(born, "refresh", run, files[2], *at)
        everything = world.all
        check(read_redis(address), world, least=everything, most=everything, promised="v000001", settled=True)


def test_a_version_that_was_lost_from_the_catalogue_leaves_nothing_in_the_next(run: Path) -> None:
    """The catalogue forgets a version whose embeddings other primaries have: its number comes again, they must not."""
    place = key_slot(b"faults") * 3 // 16384
    members = [f"m{number}" for number in range(200)]
    whole = np.ones(len(members), np.int64)

    def release(store: Store, value: float) -> str:
        with store.publish(MODEL, dims={TASK: 4}) as publication:
            publication.put(TASK, members, np.full((len(members), 4), value), whole, whole)
            return publication.commit().version

    with cluster(3, replicated=True) as servers:
        port = servers[(place + 1) % 3].port
        with open_store(f"redis://127.0.0.1:{port}?prefix=faults&cluster=true&lease=2&cache={run / 'cache'}") as store:
            first = release(store, 1.0)
            cut_off(servers[place], servers[3 + place])
            lost = release(store, 2.0)
            fail_over(servers, servers[place], servers[3 + place])
            wait_until(lambda: current(store) == first)
            again = release(store, 3.0)
            assert again[:7] == lost[:7]
            assert set(store.get(MODEL, TASK, members).vectors.ravel()) == {3.0}
            assert store.verify(MODEL) == {TASK: len(members)}


def test_a_version_that_was_begun_by_half_holds_no_refresh_up(world: World, run: Path, born: Nursery) -> None:
    """Its publisher was killed between its record and the headers of its buckets; nobody reads it, and all else goes on."""
    piece, _ = world.pieces(run / "pieces", 2)
    with valkey() as server:
        address = f"redis://127.0.0.1:{server.port}?prefix=faults&lease=2&cache={run / 'cache'}"
        born.do("embed", run, "--store", address)
        with (
            contextlib.suppress(InterruptedError),
            redis.Redis(port=server.port) as client,
            open_store(address) as store,
            store.publish(MODEL, dims={TASK: 4, f"{TASK}.features": 5}, artifact=world.digest),
        ):
            client.delete(*client.scan_iter(match="faults:*:2:*:header"))
            raise InterruptedError
        born.do("refresh", run, piece, "--store", address)
        known = counted(world, [piece])
        check(read_redis(address), world, least=known, most=known, promised="v000001")


def current(store: Store) -> str | None:
    with contextlib.suppress(StoreError):
        return store.current(MODEL)
    return None


def until_done(born: Nursery, *command: object) -> None:
    """Once the cluster has settled: a client may still meet the node that is gone."""
    until = time.monotonic() + 60
    while (ended := born.run(*command)).code:
        assert ended.code == 2 and time.monotonic() < until, ended
        time.sleep(0.2)
