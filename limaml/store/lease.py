"""File locks that say "somebody alive holds this", across processes, and vanish with the process that held them.

A publisher holds one exclusively, readers of a version share one. They are POSIX record locks: released by the kernel
when their process dies, however it dies, and not inherited by a fork. Such a lock belongs to a process as a whole and
is lost when *any* descriptor of the file is closed in it, so a process keeps one descriptor per file and counts.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Lease"]


@dataclass
class _Held:
    descriptor: int
    exclusive: bool
    holders: int
    lost: bool = False


_held: dict[str, _Held] = {}
_guard = threading.RLock()


class Lease:
    """A lock on the file `path`. `take` says whether it was got; it never waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._key = str(path)
        self._mine = False

    def take(self, *, exclusive: bool) -> bool:
        with _guard:
            held = _held.get(self._key)
            if held is not None and not held.lost:
                if exclusive or held.exclusive:
                    return False
                held.holders += 1
                self._mine = True
                return True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            if not _lock(descriptor, exclusive):
                os.close(descriptor)
                return False
            _held[self._key] = _Held(descriptor, exclusive, 1)
            self._mine = True
            return True

    def release(self, *, remove: bool = False) -> None:
        """Let go; with `remove`, delete the file too (its holder alone may)."""
        with _guard:
            held = _held.get(self._key)
            if not self._mine or held is None:
                return
            self._mine = False
            held.holders -= 1
            if held.holders:
                return
            del _held[self._key]
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(held.descriptor)

    @property
    def valid(self) -> bool:
        """False in a child process that was forked while this lease was held exclusively."""
        held = _held.get(self._key)
        return self._mine and held is not None and not held.lost

    def note(self, text: str) -> None:
        """Leave a word for whoever does not get the lease."""
        held = _held[self._key]
        with contextlib.suppress(OSError):  # a full disk may take the word, not the lease
            os.ftruncate(held.descriptor, 0)
            os.pwrite(held.descriptor, text.encode(), 0)

    def read_note(self) -> str:
        """The holder's word, as far as it can be read; waits a moment for one that is just being written."""
        for _ in range(20):
            held = _held.get(self._key)
            try:
                if held is not None:
                    text = os.pread(held.descriptor, 1000, 0).decode(errors="replace")
                else:
                    text = self.path.read_text(errors="replace")
            except OSError:
                text = ""
            if text:
                return text
            time.sleep(0.005)
        return ""


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, exclusive: bool) -> bool:
        try:  # Windows knows no shared lock here: the first reader keeps the version for all
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return not exclusive
        return True

else:
    import fcntl

    def _lock(descriptor: int, exclusive: bool) -> bool:
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _after_fork() -> None:
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        held.lost = held.exclusive or not _lock(held.descriptor, exclusive=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
