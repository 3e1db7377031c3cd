"""Directories that appear whole or not at all.

What is to become a directory is written beside its place, flushed to the disk, and moved there in one step; where one
is there already, the two are exchanged. A reader sees the old one or the new one, and so does whoever comes after a
crash.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from limaml.errors import ArtifactError

__all__ = ["clear_leftovers", "put_in_place", "read_steadily", "scratch_beside", "sync"]

_T = TypeVar("_T")


def scratch_beside(target: Path) -> Path:
    """A name that is free, beside `target`, and tells `clear_leftovers` which process it belongs to."""
    return target.parent / f".{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.writing"


def _set_aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def put_in_place(beside: Path, target: Path) -> None:
    """Move `beside` to `target` durably. What was there is left at `beside`, or gone."""
    for entry in beside.iterdir():
        sync(entry)
    sync(beside)
    if not target.exists():
        try:
            beside.rename(target)  # onto an empty directory as well
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(beside, target)  # another writer was first: the last one wins
    else:
        _exchange(beside, target)
    sync(target.parent)


def _exchange(beside: Path, target: Path) -> None:
    if _rename_exchange(beside, target):
        return
    aside = _set_aside(target)  # between the two renames readers find the old folder here
    target.rename(aside)
    beside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _rename_exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's list of names, to the disk."""
    mode = os.O_RDONLY
    if sys.platform == "win32":
        if path.is_dir():
            return  # a directory cannot be opened there
        mode = os.O_RDWR  # only what is open for writing is flushed there
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_leftovers(target: Path) -> None:
    """Remove what writers of `target` that were killed on this machine left beside it."""
    aside = _set_aside(target)
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    prefix = f".{target.name}.{socket.gethostname()}-"
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(".writing"):
            owner = entry.name[len(prefix) :].partition("-")[0]
            if owner.isdigit() and not _alive(int(owner)):
                shutil.rmtree(entry, ignore_errors=True)


def _alive(process: int) -> bool:
    if sys.platform == "win32":  # there signal 0 would be sent
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def read_steadily(target: Path, read: Callable[[Path], _T]) -> _T:
    """The result of `read(place)` on the folder `target`, read again if the folder was replaced by another one meanwhile."""
    for _ in range(20):
        aside = _set_aside(target)
        place = aside if not target.exists() and aside.exists() else target
        before = _identity(place)
        try:
            return read(place)
        except (ArtifactError, FileNotFoundError):
            if before is not None and before == _identity(place):
                raise
            if before is None and _identity(target) is None and not aside.exists():
                raise
    raise ArtifactError(f"The folder {target} is being replaced faster than it can be read; stop the writer.")


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
