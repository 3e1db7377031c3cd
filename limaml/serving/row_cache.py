"""What a cut global block makes of the ids of a row, kept by the ids: an item is encoded when it is first asked for.

Numbers of a row stay out of the key, for they may differ in every request; their share is computed anew and added, as
the parts of a cut block are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limaml.meta.scorer import gather_parts
from limaml.serving.columns import Column
from limaml.types import Parts

__all__ = ["RowCache"]

KEY_BYTES = 256
"""What a key takes, about: a tuple, its values, its entry in the dictionary."""

_FIRST = 1024

PROBES = 4
"""Slots that a row may have: its own or one of those behind it."""

_FEWEST, _MOST = 12, 20
"""Bits of the number of slots. Few slots stay in the processor's cache, so there are only as many as rows need."""

_MIX = np.uint64(0x9E3779B97F4A7C15)
_FREE = -1

_DIRECT = 2**20
"""Values below it of the first column are looked up in a table that they index: most items have one row each."""


class _Slots:
    """Places of rows whose ids are all integers, found for many rows at once and without an object for each.

    A row that finds `PROBES` slots taken takes the first: this table answers rightly or not at all.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self.clear()

    def clear(self) -> None:
        self._ids = np.zeros((self._columns, 2**_FEWEST), np.int64)  # by place
        self._told = np.zeros(0, np.int64)  # places
        self._direct = np.full(2**_FEWEST, _FREE)  # value of the first column → place of the row that last had it
        self._resize(_FEWEST)

    def _resize(self, bits: int) -> None:
        self._bits, self._shift = bits, np.uint64(64 - bits)
        self._place = np.full(2**bits + PROBES, _FREE)

    def find(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The place of each row, −1 where it is not known."""
        place = self._direct.take(ids[0], mode="clip")  # a guess: what a row is compared with, that it is
        same = np.equal(self._ids[0].take(place), ids[0])
        for kept, given in zip(self._ids[1:], ids[1:], strict=True):
            same &= kept.take(place) == given
        if np.logical_and.reduce(same) and np.minimum.reduce(place, initial=0) >= 0:
            return place
        slot = self._slot(ids)
        place = self._looked(slot, ids)
        for probe in range(1, PROBES):
            left = (place < 0).nonzero()[0]
            if not len(left):
                break
            place[left] = self._looked(slot[left] + probe, [each[left] for each in ids])
        return place

    def _looked(self, slot: NDArray[np.int64], ids: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        place = self._place.take(slot)
        for kept, given in zip(self._ids, ids, strict=True):
            place[kept.take(place) != given] = _FREE  # what no row has looks at the last place, and stays free
        return place

    def tell(self, ids: Sequence[NDArray[np.int64]], place: NDArray[np.int64]) -> None:
        if int(place.max()) >= self._ids.shape[1]:
            more = np.zeros((self._columns, max(2 * self._ids.shape[1], int(place.max()) + 1)), np.int64)
            more[:, : self._ids.shape[1]] = self._ids
            self._ids = more
        for kept, given in zip(self._ids, ids, strict=True):
            kept[place] = given
        place = np.unique(place)
        self._point_at(place)
        self._told = np.concatenate([self._told, place])
        if len(self._told) > 2 ** (self._bits - 2) and self._bits < _MOST:
            self._resize(min(_MOST, self._bits + 2))
            self._told = place = np.unique(self._told)
        for one, slot in zip(place.tolist(), self._slot(list(self._ids[:, place])).tolist(), strict=True):
            near = self._place[slot : slot + PROBES]
            free = ((near == _FREE) | (near == one)).nonzero()[0]
            near[free[0] if len(free) else 0] = one

    def _point_at(self, place: NDArray[np.int64]) -> None:
        value = self._ids[0, place]
        near = (value >= 0) & (value < _DIRECT)
        value, place = value[near], place[near]
        most = int(value.max(initial=0))
        if most >= len(self._direct):
            more = np.full(2 ** most.bit_length(), _FREE)
            more[: len(self._direct)] = self._direct
            self._direct = more
        self._direct[value] = place

    def _slot(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        mixed = ids[0].view(np.uint64) * _MIX
        for more in ids[1:]:
            mixed = (mixed ^ more.view(np.uint64)) * _MIX
        return (mixed >> self._shift).view(np.int64)


class RowCache:
    """Parts `[…]` of the rows seen, by the values of `names`, in at most `limit` bytes; then it begins anew.

    `encode` makes the parts `[m, …]` of `m` rows out of their columns `[m]`.
    """

    def __init__(self, names: Sequence[str], encode: Callable[[Mapping[str, Column]], Parts], limit: int) -> None:
        self.names, self._encode, self.limit = tuple(names), encode, limit
        self._place: dict[tuple[str, ...], dict[Hashable, int]] = {}
        self._slots = _Slots(len(self.names))
        self._kept: Parts = ()
        self._used = self._capacity = 0
        self._row_bytes = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def bytes(self) -> int:
        return self._used * self._row_bytes

    def parts(self, asked: Sequence[tuple[Mapping[str, Column], int]]) -> Parts:
        """Parts of the rows of several requests, one after the other: each its columns, and its number of rows."""
        with self._lock:
            found = self._found([one for one in asked if one[1]])
            return found if isinstance(found, tuple) else gather_parts(self._kept, torch.from_numpy(found))

    def rows(self, asked: Sequence[tuple[Mapping[str, Column], int]]) -> NDArray[Any]:
        """The same where parts are one slot, `[n, width]` and the caller's own."""
        with self._lock:
            found = self._found([one for one in asked if one[1]])
            part = found[0] if isinstance(found, tuple) else self._kept[0]
            assert part is not None
            array: NDArray[Any] = part.numpy()
            return array if isinstance(found, tuple) else array.take(found, 0)

    def _found(self, asked: Sequence[tuple[Mapping[str, Column], int]]) -> NDArray[np.int64] | Parts:
        """The place of each row; its parts where they are more than are ever kept."""
        rows = sum(count for _, count in asked)
        if self._row_bytes and (self._used + rows) * self._row_bytes > self.limit:
            if rows * self._row_bytes > self.limit:
                return self._past(asked)
            self._place.clear()
            self._slots.clear()
            self._used = 0
        if all(_is_integer(columns[name]) for columns, _ in asked for name in self.names):
            return self._places_of_integers(asked)
        return np.concatenate([self._places(columns, count) for columns, count in asked])

    def _past(self, asked: Sequence[tuple[Mapping[str, Column], int]]) -> Parts:
        """More rows than are ever kept."""
        found = [self._encode({name: columns[name].repeated(count) for name in self.names}) for columns, count in asked]
        return tuple(
            None if slot[0] is None else torch.cat([part for part in slot if part is not None])
            for slot in zip(*found, strict=True)
        )

    def _places_of_integers(self, asked: Sequence[tuple[Mapping[str, Column], int]]) -> NDArray[np.int64]:
        ids = [_joined([(columns[name].array, count) for columns, count in asked]) for name in self.names]
        places = self._slots.find(ids)
        unknown = (places < 0).nonzero()[0]
        if len(unknown):
            rest = [each[unknown] for each in ids]
            columns = {name: Column.of_array(each) for name, each in zip(self.names, rest, strict=True)}
            places[unknown] = self._places(columns, len(unknown))
            self._slots.tell(rest, places[unknown])
        self.hits += len(places) - len(unknown)
        return places

    def _places(self, columns: Mapping[str, Column], rows: int) -> NDArray[np.int64]:
        given = [columns[name] for name in self.names]
        known = self._place.setdefault(tuple(column.kind for column in given), {})
        listed = [column.keys if len(column) == rows else [column.keys[0]] * rows if rows else [] for column in given]
        keys: Sequence[Hashable] = listed[0] if len(listed) == 1 else list(zip(*listed, strict=True))
        found = list(map(known.get, keys))
        if None in found:
            fresh = {key: row for row, key in reversed(list(enumerate(keys))) if found[row] is None}
            order = sorted(fresh.values())
            self._keep({name: columns[name].repeated(rows).first(order) for name in self.names}, len(order))
            for place, row in enumerate(order, start=self._used - len(order)):
                known[keys[row]] = place
            self.misses += len(order)
            found = list(map(known.get, keys))
        self.hits += rows
        return np.array(found, dtype=np.int64)

    def _keep(self, columns: Mapping[str, Column], count: int) -> None:
        fresh = self._encode(columns)
        if not self._row_bytes:
            self._row_bytes = KEY_BYTES + sum(
                part[0].numel() * part.element_size() for part in fresh if part is not None
            )
        if self._used + count > self._capacity or not self._kept:
            self._capacity = max(_FIRST, 2 * self._capacity, self._used + count)
            grown = tuple(None if part is None else part.new_empty(self._capacity, *part.shape[1:]) for part in fresh)
            for new, old in zip(grown, self._kept, strict=False):
                if new is not None and old is not None:
                    new[: self._used] = old[: self._used]
            self._kept = grown
        for kept, part in zip(self._kept, fresh, strict=True):
            if kept is not None and part is not None:
                kept[self._used : self._used + count] = part
        self._used += count


def _joined(given: Sequence[tuple[NDArray[Any] | None, int]]) -> NDArray[np.int64]:
    """Arrays one after the other, each for so many rows."""
    arrays = [array if array is None or len(array) == rows else np.repeat(array, rows) for array, rows in given]
    joined: NDArray[Any] = np.concatenate(arrays)  # type: ignore[arg-type]
    return joined if joined.dtype == np.int64 else joined.astype(np.int64)


def _is_integer(column: Column) -> bool:
    return column.array is not None and column.kind == "Int64"
