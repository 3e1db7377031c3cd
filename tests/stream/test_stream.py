"""The whole way: events from real brokers into the log and the store, and what is left of it wherever it is cut."""

from __future__ import annotations

import io
import json
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import polars as pl
import pytest
from faults.processes import Nursery, Running
from store.servers import valkey

import limaml
from limaml.cli import main
from limaml.cli.stream import decoder_for, fresh_of
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.errors import ConfigError
from limaml.stream.dead_letters import DeadLetters
from limaml.stream.observer import JsonLines
from limaml.stream.url import open_source
from limaml.stream.worker import Pace, Worker

from .brokers import Broker, broker
from .world import World, kept, regenerated, same

KINDS = ["file", "redis", "nats", "kafka"]


def stream(world: World, *arguments: str) -> None:
    main(["stream", str(world.run), *arguments])


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def worker(processes: Nursery, world: World) -> Start:
    """`worker("--source", address)` is `limaml stream` in a process of its own, reading; killed at the end if need be."""

    @contextmanager
    def run(*arguments: object) -> Iterator[Running]:
        process = processes.start("stream", world.run, *arguments, "--log", "json")
        try:
            process.wait_until("Reading")
            yield process
        finally:
            process.kill()

    return run


def said(process: Running, words: str, times: int = 1) -> dict[str, object]:
    """The line in which a worker says these words for the n-th time; waits for it."""
    until = time.monotonic() + 60
    while len(lines := [line for line in process.said().splitlines() if words in line]) < times:
        assert not process.ended() and time.monotonic() < until, f"no {words!r} in: {process.said()}"
        time.sleep(0.01)
    found: dict[str, object] = json.loads(lines[times - 1])
    return found


def log_rows(world: World) -> pl.DataFrame:
    return limaml.InteractionLog(world.run / "log").read()


def holds(world: World, count: int, store: str | None = None) -> None:
    """The log has the past and the first `count` later interactions, each once; the store is what they give."""
    expected = world.rows_after(count)
    assert log_rows(world).sort(expected.columns).equals(expected.sort(expected.columns))
    same(kept(world.run, store), regenerated(world.run, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_ends_where_embedding_everything_anew_would(world: World, kind: str) -> None:
    with broker(kind) as server:
        server.publish(world.payloads(0, 100))
        stream(world, "--source", server.address, "--once", "--max-batch", "37")
        holds(world, 100)
        stream(world, "--source", server.address, "--once")  # nothing is new
        server.publish(world.payloads(100))
        stream(world, "--source", server.address, "--once")
        holds(world, world.later.height)


def test_several_sources_at_once(world: World) -> None:
    events = world.payloads()
    with broker("redis") as one, broker("file") as two:
        one.publish(events[::2])
        two.publish(events[1::2])
        stream(world, "--source", one.address, "--source", two.address, "--once", "--max-batch", "50")
    holds(world, len(events))


def test_what_has_no_row_is_a_dead_letter_and_holds_nothing_up(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    events = world.payloads(0, 20)
    late = json.loads(events[5]) | {"timestamp": "2200-01-01T00:00:00Z"}
    bad = [b"{", b"[]", json.dumps({**json.loads(events[0]), "user_id": None}).encode(), json.dumps(late).encode()]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join([*events[:10], *bad, *events[10:]]))
    stream(world, "--source", str(path), "--once", "--max-batch", "7")
    stream(world, "--source", str(path), "--once")
    holds(world, 20)
    letters = DeadLetters(world.run).list()
    assert [letter.payload for letter in letters] == bad
    capsys.readouterr()
    main(["dead-letters", "list", str(world.run)])
    main(["dead-letters", "show", str(world.run), letters[3].id])
    shown = capsys.readouterr().out
    assert "lies in the future" in shown and "4 dead letters in all" in shown and '"timestamp": "2200' in shown
    main(["dead-letters", "replay", str(world.run), letters[3].id, "--max-ahead", "1e10"])
    assert "1 events are rows of the log now" in capsys.readouterr().out
    assert log_rows(world)["timestamp"].max().year == 2200  # type: ignore[union-attr]
    same(kept(world.run), regenerated(world.run, log_rows(world)))
    main(["dead-letters", "drop", str(world.run), "--all"])
    assert DeadLetters(world.run).count() == 0


def test_a_second_worker_on_a_run_folder_says_so_and_ends(
    world: World, worker: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    with broker("redis") as server, worker("--source", server.address):
        with pytest.raises(SystemExit) as end:
            stream(world, "--source", server.address)
        assert end.value.code == 2
        assert "Another `limaml stream` works on" in capsys.readouterr().err


def test_it_ends_when_it_is_told_to_after_the_batch_under_way(world: World, worker: Start) -> None:
    with broker("redis") as server, worker("--source", server.address, "--metrics-port", "0") as process:
        port = said(process, "Metrics:")["port"]
        server.publish(world.payloads(0, 60))
        said(process, "A batch is servable")
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        assert 'limaml_stream_events_total{outcome="taken"}' in text
        assert "limaml_stream_event_to_servable_seconds_count" in text
        assert "limaml_stream_watermark{version=" in text
        assert 'limaml_stream_up{what="redis:clicks"} 1.0' in text
        server.publish(world.payloads(60, 90))
        process.signal(signal.SIGTERM)
        assert process.wait(30).code == 0
        holds(world, log_rows(world).height - world.past.height)
        stream(world, "--source", server.address, "--once")
        holds(world, 90)


@pytest.mark.parametrize("kind", ["redis", "nats", "kafka"])
def test_killed_at_any_moment_it_loses_nothing(world: World, worker: Start, kind: str) -> None:
    chance = random.Random(kind)
    events = world.payloads()
    total = len(events)
    with broker(kind) as server:
        for done in range(0, total, total // 4):
            with worker("--source", server.address, "--max-batch", "20", "--max-wait", "0.01") as process:
                feed = threading.Thread(target=publish_slowly, args=(server, events[done : done + total // 4]))
                feed.start()
                time.sleep(chance.uniform(0.0, 0.6))
                process.kill()
                feed.join()
        server.publish([events[0]])
        stream(world, "--source", server.address, "--once")
        assert log_rows(world).height == world.past.height + total + 1  # as it was sent: the first one twice
        same(kept(world.run), regenerated(world.run, world.rows_after(total)))


def publish_slowly(server: Broker, events: Sequence[bytes]) -> None:
    for start in range(0, len(events), 10):
        server.publish(events[start : start + 10])
        time.sleep(0.02)


def test_a_store_and_a_broker_that_go_away_are_waited_for(world: World, worker: Start) -> None:
    with valkey() as server, broker("nats") as source:
        address = f"redis://127.0.0.1:{server.port}?timeout=1"
        main(["embed", str(world.run), "--store", address])
        with worker("--source", source.address, "--store", address) as process:
            source.publish(world.payloads(0, 30))
            said(process, "A batch is servable")
            server.kill()
            source.publish(world.payloads(30, 60))
            said(process, "Trying again in")
            server.start()
            said(process, "The store answers again")
            pauses = process.said().count("Trying again in")
            source.kill()
            said(process, "Trying again in", pauses + 1)
            source.start()
            said(process, "nats:clicks:clicks.web answers again")
            source.publish(world.payloads(60, 90))
            until = time.monotonic() + 60
            while log_rows(world).height < world.past.height + 90:
                assert time.monotonic() < until
                time.sleep(0.05)
            process.signal(signal.SIGTERM)
            assert process.wait(30).code == 0
        holds(world, 90, address)


def test_an_append_of_somebody_else_is_servable_while_no_event_comes(world: World, worker: Start) -> None:
    with broker("redis") as server, worker("--source", server.address):
        limaml.InteractionLog(world.run / "log").append(world.later[:25])
        expected = regenerated(world.run, world.rows_after(25))
        until = time.monotonic() + 30
        while {k: c for k, (_, c) in kept(world.run).items()} != {k: c for k, (_, c) in expected.items()}:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_small_files_of_the_log_are_folded_now_and_then(world: World) -> None:
    place = Workspace(world.run)
    log = place.log(place.schema)
    with broker("file") as server, place.store() as store, place.refresher(store) as refresher:
        server.publish(world.payloads(0, 60))
        worker = Worker(
            [open_source(server.address, "g")],
            decoder_for(place, refresher, max_ahead=300.0, epoch="s"),
            log,
            DeadLetters(world.run),
            lambda: fresh_of(refresher.run()),
            JsonLines(io.StringIO()),
            pace=Pace(max_batch=6, max_wait=0.0, compact_tails=4),
        )
        totals = worker.run(once=True)
    assert (totals.batches, totals.taken, totals.applied) == (10, 60, totals.tasks)
    assert log.tails < 4
    holds(world, 60)


def test_two_sources_of_one_name_are_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.touch()
    with pytest.raises(ConfigError, match="each needs one of its own"):
        main(["stream", str(world.run), "--source", str(path), "--source", str(path), "--debug"])


def test_events_of_a_forgotten_member_come_to_nothing(world: World) -> None:
    first = json.loads(world.payloads(0, 1)[0])
    key = str(first["user_id"])
    limaml.InteractionLog(world.run / "log").forget("user_id", ["user_id"], [key])
    with broker("redis") as server:
        server.publish([json.dumps(first).encode(), json.dumps({**first, "timestamp": "soon"}).encode()])
        stream(world, "--source", server.address, "--once")
    assert not (log_rows(world)["user_id"].cast(pl.String) == key).any()
    assert DeadLetters(world.run).count() == 0


def test_new_row_ids_can_be_recommended(world: World) -> None:
    fresh = json.loads(world.payloads(0, 1)[0]) | {"item_id": 29_999}
    with broker("file") as server:
        server.publish([json.dumps(fresh).encode()])
        stream(world, "--source", server.address, "--once")
    assert 29_999 in Workspace(world.run).candidates()["item_id"]


def test_every_live_version_is_kept_fresh(world: World) -> None:
    with limaml.open_store(world.run / "store") as store:
        old = store.current(MODEL_NAME)
    main(["embed", str(world.run)])
    with limaml.open_store(world.run / "store") as store:
        new = store.current(MODEL_NAME)
        assert old is not None
        store.activate(MODEL_NAME, old)  # the newer one waits
    with broker("file") as server:
        server.publish(world.payloads(0, 40))
        stream(world, "--source", server.address, "--once")
    expected = regenerated(world.run, world.rows_after(40))
    same(kept(world.run, version=old), expected)
    same(kept(world.run, version=new), expected)
