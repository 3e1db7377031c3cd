"""Hashes of ids and checks of values, for many at once by numpy, for one by Python's integers: the same numbers.

The hash of an id is 64 bits, that of its text in `limaml/hashing.py`. The check of a value is 32 bits: with
`K = 0x9E3779B97F4A7C15`, all arithmetic modulo 2⁶⁴, and its 8-byte words `w[j]`, the check's own 4 bytes left out as zeros,

    s = seed + Σ_j r[j]·(w[j] xor (w[j] >> 32));   check = (s·K) >> 32

where `r[j]` is the odd number `splitmix64(j) | 1` and the seed is the sum of two hashes, of the id and of where the value lies.
Another word, another key or a piece that was cut off gives another sum, so that all but one in 2³² of them are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from limaml.hashing import LOW_BYTES, hash_many, hash_one

__all__ = ["LONGEST_ID", "Texts", "check_one", "check_rows", "hash_many", "hash_one", "hashes_of", "id_bytes"]

LONGEST_ID = 2**24 - 1
"""Bytes."""

_K, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1
_FACTOR, _HALF = np.uint64(_K), np.uint64(32)
_AT_ONCE = 2**19  # bytes of values that stay in a core's cache


def id_bytes(task_id: str) -> bytes:
    """The id in UTF-8, also where it holds half of a surrogate pair."""
    return task_id.encode("utf-8", "surrogatepass")


class Texts:
    """Ids in UTF-8, one behind the other with at most a zero between, and 8 zeros: `raw`; where each begins and how long it is:
    `starts`, `lengths [n]`."""

    __slots__ = ("lengths", "raw", "starts")

    def __init__(self, raw: bytes, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self.raw, self.starts, self.lengths = raw + bytes(8), starts, lengths

    @staticmethod
    def of(ids: Sequence[str]) -> Texts:
        """Raises `TypeError` if one of them is no string."""
        raw = id_bytes("\0".join(ids))
        # to look for what stands between takes a third of the time of asking each id for its length
        ends = (
            np.append(np.flatnonzero(np.frombuffer(raw, np.uint8) == 0), len(raw))
            if len(ids)
            else np.empty(0, np.int64)
        )
        if len(ends) != len(ids):  # an id has a zero of its own
            return Texts.of_bytes([id_bytes(each) for each in ids])
        starts = np.zeros_like(ends)
        starts[1:] = ends[:-1] + 1
        return Texts(raw, starts, ends - starts)

    @staticmethod
    def of_bytes(raws: Sequence[bytes]) -> Texts:
        lengths = np.fromiter(map(len, raws), np.int64, len(raws))
        return Texts(b"".join(raws), np.cumsum(lengths) - lengths, lengths)

    def hashes(self) -> NDArray[np.uint64]:
        return hash_many(np.frombuffer(self.raw, np.uint8), self.starts, self.lengths)


def hashes_of(raws: Sequence[bytes]) -> NDArray[np.uint64]:
    """Hashes `[n]` of ids."""
    if len(raws) <= 4:
        return np.array([hash_one(raw) for raw in raws], np.uint64)
    return Texts.of_bytes(raws).hashes()


def check_rows(rows: NDArray[np.uint8], seeds: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Checks `[n]` of values `[n, size]`, `size` a multiple of 8, whatever stands in their last 4 bytes. `seeds [n]`."""
    n, size = rows.shape
    words, factors = rows.view("<u8"), _factors(size // 8)
    sums = np.empty(n, np.uint64)
    step = max(1, _AT_ONCE // size)
    for start in range(0, n, step):
        part = words[start : start + step]
        mixed = part >> _HALF
        mixed ^= part
        mixed[:, -1] = part[:, -1] & LOW_BYTES[4]
        np.dot(mixed, factors, out=sums[start : start + step])
    sums += seeds
    sums *= _FACTOR
    return (sums >> _HALF).astype(np.uint32)


def check_one(value: bytes, seed: int) -> int:
    """The check of one value."""
    words, factors = np.frombuffer(value, "<u8"), _factors(len(value) // 8)
    mixed = words >> _HALF
    mixed ^= words
    mixed[-1] = int.from_bytes(value[-8:-4], "little")
    return ((int(mixed.dot(factors)) + seed) * _K & _MASK) >> 32


@lru_cache(maxsize=64)
def _factors(number: int) -> NDArray[np.uint64]:
    z = (np.arange(1, number + 1, dtype=np.uint64)) * _FACTOR
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
