"""A version being written: what is put is gathered, sorted and written in large pieces. The same for every backend."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, cold_value, prepare, text_of
from limaml.store.contract import Published

if TYPE_CHECKING:
    from limaml.store.catalogued import Stored

__all__ = ["DEFAULT_BUFFER", "BufferedPublication", "Target"]

DEFAULT_BUFFER = 64 * 2**20
"""Bytes that are gathered before they are written; pieces this large are written in the order of keys."""

_AT_ONCE = 32 * 2**20


class Target(Protocol):
    """What a backend does for one version that is being written. `valid` is False once somebody else may write it."""

    version: str
    layouts: Mapping[str, Layout]

    @property
    def valid(self) -> bool: ...

    def write(self, layout: Layout, batches: Sequence[Batch]) -> Stored:
        """Store what is above the stored revisions, and not forgotten."""
        ...

    def forgotten(self, task_type: str) -> set[str]:
        """Ids that must not be stored."""
        ...

    def write_cold(self, layout: Layout, value: bytes) -> None: ...

    def written(self, layout: Layout, ids: Sequence[str]) -> NDArray[np.bool_]: ...

    def verify(self) -> Mapping[str, int]:
        """Put everything in its final form and read it back; task type → count."""
        ...

    def finish(self, activate: bool) -> int:
        """Make the version ready and, with `activate`, current: *one step*. Returns its bytes."""
        ...

    def remove(self) -> None: ...

    def release(self) -> None:
        """Let the next publisher in."""
        ...


class BufferedPublication:
    """The `Publication` of every backend."""

    def __init__(self, target: Target, buffer_bytes: int = DEFAULT_BUFFER) -> None:
        self._target = target
        self._limit = buffer_bytes
        self._pending: dict[str, list[Batch]] = {}
        self._cold: dict[str, bytes] = {}
        self._bytes = 0
        self._put = self._applied = 0
        self._forgotten_puts: dict[str, int] = {}
        self._left_out: dict[str, set[str]] = {}
        self._forgotten_before = {task_type: target.forgotten(task_type) for task_type in target.layouts}
        self._over = ""
        self._process = os.getpid()

    @property
    def version(self) -> str:
        return self._target.version

    def put(
        self,
        task_type: str,
        ids: Sequence[str],
        vectors: NDArray[np.floating[Any]],
        count: NDArray[np.int64],
        event_time: NDArray[np.int64],
    ) -> None:
        self._check()
        layout = self._layout(task_type)
        at_once = len(ids) * layout.size >= _AT_ONCE  # so much is written now, and not copied before
        batch = prepare(layout, ids, vectors, count, event_time, later=at_once)
        self._pending.setdefault(task_type, []).append(batch)
        self._put += len(ids)
        self._bytes += batch.nbytes
        if at_once or self._bytes >= self._limit:
            self._flush()

    def put_cold(self, task_type: str, vector: NDArray[np.floating[Any]]) -> None:
        self._check()
        # kept until the end: a key at the end of its range would stand in the way of appending
        self._cold[task_type] = cold_value(self._layout(task_type), vector)

    def written(self, task_type: str, ids: Sequence[str]) -> NDArray[np.bool_]:
        self._check()
        self._flush()
        return self._target.written(self._layout(task_type), ids)

    def commit(self, *, expected: Mapping[str, int] | None = None, activate: bool = True) -> Published:
        self._check()
        self._flush()
        for task_type, value in self._cold.items():
            self._target.write_cold(self._layout(task_type), value)
        counts = self._target.verify()
        for task_type, number in (expected or {}).items():
            self._compare(task_type, counts.get(task_type, 0), number)
        size = self._target.finish(activate)
        self._end("committed")
        kept_out = sum(self._forgotten_puts.values())
        return Published(
            self.version, counts, self._applied, self._put - self._applied - kept_out, size, activate, kept_out
        )

    def abandon(self) -> None:
        self._check()
        self._target.remove()
        self._end("abandoned")

    def close(self) -> None:
        if not self._over:
            self._end("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        for task_type, batches in self._pending.items():
            done = self._target.write(self._layout(task_type), batches)
            self._applied += done.applied
            if done.forgotten:
                left_out = self._left_out.setdefault(task_type, set())
                left_out |= set(map(text_of, done.forgotten))
                times = sum(raw in done.forgotten for batch in batches for raw in batch.raws)
                self._forgotten_puts[task_type] = self._forgotten_puts.get(task_type, 0) + times
        self._pending, self._bytes = {}, 0

    def _compare(self, task_type: str, count: int, expected: int) -> None:
        """What is missing must have been forgotten: left out when it was put, or removed since. There may be more, as a
        refresh gives the version tasks that are new while it is written."""
        left_out = self._left_out.get(task_type, set())
        since: set[str] = set()
        if count < expected:
            since = self._target.forgotten(task_type) - self._forgotten_before.get(task_type, set())
        if expected - count > len(left_out | since):
            raise StoreError(
                f"Version {self.version} has {count} embeddings of task type '{task_type}', but {expected} were expected"
                f"{f' ({len(left_out)} of them are forgotten)' if left_out else ''}. It is not served: put the missing ones "
                "and commit again, or abandon it."
            )

    def _layout(self, task_type: str) -> Layout:
        found = self._target.layouts.get(task_type)
        if found is None:
            raise StoreError(
                f"Version {self.version} has no task type {task_type!r}; it was begun with "
                f"{', '.join(map(repr, self._target.layouts))}."
            )
        return found

    def _check(self) -> None:
        if self._over:
            raise StoreError(f"This publication of version {self.version} was {self._over}; begin another one.")
        if self._process == os.getpid() and not self._target.valid:
            raise StoreError(
                f"This publication of version {self.version} is no longer the only one: its lease ended, as the store did "
                "not hear from it in time. Begin it again, with resume."
            )
        if self._process != os.getpid():
            raise StoreError(
                f"This publication of version {self.version} belongs to process {self._process}, not to "
                f"{os.getpid()}: put from there, or send the embeddings there."
            )

    def _end(self, how: str) -> None:
        self._over, self._pending = how, {}
        self._target.release()
