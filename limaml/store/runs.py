"""Many embeddings side by side, and an index that finds them by their ids' hashes: a *run*. In memory, or as a file
(`run_files`) that is mapped.

A batch that is put is embeddings; what a publication writes is a run of its batches; what a version holds is the merge of what
was written. So sorting, doubles and look-ups are here, once. Values lie in the order in which they were put: to sort them would
be to gather them from all over memory, so only hashes are sorted, with the place of each. Nothing is an object per embedding:
hashes `[n]`, values `[n, size]`, and where each id lies in a text of all ids, `[n]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.store.hashing import LONGEST_ID, Texts, hash_many
from limaml.store.packing import intact, revisions

__all__ = ["ERASED", "Embeddings", "LaterEmbeddings", "Run", "ids_at", "merge", "revision_of", "sort_order", "spans_of"]

ERASED = 2**64 - 1
"""The span of an embedding that was erased; its value is zeros."""

_LENGTH_BITS = 24
_WIDTH = np.arange(16)  # entries behind a directory's that are looked at together
_STEP = 32768


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings in any order. `text` gives bytes when sliced; `base` is where the ids begin in it. `order`, where it is known
    that no id is there twice: their numbers in the order of hashes."""

    hashes: NDArray[np.uint64]  # [n]
    rows: NDArray[np.uint8]  # [n, size]
    spans: NDArray[np.uint64]  # [n] start · 2²⁴ + length of the id in the text
    text: Any
    base: int = 0
    order: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Where no embedding was erased `[n]`."""
        there: NDArray[np.bool_] = self.rows[:, 0] != 0
        return there

    def raws(self, rows: Any = slice(None)) -> list[bytes | None]:
        """Ids in UTF-8 of some rows; `None` where one was erased."""
        return ids_at(self.text, self.base, self.spans[rows])

    def part(self, start: int, stop: int) -> Embeddings:
        return self.where(slice(start, stop))

    def where(self, rows: Any) -> Embeddings:
        """Some rows of it, by a slice, a mask or in the order of their numbers."""
        return Embeddings(self.hashes[rows], self.rows[rows], self.spans[rows], self.text, self.base)

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
class LaterEmbeddings(Embeddings):
    """Embeddings whose values are packed part by part, as they are written: they are never all in memory. `rows` is empty."""

    pack: Callable[[int, int], NDArray[np.uint8]] = field(kw_only=True)

    def part(self, start: int, stop: int) -> Embeddings:
        stop = min(stop, len(self))
        return Embeddings(self.hashes[start:stop], self.pack(start, stop), self.spans[start:stop], self.text, self.base)


@dataclass(frozen=True, eq=False)
class Run:
    """Embeddings with an index: `n` entries for what can be found among `m` that lie there. `directory[h >> shift]` is the first
    entry of that hash or above."""

    hashes: NDArray[np.uint64]  # [n] ascending
    places: NDArray[np.uint32]  # [n] which of the m it is
    rows: NDArray[np.uint8]  # [m, size]
    spans: NDArray[np.uint64]  # [m]
    text: Any
    base: int
    directory: NDArray[np.uint32]
    shift: int

    def __len__(self) -> int:
        return len(self.hashes)

    def entries(self, start: int, stop: int) -> Embeddings:
        """Embeddings in the order of the index."""
        places = np.minimum(self.places[start:stop], max(0, len(self.rows) - 1))
        return Embeddings(self.hashes[start:stop], self.rows[places], self.spans[places], self.text, self.base)

    def find(self, raws: Sequence[bytes], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The place of each id, whose hashes are given too; -1 where it is not here."""
        n = len(self.hashes)
        if not n or not len(hashes):
            return np.full(len(hashes), -1, np.int64)
        entries = np.minimum(self._first(hashes), n - 1)
        hit = self.hashes[entries] == hashes
        places = self.places[entries].astype(np.int64)
        np.minimum(places, len(self.rows) - 1, out=places)  # a damaged one names an id that is not sought
        if hit.all():
            if ids_at(self.text, self.base, self.spans[places]) == raws:
                return places
            asked = list(range(len(places)))
        else:
            asked = np.flatnonzero(hit).tolist()
            places[~hit] = -1
        for at, raw in zip(asked, ids_at(self.text, self.base, self.spans[places[asked]]), strict=True):
            if raw != raws[at]:
                places[at] = self._along(raws[at], int(entries[at]))
        return places

    def find_one(self, raw: bytes, h: int) -> int:
        """The same for one id."""
        bucket = h >> self.shift
        low, high = self.directory[bucket : bucket + 2].tolist()
        entry = low + int(self.hashes[low:high].searchsorted(np.uint64(h)))
        if entry >= len(self.hashes) or self.hashes.item(entry) != h:
            return -1
        place = self.places.item(entry)
        if place < len(self.rows) and (span := self.spans.item(place)) != ERASED:
            start = self.base + (span >> _LENGTH_BITS)
            if self.text[start : start + (span & LONGEST_ID)] == raw:
                return place
        return self._along(raw, entry)

    def _first(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """An entry from which on the hash may stand; exactly its first one if it is here."""
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

    def _along(self, raw: bytes, entry: int) -> int:
        """Ids of one hash stand side by side."""
        sought = self.hashes[entry]
        while entry < len(self.hashes) and self.hashes[entry] == sought:
            if self.entries(entry, entry + 1).raws() == [raw]:
                return int(self.places[entry])
            entry += 1
        return -1


def ids_at(text: Any, base: int, spans: NDArray[np.uint64]) -> list[bytes | None]:
    """Ids in UTF-8 that lie in a text; `None` where one was erased."""
    return [
        None if span == ERASED else text[(start := base + (span >> _LENGTH_BITS)) : start + (span & LONGEST_ID)]
        for span in spans.tolist()
    ]


def revision_of(value: NDArray[np.uint8]) -> tuple[int, int]:
    """Count and event time of one value."""
    count, event_time = revisions(value[None])
    return int(count[0]), int(event_time[0])


def spans_of(texts: Texts) -> NDArray[np.uint64]:
    spans: NDArray[np.uint64] = ((texts.starts << _LENGTH_BITS) | texts.lengths).astype(np.uint64)
    return spans


def sort_order(
    hashes: NDArray[np.uint64], raw: Callable[[int], bytes | None], revision: Callable[[int], tuple[int, int]]
) -> NDArray[np.int64]:
    """Rows `[≤ n]` in the order of their hashes; of an id that is there more than once the highest revision alone (of
    equal ones the first). `raw` and `revision` of a row are asked for only where hashes are equal."""
    order, distinct = _ascending(hashes)
    if distinct:
        return order
    ordered = hashes[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not len(same):
        return order
    dropped = []
    for group in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1):
        best: dict[bytes | None, int] = {}
        for row in sorted(order[group[0] : group[-1] + 2].tolist()):
            other = best.setdefault(raw(row), row)
            if other != row:
                above = revision(row) > revision(other)
                dropped.append(other if above else row)
                best[raw(row)] = row if above else other
    return order[~np.isin(order, dropped)]


def _ascending(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], bool]:
    """What `argsort` gives, and whether all are known to differ. To sort numbers is several times faster than to sort rows by
    them, so a row's number takes the place of its hash's last bits; they hardly ever tell."""
    n = len(hashes)
    low = np.uint64((1 << n.bit_length()) - 1)
    keys = hashes & ~low
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    order = (keys & low).astype(np.int64)
    keys >>= np.uint64(n.bit_length())
    if (keys[1:] != keys[:-1]).all():
        return order, True
    ordered = hashes[order]
    return (order if (ordered[1:] >= ordered[:-1]).all() else np.argsort(hashes, kind="stable")), False


@dataclass(frozen=True, eq=False)
class Merged:
    """Some of several runs' entries, as one: which run each is of, and its place there; and those that another one hides."""

    hashes: NDArray[np.uint64]  # [k] ascending
    numbers: NDArray[np.int64]  # [k]
    places: NDArray[np.int64]  # [k]
    hidden: tuple[NDArray[np.int64], NDArray[np.int64]]  # runs and places


def merge(runs: Sequence[Run], step: int = _STEP) -> Iterator[Merged]:
    """The indices of runs as one, piece by piece in the order of hashes: of an id that several have the highest revision (of
    equal ones the earlier run's), and none that was erased."""
    total = sum(map(len, runs))
    parts = max(1, -(-total // step))
    edges = np.array([(2**64 * part // parts) for part in range(1, parts)], np.uint64)
    cuts = [[0, *np.searchsorted(run.hashes, edges).tolist(), len(run)] for run in runs]
    for part in range(parts):
        pieces = [slice(cut[part], cut[part + 1]) for cut in cuts]
        places = [run.places[piece].astype(np.int64) for run, piece in zip(runs, pieces, strict=True)]
        alive = np.concatenate([run.spans[each] != np.uint64(ERASED) for run, each in zip(runs, places, strict=True)])
        hashes = np.concatenate([run.hashes[piece] for run, piece in zip(runs, pieces, strict=True)])[alive]
        numbers = np.repeat(np.arange(len(runs)), [len(each) for each in places])[alive]
        where = np.concatenate(places)[alive]

        def raw(entry: int, numbers: NDArray[np.int64] = numbers, where: NDArray[np.int64] = where) -> bytes | None:
            run = runs[numbers[entry]]
            return ids_at(run.text, run.base, run.spans[where[entry : entry + 1]])[0]

        def revision(
            entry: int, numbers: NDArray[np.int64] = numbers, where: NDArray[np.int64] = where
        ) -> tuple[int, int]:
            return revision_of(runs[numbers[entry]].rows[where[entry]])

        order = sort_order(hashes, raw, revision)
        lost = np.ones(len(hashes), np.bool_)
        lost[order] = False
        yield Merged(hashes[order], numbers[order], where[order], (numbers[lost], where[lost]))
