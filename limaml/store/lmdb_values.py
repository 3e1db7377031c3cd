"""The embeddings in LMDB: how they are written, walked, checked and removed inside one transaction.

A key is the version's number (4 bytes, big-endian), the task type's place in the version (2 bytes), and the task's
identity, so a version, and a task type of it, is one range of keys.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, damaged, table_of
from limaml.store.catalog import Tally
from limaml.store.packing import COLD, checks, checksum, newer, revisions

__all__ = ["estimate_bytes", "key_prefix", "remove_some", "verify", "walk", "write", "write_cold"]

_PAGE, _PAGE_HEADER, _NODE, _POINTER = 4096, 16, 8, 2


def key_prefix(number: int, place: int | None = None) -> bytes:
    """Start of the keys of version `number`, or of its task type at `place`."""
    return struct.pack(">I", number) if place is None else struct.pack(">IH", number, place)


def write(txn: Any, values: Any, batch: Batch, tally: Tally) -> tuple[Tally, int]:
    """Store what is above the stored revisions; returns the tally after it, and how many were stored."""
    if not batch.names:
        return tally, 0
    with txn.cursor(values) as cursor:
        if not cursor.last() or cursor.key() < batch.names[0]:
            pairs = list(zip(batch.names, batch.values, strict=True))
            cursor.putmulti(pairs, append=True)
            return _added(tally, pairs, len(pairs), checksum(batch.checks)), len(pairs)
        old = list(map(txn.get, batch.names))
        new_rows = [row for row, value in enumerate(old) if value is None]
        held_rows = [row for row, value in enumerate(old) if value is not None]
        replaced: list[int] = []
        lost = 0
        if held_rows:
            held = table_of(batch.layout, [batch.names[row] for row in held_rows], [v for v in old if v is not None])
            above = newer(batch.count[held_rows], batch.event_time[held_rows], *revisions(held))
            replaced = [row for row, is_above in zip(held_rows, above.tolist(), strict=True) if is_above]
            lost = checksum(checks(held)[above])
        rows = sorted([*new_rows, *replaced])
        cursor.putmulti([(batch.names[row], batch.values[row]) for row in rows])
    fresh = [(batch.names[row], batch.values[row]) for row in new_rows]
    return _added(tally, fresh, len(new_rows), checksum(batch.checks[rows]) - lost), len(rows)


def write_cold(txn: Any, values: Any, layout: Layout, value: bytes, tally: Tally) -> Tally:
    key = layout.prefix + COLD
    txn.put(key, value, db=values)
    size = tally.bytes + (0 if tally.cold is not None else len(key) + len(value))
    return Tally(tally.count, tally.checksum, size, int(checks(table_of(layout, [key], [value]))[0]))


def walk(txn: Any, values: Any, layout: Layout, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
    """Up to `limit` keys and values of a task type in the order of keys, from behind `after`; not the cold embedding."""
    with txn.cursor(values) as cursor:
        if not cursor.set_range(layout.prefix if after is None else after + b"\x00"):
            return []
        found = list(islice(cursor.iternext(), limit))
    end = layout.prefix + COLD
    return found if not found or found[-1][0] < end else found[: bisect_left(found, end, key=itemgetter(0))]


def verify(txn: Any, values: Any, layout: Layout, tally: Tally) -> int:
    """Read a task type back: every value's check, then the count and the checksum. Returns the count."""
    count, total, after = 0, 0, None
    while pairs := walk(txn, values, layout, after, 8192):
        names, found = zip(*pairs, strict=True)
        count, total, after = count + len(pairs), total + checksum(checks(table_of(layout, names, found))), names[-1]
    if count != tally.count or total != tally.checksum:
        raise StoreError(
            f"Version {layout.version} of model '{layout.model}' is not as it was written: task type "
            f"'{layout.task_type}' has {count} embeddings with checksum {total}, where {tally.count} with "
            f"{tally.checksum} were put. Publish it again, or serve another version."
        )
    if tally.cold is not None:
        key = layout.prefix + COLD
        cold = txn.get(key, b"", db=values)
        if int(checks(table_of(layout, [key], [cold]))[0]) != tally.cold:
            raise StoreError(damaged(layout, "(cold)"))
    return count


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


def estimate_bytes(keys: int, key: int, value: int) -> int:
    """Pages that so many keys and values take, written in order (random order: up to half as much again)."""
    node = _NODE + key + value
    spare = 0
    if node > (_PAGE - _PAGE_HEADER) // 2:  # the value gets pages of its own
        spare = -(-(_PAGE_HEADER + value) // _PAGE) * _PAGE
        node = _NODE + key + 8
    node += node % 2 + _POINTER
    leaves = -(-keys // ((_PAGE - _PAGE_HEADER) // node))
    branches = -(-leaves * (_NODE + key + _POINTER) // (_PAGE - _PAGE_HEADER))
    return (leaves + branches) * _PAGE + keys * spare


def _added(tally: Tally, new: Sequence[tuple[bytes, bytes]], count: int, total: int) -> Tally:
    size = sum(map(len, [key for key, _ in new])) + sum(map(len, [value for _, value in new]))
    return Tally(tally.count + count, tally.checksum + total, tally.bytes + size, tally.cold)
