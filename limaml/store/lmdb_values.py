"""The embeddings of one version in the embedded store: those that were published, in runs, and those that were upserted, in LMDB.

A version's embeddings are published as few sorted files (`run_files`), which never change but for what is erased. Upserts lie in
LMDB, under keys of the version's number (4 bytes, big-endian), the task type's place in the version (2 bytes), and the task's
identity; `upsert_marks` says which there may be. An upsert hides the run's embedding of the same task, and a run that is written later hides an earlier one's: whatever
hides is of a higher revision. All functions work inside one transaction.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, check_table, check_values, cold_rows, damaged, raw_of, text_of
from limaml.store.catalog import Tally
from limaml.store.hashing import LONGEST_ID, hashes_of
from limaml.store.packing import COLD, LONGEST_PLAIN_ID, checks, checksum, newer, revisions
from limaml.store.run_files import RunFile, Written
from limaml.store.runs import Run, merge
from limaml.store.upsert_marks import mark

__all__ = [
    "Change",
    "check_run",
    "held",
    "hide",
    "key_prefix",
    "payload",
    "remove_some",
    "upsert",
    "verify",
    "walk",
    "write_cold",
]


def key_prefix(number: int, place: int | None = None) -> bytes:
    """Start of the keys of version `number`, or of its task type at `place`."""
    return struct.pack(">I", number) if place is None else struct.pack(">IH", number, place)


def held(
    layout: Layout,
    raws: Sequence[bytes],
    hashes: NDArray[np.uint64],
    upserted: Sequence[bytes | None],
    runs: Sequence[Run],
    lenient: bool = False,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Values `[n, size]` of ids (zeros where there is none) and which there are `[n]`, not yet checked. `upserted` is what LMDB
    has of them. `StoreError` if that has another size, unless `lenient`."""
    n, size = len(raws), layout.size
    missing = np.array([value is None for value in upserted], np.bool_)
    table = np.zeros((n, size), np.uint8)
    for row in np.flatnonzero(~missing).tolist():
        table[row] = value_row(layout, raws[row], upserted[row] or b"", lenient)
    found = ~missing
    for run in reversed(runs):
        rows = np.flatnonzero(~found)
        if not len(rows):
            break
        places = run.find([raws[row] for row in rows.tolist()], hashes[rows])
        rows, places = rows[places >= 0], places[places >= 0]
        table[rows], found[rows] = run.rows[places], True
    return table, found


def value_row(layout: Layout, raw: bytes, value: bytes, lenient: bool = False) -> NDArray[np.uint8]:
    """What LMDB has of an id as one row `[size]`, not yet checked. `StoreError` if it has another size, unless `lenient`."""
    size = layout.size
    if len(value) < size or value[size:] != (raw if len(raw) > LONGEST_PLAIN_ID else b""):
        if not lenient:
            raise StoreError(damaged(layout, text_of(raw)))
        value = value.ljust(size, b"\0")
    return np.frombuffer(value, np.uint8, size)


def upsert(txn: Any, values: Any, batch: Batch, tally: Tally, runs: Sequence[Run]) -> tuple[Tally, int]:
    """Store what is above the stored revisions; returns the tally after it, and how many were stored."""
    layout, new = batch.layout, batch.embeddings
    if not len(new):
        return tally, 0
    names, raws = batch.names, batch.raws
    old, found = held(layout, raws, new.hashes, [txn.get(name, db=values) for name in names], runs)
    there = np.flatnonzero(found)
    check_table(layout, old[there], new.hashes[there], lambda row: text_of(raws[there[row]]))
    above = ~found | newer(*revisions(new.rows), *revisions(old))
    rows, stored = np.flatnonzero(above).tolist(), batch.values
    with txn.cursor(values) as cursor:
        cursor.putmulti(sorted((names[row], stored[row]) for row in rows))
    mark(txn, values, layout, new.hashes[above], lambda: _upserted_hashes(txn, values, layout))
    fresh = above & ~found
    change = Change(int(fresh.sum()), checksum(checks(new.rows[above])), payload(layout, new.spans[fresh]))
    return change.less(0, checksum(checks(old[above & found]))).on(tally), len(rows)


class Change:
    """What a step does to a tally."""

    def __init__(self, count: int = 0, total: int = 0, size: int = 0) -> None:
        self.count, self.total, self.size = count, total, size

    def less(self, count: int, total: int, size: int = 0) -> Change:
        return Change(self.count - count, self.total - total, self.size - size)

    def on(self, tally: Tally) -> Tally:
        return Tally(
            tally.count + self.count, tally.checksum + self.total, tally.bytes + self.size, tally.cold, tally.runs
        )


def payload(layout: Layout, spans: NDArray[np.uint64]) -> int:
    """Bytes of the keys and values of embeddings, as if all were in LMDB."""
    lengths = (spans & np.uint64(LONGEST_ID)).astype(np.int64)
    hashed = int(np.count_nonzero(lengths > LONGEST_PLAIN_ID))
    return int(lengths.sum()) + len(spans) * (len(layout.prefix) + 1 + layout.size) + 32 * hashed


def write_cold(txn: Any, values: Any, layout: Layout, value: bytes, tally: Tally) -> Tally:
    key = layout.prefix + COLD
    txn.put(key, value, db=values)
    size = tally.bytes + (0 if tally.cold is not None else len(key) + len(value))
    return Tally(tally.count, tally.checksum, size, int(checks(cold_rows(layout, value))[0]), tally.runs)


def walk(txn: Any, values: Any, layout: Layout, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
    """Up to `limit` upserts of a task type in the order of keys, from behind `after`; not the cold embedding."""
    with txn.cursor(values) as cursor:
        if not cursor.set_range(layout.prefix if after is None else after + b"\x00"):
            return []
        found = list(islice(cursor.iternext(), limit))
    end = layout.prefix + COLD
    return found if not found or found[-1][0] < end else found[: bisect_left(found, end, key=itemgetter(0))]


def _upserted_hashes(txn: Any, values: Any, layout: Layout) -> Iterator[NDArray[np.uint64]]:
    after: bytes | None = None
    while pairs := walk(txn, values, layout, after, 8192):
        yield hashes_of([raw_of(layout, name, value) for name, value in pairs])
        after = pairs[-1][0]


def _upserts(
    txn: Any, values: Any, layout: Layout
) -> Iterator[tuple[list[bytes], list[bytes], NDArray[np.uint64], NDArray[np.uint8]]]:
    """Keys, ids, hashes and checked values of all upserts, piece by piece."""
    after: bytes | None = None
    while pairs := walk(txn, values, layout, after, 8192):
        names, stored = [name for name, _ in pairs], [value for _, value in pairs]
        raws = [raw_of(layout, name, value) for name, value in pairs]
        yield names, raws, hashes_of(raws), check_values(layout, names, stored)
        after = names[-1]


def hide(txn: Any, values: Any, layout: Layout, new: Run, earlier: Sequence[Run], change: Change) -> tuple[Change, int]:
    """A new run against the upserts that are there: those below it go, those above hide its embeddings. `change` is what the run
    would do if there were none. Returns what it does, and how many of it are hidden."""
    hidden = 0
    for names, raws, hashes, table in _upserts(txn, values, layout):
        places = new.find(raws, hashes)
        for row in np.flatnonzero(places >= 0).tolist():
            mine = new.rows[places[row : row + 1]]
            before, found = held(layout, raws[row : row + 1], hashes[row : row + 1], [None], earlier)
            if found[0]:  # the run took its place, which the upsert had already
                change = change.less(0, checksum(checks(mine)) - checksum(checks(before)))
            else:
                change = change.less(1, checksum(checks(mine)), payload(layout, new.spans[places[row : row + 1]]))
            if newer(*revisions(mine), *revisions(table[row : row + 1]))[0]:
                txn.delete(names[row], db=values)
                change = change.less(0, checksum(checks(table[row : row + 1])) - checksum(checks(mine)))
            else:
                hidden += 1
    return change, hidden


def verify(txn: Any, values: Any, layout: Layout, tally: Tally, runs: Sequence[RunFile]) -> int:
    """Read a task type back: every byte of its files, or every embedding's check; then the count and the checksum. Returns the
    count."""
    contents = [check_run(layout, run) for run in runs]
    if len(runs) == 1:
        count, total = contents[0]
    else:
        count = total = 0
        for piece in merge(runs) if runs else ():
            count += len(piece.hashes)
            for number, run in enumerate(runs):
                total += checksum(checks(run.rows[piece.places[piece.numbers == number]]))
    for _, raws, hashes, table in _upserts(txn, values, layout):
        below, found = held(layout, raws, hashes, [None] * len(raws), runs)
        count += len(raws) - int(found.sum())
        total += checksum(checks(table)) - checksum(checks(below[found]))
    if count != tally.count or total != tally.checksum:
        raise StoreError(
            f"Version {layout.version} of model '{layout.model}' is not as it was written: task type "
            f"'{layout.task_type}' has {count} embeddings with checksum {total}, where {tally.count} with "
            f"{tally.checksum} were put. Publish it again, or serve another version."
        )
    if tally.cold is not None:
        cold = txn.get(layout.prefix + COLD, b"", db=values)
        if int(checks(cold_rows(layout, cold))[0]) != tally.cold:
            raise StoreError(damaged(layout, "(cold)"))
    return count


def check_run(layout: Layout, run: RunFile) -> Written:
    """What a file holds. Raises `StoreError` if that is not what was written, but for what was erased from it: where it is not the
    same bytes, each embedding's own check says which one is damaged."""
    as_written, contents = run.read_back()
    if as_written:
        return contents
    reached = 0
    if run.sorted_well():
        for start in range(0, len(run), 32768):
            part = run.entries(start, start + 32768)
            fine = part.sound(layout.seed)
            if not fine.all():
                raw = part.raws([int(np.argmin(fine))])[0] or b""
                raise StoreError(damaged(layout, raw.decode("utf-8", "backslashreplace")))
            reached += int(np.count_nonzero(part.alive))
    if reached < contents.rows or not run.zeros_elsewhere():
        raise StoreError(
            f"A file of task type '{layout.task_type}' in version {layout.version} of model '{layout.model}' is "
            "damaged. Roll back to another version, or publish this one again."
        )
    return contents


def remove_some(txn: Any, values: Any, prefix: bytes, limit: int) -> int:
    """Delete up to `limit` keys that begin with `prefix`; returns how many."""
    removed = 0
    with txn.cursor(values) as cursor:
        here = cursor.set_range(prefix)
        while here and removed < limit and cursor.key().startswith(prefix):
            cursor.delete()
            removed += 1
            here = bool(cursor.key())
    return removed
