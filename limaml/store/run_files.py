"""A run as a file, written once and mapped. Only what is erased from it changes.

    offset  content
    0       header (64 bytes): "limaml\\0\\1", then n, capacity and bytes of text (8 bytes each), size of a value, shift (4 each),
            CRC-32 of all before (4)
    64      hashes     capacity · 8    ascending
    …       spans      capacity · 8    of each id in the text: start · 2²⁴ + length; 2⁶⁴ - 1 where the embedding was erased
    …       directory  (2^(64 - shift) + 1) · 4    the first row whose hash has these upper bits, or higher ones
    …       values     capacity · size
    …       text       ids in UTF-8, in any order, and 8 zeros

All numbers are little-endian; of each section the first `n` entries count. To erase an embedding is to overwrite its value and
its id with zeros; its hash stays.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from limaml.durable import sync
from limaml.store.hashing import LONGEST_ID
from limaml.store.packing import checks, checksum
from limaml.store.runs import ERASED, Run, merge

__all__ = ["Written", "erase", "open_run", "sorted_well", "write_run"]

_MAGIC = b"limaml\0\1"
_HEADER = struct.Struct("<8sQQQIII")
_HEAD = 64
_PER_ENTRY = 4  # rows for each entry of the directory, about


@dataclass(frozen=True)
class Written:
    rows: int
    checksum: int


@dataclass(frozen=True)
class _Places:
    """Where the sections begin."""

    capacity: int
    size: int
    shift: int

    @property
    def spans(self) -> int:
        return _HEAD + 8 * self.capacity

    @property
    def directory(self) -> int:
        return self.spans + 8 * self.capacity

    @property
    def rows(self) -> int:
        return -(-(self.directory + 4 * ((1 << 64 - self.shift) + 1)) // 8) * 8

    @property
    def text(self) -> int:
        return self.rows + self.capacity * self.size


def write_run(
    path: Path, runs: Sequence[Run], text_sizes: Sequence[int], size: int, choose: Callable[[Run], NDArray[np.bool_]]
) -> Written:
    """Write the merge of runs, as far as `choose` says of each piece. Ids of what is left out are not written. On the disk when
    this returns; removed again if it raises."""
    capacity = sum(map(len, runs))
    places = _Places(capacity, size, 64 - max(1, (capacity // _PER_ENTRY).bit_length()))
    counts = np.zeros(2 ** (64 - places.shift), np.int64)
    n = total = 0
    out: list[int] = []
    try:
        with path.open("wb") as file:
            for piece in merge(runs, text_sizes):
                wanted = choose(piece)
                if not wanted.all():
                    out += piece.spans[~wanted].tolist()
                    piece = piece.where(wanted)
                if not len(piece):
                    continue
                sections = ((_HEAD, piece.hashes), (places.spans, piece.spans), (places.rows, piece.rows))
                for place, section in sections:
                    file.seek(place + n * section.strides[0])
                    file.write(np.ascontiguousarray(section).data)
                _count(counts, piece.hashes, places.shift)
                n, total = n + len(piece), total + checksum(checks(piece.rows))
            file.seek(places.text)
            for run, length in zip(runs, text_sizes, strict=True):
                file.write(memoryview(run.text)[run.base : run.base + length])
            file.write(bytes(8))
            for span in out:
                file.seek(places.text + (span >> 24))
                file.write(bytes(span & LONGEST_ID))
            file.seek(places.directory)
            file.write(_directory(counts).data)
            head = _HEADER.pack(_MAGIC, n, capacity, sum(text_sizes), size, places.shift, 0)[:-4]
            file.seek(0)
            file.write(head + struct.pack("<I", zlib.crc32(head)))
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(n, total)


def open_run(path: Path, size: int) -> tuple[Run, int]:
    """A file as a run of values of `size` bytes, mapped, and the bytes of its text. `ValueError` if it is not whole."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise ValueError(f"{path} was cut off")
        magic, n, capacity, text, found, shift, check = _HEADER.unpack(head)
        if magic != _MAGIC or check != zlib.crc32(head[:-4]) or found != size or n > capacity:
            raise ValueError(f"the header of {path} is damaged")
        places = _Places(capacity, size, shift)
        if path.stat().st_size != places.text + text + 8:
            raise ValueError(f"{path} has {path.stat().st_size} bytes in place of {places.text + text + 8}")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.frombuffer(mapped, np.uint8)
    return (
        Run(
            whole[_HEAD : _HEAD + 8 * n].view("<u8"),
            whole[places.rows : places.rows + n * size].reshape(n, size),
            whole[places.spans : places.spans + 8 * n].view("<u8"),
            mapped,
            places.text,
            whole[places.directory : places.directory + 4 * (2 ** (64 - shift) + 1)].view("<u4"),
            shift,
        ),
        text,
    )


def sorted_well(run: Run) -> bool:
    """Whether look-ups can work: hashes ascend, and the directory is theirs."""
    counts = np.zeros(2 ** (64 - run.shift), np.int64)
    if len(run):
        _count(counts, run.hashes, run.shift)
    ascending = bool((run.hashes[1:] >= run.hashes[:-1]).all())
    return ascending and run.directory is not None and np.array_equal(_directory(counts), run.directory)


def erase(path: Path, rows: Sequence[int]) -> None:
    """Overwrite embeddings; on the disk when this returns. Doing it again does no harm."""
    with path.open("r+b") as file:
        _, n, capacity, _, size, shift, _ = _HEADER.unpack(file.read(_HEADER.size))
        places = _Places(capacity, size, shift)
        with mmap.mmap(file.fileno(), 0) as mapped:
            for row in sorted(row for row in rows if row < n):
                at = places.spans + 8 * row
                (span,) = struct.unpack_from("<Q", mapped, at)
                if span != ERASED:
                    start = places.text + (span >> 24)
                    mapped[start : start + (span & LONGEST_ID)] = bytes(span & LONGEST_ID)
                start = places.rows + row * size
                mapped[start : start + size] = bytes(size)
                struct.pack_into("<Q", mapped, at, ERASED)
            mapped.flush()
        os.fsync(file.fileno())


def _count(counts: NDArray[np.int64], hashes: NDArray[np.uint64], shift: int) -> None:
    buckets = (hashes >> np.uint64(shift)).astype(np.int64)
    found = np.bincount(buckets - buckets[0])
    counts[buckets[0] : buckets[0] + len(found)] += found


def _directory(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype("<u4")
