"""Each task's last interactions, packed in LMDB, so that refreshing a task does not scan the log.

Windows are a view of the log: they hold what reading it whole gives, exact duplicates dropped, and remember the append
that they have come to. What is lost or damaged is made again from the log (`rebuild`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.embeddings.window_build import built, first_of_equals
from limaml.embeddings.window_database import Layout, WindowDatabase, WindowState
from limaml.embeddings.window_value import INDEX, Row, count_of, extended, newest_of, parts_of, unseen
from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import locked
from limaml.interactions.index import time_values
from limaml.interactions.keys import task_keys
from limaml.interactions.log import APPEND, InteractionLog
from limaml.interactions.packed_rows import RowCodec
from limaml.interactions.schema import Task

__all__ = ["CaughtUp", "Layout", "WindowRows", "Windows"]

ROWS_PER_STEP = 200_000
TASKS_PER_LOOK = 4096
REBUILD_WAIT_S = 3600.0
ASKED = "it was asked for"

Change = tuple[int, str, bytes, bytes | None]
"""Number of the task type, the task, its window, and the one before."""


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
class _Taken:
    """Rows of the log that windows take in."""

    rows: pl.DataFrame
    times: NDArray[np.int64]
    buckets: NDArray[np.int64]
    appends: NDArray[np.int64]

    def order(self, kept: NDArray[np.int64]) -> list[int]:
        """The rows `kept`, ascending, by time and bucket; as appended, where both tie."""
        found: list[int] = kept[np.lexsort((self.buckets[kept], self.times[kept]))].tolist()
        return found


class Windows:
    """The windows in `folder`, over `log`. To be closed."""

    def __init__(self, folder: Path | str, log: InteractionLog, layout: Layout) -> None:
        self.folder, self.log = Path(folder), log
        self._database = WindowDatabase(self.folder)
        self._layout = layout
        self._codec: RowCodec | None = None
        try:
            found = self._database.state()
            if found is not None and found.log == log.id:
                self._layout = found.layout.with_room_for(layout)
        except BaseException:
            self.close()
            raise

    # --- following the log -------------------------------------------------------------------------------------------

    def catch_up(self) -> CaughtUp:
        """Take in what was appended to the log since the last time; all of it, if there was none."""
        why = self._why_rebuild()
        if why:
            return self.rebuild(why)
        rows = duplicates = reread = 0
        while True:
            state = self._database.state()
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
        state = self._database.state()
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
        through, old = self.log.position, self._database.state()
        state = WindowState(
            self.log.id, self._layout, through, epoch=0 if old is None else old.epoch + 1, complete=False
        )

        self._database.begin(state, old)
        rows = duplicates = 0
        for _, frame in self.log.buckets(through=through, numbered=True):
            if not frame.height:
                continue
            done = self._apply(state, frame, through, whole=True)
            if done is None:
                return None
            self._database.let_go()  # the next bucket's tasks lie in all parts of the file
            state = self._database.state() or state
            rows, duplicates = rows + done[0], duplicates + done[1]
        if not self._database.put(state, replace(state, complete=True)):
            return None
        return CaughtUp(through, rows, duplicates, rebuilt=why)

    def _apply(
        self, state: WindowState, frame: pl.DataFrame | None, last: int, whole: bool = False
    ) -> tuple[int, int, int] | None:
        """Take rows in, with their `APPEND` column: rows, duplicates, tasks read again; None if somebody was faster.

        `whole`: they are all rows of the log's buckets that they are in."""
        taken = self._taken(frame)
        if taken is None:
            return (0, 0, 0) if self._database.put(state, replace(state, position=last)) else None
        kept, changed = self._made(taken) if whole else (np.arange(len(taken.times)), list[Change]())
        order, reread = taken.order(kept), 0
        kinds = list(enumerate(self._layout.tasks.items()))[whole:]  # those that are not made yet
        if kinds:
            numbers = taken.appends.tolist()
            packed = self._rows_codec().pack(taken.rows)
            entries: list[Row] = list(zip(taken.times.tolist(), taken.buckets.tolist(), packed, strict=True))
        for kind, (name, columns) in kinds:
            keys, codes = task_keys(taken.rows, Task(name=name, columns=columns))
            mine: list[list[int]] = [[] for _ in keys]
            owners = codes.tolist()
            for row in order:
                mine[owners[row]].append(row)
            olds = self._database.values(kind, keys)
            if kind == 0:
                order, reread = self._distinct(taken.rows, entries, mine, olds, order, state.position)
                alive = set(order)
                mine = [[row for row in some if row in alive] for some in mine]
            for key, some, old in zip(keys, mine, olds, strict=True):
                if not some:
                    continue
                newest_append = max(numbers[row] for row in some)
                new = extended(old, [entries[row] for row in some], self._layout.keep, newest_append)
                changed.append((kind, key, new, old))
        latest = int(taken.times[order].max()) if len(order) else None
        newest = max((t for t in (state.newest, latest) if t is not None), default=None)
        done = self._database.put(state, replace(state, position=last, newest=newest), changed)
        return (len(taken.times), len(taken.times) - len(order), reread) if done else None

    def _taken(self, frame: pl.DataFrame | None) -> _Taken | None:
        """The rows of `frame` that nobody has had forgotten; None if there are none."""
        given = self.log.unforgotten(frame) if frame is not None else None
        if given is None or not given.height:
            return None
        rows = given.drop(APPEND)
        times, unit = time_values(rows[self._layout.time])
        if unit == "order":
            raise DataError(
                f"The time column '{self._layout.time}' holds {rows[self._layout.time].dtype}, which only gives an order within one "
                "table, so that new rows cannot be placed behind old ones. Use numbers or dates as the time."
            )
        return _Taken(rows, times, self.log.bucket_of(rows).astype(np.int64), given[APPEND].cast(pl.Int64).to_numpy())

    def _made(self, taken: _Taken) -> tuple[NDArray[np.int64], list[Change]]:
        """The rows that no earlier one equals, and the windows of the first task type, of whose tasks nothing is there yet."""
        name, columns = next(iter(self._layout.tasks.items()))
        keys, codes = task_keys(taken.rows, Task(name=name, columns=columns))
        place, codec = (taken.times, taken.buckets, codes), self._rows_codec()
        order = first_of_equals(taken.rows, *place, codec)
        windows = built(taken.rows, order, *place, taken.appends, codec, self._layout.keep)
        return np.sort(order), [(0, key, window, None) for key, window in zip(keys, windows, strict=True)]

    def _distinct(
        self,
        rows: pl.DataFrame,
        entries: list[Row],
        mine: list[list[int]],
        olds: Sequence[bytes | None],
        order: list[int],
        position: int,
    ) -> tuple[list[int], int]:
        """The rows, in `order`, that no earlier row equals; and how many tasks were read again to know.

        Equal rows are rows of one task of the first type, whose rows are all in one bucket of the log.
        """
        gone: set[int] = set()
        unsure: list[int] = []
        for task, (some, old) in enumerate(zip(mine, olds, strict=True)):
            fresh, sure = unseen(old, [entries[row] for row in some])
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
        state = self._database.state()
        return state.position if state is not None and state.complete else 0

    @property
    def epoch(self) -> int:
        """Changes whenever a window may have lost rows for a time: what was read before may not be what is there."""
        state = self._database.state()
        return -1 if state is None or not state.complete else state.epoch

    @property
    def newest(self) -> int | None:
        """Time of the newest interaction of all."""
        state = self._database.state()
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
        values = self._database.values(self._kind(task_type), keys)
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
        return self._database.changed_since(self._kind(task_type), position)

    def newer_than(self, task_type: str, time: int) -> list[str]:
        """Keys of the tasks whose newest interaction is after `time`; looks at every window."""
        return self._database.newer_than(self._kind(task_type), time)

    def count(self, task_type: str) -> int:
        """Number of tasks that have a window."""
        return self._database.count(self._kind(task_type))

    def refreshed(self, version: str) -> int | None:
        """The append up to which a version was refreshed, as `settle` was told; None if it never was."""
        return self._database.refreshed(version)

    def settle(self, version: str, position: int) -> None:
        """Remember that a version has what the log had at append `position`."""
        self._database.settle(version, position)

    # --- forgetting --------------------------------------------------------------------------------------------------

    def forget(self, task_type: str, keys: Collection[str]) -> int:
        """Remove the windows of tasks, and their interactions from the windows of other task types. Returns how many
        windows were removed or made shorter.

        The log must not take rows of these tasks in any more (`mark_forgotten`), and must have theirs still. A window that
        lost rows keeps its count, by which the store orders embeddings: the next interaction brings the new embedding.
        """
        kind = self._kind(task_type)
        return self._shorten_others(task_type, kind, frozenset(keys)) + self._database.remove(kind, keys)

    def _shorten_others(self, task_type: str, kind: int, keys: frozenset[str]) -> int:
        state = self._database.state()
        if state is None or len(state.layout.tasks) < 2:
            return 0
        own = Task(name=task_type, columns=self._layout.tasks[task_type])
        changed = 0
        for other, name in enumerate(self._layout.tasks):
            if other == kind:
                continue
            tasks = self.changed_since(name, -1)
            for start in range(0, len(tasks), TASKS_PER_LOOK):
                some = tasks[start : start + TASKS_PER_LOOK]
                held = self.read(name, some, columns=list(own.columns))
                if held.frame.height:
                    known, codes = task_keys(held.frame, own)
                    bad = np.array([key in keys for key in known])[codes]
                    for place in np.unique(held.owner[bad]).tolist():
                        changed += self._database.shorten(other, some[place], bad[held.owner == place].tolist())
        return changed

    def close(self) -> None:
        self._database.close()

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


def _left_out(entries: list[Row], rows: list[int], fresh: list[Row]) -> set[int]:
    """Those of `rows` that are not in `fresh`, which holds them in the same order."""
    kept = {id(row) for row in fresh}
    return {row for row in rows if id(entries[row]) not in kept}
