"""The worker: events from sources into the log, from the log into every live version, and only then a commit.

    fetch ──► drop what the log has ──► decode ──► dead letters ──► log.append(positions) ──► refresh ──► commit

Every arrow may be cut by a kill: what is left of it is seen in the log's positions, and the rest is done again. Nothing
is fetched while a batch is under way, so that a slow store slows the reading down and nothing piles up here. What does
not answer, a source or the store, is asked again after a pause that grows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from limaml.errors import ConfigError, StoreError
from limaml.interactions.atomic_files import locked
from limaml.interactions.log import InteractionLog
from limaml.stream.dead_letters import DeadLetter, DeadLetters, mentions
from limaml.stream.decode import Decoder
from limaml.stream.observer import BatchDone, Fresh, Observer
from limaml.stream.source import Event, Source, SourceDown, partition_key

__all__ = ["Pace", "Totals", "Worker", "alone"]

STORE = "store"
_SLICE_S = 0.2  # how long a signal may wait to be seen
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pace:
    """How much at a time, and how often. Times are in seconds."""

    max_batch: int = 2000  # events
    max_wait: float = 0.1  # from a batch's first event until it is taken as it is
    idle: float = 1.0  # between two looks at what others appended, while no event comes
    lag: float = 1.0  # between two questions for the lag
    compact_tails: int = 256  # small files in the log before they are folded
    first_pause: float = 0.2  # after a failure; doubled each time
    longest_pause: float = 15.0


@dataclass
class Totals:
    """What a worker did since it began; the names are those of `BatchDone`."""

    batches: int = 0
    events: int = 0
    taken: int = 0
    already: int = 0
    dead: int = 0
    forgotten: int = 0
    tasks: int = 0
    applied: int = 0

    def count(self, done: BatchDone) -> None:
        self.batches += 1
        self.events += done.events
        self.taken += done.taken
        self.already += done.already
        self.dead += done.dead
        self.forgotten += done.forgotten
        self.tasks += done.fresh.tasks
        self.applied += sum(done.fresh.applied.values())


class _Stopped(Exception):
    """Told to stop while waiting for the store: the log has the events, and the next worker does the rest."""


@dataclass
class _Feed:
    source: Source
    is_open: bool = False
    pause: float = 0.0
    try_at: float = 0.0  # monotonic
    empty: bool = False  # the last fetch brought nothing


@dataclass
class _Batch:
    events: list[tuple[_Feed, Event]] = field(default_factory=list)


@dataclass(frozen=True)
class _Kept:
    new: Sequence[Event]  # that the log had not
    taken: int
    dead: int
    forgotten: int


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only worker of a run folder; `StoreError` if there is another one."""
    try:
        with locked(folder / ".stream.lock", 0.0):
            yield
    except StoreError as error:
        if ".stream.lock" not in str(error):
            raise
        raise StoreError(
            f"Another `limaml stream` works on {folder}, and two would read the same events. One takes several --source; end "
            "the other one first, or give this one a run folder of its own."
        ) from None


class Worker:
    """`refresh` makes every live version as fresh as the log, and may be called at any time. `stop`, once set, ends `run`
    after the batch under way. Raises what no waiting mends (`ConfigError`, `DataError`)."""

    def __init__(
        self,
        sources: Sequence[Source],
        decoder: Decoder,
        log: InteractionLog,
        letters: DeadLetters,
        refresh: Callable[[], Fresh],
        observer: Observer,
        *,
        pace: Pace | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        names = [source.name for source in sources]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(
                f"The sources have the names {names}; each needs one of its own, by which the log knows it: add name=… to the "
                "address."
            )
        self._feeds = [_Feed(source) for source in sources]
        self._decoder, self._log, self._letters, self._refresh = decoder, log, letters, refresh
        self._observer, self._pace, self._stop = observer, pace or Pace(), stop or threading.Event()
        self._lag_at = self._idle_at = 0.0
        self.totals = Totals()

    def run(self, *, once: bool = False) -> Totals:
        """Work until `stop` is set; with `once`, until every source has brought all it holds."""
        with ExitStack() as stack, suppress(_Stopped):
            for feed in self._feeds:
                stack.callback(feed.source.close)
            self._patiently(self._refresh)  # what an earlier worker had appended and no more
            while not self._stop.is_set():
                batch = self._gather(once)
                if batch.events:
                    self._take(batch)
                elif once and all(self._drained(feed) for feed in self._feeds):
                    break
                else:
                    self._idle()
                self._tell_lag()
        return self.totals

    # --- fetching ----------------------------------------------------------------------------------------------------

    def _gather(self, once: bool) -> _Batch:
        """Events of all sources, fairly, until there are enough or the first one has waited long enough."""
        batch = _Batch()
        deadline: float | None = None
        while len(batch.events) < self._pace.max_batch and not self._stop.is_set():
            feeds = [feed for feed in self._feeds if self._opened(feed)]
            if not feeds:
                self._stop.wait(self._pace.first_pause)
                return batch
            found = 0
            for feed in feeds:
                share = -(-(self._pace.max_batch - len(batch.events)) // len(feeds))
                found += self._fetch(feed, batch, share, 0.0) if share > 0 else 0
            now = time.monotonic()
            if found:
                deadline = deadline or now + self._pace.max_wait
                continue
            if deadline is not None and (now >= deadline or once):
                return batch
            wait = _SLICE_S if deadline is None else min(_SLICE_S, deadline - now)
            before = len(batch.events)
            for feed in (feed for feed in feeds if feed.is_open):
                self._fetch(feed, batch, self._pace.max_batch - before, wait / len(feeds))
                if len(batch.events) > before:
                    deadline = deadline or time.monotonic() + self._pace.max_wait
                    break
            else:
                if deadline is None:
                    return batch
        return batch

    def _fetch(self, feed: _Feed, batch: _Batch, limit: int, wait: float) -> int:
        try:
            found = feed.source.fetch(limit, wait)
        except SourceDown as error:
            self._lost(feed, error)
            return 0
        feed.empty = not found
        batch.events += [(feed, event) for event in found]
        return len(found)

    def _opened(self, feed: _Feed) -> bool:
        """Whether the source is open; tries, if it is time to."""
        if feed.is_open or time.monotonic() < feed.try_at:
            return feed.is_open
        prefix = partition_key(feed.source.name, "")
        positions = {
            name.removeprefix(prefix): position
            for name, position in self._log.positions().items()
            if name.startswith(prefix)
        }
        try:
            for sentence in feed.source.open(positions):
                self._observer.say("warning", sentence, source=feed.source.name)
        except SourceDown as error:
            self._lost(feed, error)
            return False
        if feed.pause:
            self._observer.say("info", f"The source {feed.source.name} answers again.", source=feed.source.name)
        feed.is_open, feed.pause, feed.empty = True, 0.0, False
        self._observer.up(feed.source.name, True)
        return True

    def _drained(self, feed: _Feed) -> bool:
        """Whether a source has brought all it holds: a fetch that brings nothing may have been a slow answer."""
        if not (feed.is_open and feed.empty):
            return False
        try:
            return not any(feed.source.lag().values())
        except SourceDown as error:
            self._lost(feed, error)
            return False

    def _lost(self, feed: _Feed, error: SourceDown) -> None:
        """Close the source, and try again later. What it brought and is not in the log will come again."""
        feed.is_open = False
        feed.source.close()
        feed.pause = self._next_pause(feed.pause)
        feed.try_at = time.monotonic() + feed.pause
        self._observer.up(feed.source.name, False)
        self._observer.say("warning", f"{error} Trying again in {feed.pause:.1f} s.", source=feed.source.name)

    # --- one batch ---------------------------------------------------------------------------------------------------

    def _take(self, batch: _Batch) -> None:
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        kept = self._patiently(lambda: self._append(batch))
        seconds["append"] = time.perf_counter() - began
        fresh = self._patiently(self._refresh)
        seconds["refresh"] = time.perf_counter() - began - seconds["append"]
        servable = time.time()
        self._commit(batch)
        seconds["commit"] = time.perf_counter() - began - seconds["append"] - seconds["refresh"]
        done = BatchDone(
            events=len(batch.events),
            taken=kept.taken,
            already=len(batch.events) - len(kept.new),
            dead=kept.dead,
            forgotten=kept.forgotten,
            fresh=fresh,
            delays=[max(0.0, servable - event.time) for event in kept.new if event.time is not None],
            seconds=seconds,
        )
        self.totals.count(done)
        self._observer.batch(done)
        if self._log.tails >= self._pace.compact_tails:
            self._patiently(self._log.compact)

    def _append(self, batch: _Batch) -> _Kept:
        """Refused events to the dead letters, the others to the log with the positions of all. May be done again."""
        at = self._log.positions()
        new: list[Event] = []
        keys: list[str] = []
        for feed, event in batch.events:
            key = partition_key(feed.source.name, event.partition)
            if event.position > at.get(key, -1):
                at[key] = event.position
                new.append(event)
                keys.append(feed.source.name)
        if not new:
            return _Kept(new, 0, 0, 0)
        decoded = self._decoder.decode([event.payload for event in new])
        letters = [
            DeadLetter(keys[place], new[place].partition, new[place].position, new[place].payload, why, new[place].time)
            for place, why in decoded.refused.items()
        ]
        kept = self._unforgotten(letters)
        if kept:
            self._letters.put(kept)
            self._observer.say(
                "warning",
                f"{len(kept)} events have no row and are dead letters now. The first: {kept[0].reason}",
                id=kept[0].id,
            )
        positions = {
            partition_key(name, event.partition): event.position for name, event in zip(keys, new, strict=True)
        }
        appended = self._log.append(decoded.rows, positions=positions)
        forgotten = appended.forgotten + len(letters) - len(kept)
        return _Kept(new, appended.new, len(kept), forgotten)

    def _unforgotten(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Letters but those of forgotten tasks, of which nothing is kept."""
        if not letters:
            return []
        columns = {task.name: task.columns for task in self._decoder.schema.tasks}
        stones = [(columns[task], keys) for task, keys in self._log.forgotten().items() if task in columns and keys]
        return [each for each in letters if not any(mentions(each.payload, names, keys) for names, keys in stones)]

    def _commit(self, batch: _Batch) -> None:
        for feed in self._feeds:
            positions = {event.partition: event.position for owner, event in batch.events if owner is feed}
            if positions and feed.is_open:
                try:
                    feed.source.commit(positions)
                except SourceDown as error:  # the log has the positions: nothing comes twice
                    self._lost(feed, error)

    # --- between batches ---------------------------------------------------------------------------------------------

    def _idle(self) -> None:
        """While nothing comes: what others appended (a refresh, a replay), and versions that are new."""
        if time.monotonic() >= self._idle_at:
            self._patiently(self._refresh)
            self._idle_at = time.monotonic() + self._pace.idle

    def _tell_lag(self) -> None:
        if time.monotonic() < self._lag_at:
            return
        for feed in self._feeds:
            if feed.is_open:
                try:
                    self._observer.lag(feed.source.name, feed.source.lag())
                except SourceDown as error:
                    self._lost(feed, error)
        self._lag_at = time.monotonic() + self._pace.lag

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """Do it again until it is done, while the store, the log's lock or the disk refuses. `_Stopped` if told to stop."""
        pause = 0.0
        while True:
            try:
                result = work()
            except (StoreError, OSError) as error:
                pause = self._next_pause(pause)
                self._observer.up(STORE, False)
                self._observer.say("warning", f"{error} Trying again in {pause:.1f} s; no event is lost.")
                if self._stop.wait(pause):
                    raise _Stopped from error
                continue
            if pause:
                self._observer.say("info", "The store answers again.")
            self._observer.up(STORE, True)
            return result

    def _next_pause(self, pause: float) -> float:
        return min(self._pace.longest_pause, 2 * pause or self._pace.first_pause)
