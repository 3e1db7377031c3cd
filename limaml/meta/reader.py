"""Reading windows of buckets: the one that is trained on, encoded, and the next one, which a thread reads meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from limaml.interactions import Encoder
from limaml.interactions.buckets import Buckets
from limaml.meta.survey import read_buckets
from limaml.types import Interactions

__all__ = ["Opened", "WindowReader"]


@dataclass(frozen=True)
class Opened:
    """Encoded rows of some buckets. Only they are numbered, and only their tasks have ids."""

    buckets: tuple[int, ...]
    data: Interactions
    bucket: Tensor  # [rows of the table] the bucket that each row of the table came from


class WindowReader:
    """Opens windows, one after the other. Two are in memory at most: the last one opened, and the one that comes next.

    It is a thread that reads ahead and not a process: polars, numpy and torch let other threads run while they work, and
    nothing has to be copied. `waited` counts the seconds in which a window was not there when it was asked for.
    """

    def __init__(self, buckets: Buckets, encoder: Encoder) -> None:
        self.buckets, self.encoder = buckets, encoder
        self.waited = 0.0
        self.time_unit = "order"  # of what was opened last
        self._now: Opened | None = None
        self._next: tuple[tuple[int, ...], Future[Opened]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def open(self, buckets: Sequence[int], then: Sequence[int] | None = None) -> Opened:
        """The window of these buckets; `then` is the one that will be asked for next, if that is known."""
        wanted = tuple(buckets)
        if self._now is None or self._now.buckets != wanted:
            self._now = None  # its rows go before others come
            started = time.perf_counter()
            self._now = self._take(wanted)
            self.time_unit = self._now.data.time_unit
            self.waited += time.perf_counter() - started
        if then is not None and tuple(then) != wanted:
            self._ahead(tuple(then))
        return self._now

    def _take(self, wanted: tuple[int, ...]) -> Opened:
        ahead, self._next = self._next, None
        if ahead is not None:
            found = ahead[1].result()
            if ahead[0] == wanted:
                return found
            del found
        return self._read(wanted)

    def _ahead(self, wanted: tuple[int, ...]) -> None:
        if self._next is not None and self._next[0] == wanted:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="limaml-reader")
        if self._next is not None:
            self._next[1].cancel()
        self._next = wanted, self._thread.submit(self._read, wanted)

    def _read(self, numbers: tuple[int, ...]) -> Opened:
        frame, bucket = read_buckets(self.buckets, numbers)
        return Opened(numbers, self.encoder.encode(frame), bucket)

    def close(self) -> None:
        """Let everything go, and the thread end."""
        self._now = self._next = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
