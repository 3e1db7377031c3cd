"""Many embeddings in the order of their ids' hashes: a *run*. In memory, or as a file (`run_files`) that is mapped.

A batch that is put is a run; what a publication writes is the merge of its batches; what a version holds is the merge of what
was written. So sorting, doubles and look-ups are here, once. Nothing is an object per embedding: hashes `[n]`, values `[n, size]`,
and where each id lies in a text of all ids, `[n]`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.store.hashing import LONGEST_ID, Texts, hash_many
from limaml.store.packing import intact, revisions

__all__ = ["ERASED", "LaterRun", "Run", "merge", "sort_order", "spans_of"]

ERASED = 2**64 - 1
"""The span of an embedding that was erased; its value is zeros."""

_LENGTH_BITS = 24
_WIDTH = np.arange(16)  # rows behind a directory's entry that are looked at together
_STEP = 32768


@dataclass(frozen=True, eq=False)
class Run:
    """`text` gives bytes when sliced; `base` is where the ids begin in it. `directory[h >> shift]`, where there is one, is the
    first row of that hash or above."""

    hashes: NDArray[np.uint64]  # [n] ascending
    rows: NDArray[np.uint8]  # [n, size]
    spans: NDArray[np.uint64]  # [n] start · 2²⁴ + length of the id in the text
    text: Any
    base: int = 0
    directory: NDArray[np.uint32] | None = None
    shift: int = 64

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Where no embedding was erased `[n]`."""
        there: NDArray[np.bool_] = self.rows[:, 0] != 0
        return there

    def raws(self, rows: Any) -> list[bytes | None]:
        """Ids in UTF-8 of some rows; `None` where one was erased."""
        text, base = self.text, self.base
        return [
            None if span == ERASED else text[(start := base + (span >> _LENGTH_BITS)) : start + (span & LONGEST_ID)]
            for span in self.spans[rows].tolist()
        ]

    def part(self, start: int, stop: int) -> Run:
        return Run(self.hashes[start:stop], self.rows[start:stop], self.spans[start:stop], self.text, self.base)

    def where(self, rows: NDArray[Any]) -> Run:
        """Some rows of it, by a mask or in the order of their numbers."""
        return Run(self.hashes[rows], self.rows[rows], self.spans[rows], self.text, self.base)

    def find(self, raws: Sequence[bytes], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row of each id, whose hashes are given too; -1 where it is not here."""
        n = len(self.hashes)
        if not n or not len(hashes):
            return np.full(len(hashes), -1, np.int64)
        rows = np.minimum(self._first(hashes), n - 1)
        hit = self.hashes[rows] == hashes
        if hit.all():
            if self.raws(rows) == raws:
                return rows
            asked = list(range(len(rows)))
        else:
            asked = np.flatnonzero(hit).tolist()
            rows[~hit] = -1
        for place, raw in zip(asked, self.raws(rows[asked]), strict=True):
            if raw != raws[place]:
                rows[place] = self._along(raws[place], int(rows[place]))
        return rows

    def find_one(self, raw: bytes, h: int) -> int:
        """The same for one id."""
        low, high = 0, len(self.hashes)
        if self.directory is not None:
            bucket = h >> self.shift
            low, high = self.directory[bucket : bucket + 2].tolist()
        row = low + int(self.hashes[low:high].searchsorted(np.uint64(h)))
        if row == high or self.hashes.item(row) != h:
            return -1
        span = self.spans.item(row)
        start = self.base + (span >> _LENGTH_BITS)
        if self.text[start : start + (span & LONGEST_ID)] == raw and span != ERASED:
            return row
        return self._along(raw, row)

    def _first(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """A row from which on the hash may stand; exactly its first one if it is here."""
        if self.directory is None:
            return np.searchsorted(self.hashes, hashes)
        buckets = (hashes >> np.uint64(self.shift)).astype(np.int64)
        if len(hashes) == 1:
            low, high = self.directory[buckets[0] : buckets[0] + 2].tolist()
            within: NDArray[np.int64] = low + np.searchsorted(self.hashes[low:high], hashes)
            return within
        first = self.directory[buckets].astype(np.int64)
        near = np.minimum(first[:, None] + _WIDTH, len(self.hashes) - 1)
        same = self.hashes.take(near) == hashes[:, None]
        first += same.argmax(axis=1)
        unseen = ~same.any(axis=1)
        if unseen.any():  # not here, or in a bucket wider than that
            first[unseen] = np.searchsorted(self.hashes, hashes[unseen])
        return first

    def _along(self, raw: bytes, row: int) -> int:
        """Ids of one hash stand side by side."""
        sought = self.hashes[row]
        while row < len(self.hashes) and self.hashes[row] == sought:
            if self.raws([row])[0] == raw:
                return row
            row += 1
        return -1

    def sound(self, seed: int) -> NDArray[np.bool_]:
        """Whether each embedding `[n]` is as it was written, id and hash included; erased ones are."""
        padded = np.frombuffer(self.text, np.uint8)[self.base :]
        alive = self.alive
        spans = np.where(alive, self.spans, np.uint64(0))
        starts = (spans >> np.uint64(_LENGTH_BITS)).astype(np.int64)
        lengths = (spans & np.uint64(LONGEST_ID)).astype(np.int64)
        inside = starts + lengths <= len(padded) - 8
        starts[~inside] = lengths[~inside] = 0
        same = hash_many(padded, starts, lengths) == self.hashes
        fine: NDArray[np.bool_] = ~alive | (inside & same & intact(self.rows, self.hashes + np.uint64(seed)))
        return fine


@dataclass(frozen=True, eq=False)
class LaterRun(Run):
    """A run whose values are packed part by part, as they are written: they are never all in memory. `rows` is empty."""

    pack: Callable[[int, int], NDArray[np.uint8]] = field(kw_only=True)

    def part(self, start: int, stop: int) -> Run:
        stop = min(stop, len(self))
        return Run(self.hashes[start:stop], self.pack(start, stop), self.spans[start:stop], self.text, self.base)


def spans_of(texts: Texts) -> NDArray[np.uint64]:
    spans: NDArray[np.uint64] = ((texts.starts << _LENGTH_BITS) | texts.lengths).astype(np.uint64)
    return spans


def sort_order(
    hashes: NDArray[np.uint64],
    raw: Callable[[int], bytes],
    count: NDArray[np.int64],
    event_time: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Rows `[≤ n]` in the order of their hashes; of an id that is there more than once the highest revision alone (of
    equal ones the first)."""
    order = _ascending(hashes)
    ordered = hashes[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not len(same):
        return order
    dropped = []
    for group in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1):
        best: dict[bytes, int] = {}
        for row in sorted(order[group[0] : group[-1] + 2].tolist()):
            other = best.setdefault(raw(row), row)
            if other != row:
                above = (count[row], event_time[row]) > (count[other], event_time[other])
                dropped.append(other if above else row)
                best[raw(row)] = row if above else other
    return order[~np.isin(order, dropped)]


def _ascending(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What `argsort` gives. To sort numbers is several times faster than to sort rows by them, so a row's number takes the
    place of its hash's last bits; they hardly ever tell."""
    n = len(hashes)
    low = np.uint64((1 << n.bit_length()) - 1)
    keys = hashes & ~low
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= low
    order = keys.astype(np.int64)
    ordered = hashes[order]
    return order if (ordered[1:] >= ordered[:-1]).all() else np.argsort(hashes)


class _Joined:
    """The texts of several runs, one behind the other."""

    def __init__(self, runs: Sequence[Run], sizes: Sequence[int]) -> None:
        self._runs = runs
        self._starts = np.cumsum([0, *sizes[:-1]]).tolist()

    def __getitem__(self, span: slice) -> bytes:
        if span.start == span.stop:
            return b""
        place = bisect_right(self._starts, span.start) - 1
        run = self._runs[place]
        start = span.start - self._starts[place] + run.base
        found: bytes = run.text[start : start + span.stop - span.start]
        return found


def merge(runs: Sequence[Run], text_sizes: Sequence[int], step: int = _STEP) -> Iterator[Run]:
    """Runs as one, piece by piece: of an id that several have the highest revision (of equal ones the earlier run's), and
    none that was erased. The pieces' text is all runs' texts (`text_sizes`: bytes of their ids), one behind the other."""
    if len(runs) == 1:
        for start in range(0, len(runs[0]), step):
            found = runs[0].part(start, start + step)
            yield found if (alive := found.alive).all() else found.where(alive)
        return
    joined, bases = _Joined(runs, text_sizes), np.cumsum([0, *text_sizes])
    total = sum(map(len, runs))
    parts = max(1, -(-total // step))
    edges = np.array([(2**64 * part // parts) for part in range(1, parts)], np.uint64)
    cuts = [[0, *np.searchsorted(run.hashes, edges).tolist(), len(run)] for run in runs]
    for part in range(parts):
        pieces = [run.part(cut[part], cut[part + 1]) for run, cut in zip(runs, cuts, strict=True)]
        moved = [
            np.where(piece.spans == np.uint64(ERASED), piece.spans, piece.spans + np.uint64(int(base) << _LENGTH_BITS))
            for piece, base in zip(pieces, bases, strict=False)
        ]
        hashes, spans = np.concatenate([piece.hashes for piece in pieces]), np.concatenate(moved)
        whole = Run(hashes, np.concatenate([piece.rows for piece in pieces]), spans, joined)
        there = np.flatnonzero(whole.alive)

        def raw(row: int, whole: Run = whole, there: NDArray[np.int64] = there) -> bytes:
            return whole.raws([there[row]])[0] or b""

        yield whole.where(there[sort_order(hashes[there], raw, *revisions(whole.rows[there]))])
