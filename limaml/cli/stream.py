"""`limaml stream`: events reach the store as they come."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.status import Status

from limaml.cli.console import console, say
from limaml.cli.workspace import Workspace
from limaml.embeddings.refresher import Refresher, RefreshReport
from limaml.interactions.side_tables import SideTables
from limaml.stream.dead_letters import DeadLetters
from limaml.stream.decode import Decoder
from limaml.stream.metrics import Metrics
from limaml.stream.observer import BatchDone, Fresh, JsonLines, Observer, Observers
from limaml.stream.readable import Readable
from limaml.stream.url import open_source
from limaml.stream.worker import Pace, Totals, Worker, alone

__all__ = ["decoder_for", "fresh_of", "stream_command"]


def stream_command(
    folder: Path,
    /,
    *,
    source: Annotated[
        list[str],
        Parameter(
            help="Where events come from: kafka://host:9092/topic, redis://host/stream-key, nats://host/stream?subject=…, or a "
            "file of JSON lines. Repeat for more.",
            negative=(),
        ),
    ],
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    once: Annotated[bool, Parameter(help="Take in what is there, then end.", negative=())] = False,
    max_batch: Annotated[int, Parameter(help="Events at a time.", validator=Number(gte=1))] = 2000,
    max_wait: Annotated[
        float, Parameter(help="Seconds that an event may wait for others.", validator=Number(gte=0))
    ] = 0.1,
    max_ahead: Annotated[
        float, Parameter(help="Seconds that an event may lie in the future.", validator=Number(gte=0))
    ] = 300.0,
    epoch: Annotated[
        Literal["s", "ms", "us", "ns"], Parameter(help="Unit of numbers that stand for times in a column of datetimes.")
    ] = "s",
    metrics_port: Annotated[
        int | None,
        Parameter(
            help="Serve Prometheus metrics on this port of this machine (0: any).", validator=Number(gte=0, lte=65535)
        ),
    ] = None,
    log: Annotated[
        Literal["auto", "text", "json"], Parameter(help="Sentences, or JSON lines on stderr (auto: by the terminal).")
    ] = "auto",
) -> None:
    """Take events in as they come: append them to the log once, adapt the touched tasks again, upsert their embeddings.

    An event is a JSON object with the log's columns. What has no row goes to the dead letters, with the reason. Every version
    that is served, or about to be, is kept fresh. End it with Ctrl-C or SIGTERM; it can be killed at any moment, too, and
    goes on where the log ends.

    `limaml stream runs/mine --source "redis://localhost:6379/clicks"`

    `limaml stream runs/mine --source events.jsonl --once`

    Next: `limaml dead-letters list runs/mine`, `limaml recommend runs/mine --task 42`.
    """
    place = Workspace(folder)
    trained = place.trained
    name = "limaml-" + hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
    sources = [open_source(address, name) for address in source]
    with ExitStack() as stack:
        stack.enter_context(alone(folder))
        opened = stack.enter_context(place.store(store))
        refresher = stack.enter_context(place.refresher(opened, store))
        shown = stack.enter_context(_shown(log))
        observers: list[Observer] = [shown]
        if metrics_port is not None:
            metrics = Metrics()
            port, stop_serving = metrics.serve(metrics_port)
            stack.callback(stop_serving)
            observers.append(metrics)
            shown.say("info", f"Metrics: http://127.0.0.1:{port}/metrics", port=port)
        stop = stack.enter_context(_told_to_stop())
        worker = Worker(
            sources,
            decoder_for(place, refresher, max_ahead=max_ahead, epoch=epoch),
            place.log(trained.encoder.schema),
            DeadLetters(folder),
            lambda: fresh_of(refresher.run()),
            Observers(observers),
            pace=Pace(max_batch=max_batch, max_wait=max_wait),
            stop=stop,
        )
        shown.say("info", f"Reading {', '.join(each.name for each in sources)}.", group=name)
        began, position = time.monotonic(), place.log(place.schema).position
        totals = worker.run(once=once)
        if totals.taken and place.schema.row is not None:  # what came with the events can be recommended
            for _, rows in place.log(place.schema).since(position):
                place.add_candidates(place.joined(rows)[0])
    say(_summary(totals, time.monotonic() - began, folder))


def decoder_for(place: Workspace, refresher: Refresher, *, max_ahead: float, epoch: str) -> Decoder:
    """What makes rows for the log of a run folder out of events."""
    encoder = place.trained.encoder
    return Decoder(
        place.log(encoder.schema).schema,
        encoder.schema,
        epoch=epoch,
        max_ahead_s=max_ahead,
        latest=lambda: refresher.windows.newest,
        accepts=Readable(encoder, SideTables(place.folder / "side")),
    )


def fresh_of(report: RefreshReport) -> Fresh:
    """A refresh of several versions, as the stream counts it."""
    applied: dict[str, int] = {}
    stale: dict[str, int] = {}
    for version in report.versions:
        for into, counts in ((applied, version.applied), (stale, version.stale)):
            for task, count in counts.items():
                into[task] = into.get(task, 0) + count
    watermarks = {version.version: version.watermark for version in report.versions}
    return Fresh(applied, stale, watermarks, sum(version.tasks for version in report.versions))


def _summary(totals: Totals, seconds: float, folder: Path) -> list[str]:
    lines = [
        f"{totals.events:,} events in {totals.batches:,} batches and {seconds:.1f} s: {totals.taken:,} are new in the log, "
        f"{totals.already:,} were there already, {totals.dead:,} are dead letters, {totals.forgotten:,} are of forgotten tasks.",
        f"{totals.tasks:,} times a task was adapted again; {totals.applied:,} embeddings are new in the store.",
    ]
    return [*lines, f"Look at the dead letters: limaml dead-letters list {folder}"] if totals.dead else lines


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM and SIGINT, which then have no other effect."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.signal(each, lambda *_: stop.set()) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _shown(log: str) -> Iterator[Observer]:
    if log == "json" or (log == "auto" and not console.is_terminal):
        yield JsonLines()
        return
    if not console.is_terminal:
        yield _Line(None)
        return
    with console.status("Waiting for events") as status:
        yield _Line(status)


class _Line:
    """Sentences, and below them one line of how things are."""

    def __init__(self, status: Status | None) -> None:
        self._status, self._began = status, time.monotonic()
        self._totals, self._lag, self._delay = Totals(), dict[str, int | None](), 0.0

    def batch(self, done: BatchDone) -> None:
        self._totals.count(done)
        self._delay = max(done.delays, default=0.0)
        self._show()

    def lag(self, source: str, lags: Mapping[str, int | None]) -> None:
        known = [each for each in lags.values() if each is not None]
        self._lag[source] = sum(known) if len(known) == len(lags) else None
        self._show()

    def up(self, what: str, is_up: bool) -> None:
        """Said in a sentence."""

    def say(self, level: str, sentence: str, **fields: object) -> None:
        console.print(f"  {sentence}", style="yellow" if level == "warning" else None, markup=False, highlight=False)

    def _show(self) -> None:
        if self._status is None:
            return
        totals = self._totals
        lags = ", ".join(f"{name} {'?' if lag is None else f'{lag:,}'}" for name, lag in self._lag.items())
        self._status.update(
            f"{totals.events:,} events ({totals.events / max(time.monotonic() - self._began, 1):,.0f}/s), {totals.tasks:,} tasks, "
            f"{totals.dead:,} dead; event to servable {self._delay:.2f} s; lag: {lags}"
        )
