"""One task's window as bytes: how many interactions there are, and the last of them.

    count u64 | changed u64 | rows u32 | time i64, bucket u32, size u32 of each row | the rows, packed

Rows are in the order that reading the whole log would give them: by time, then by bucket, then as they were appended.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

__all__ = ["HEAD", "INDEX", "Row", "count_of", "extended", "newest_of", "parts_of", "revision_of", "unseen"]

_HEAD = struct.Struct("<QQI")
_ENTRY = struct.Struct("<qII")
HEAD = np.dtype([("count", "<u8"), ("changed", "<u8"), ("rows", "<u4")])
INDEX = np.dtype([("time", "<i8"), ("bucket", "<u4"), ("size", "<u4")])

Row = tuple[int, int, bytes]
"""Time, bucket, packed row."""

_order = itemgetter(0, 1)


@dataclass(frozen=True, slots=True)
class _Parts:
    count: int
    changed: int
    rows: int
    index: bytes
    packed: bytes

    def entries(self) -> list[Row]:
        found, at = [], 0
        for time, bucket, size in _ENTRY.iter_unpack(self.index):
            found.append((time, bucket, self.packed[at : at + size]))
            at += size
        return found


def parts_of(value: bytes) -> _Parts:
    """The header, the index and the packed rows of a window."""
    count, changed, rows = _HEAD.unpack_from(value)
    begin = _HEAD.size + rows * _ENTRY.size
    return _Parts(count, changed, rows, value[_HEAD.size : begin], value[begin:])


def count_of(value: bytes) -> int:
    """Distinct interactions of the task, those that the window no longer holds included."""
    return int(_HEAD.unpack_from(value)[0])


def newest_of(value: bytes) -> int:
    """Time of the newest interaction; there is at least one."""
    rows = _HEAD.unpack_from(value)[2]
    return int(_ENTRY.unpack_from(value, _HEAD.size + (rows - 1) * _ENTRY.size)[0])


def revision_of(value: bytes) -> int:
    """The append that changed the window last."""
    return int(_HEAD.unpack_from(value)[1])


def unseen(value: bytes | None, rows: Sequence[Row]) -> tuple[list[Row], bool]:
    """Those of `rows`, in their order, that the window and the rows before them do not have; and whether it can tell.

    It cannot where a row is as old as the oldest row that it holds, or older, and it does not hold all there are.
    """
    own: set[bytes] = set()
    if value is not None:
        parts = parts_of(value)
        first, newest = _ENTRY.unpack_from(parts.index)[0], newest_of(value)
        earliest = min(row[0] for row in rows)
        if parts.count > parts.rows and earliest <= first:
            return [], False
        if earliest <= newest:
            own = {row for time, _, row in parts.entries() if time >= earliest}
    fresh = []
    for row in rows:
        if row[2] not in own:
            own.add(row[2])
            fresh.append(row)
    return fresh, True


def extended(value: bytes | None, rows: Sequence[Row], keep: int | None, changed: int) -> bytes:
    """The window with `rows`, which it does not have and which are in order; cut to the last `keep`."""
    count, index, packed = 0, b"", b""
    entries: Sequence[Row] = rows
    if value is not None:
        parts = parts_of(value)
        count, changed = parts.count, max(parts.changed, changed)
        last = _ENTRY.unpack_from(parts.index, len(parts.index) - _ENTRY.size)
        if rows and last[:2] <= _order(rows[0]):
            index, packed = parts.index, parts.packed
        else:  # something came late: sorted again, known rows before new ones where they tie
            entries = sorted([*parts.entries(), *rows], key=_order)
    index += b"".join(_ENTRY.pack(time, bucket, len(row)) for time, bucket, row in entries)
    packed += b"".join(row for _, _, row in entries)
    held = len(index) // _ENTRY.size
    if keep is not None and held > keep:
        gone = (held - keep) * _ENTRY.size
        packed = packed[sum(size for _, _, size in _ENTRY.iter_unpack(index[:gone])) :]
        index, held = index[gone:], keep
    return _HEAD.pack(count + len(rows), changed, held) + index + packed


def without_rows(value: bytes, bad: Sequence[bool]) -> bytes | None:
    """The window without the rows that are `bad`; None if none is left. Its count stays: it orders embeddings."""
    parts = parts_of(value)
    kept = [row for row, out in zip(parts.entries(), bad, strict=True) if not out]
    if not kept:
        return None
    index = b"".join(_ENTRY.pack(time, bucket, len(row)) for time, bucket, row in kept)
    return _HEAD.pack(parts.count, parts.changed, len(kept)) + index + b"".join(row for _, _, row in kept)
