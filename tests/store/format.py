"""The bytes of stored embeddings by their documentation alone (`store/hashing.py`, `packing.py`, `run_files.py`): a second reading, in
plain Python, that shares no code with the first."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

K, M = 0x9E3779B97F4A7C15, 2**64 - 1
COLD_TEXT = b"cold embedding"  # in place of an id, in the check of a cold embedding


def id_hash(raw: bytes) -> int:
    h = len(raw) * K & M
    for start in range(0, len(raw), 8):
        word = int.from_bytes(raw[start : start + 8], "little")
        h = (h ^ word) * K & M
        h ^= h >> 32
    return h


def factor(j: int) -> int:
    """splitmix64(j) | 1"""
    z = (j + 1) * K & M
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M
    return z ^ z >> 31 | 1


FACTORS = [factor(j) for j in range(1000)]


def check_of(value: bytes, raw: bytes, where: bytes) -> int:
    """The check that a value (the id behind it cut off) must carry for the id `raw` in the version and task type `where`."""
    words = struct.unpack(f"<{len(value) // 8}Q", value[:-4] + bytes(4))
    total = id_hash(raw) + id_hash(where)
    total += sum(f * (w ^ w >> 32) for f, w in zip(FACTORS, words, strict=False))
    return ((total & M) * K & M) >> 32


class Embedding(NamedTuple):
    raw: bytes  # the id
    value: bytes
    offset: int  # of the value in the file
    row: int


def read_run(path: Path) -> Iterator[Embedding]:
    """The embeddings in a run's file, those that were erased left out; asserts that the file is as documented."""
    content = path.read_bytes()
    magic, n, capacity, text_bytes, size, shift, crc = struct.unpack("<8sQQQIII", content[:44])
    assert magic == b"limaml\0\1"
    assert zlib.crc32(content[:40]) == crc
    assert n <= capacity
    spans = 64 + 8 * capacity
    directory = spans + 8 * capacity
    rows = directory + 4 * (2 ** (64 - shift) + 1)
    rows += -rows % 8
    text = rows + capacity * size
    assert len(content) == text + text_bytes + 8
    hashes = struct.unpack_from(f"<{n}Q", content, 64)
    assert list(hashes) == sorted(hashes)
    firsts = struct.unpack_from(f"<{2 ** (64 - shift) + 1}I", content, directory)
    for row, (h, span) in enumerate(zip(hashes, struct.unpack_from(f"<{n}Q", content, spans), strict=True)):
        offset = rows + row * size
        value = content[offset : offset + size]
        assert firsts[h >> shift] <= row < firsts[(h >> shift) + 1]
        if span == M:
            assert value == bytes(size)
            continue
        start = text + (span >> 24)
        raw = content[start : start + (span & 2**24 - 1)]
        assert id_hash(raw) == h
        yield Embedding(raw, value, offset, row)
