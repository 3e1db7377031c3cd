"""One LMDB environment per process and path, that grows by itself and survives a fork.

LMDB asks four things of whoever uses it, and breaks data or crashes where they are not done; this file does them:
a process opens a path once (environments are shared and counted); the map is resized only while no transaction of the
process is open (a gate counts them); a writer meets a full map (its work is done again in a larger one); an environment
never crosses a fork (it is closed before, and opened again by whoever uses it next, on either side).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from limaml.errors import StoreError

__all__ = ["DEFAULT_MAP_SIZE", "Environment", "acquire", "release"]

DEFAULT_MAP_SIZE = 2**30
"""Bytes of address space to begin with; the file takes what is used of it."""

_MAX_READERS = 1022
_T = TypeVar("_T")

_open: dict[str, Environment] = {}
_guard = threading.RLock()


class Environment:
    """Runs work in transactions, whose default database is `values`.

    `work(txn)` must have no effect but through `txn`: it may be run more than once. It must not begin another one.
    """

    def __init__(self, path: Path, map_size: int) -> None:
        self.path = path
        self.users = 0
        self._map_size = map_size
        self._env: Any = None
        self.catalog: Any = None  # handles of the databases, valid inside a transaction
        self.values: Any = None
        self.forgotten: Any = None
        self._new_locks()
        with self._changed:
            self._begin_using()

    def read(self, work: Callable[[Any], _T]) -> _T:
        """`work` in a read transaction: one snapshot."""
        cleared = False
        while True:
            failure: lmdb.Error
            self._enter()
            try:
                with self._env.begin(db=self.values) as txn:
                    return work(txn)
            except lmdb.MapResizedError as error:  # another process has grown the map
                failure = error
            except lmdb.ReadersFullError as error:
                if cleared:
                    raise self._explained(error) from error
                self._env.reader_check()  # dead processes leave their slots
                cleared = True
                continue
            except lmdb.Error as error:
                failure = error
            finally:
                self._leave()
            self._recover(failure)

    def write(self, work: Callable[[Any], _T]) -> _T:
        """`work` in a write transaction: when this returns it is on the disk; if it raises, nothing was done."""
        with self._writer:
            while True:
                failure: lmdb.Error
                self._enter()
                try:
                    with self._env.begin(db=self.values, write=True) as txn:
                        return work(txn)
                except lmdb.Error as error:
                    failure = error
                finally:
                    self._leave()
                self._recover(failure)

    def _recover(self, failure: lmdb.Error) -> None:
        """Return if the work can be done again now, else raise a `StoreError`."""
        if isinstance(failure, lmdb.MapFullError):
            self._resize(2 * self._map_size)
        elif isinstance(failure, lmdb.MapResizedError):
            self._resize(0)
        else:
            if isinstance(failure, lmdb.PanicError):  # LMDB does nothing more until it is opened anew
                self._close()
            raise self._explained(failure) from failure

    def let_go(self) -> None:
        """Unmap the file: the pages that were looked at count as memory of the process no longer. Whoever works next maps
        it again."""
        with self._writer:
            self._close()

    def usage(self) -> tuple[int, int, int]:
        """Keys of the embeddings, bytes of the pages in use, bytes of the map file."""

        def count(txn: Any) -> tuple[int, int]:
            found = [txn.stat(db=handle) for handle in (self.values, self.catalog, self.forgotten)]
            pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in found)
            return found[0]["entries"], pages * found[0]["psize"]

        keys, used = self.read(count)
        status = (self.path / "data.mdb").stat()
        return keys, used, getattr(status, "st_blocks", status.st_size // 512) * 512

    # ------------------------------------------------------------------------------------------------ the gate

    def _new_locks(self) -> None:
        self._writer = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        self._active = 0
        self._shut = False

    def _enter(self) -> None:
        with self._changed:
            while self._shut:
                self._changed.wait()
            if self._env is None:
                self._begin_using()
            self._active += 1

    def _leave(self) -> None:
        with self._changed:
            self._active -= 1
            if not self._active:
                self._changed.notify_all()

    def _shut_gate(self) -> None:
        with self._changed:
            while self._shut:
                self._changed.wait()
            self._shut = True
            while self._active:
                self._changed.wait()

    def _open_gate(self) -> None:
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def _close(self) -> None:
        """Stop using the file, once nobody works on it; whoever works next begins anew."""
        self._shut_gate()
        self._stop_using()
        self._open_gate()

    def _resize(self, size: int) -> None:
        self._shut_gate()
        try:
            if self._env is not None:
                self._env.set_mapsize(size)
                self._map_size = int(self._env.info()["map_size"])
        except lmdb.Error as error:
            raise StoreError(
                f"The store {self.path} could not grow its map to {size} bytes: {error}. Free address space (ulimit -v)."
            ) from error
        finally:
            self._open_gate()

    def _begin_using(self) -> None:
        try:
            self._env = lmdb.open(
                str(self.path), map_size=self._map_size, max_dbs=4, max_readers=_MAX_READERS, max_spare_txns=1
            )
            self._env.reader_check()
            self._map_size = int(self._env.info()["map_size"])  # the file's own, where that is larger
            while True:
                try:
                    if self._foreign():
                        self._stop_using()
                        raise StoreError(f"{self.path} is an LMDB database of another program; choose another folder.")
                    names = (b"catalog", b"embeddings", b"forgotten")
                    self.catalog, self.values, self.forgotten = map(self._env.open_db, names)
                    return
                except lmdb.MapFullError:
                    self._map_size *= 2
                    self._env.set_mapsize(self._map_size)
        except lmdb.Error as error:
            self._stop_using()
            raise self._explained(error) from error

    def _foreign(self) -> bool:
        with self._env.begin() as txn:
            return txn.stat()["entries"] > 0 and txn.get(b"catalog") is None

    def _stop_using(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = self.catalog = self.values = self.forgotten = None

    def _explained(self, error: lmdb.Error) -> StoreError:
        text = str(error)
        # LMDB reports a write that was cut short, as by a disk that becomes full, as an input/output error
        if any(sign in text for sign in ("No space left", "File too large", "quota", "Input/output error")):
            free = shutil.disk_usage(self.path).free
            return StoreError(
                f"The disk of the store {self.path} is full, over a limit, or failing ({text}; {free} bytes are free). "
                "Nothing of this step was stored, and what was served is served on. Make room (`expire`, `gc`, other "
                "files), then do it again."
            )
        return StoreError(f"The store {self.path} refuses: {text}.")


def acquire(path: Path, map_size: int = DEFAULT_MAP_SIZE) -> Environment:
    """The process's environment for `path`, opened if need be; give it back with `release`."""
    key = str(path.resolve())
    with _guard:
        found = _open.get(key)
        if found is None:
            found = _open[key] = Environment(Path(key), map_size)
        found.users += 1
        return found


def release(environment: Environment) -> None:
    with _guard:
        environment.users -= 1
        if environment.users == 0:
            environment._close()
            _open.pop(str(environment.path), None)


def _before_fork() -> None:
    _guard.acquire()
    for environment in _open.values():
        environment._writer.acquire()
        environment._shut_gate()
        environment._stop_using()


def _after_fork_in_parent() -> None:
    for environment in _open.values():
        environment._open_gate()
        environment._writer.release()
    _guard.release()


def _after_fork_in_child() -> None:
    global _guard
    for environment in _open.values():
        environment._new_locks()  # threads that waited for the old ones are not here
    _guard = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
