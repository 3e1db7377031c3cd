"""What a worker tells of itself, and those who listen: a log of JSON lines, a live line for people, metrics."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TextIO

__all__ = ["BatchDone", "Fresh", "JsonLines", "Observer", "Observers"]


@dataclass(frozen=True)
class Fresh:
    """What refreshing the live versions did. Each mapping is by task type, `watermarks` by version."""

    applied: Mapping[str, int] = field(default_factory=dict)  # embeddings that are new in a version
    stale: Mapping[str, int] = field(default_factory=dict)  # ones that a version had already
    watermarks: Mapping[str, int | None] = field(default_factory=dict)
    tasks: int = 0  # that were adapted


@dataclass(frozen=True)
class BatchDone:
    """One micro-batch, from the first event to the commit. Counts are of events."""

    events: int  # that were fetched
    taken: int  # that are rows of the log now
    already: int  # that the log had: delivered again
    dead: int  # that are dead letters now
    forgotten: int  # of tasks that were forgotten
    fresh: Fresh
    delays: Sequence[float]  # seconds from the source's time to being servable, of each new event that has one
    seconds: Mapping[str, float]  # decode, append, refresh, commit


class Observer(Protocol):
    def batch(self, done: BatchDone) -> None: ...

    def lag(self, source: str, lags: Mapping[str, int | None]) -> None:
        """Events that a source holds and nobody has fetched, by partition."""
        ...

    def up(self, what: str, is_up: bool) -> None:
        """Whether a source, or the store, answers."""
        ...

    def say(self, level: str, sentence: str, **fields: object) -> None:
        """A sentence for people; `level` is info, warning or error."""
        ...


class Observers:
    """Several as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = list(observers)

    def batch(self, done: BatchDone) -> None:
        for each in self._all:
            each.batch(done)

    def lag(self, source: str, lags: Mapping[str, int | None]) -> None:
        for each in self._all:
            each.lag(source, lags)

    def up(self, what: str, is_up: bool) -> None:
        for each in self._all:
            each.up(what, is_up)

    def say(self, level: str, sentence: str, **fields: object) -> None:
        for each in self._all:
            each.say(level, sentence, **fields)


class JsonLines:
    """One JSON object a line: `time`, `level`, `message`, and numbers by name."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def batch(self, done: BatchDone) -> None:
        self.say(
            "info",
            "A batch is servable.",
            events=done.events,
            taken=done.taken,
            already=done.already,
            dead=done.dead,
            forgotten=done.forgotten,
            tasks=done.fresh.tasks,
            applied=sum(done.fresh.applied.values()),
            stale=sum(done.fresh.stale.values()),
            slowest_s=round(max(done.delays, default=0.0), 4),
            seconds={name: round(value, 4) for name, value in done.seconds.items()},
        )

    def lag(self, source: str, lags: Mapping[str, int | None]) -> None:
        """Left to the metrics."""

    def up(self, what: str, is_up: bool) -> None:
        """Said in a sentence as well."""

    def say(self, level: str, sentence: str, **fields: object) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "message": sentence, **fields}
        print(json.dumps(line, default=str), file=self._file or sys.stderr, flush=True)
