"""Each task's last interactions, packed in LMDB, so that refreshing a task does not scan the log.

    w <type> <task key>          one task's window (`window_value`)
    c <type> <append> <task>     which append changed each task last: what a refresh has to look at
    windows, refreshed <version> what the windows hold, and how far each version has been refreshed

Windows are a view of the log: they hold what reading it whole gives, exact duplicates dropped, and remember the append
that they have come to. What is lost or damaged is made again from the log (`rebuild`). Each step is one transaction;
whoever else works on the same windows meanwhile is noticed, and the step is done again.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.embeddings.window_value import (
    INDEX,
    Row,
    count_of,
    extended,
    newest_of,
    parts_of,
    revision_of,
    unseen,
    without_rows,
)
from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import locked
from limaml.interactions.index import time_values
from limaml.interactions.keys import task_keys
from limaml.interactions.log import APPEND, InteractionLog
from limaml.interactions.packed_rows import RowCodec
from limaml.interactions.schema import Schema, Task
from limaml.store.environment import acquire, release

__all__ = ["CaughtUp", "Layout", "WindowRows", "Windows"]

FORMAT = 1
ROWS_PER_STEP = 200_000
REBUILD_WAIT_S = 3600.0
ASKED = "it was asked for"
_STATE = b"windows"
_REFRESHED = b"refreshed "


@dataclass(frozen=True)
class Layout:
    """What windows hold: for which task types, in order of which column, and how many rows of each task."""

    tasks: Mapping[str, tuple[str, ...]]  # task type → the columns that name its tasks
    time: str
    keep: int | None  # None: all rows

    @staticmethod
    def of(schema: Schema, keep: int | None) -> Layout:
        if schema.time is None:
            raise ConfigError(
                "The interactions have no time, so that there are no latest ones. Train again with --time, or publish all "
                "tasks anew (limaml embed)."
            )
        return Layout({task.name: tuple(task.columns) for task in schema.tasks}, schema.time, keep)

    def with_room_for(self, other: Layout) -> Layout:
        """What holds all that either holds. `ConfigError` where they contradict each other."""
        for task, columns in other.tasks.items():
            if self.tasks.get(task, columns) != columns:
                raise ConfigError(
                    f"Task type '{task}' is named by {list(self.tasks[task])} in one model and by {list(columns)} in another, "
                    "and one run folder keeps both fresh. Train the other model into a run folder of its own."
                )
        if self.time != other.time:
            raise ConfigError(
                f"One model orders interactions by '{self.time}' and another by '{other.time}', and one run folder keeps both "
                "fresh. Train the other model into a run folder of its own."
            )
        keep = None if self.keep is None or other.keep is None else max(self.keep, other.keep)
        return Layout({**self.tasks, **other.tasks}, self.time, keep)


@dataclass(frozen=True)
class CaughtUp:
    """What catching up with the log did."""

    position: int  # the append that the windows have come to
    rows: int = 0  # rows that were taken in
    duplicates: int = 0  # rows that equal an earlier one in every column
    reread: int = 0  # tasks whose rows in the log had to be read, as a row came too late to tell
    rebuilt: str = ""  # why all was made anew; empty if it was not


@dataclass(frozen=True)
class WindowRows:
    """The windows of some tasks, one after the other."""

    frame: pl.DataFrame  # rows, as the log has them
    owner: NDArray[np.int64]  # [rows] position among the tasks, ascending
    count: NDArray[np.int64]  # [tasks] distinct interactions, those beyond the window included
    newest: NDArray[np.int64]  # [tasks] time of the newest; 0 for a task without interactions


@dataclass(frozen=True)
class _State:
    log: str
    layout: Layout
    position: int
    newest: int | None = None  # time of the newest interaction of all
    epoch: int = 0  # changes where rows leave windows, or all is made anew
    complete: bool = True  # False while all is made anew

    def packed(self) -> bytes:
        layout = {"tasks": self.layout.tasks, "time": self.layout.time, "keep": self.layout.keep}
        return json.dumps({"format": FORMAT, **vars(self), "layout": layout}).encode()

    @staticmethod
    def unpacked(value: bytes) -> _State | None:
        raw = json.loads(value)
        if raw.pop("format") != FORMAT:
            return None
        layout = raw.pop("layout")
        tasks = {name: tuple(columns) for name, columns in layout["tasks"].items()}
        return _State(**raw, layout=Layout(tasks, layout["time"], layout["keep"]))


class Windows:
    """The windows in `folder`, over `log`. To be closed."""

    def __init__(self, folder: Path | str, log: InteractionLog, layout: Layout) -> None:
        self.folder, self.log = Path(folder), log
        self.folder.mkdir(parents=True, exist_ok=True)
        self._env = acquire(self.folder)
        self._layout = layout
        self._codec: RowCodec | None = None
        found = self._state()
        if found is not None and found.log == log.id:
            self._layout = found.layout.with_room_for(layout)

    # --- following the log -------------------------------------------------------------------------------------------

    def catch_up(self) -> CaughtUp:
        """Take in what was appended to the log since the last time; all of it, if there was none."""
        why = self._why_rebuild()
        if why:
            return self.rebuild(why)
        rows = duplicates = reread = 0
        while True:
            state = self._state()
            assert state is not None
            frames, held, last = list[pl.DataFrame](), 0, state.position
            end = self.log.position
            for number, frame in self.log.since(state.position):
                frames.append(frame.with_columns(pl.lit(number, pl.UInt32).alias(APPEND)))
                held, last = held + frame.height, number
                if held >= ROWS_PER_STEP:
                    break
            else:
                last = max(end, last)
            if last == state.position:
                return CaughtUp(last, rows, duplicates, reread)
            done = self._apply(state, pl.concat(frames) if frames else None, last)
            if done is not None:
                rows, duplicates, reread = rows + done[0], duplicates + done[1], reread + done[2]

    def _why_rebuild(self) -> str:
        state = self._state()
        if state is None:
            return "there were no windows yet"
        if state.log != self.log.id or state.position > self.log.position:
            return "the windows are those of another log"
        if not state.complete:
            return "making them anew was interrupted"
        if state.layout != self._layout:
            return "a model needs longer windows, or windows of another task type"
        return ""

    def rebuild(self, why: str = ASKED) -> CaughtUp:
        """Make all windows anew from the log, one bucket in memory at a time. How far versions are refreshed stays known."""
        with locked(self.folder / ".rebuild", REBUILD_WAIT_S):
            if why != ASKED and not self._why_rebuild():  # another process did it
                return self.catch_up()
            while True:
                done = self._rebuilt(why)
                if done is not None:
                    return done

    def _rebuilt(self, why: str) -> CaughtUp | None:
        through, old = self.log.position, self._state()
        state = _State(self.log.id, self._layout, through, epoch=0 if old is None else old.epoch + 1, complete=False)

        def begin(txn: Any) -> None:
            txn.drop(self._env.values, delete=False)
            if old is not None and old.log != state.log:
                for key in list(_keys(txn, self._env.catalog, _REFRESHED)):
                    txn.delete(key, db=self._env.catalog)
            txn.put(_STATE, state.packed(), db=self._env.catalog)

        self._env.write(begin)
        rows = duplicates = 0
        for _, frame in self.log.buckets(through=through, numbered=True):
            if not frame.height:
                continue
            done = self._apply(state, frame, through, whole=True)
            if done is None:
                return None
            state = self._state() or state
            rows, duplicates = rows + done[0], duplicates + done[1]
        if not self._step(state, replace(state, complete=True), lambda txn: None):
            return None
        return CaughtUp(through, rows, duplicates, rebuilt=why)

    def _apply(
        self, state: _State, frame: pl.DataFrame | None, last: int, whole: bool = False
    ) -> tuple[int, int, int] | None:
        """Take rows in, with their `APPEND` column: rows, duplicates, tasks read again; None if somebody was faster.

        `whole`: they are all rows of the log's buckets that they are in."""
        given = self.log.unforgotten(frame) if frame is not None else None
        if given is None or not given.height:
            return (0, 0, 0) if self._step(state, replace(state, position=last), lambda txn: None) else None
        numbers = given[APPEND].to_list()
        rows = given.drop(APPEND)
        times, unit = time_values(rows[self._layout.time])
        if unit == "order":
            raise DataError(
                f"The time column '{self._layout.time}' holds {rows[self._layout.time].dtype}, which only gives an order within one "
                "table, so that new rows cannot be placed behind old ones. Use numbers or dates as the time."
            )
        buckets = self.log.bucket_of(rows)
        packed = self._rows_codec().pack(rows)
        order = np.lexsort((buckets, times)).tolist()  # stable: as appended, where both tie
        entries: list[Row] = list(zip(times.tolist(), buckets.tolist(), packed, strict=True))
        puts: dict[bytes, bytes] = {}
        moves: list[tuple[bytes, bytes, bytes | None]] = []
        reread, duplicates = 0, 0
        for kind, (name, columns) in enumerate(self._layout.tasks.items()):
            keys, codes = task_keys(rows, Task(name=name, columns=columns))
            mine: list[list[int]] = [[] for _ in keys]
            owners = codes.tolist()
            for row in order:
                mine[owners[row]].append(row)
            olds = self._values(kind, keys)
            if kind == 0:
                order, reread = self._distinct(rows, entries, mine, olds, order, state.position, whole)
                duplicates = len(entries) - len(order)
                alive = set(order)
                mine = [[row for row in some if row in alive] for some in mine]
            for key, some, old in zip(keys, mine, olds, strict=True):
                if not some:
                    continue
                new = extended(
                    old, [entries[row] for row in some], self._layout.keep, max(numbers[row] for row in some)
                )
                puts[_window_key(kind, key)] = new
                before = None if old is None else _changed_key(kind, revision_of(old), key)
                moves.append((_changed_key(kind, revision_of(new), key), key.encode(), before))

        def put(txn: Any) -> None:
            for fresh, key, before in moves:
                if before != fresh:
                    if before is not None:
                        txn.delete(before)
                    txn.put(fresh, key)
            with txn.cursor() as cursor:
                cursor.putmulti(sorted(puts.items()))

        latest = int(times[order].max()) if len(order) else None
        newest = max((t for t in (state.newest, latest) if t is not None), default=None)
        done = self._step(state, replace(state, position=last, newest=newest), put)
        return (len(entries), duplicates, reread) if done else None

    def _distinct(
        self,
        rows: pl.DataFrame,
        entries: list[Row],
        mine: list[list[int]],
        olds: Sequence[bytes | None],
        order: list[int],
        position: int,
        whole: bool,
    ) -> tuple[list[int], int]:
        """The rows, in `order`, that no earlier row equals; and how many tasks were read again to know.

        Equal rows are rows of one task of the first type, whose rows are all in one bucket of the log.
        """
        gone: set[int] = set()
        unsure: list[int] = []
        for task, (some, old) in enumerate(zip(mine, olds, strict=True)):
            fresh, sure = unseen(None if whole else old, [entries[row] for row in some])
            if not sure:
                unsure.append(task)
            elif len(fresh) < len(some):
                gone |= _left_out(entries, some, fresh)
        if unsure:
            firsts = [mine[task][0] for task in unsure]
            ids = rows.select(self.log.task_columns)[firsts].rows()
            history = self.log.read(ids, through=position)
            known = set(self._rows_codec().pack(self.log.unforgotten(history)))
            for task in unsure:
                fresh, _ = unseen(None, [entries[row] for row in mine[task] if entries[row][2] not in known])
                gone |= _left_out(entries, mine[task], fresh)
        return [row for row in order if row not in gone] if gone else order, len(unsure)

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The append that the windows have come to; 0 if there are none."""
        state = self._state()
        return state.position if state is not None and state.complete else 0

    @property
    def epoch(self) -> int:
        """Changes whenever a window may have lost rows for a time: what was read before may not be what is there."""
        state = self._state()
        return -1 if state is None or not state.complete else state.epoch

    @property
    def newest(self) -> int | None:
        """Time of the newest interaction of all."""
        state = self._state()
        return None if state is None else state.newest

    @property
    def layout(self) -> Layout:
        return self._layout

    def read(
        self,
        task_type: str,
        keys: Sequence[str],
        *,
        columns: Sequence[str] | None = None,
        most: int | None = None,
    ) -> WindowRows:
        """The windows of the tasks `keys`; only `columns`, and only the `most` recent rows of each, where these are given."""
        values = self._values(self._kind(task_type), keys)
        parts = [None if value is None else parts_of(value) for value in values]
        held = np.array([0 if part is None else part.rows for part in parts], dtype=np.int64)
        index = np.frombuffer(b"".join(part.index for part in parts if part is not None), INDEX)
        packed = b"".join(part.packed for part in parts if part is not None)
        size = index["size"].astype(np.int64)
        starts = np.cumsum(size) - size
        owner = np.repeat(np.arange(len(held)), held)
        if most is not None and len(held) and int(held.max()) > most:
            behind = np.cumsum(held)[owner] - np.arange(len(owner))  # 1 for the last row of each task
            starts, owner = starts[behind <= most], owner[behind <= most]
        return WindowRows(
            self._rows_codec().unpack(packed, starts, columns),
            owner,
            np.array([0 if value is None else count_of(value) for value in values], dtype=np.int64),
            np.array([0 if value is None else newest_of(value) for value in values], dtype=np.int64),
        )

    def changed_since(self, task_type: str, position: int) -> list[str]:
        """Keys of the tasks that an append after `position` changed, the longest ago first."""
        begin = _changed_key(self._kind(task_type), position + 1, None)
        prefix = begin[:2]

        def scan(txn: Any) -> list[str]:
            with txn.cursor() as cursor:
                found: list[str] = []
                if cursor.set_range(begin):
                    for key, value in cursor:
                        if key[:2] != prefix:
                            break
                        found.append(value.decode())
                return found

        return self._env.read(scan)

    def newer_than(self, task_type: str, time: int) -> list[str]:
        """Keys of the tasks whose newest interaction is after `time`; looks at every window."""
        kind = self._kind(task_type)

        def scan(txn: Any) -> list[str]:
            keys = [value.decode() for _, value in _items(txn, _changed_prefix(kind))]
            with txn.cursor() as cursor:
                held = dict(cursor.getmulti([_window_key(kind, key) for key in keys]))
            return [key for key in keys if newest_of(held[_window_key(kind, key)]) > time]

        return self._env.read(scan)

    def count(self, task_type: str) -> int:
        """Number of tasks that have a window."""
        prefix = _changed_prefix(self._kind(task_type))
        return self._env.read(lambda txn: sum(1 for _ in _items(txn, prefix)))

    # --- how far versions are ----------------------------------------------------------------------------------------

    def refreshed(self, version: str) -> int | None:
        """The append up to which a version was refreshed, as `settle` was told; None if it never was."""
        value = self._env.read(lambda txn: txn.get(_refreshed_key(version), db=self._env.catalog))
        return None if value is None else int(value)

    def settle(self, version: str, position: int) -> None:
        """Remember that a version has what the log had at append `position`."""
        key = _refreshed_key(version)
        self._env.write(lambda txn: txn.put(key, str(position).encode(), db=self._env.catalog))

    # --- forgetting --------------------------------------------------------------------------------------------------

    def forget(self, task_type: str, keys: Collection[str]) -> int:
        """Remove the windows of tasks, and their interactions from the windows of other task types. Returns how many
        windows were removed or made shorter.

        The log must not take rows of these tasks in any more (`mark_forgotten`), and must have theirs still. A window that
        lost rows keeps its count, by which the store orders embeddings: the next interaction brings the new embedding.
        """
        kind = self._kind(task_type)
        removed = self._shorten_others(task_type, kind, frozenset(keys))

        def work(txn: Any) -> int:
            gone = 0
            for key in keys:
                value = txn.get(_window_key(kind, key))
                if value is not None:
                    txn.delete(_changed_key(kind, revision_of(value), key))
                    txn.delete(_window_key(kind, key))
                    gone += 1
            held = _State.unpacked(txn.get(_STATE, db=self._env.catalog) or b'{"format": 0}')
            if held is not None:  # who is taking rows in at this moment does it again, without these tasks
                txn.put(_STATE, replace(held, epoch=held.epoch + 1).packed(), db=self._env.catalog)
            return gone

        return removed + self._env.write(work)

    def _shorten_others(self, task_type: str, kind: int, keys: frozenset[str]) -> int:
        state = self._state()
        if state is None or len(state.layout.tasks) < 2:
            return 0
        own = Task(name=task_type, columns=self._layout.tasks[task_type])
        changed = 0
        for other, name in enumerate(self._layout.tasks):
            if other == kind:
                continue
            for part in _pieces(self.changed_since(name, -1), 4096):
                held = self.read(name, part, columns=list(dict.fromkeys(own.columns)))
                if not held.frame.height:
                    continue
                known, codes = task_keys(held.frame, own)
                bad = np.array([key in keys for key in known])[codes]
                for place in np.unique(held.owner[bad]).tolist():
                    changed += self._shorten(other, part[place], bad[held.owner == place])
        return changed

    def _shorten(self, kind: int, key: str, bad: NDArray[np.bool_]) -> int:
        def work(txn: Any) -> int:
            value = txn.get(_window_key(kind, key))
            if value is None or parts_of(value).rows != len(bad):
                return 0
            left = without_rows(value, bad.tolist())
            if left is None:
                txn.delete(_changed_key(kind, revision_of(value), key))
                txn.delete(_window_key(kind, key))
            else:
                txn.put(_window_key(kind, key), left)
            return 1

        return self._env.write(work)

    def close(self) -> None:
        release(self._env)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _kind(self, task_type: str) -> int:
        if task_type not in self._layout.tasks:
            raise ConfigError(f"There are no windows of '{task_type}', but of {list(self._layout.tasks)}.")
        return list(self._layout.tasks).index(task_type)

    def _rows_codec(self) -> RowCodec:
        if self._codec is None or not self._codec.schema:
            self._codec = RowCodec(self.log.schema)
        return self._codec

    def _values(self, kind: int, keys: Sequence[str]) -> list[bytes | None]:
        wanted = [_window_key(kind, key) for key in keys]

        def get(txn: Any) -> dict[bytes, bytes]:
            with txn.cursor() as cursor:
                return dict(cursor.getmulti(wanted))

        found = self._env.read(get)
        return [found.get(key) for key in wanted]

    def _state(self) -> _State | None:
        value = self._env.read(lambda txn: txn.get(_STATE, db=self._env.catalog))
        return None if value is None else _State.unpacked(value)

    def _step(self, expected: _State, new: _State, work: Callable[[Any], None]) -> bool:
        """`work` and the new state in one transaction, unless the state is not the `expected` one any more."""

        def step(txn: Any) -> bool:
            if txn.get(_STATE, db=self._env.catalog) != expected.packed():
                return False
            work(txn)
            txn.put(_STATE, new.packed(), db=self._env.catalog)
            return True

        return self._env.write(step)


def _left_out(entries: list[Row], rows: list[int], fresh: list[Row]) -> set[int]:
    """Those of `rows` that are not in `fresh`, which holds them in the same order."""
    kept = {id(row) for row in fresh}
    return {row for row in rows if id(entries[row]) not in kept}


def _window_key(kind: int, key: str) -> bytes:
    text = key.encode()
    # no UTF-8 begins with 0xff; LMDB takes keys of up to 511 bytes
    return b"w%c" % kind + (text if len(text) <= 480 else b"\xff" + hashlib.blake2b(text).digest())


def _changed_prefix(kind: int) -> bytes:
    return b"c%c" % kind


def _changed_key(kind: int, position: int, key: str | None) -> bytes:
    name = b"" if key is None else hashlib.blake2b(key.encode(), digest_size=16).digest()
    return _changed_prefix(kind) + struct.pack(">Q", max(0, position)) + name


def _refreshed_key(version: str) -> bytes:
    return _REFRESHED + hashlib.blake2b(version.encode(), digest_size=16).hexdigest().encode()


def _items(txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with txn.cursor() as cursor:
        if cursor.set_range(prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value


def _keys(txn: Any, database: Any, prefix: bytes) -> Iterator[bytes]:
    with txn.cursor(db=database) as cursor:
        if cursor.set_range(prefix):
            for key, _ in cursor:
                if not key.startswith(prefix):
                    return
                yield key


def _pieces(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
