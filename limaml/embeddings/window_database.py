"""Where windows are kept: LMDB, and what stands in it.

    w <type> <task key>          one task's window (`window_value`)
    c <type> <append> <task>     which append changed each task last
    windows, refreshed <version> what the windows hold, and how far each version has been refreshed

Each change is one transaction on the state it expects: whoever else works on the same windows meanwhile is noticed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limaml.embeddings.window_value import newest_of, parts_of, revision_of, without_rows
from limaml.errors import ConfigError
from limaml.interactions.schema import Schema
from limaml.store.environment import acquire, release

__all__ = ["Layout", "WindowDatabase", "WindowState"]

FORMAT = 1
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
class WindowState:
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
    def unpacked(value: bytes) -> WindowState | None:
        raw = json.loads(value)
        if raw.pop("format") != FORMAT:
            return None
        layout = raw.pop("layout")
        tasks = {name: tuple(columns) for name, columns in layout["tasks"].items()}
        return WindowState(**raw, layout=Layout(tasks, layout["time"], layout["keep"]))


class WindowDatabase:
    """The windows in `folder`, by the number of the task type (`kind`) and the task's key. To be closed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._env = acquire(folder)

    def close(self) -> None:
        release(self._env)

    def let_go(self) -> None:
        """Give the memory back that looking at windows took: pages of the file."""
        self._env.let_go()

    def state(self) -> WindowState | None:
        """What the windows hold; None if there are none, or none that this version of limaml reads."""
        value = self._env.read(lambda txn: txn.get(_STATE, db=self._env.catalog))
        return None if value is None else WindowState.unpacked(value)

    def begin(self, state: WindowState, old: WindowState | None) -> None:
        """Remove all windows. What is known of versions stays, unless it is of another log."""

        def work(txn: Any) -> None:
            txn.drop(self._env.values, delete=False)
            if old is not None and old.log != state.log:
                for key, _ in list(_items(txn, _REFRESHED, self._env.catalog)):
                    txn.delete(key, db=self._env.catalog)
            txn.put(_STATE, state.packed(), db=self._env.catalog)

        self._env.write(work)

    def put(
        self,
        expected: WindowState,
        new: WindowState,
        changed: Sequence[tuple[int, str, bytes, bytes | None]] = (),
    ) -> bool:
        """Write windows (kind, key, value, value before) and the new state, unless the state is not `expected` any more."""
        moves = []
        for kind, key, value, before in changed:
            fresh = _changed_key(kind, revision_of(value), key)
            stale = None if before is None else _changed_key(kind, revision_of(before), key)
            if fresh != stale:
                moves.append((fresh, key.encode(), stale))
        puts = sorted((_window_key(kind, key), value) for kind, key, value, _ in changed)

        def work(txn: Any) -> bool:
            if txn.get(_STATE, db=self._env.catalog) != expected.packed():
                return False
            for fresh, key, stale in moves:
                if stale is not None:
                    txn.delete(stale)
                txn.put(fresh, key)
            with txn.cursor() as cursor:
                cursor.putmulti(puts)
            txn.put(_STATE, new.packed(), db=self._env.catalog)
            return True

        return self._env.write(work)

    def values(self, kind: int, keys: Sequence[str]) -> list[bytes | None]:
        """The windows of `keys`, in one snapshot."""
        wanted = [_window_key(kind, key) for key in keys]

        def get(txn: Any) -> dict[bytes, bytes]:
            with txn.cursor() as cursor:
                return dict(cursor.getmulti(wanted))

        found = self._env.read(get)
        return [found.get(key) for key in wanted]

    def changed_since(self, kind: int, position: int) -> list[str]:
        """Keys of the tasks that an append after `position` changed, the longest ago first."""
        begin = _changed_key(kind, position + 1, None)
        return self._env.read(lambda txn: [v.decode() for _, v in _items(txn, begin, None, len(_changed_prefix(kind)))])

    def newer_than(self, kind: int, time: int) -> list[str]:
        """Keys of the tasks whose newest interaction is after `time`."""

        def scan(txn: Any) -> list[str]:
            keys = [value.decode() for _, value in _items(txn, _changed_prefix(kind))]
            with txn.cursor() as cursor:
                held = dict(cursor.getmulti([_window_key(kind, key) for key in keys]))
            return [key for key in keys if newest_of(held[_window_key(kind, key)]) > time]

        return self._env.read(scan)

    def count(self, kind: int) -> int:
        """Number of tasks that have a window."""
        return self._env.read(lambda txn: sum(1 for _ in _items(txn, _changed_prefix(kind))))

    def remove(self, kind: int, keys: Collection[str]) -> int:
        """Remove windows; who is taking rows in at this moment does it again. Returns how many there were."""

        def work(txn: Any) -> int:
            gone = 0
            for key in keys:
                value = txn.get(_window_key(kind, key))
                if value is not None:
                    txn.delete(_changed_key(kind, revision_of(value), key))
                    txn.delete(_window_key(kind, key))
                    gone += 1
            packed = txn.get(_STATE, db=self._env.catalog)
            held = None if packed is None else WindowState.unpacked(packed)
            if held is not None:
                txn.put(_STATE, replace(held, epoch=held.epoch + 1).packed(), db=self._env.catalog)
            return gone

        return self._env.write(work)

    def shorten(self, kind: int, key: str, bad: Sequence[bool]) -> bool:
        """Take the rows that are `bad` out of a window; False if it is not the window that was looked at."""

        def work(txn: Any) -> bool:
            value = txn.get(_window_key(kind, key))
            if value is None or parts_of(value).rows != len(bad):
                return False
            left = without_rows(value, bad)
            if left is None:
                txn.delete(_changed_key(kind, revision_of(value), key))
                txn.delete(_window_key(kind, key))
            else:
                txn.put(_window_key(kind, key), left)
            return True

        return self._env.write(work)

    def refreshed(self, version: str) -> int | None:
        """The append up to which a version was refreshed; None if that is not known."""
        value = self._env.read(lambda txn: txn.get(_refreshed_key(version), db=self._env.catalog))
        return None if value is None else int(value)

    def settle(self, version: str, position: int) -> None:
        """Remember that a version has what the log had at append `position`; never less than was known."""
        key = _refreshed_key(version)

        def work(txn: Any) -> None:
            known = int(txn.get(key, b"0", db=self._env.catalog))
            txn.put(key, str(max(known, position)).encode(), db=self._env.catalog)

        self._env.write(work)


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


def _items(txn: Any, begin: bytes, database: Any = None, prefix: int | None = None) -> Iterator[tuple[bytes, bytes]]:
    """Entries from `begin` on that share its first `prefix` bytes (None: all of them)."""
    shared = begin[:prefix]
    with txn.cursor() if database is None else txn.cursor(db=database) as cursor:
        if cursor.set_range(begin):
            for key, value in cursor:
                if not key.startswith(shared):
                    return
                yield key, value
