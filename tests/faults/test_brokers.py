"""A broker is killed and started again under a stream, and lines to it are cut and go dead: the log has what the broker has, once."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
from stream.brokers import Broker, broker

from .checker import check, check_log
from .conftest import FULL
from .processes import Nursery
from .raw import read_lmdb
from .wire import wire
from .world import World

OUTAGES = 20 if FULL else 2
EVENTS_A_PIECE = 4


def events_of(rows: pl.DataFrame) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows.iter_rows(named=True)]


def rows_of(world: World, payloads: Sequence[bytes]) -> pl.DataFrame:
    return pl.DataFrame(list(map(json.loads, payloads)), schema=world.later.schema)


@contextmanager
def feeding(server: Broker, events: Sequence[bytes], pause: float) -> Iterator[Callable[[], bool]]:
    """Events go to a broker in pieces, each as often as the broker needs to say that it has it. Gives whether all are there."""
    stop = threading.Event()

    def feed() -> None:
        for start in range(0, len(events), EVENTS_A_PIECE):
            while not stop.is_set():
                try:
                    server.publish(events[start : start + EVENTS_A_PIECE])
                    break
                except Exception:  # whatever each client says of a broker that is down
                    time.sleep(0.05)
            stop.wait(pause)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield lambda: not thread.is_alive()
    finally:
        stop.set()
        thread.join()


def check_all(world: World, run: Path, held: Sequence[bytes]) -> None:
    """The log has the past and what the broker has, each as often; the store is what the clicks give, however often they came."""
    rows = rows_of(world, held)
    there = check_log(run / "log", world, rows)
    known = world.clicks(there)
    check(read_lmdb(run / "store"), world, least=known, most=known, promised="v000001", settled=True)
    assert known == world.all, "the broker has lost an event that it had said it has"


@pytest.mark.parametrize("kind", ["redis", "nats", "kafka"])
def test_a_broker_killed_under_a_stream_loses_and_doubles_nothing(
    kind: str, world: World, run: Path, born: Nursery
) -> None:
    """At random moments, for random times; now and then the worker is killed beside it."""
    choose = random.Random(kind)
    born.do("embed", run)
    command: list[object] = ["stream", run, "--max-batch", 8, "--max-wait", 0.02, "--log", "text", "--source"]
    killed = 0
    with broker(kind) as server:
        worker = born.start(*command, server.address)
        with feeding(server, events_of(world.later), 0.02 * OUTAGES) as all_sent:
            worker.wait_until("Reading")
            for number in range(OUTAGES):
                time.sleep(choose.uniform(0.0, 0.5))
                server.kill()
                if number == 0:
                    worker.wait_until("Trying again in")
                elif choose.random() < 0.25:
                    killed += worker.kill().killed
                    worker = born.start(*command, server.address)
                time.sleep(choose.uniform(0.1, 0.6))
                server.start()
            wait_until(all_sent)
        worker.kill()
        born.do("stream", run, "--source", server.address, "--once")
        held = server.held()
    check_all(world, run, held)
    print(
        f"\n{kind}: killed {OUTAGES} times, the worker {killed} times; {len(held)} events for {len(world.later)} clicks"
    )


@pytest.mark.parametrize("kind", ["redis", "nats"])
def test_lines_that_are_cut_and_go_dead_lose_and_double_nothing(
    kind: str, world: World, run: Path, born: Nursery
) -> None:
    """The broker is well all the while, and events come in; only the worker does not reach it."""
    choose = random.Random(kind)
    born.do("embed", run)
    with broker(kind) as server, wire(server.port) as line:
        address = server.address.replace(f":{server.port}/", f":{line.port}/").replace("timeout=2", "timeout=0.5")
        command: list[object] = ["stream", run, "--max-batch", 8, "--max-wait", 0.02, "--log", "text", "--source"]
        worker = born.start(*command, address)
        with feeding(server, events_of(world.later), 0.02 * OUTAGES) as all_sent:
            worker.wait_until("Reading")
            for number in range(OUTAGES):
                time.sleep(choose.uniform(0.0, 0.5))
                (line.die if number % 2 else line.cut)()
                if number == 0:
                    worker.wait_until("Trying again in")
                time.sleep(choose.uniform(0.1, 1.5))
                line.mend()
            wait_until(all_sent)
        worker.kill()
        born.do("stream", run, "--source", address, "--once")
        held = server.held()
    assert len(held) == len(world.later)
    check_all(world, run, held)


def wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 600
    while not done():
        assert time.monotonic() < until, "the events are never all sent"
        time.sleep(0.02)
