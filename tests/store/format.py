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
    row: int  # its place among the values
    span: int  # offset of its id's span in the file


def read_run(path: Path) -> Iterator[Embedding]:
    """The embeddings in a run's file, those that were erased left out; asserts that the file is as documented."""
    content = path.read_bytes()
    magic, n, capacity, m, text_bytes, size, shift, *_crcs, crc = struct.unpack("<8sQQQQII6II", content[:76])
    assert magic == b"limaml\0\2"
    assert zlib.crc32(content[:72]) == crc
    assert n <= capacity and content[76:80] == bytes(4)
    text = 80 + m * size
    spans = text + text_bytes + 8
    spans += -spans % 8
    hashes = spans + 8 * m
    places = hashes + 8 * capacity
    directory = places + 4 * capacity
    end = directory + 4 * (2 ** (64 - shift) + 1)
    assert len(content) == end
    entries = struct.unpack_from(f"<{n}Q", content, hashes)
    assert list(entries) == sorted(entries)
    firsts = struct.unpack_from(f"<{2 ** (64 - shift) + 1}I", content, directory)
    found = struct.unpack_from(f"<{n}I", content, places)
    assert len(set(found)) == n
    for entry, (h, row) in enumerate(zip(entries, found, strict=True)):
        offset, span_at = 80 + row * size, spans + 8 * row
        value, (span,) = content[offset : offset + size], struct.unpack_from("<Q", content, span_at)
        assert firsts[h >> shift] <= entry < firsts[(h >> shift) + 1]
        if span == M:
            assert value == bytes(size)
            continue
        start = text + (span >> 24)
        raw = content[start : start + (span & 2**24 - 1)]
        assert id_hash(raw) == h
        yield Embedding(raw, value, offset, row, span_at)
    for row in {*range(m)} - {*found}:
        assert content[80 + row * size : 80 + (row + 1) * size] == bytes(size)
        assert content[spans + 8 * row : spans + 8 * (row + 1)] == b"\xff" * 8


def as_written(path: Path) -> bool:
    """Whether the sections of a run's file have the CRCs that its header says. Not so once something was erased."""
    content = path.read_bytes()
    _, n, capacity, m, text_bytes, size, shift, *crcs, _ = struct.unpack("<8sQQQQII6II", content[:76])
    text = 80 + m * size
    spans = -(-(text + text_bytes + 8) // 8) * 8
    hashes = spans + 8 * m
    places = hashes + 8 * capacity
    directory = places + 4 * capacity
    starts = (80, text, spans, hashes, places, directory)
    lengths = (m * size, text_bytes, 8 * m, 8 * n, 4 * n, 4 * (2 ** (64 - shift) + 1))
    return [zlib.crc32(content[at : at + length]) for at, length in zip(starts, lengths, strict=True)] == crcs
