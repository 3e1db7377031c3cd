"""Whatever the order, the same store: clicks in duplicate, out of order, late; clocks that go back; publishers at one time."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from stream.brokers import broker

from limaml.stream.dead_letters import DeadLetters

from .checker import check, check_log
from .conftest import FULL, reading
from .processes import STOP, Nursery
from .raw import read_lmdb
from .test_brokers import events_of, rows_of
from .test_kills import address_of
from .world import World, counted


@pytest.mark.parametrize("seed", range(6 if FULL else 1))
def test_duplicated_reordered_and_late_clicks_end_in_the_same_store(
    seed: int, world: World, run: Path, born: Nursery, tmp_path: Path
) -> None:
    """Files that hold any clicks in any order, most of them several times, some with a click twice in one file."""
    choose = random.Random(seed)
    born.do("embed", run)
    rows = list(range(len(world.later)))
    deliveries = [choose.sample(rows, choose.randint(1, len(rows) // 3)) for _ in range(4)]
    missing = [row for row in rows if not any(row in delivery for delivery in deliveries)]
    choose.shuffle(missing)
    deliveries += [missing, choose.choices(rows, k=20)]
    for number, delivery in enumerate(deliveries):
        file = tmp_path / f"{number}.parquet"
        world.later[delivery].write_parquet(file)
        for _ in range(choose.randint(1, 2)):
            born.do("refresh", run, file)
    everything = world.all
    check(read_lmdb(run / "store"), world, least=everything, most=everything, promised="v000001")
    born.do("embed", run)
    check(read_lmdb(run / "store"), world, least=everything, most=everything, promised="v000002", settled=True)


@pytest.mark.parametrize("kind", ["file", "redis", "nats", "kafka"])
def test_duplicated_reordered_late_and_early_events_end_in_the_same_store(
    kind: str, world: World, run: Path, born: Nursery
) -> None:
    """Out of each source; an event that says it comes from the future is a dead letter, and in once it comes in its time."""
    choose = random.Random(kind)
    born.do("embed", run)
    rows = list(range(len(world.later)))
    events = events_of(world.later)
    too_early = [json.dumps({**json.loads(events[row]), "timestamp": 2**33 + row}).encode() for row in rows[::40]]
    with broker(kind) as server:
        for part in range(3 if FULL else 2):
            chosen = choose.sample(rows, len(rows) // 2) if part == 0 else choose.sample(rows, len(rows))
            delivery = [events[row] for row in chosen + choose.choices(chosen, k=20)]
            for event in too_early if part == 0 else ():
                delivery.insert(choose.randrange(len(delivery)), event)
            server.publish(delivery)
            born.do("stream", run, "--source", server.address, "--once", "--max-batch", choose.randint(20, 90))
        held = server.held()
    refused = [letter.payload for letter in DeadLetters(run).list()]
    assert sorted(refused) == sorted(too_early)
    there = check_log(run / "log", world, rows_of(world, [event for event in held if event not in set(too_early)]))
    everything = world.all
    assert world.clicks(there) == everything
    check(read_lmdb(run / "store"), world, least=everything, most=everything, promised="v000001", settled=True)


@pytest.mark.parametrize("kind", ["lmdb", "valkey"])
def test_a_clock_that_goes_back(kind: str, world: World, run: Path, born: Nursery) -> None:
    """Each command lives a day before the one before it: what is newest is what came last all the same."""
    if not born.counting:
        pytest.skip("no C compiler: the clock cannot be moved")
    pieces = world.pieces(run / "pieces", 3)
    with address_of(kind, run) as address:
        at = ["--store", address]
        for day, piece in enumerate([None, *pieces], 1):
            if piece is not None:
                born.do("refresh", run, piece, *at, clock=-86400 * day)
            born.do("embed", run, "--keep", 2, *at, clock=-86400 * day - 3600)
        everything = world.all
        contents = reading(address)()
        check(contents, world, least=everything, most=everything, promised="v000004", settled=True)
        assert len(contents.records()) == 2
        rolled = born.do("store", "rollback", address, clock=-86400 * 9)
        assert "Version v000003" in rolled
        born.do("refresh", run, pieces[2], *at, clock=-86400 * 10)
        check(reading(address)(), world, least=everything, most=everything, promised="v000003", settled=True)


@pytest.mark.parametrize("kind", ["lmdb", "valkey"])
def test_of_two_publishers_one_wins_and_the_other_says_so(kind: str, world: World, run: Path, born: Nursery) -> None:
    """The first is held at one call after another, for as long as the second takes to be refused: while embeddings are made,
    if both are of one run folder, and while they are put into the store, if not."""
    if not born.counting:
        pytest.skip("no C compiler: no process can be held at a call")
    with address_of(kind, run) as address:
        address = str(address).replace("lease=2", "lease=20")
        command = ["embed", run, "--store", address, "--keep", 1]
        born.do(*command)  # the first puts the model folder there; the second shows what a publisher does each time
        calls = born.run(*command).seen
        twin = world.copy(run.parent / f"{run.name}-twin")
        other = ["embed", twin, *command[2:]]
        served, refused = 2, 0
        places = random.Random(5).sample(range(calls // 4, calls - 8), min(calls // 2, 30) if FULL else 4)
        for turn, at in enumerate(places):
            first = born.start(*command, at=at, how=STOP)
            first.wait_stopped()  # or ended, as the number of calls is not the same each time
            second = born.start(*(other if turn % 2 else command))
            until = time.monotonic() + 2
            while (
                not second.ended() and time.monotonic() < until
            ):  # held in a transaction, the first holds the second, too
                time.sleep(0.01)
            first.signal(signal.SIGCONT)
            one, ended = first.wait(), second.wait()
            assert one.code in (0, 2) and ended.code in (0, 2), (one, ended)
            for loser in (one, ended):
                if loser.code:
                    said = "Another publisher of model 'model' is at work" in loser.said
                    assert said or (not turn % 2 and "Another process generates embeddings in" in loser.said), loser
                    refused += 1
            assert 0 in (one.code, ended.code)
            served += (one.code == 0) + (ended.code == 0)
            none = counted(world, [])
            check(reading(address)(), world, least=none, most=none, promised=f"v{served:06d}", settled=True)
        assert refused
