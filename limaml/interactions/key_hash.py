"""Hashes of task keys, for many at once by numpy, for one by Python's integers: the same numbers on every machine, in every version.

A decimal integer of 64 bits, written as `str(int)` writes it, is hashed as that number by splitmix64, any other key as text
(limaml/hashing.py). So a column of integers is hashed without writing a single digit, and `42` and `"42"` still have one hash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.hashing import hash_many, hash_one
from limaml.interactions.columns import canonical_text, joined_text

__all__ = ["key_hash", "key_hashes"]

_K, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1
_FACTOR = np.uint64(_K)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_DECIMAL = re.compile(r"(0|-?[1-9][0-9]{0,18})\Z", re.ASCII)
_SIGNED = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)


def key_hash(key: str) -> int:
    """The hash of one task key."""
    if _DECIMAL.match(key) and -(2**63) <= int(key) < 2**63:
        z = (int(key) + _K) & _MASK
        for shift, factor in _MIX:
            z = (z ^ (z >> shift)) * factor & _MASK
        return z ^ (z >> 31)
    return hash_one(key.encode("utf-8", "surrogatepass"))


def key_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> NDArray[np.uint64]:
    """The hash `[rows]` of the key of each row of `frame`, of which `columns` name the task and hold no null."""
    if len(columns) == 1:
        column = frame[columns[0]]
        if column.dtype in _SIGNED:
            return _of_integers(column.cast(pl.Int64).to_numpy())
        return _of_texts(canonical_text(column))
    parts = [
        canonical_text(frame[name])
        .str.replace_all("\\", "\\\\", literal=True)
        .str.replace_all("|", "\\|", literal=True)
        for name in columns
    ]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + "|" + part
    return _of_texts(joined)


def _of_integers(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    z = values.astype(np.uint64) + _FACTOR
    for shift, factor in _MIX:
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def _of_texts(texts: pl.Series) -> NDArray[np.uint64]:
    raw = np.frombuffer(joined_text(texts).encode() + bytes(8), np.uint8)
    lengths = texts.str.len_bytes().to_numpy().astype(np.int64)
    found = hash_many(raw, np.cumsum(lengths) - lengths, lengths)
    numbers = texts.cast(pl.Int64, strict=False)
    decimal = ((numbers.cast(pl.String) == texts) & numbers.is_not_null()).fill_null(False).to_numpy()
    if decimal.any():
        found[decimal] = _of_integers(numbers.fill_null(0).to_numpy()[decimal])
    return found
