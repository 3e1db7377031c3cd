"""Which ids may have an upsert: bits that a look-up of many ids reads at once, in place of asking LMDB for each of them.

Under a task type's prefix and byte 3: how many bits are set (8 bytes, little-endian), then 2^k bits, k ≥ 15. The bit of an id is
number `h >> (64 - k)`, h its hash; bit b is bit `b mod 8` of byte `b div 8`. It is set in the step that upserts the id, and stays when the
upsert goes. When an eighth is set there become four times as many, up to 2²¹: each upsert writes them anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.store.batch import Layout

__all__ = ["mark", "marked"]

_MARKS = b"\x03"  # behind the cold embedding's identity
_COUNT = struct.Struct("<Q")
_LEAST, _MOST = 15, 21
_SHARE = 8
_BIT = (1 << np.arange(8)).astype(np.uint8)


def marked(txn: Any, layout: Layout, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Which of `hashes` may be of ids that have an upsert."""
    raw = txn.get(layout.prefix + _MARKS)
    if raw is None:
        return np.empty(0, np.int64)
    bits = np.frombuffer(raw, np.uint8, offset=_COUNT.size)
    at = _places(hashes, bits)
    found: NDArray[np.int64] = (bits.take(at >> 3) & _BIT.take(at & 7)).nonzero()[0]
    return found


def mark(
    txn: Any,
    values: Any,
    layout: Layout,
    hashes: NDArray[np.uint64],
    every: Callable[[], Iterable[NDArray[np.uint64]]],
) -> None:
    """Take note of upserts by the hashes of their ids; `every` gives those of all upserts, these included, if need be."""
    raw = txn.get(layout.prefix + _MARKS, db=values)
    bits = (
        np.zeros(2**_LEAST // 8, np.uint8) if raw is None else np.frombuffer(raw, np.uint8, offset=_COUNT.size).copy()
    )
    count = (0 if raw is None else _COUNT.unpack_from(raw)[0]) + _set(bits, hashes)
    while count * _SHARE > 8 * len(bits) and 8 * len(bits) < 2**_MOST:
        bits = np.zeros(min(4 * len(bits), 2**_MOST // 8), np.uint8)
        count = sum(_set(bits, some) for some in every())
    txn.put(layout.prefix + _MARKS, _COUNT.pack(count) + bits.tobytes(), db=values)


def _places(hashes: NDArray[np.uint64], bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    return (hashes >> np.uint64(65 - (8 * len(bits)).bit_length())).astype(np.int64)


def _set(bits: NDArray[np.uint8], hashes: NDArray[np.uint64]) -> int:
    """Returns how many were not set before."""
    at = np.unique(_places(hashes, bits))
    fresh = at[(bits[at >> 3] & _BIT[at & 7]) == 0]
    np.bitwise_or.at(bits, fresh >> 3, _BIT[fresh & 7])
    return len(fresh)
