"""A hash of texts, for many at once by numpy, for one by Python's integers: the same numbers on every machine, in every version.

The hash is 64 bits. With `K = 0x9E3779B97F4A7C15`, all arithmetic modulo 2⁶⁴ and `n` the text's bytes in UTF-8,

    h = n·K;   for each 8 bytes w (little-endian, the last ones filled with zeros):   h = (h xor w)·K;  h = h xor (h >> 32)
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOW_BYTES", "hash_many", "hash_one"]

_K, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1
_FACTOR, _HALF = np.uint64(_K), np.uint64(32)
LOW_BYTES = np.array([(1 << 8 * kept) - 1 for kept in range(9)], np.uint64)
"""What keeps the first 0 … 8 bytes of a word."""


def hash_one(raw: bytes) -> int:
    """The hash of a text."""
    h = len(raw) * _K & _MASK
    for (word,) in struct.iter_unpack("<Q", raw + bytes(-len(raw) % 8)):
        h = (h ^ word) * _K & _MASK
        h ^= h >> 32
    return h


def hash_many(padded: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hashes `[n]` of the texts in `padded` that begin at `starts` and have `lengths`; 8 bytes more stand behind the last."""
    words: NDArray[np.uint64] = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))  # one at every byte
    h = lengths.astype(np.uint64) * _FACTOR
    shortest, longest = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
    for done in range(0, longest, 8):
        if shortest >= done + 8:  # all have a whole word more
            h ^= words[starts + done]
            h *= _FACTOR
            h ^= h >> _HALF
        elif shortest > done:
            h ^= words[starts + done] & LOW_BYTES[np.minimum(lengths - done, 8)]
            h *= _FACTOR
            h ^= h >> _HALF
        else:
            rows = np.flatnonzero(lengths > done)
            part = (h[rows] ^ (words[starts[rows] + done] & LOW_BYTES[np.minimum(lengths[rows] - done, 8)])) * _FACTOR
            h[rows] = part ^ (part >> _HALF)
    return h
