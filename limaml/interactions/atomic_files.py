"""Files that survive a crash: atomic replacement, and one writer at a time."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from limaml.durable import sync
from limaml.errors import StoreError

__all__ = ["file_sha256", "locked", "write_atomically", "written"]


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path`: whoever opens it, at any moment and after any crash, finds the old content or the new."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with written(path):
        try:
            new.write_bytes(content)
            sync(new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say of a file that could not be written, as on a disk that is full, which one it is: a `StoreError`."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StoreError(
            f"{path} could not be written ({error}). What was there before is there still. See that the disk has room and "
            "the folder may be written to, then do it again."
        ) from error


@contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file `path`, waiting up to `wait_s` seconds for it, else raise `StoreError`.

    The system lets go of the lock when the process ends, however it ends, so that no stale lock is ever left.
    """
    deadline = time.monotonic() + wait_s
    with path.open("a+b") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"Another process is writing to {path.parent} and holds {path.name} (waited {wait_s:g} s). "
                    "Nothing was written. Try again when it is done, or wait longer."
                )
            time.sleep(0.02)
        yield


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
