"""A version being written: what is put is gathered, sorted and written in large pieces. The same for every backend."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, cold_value, merge, prepare
from limaml.store.contract import Published

__all__ = ["DEFAULT_BUFFER", "BufferedPublication", "Target"]

DEFAULT_BUFFER = 64 * 2**20
"""Bytes that are gathered before they are written; pieces this large are written in the order of keys."""


class Target(Protocol):
    """What a backend does for one version that is being written. `valid` is False once somebody else may write it."""

    version: str
    layouts: Mapping[str, Layout]

    @property
    def valid(self) -> bool: ...

    def write(self, batches: Sequence[Batch]) -> int:
        """Store what is above the stored revisions: *one step*. Returns how many were stored."""
        ...

    def write_cold(self, layout: Layout, value: bytes) -> None: ...

    def written(self, layout: Layout, ids: Sequence[str]) -> NDArray[np.bool_]: ...

    def verify(self) -> Mapping[str, int]:
        """Read everything back; task type → count."""
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
        batch = prepare(self._layout(task_type), ids, vectors, count, event_time)
        self._pending.setdefault(task_type, []).append(batch)
        self._put += len(ids)
        self._bytes += sum(map(len, batch.values)) + sum(map(len, batch.names))
        if self._bytes >= self._limit:
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
            if counts.get(task_type, 0) != number:
                raise StoreError(
                    f"Version {self.version} has {counts.get(task_type, 0)} embeddings of task type '{task_type}', but "
                    f"{number} were expected. It is not served: put the missing ones and commit again, or abandon it."
                )
        size = self._target.finish(activate)
        self._end("committed")
        return Published(self.version, counts, self._applied, self._put - self._applied, size, activate)

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
        pending = [merge(self._pending[name]) for name in self._target.layouts if name in self._pending]
        self._applied += self._target.write(pending)
        self._pending, self._bytes = {}, 0

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
