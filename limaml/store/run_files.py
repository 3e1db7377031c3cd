"""A run as a file, written once and mapped. Only what is erased from it changes.

    offset  content
    0       header (80 bytes): "limaml\\0\\2"; n, capacity, m and bytes of text (8 bytes each); size of a value, shift (4 each);
            CRC-32 of each section as it was written, in their order here (6 · 4); CRC-32 of all before (4); 4 zeros
    80      values     m · size        in the order in which they were put
    …       text       ids in UTF-8, in any order, and 8 zeros or a few more, to a multiple of 8
    …       spans      m · 8           of each value's id in the text: start · 2²⁴ + length; 2⁶⁴ - 1 where it was erased
    …       hashes     capacity · 8    ascending
    …       places     capacity · 4    the value's number of each hash
    …       directory  (2^(64 - shift) + 1) · 4    the first hash that has these upper bits, or higher ones

All numbers are little-endian; of hashes and places the first `n` entries count. To erase an embedding is to overwrite its value
and its id with zeros; its hash stays. A file whose sections have their CRCs is as it was written. One from which something was
erased has not; it is then checked value by value.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import eq
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from limaml.durable import sync
from limaml.errors import StoreError
from limaml.store.hashing import LONGEST_ID
from limaml.store.packing import checks, checksum
from limaml.store.runs import ERASED, Embeddings, Run, merge, revision_of, sort_order

__all__ = ["RunFile", "Written", "erase", "merge_runs", "open_run", "write_run"]

_MAGIC = b"limaml\0\2"
_SECTIONS = ("values", "text", "spans", "hashes", "places", "directory")
_HEADER = struct.Struct("<8sQQQQII6I")
_HEAD = 80
_PER_ENTRY = 4  # entries for each of the directory, about
_STEP = 4096  # rows, few enough to stay in a core's cache from packing until they are written
_BLOCK = 2**20
_PUSH = 16 * 2**20  # bytes after which the disk is set to work


class Written(NamedTuple):
    rows: int
    checksum: int


@dataclass(frozen=True)
class _Places:
    """Where the sections begin."""

    capacity: int
    m: int
    text_size: int
    size: int
    shift: int

    def __post_init__(self) -> None:
        if self.m >= 2**32:
            raise StoreError(
                f"A version cannot hold {self.m} embeddings of one task type; {2**32 - 1} are the most. Split the task type."
            )

    @property
    def text(self) -> int:
        return _HEAD + self.m * self.size

    @property
    def spans(self) -> int:
        return -(-(self.text + self.text_size + 8) // 8) * 8

    @property
    def hashes(self) -> int:
        return self.spans + 8 * self.m

    @property
    def places(self) -> int:
        return self.hashes + 8 * self.capacity

    @property
    def directory(self) -> int:
        return self.places + 4 * self.capacity

    @property
    def end(self) -> int:
        return self.directory + 4 * ((1 << 64 - self.shift) + 1)


@dataclass(frozen=True, eq=False)
class RunFile(Run):
    """A file that is mapped."""

    text_size: int
    crcs: tuple[int, ...]

    def read_back(self) -> tuple[bool, Written]:
        """Read everything: whether each byte is the one that was written; and how many embeddings there are that were not
        erased, with their checksum."""
        rows = total = crc = 0
        for start in range(0, len(self.rows), _STEP):  # a thread that serves has its turn between two
            block = self.rows[start : start + _STEP]
            crc = zlib.crc32(_bytes(block), crc)
            rows, total = rows + int(np.count_nonzero(block[:, 0])), total + checksum(checks(block))
        text = memoryview(self.text)[self.base : self.base + self.text_size]
        others = (text, _bytes(self.spans), _bytes(self.hashes), _bytes(self.places), _bytes(self.directory))
        as_written = crc == self.crcs[0] and all(map(eq, map(_crc_of, others), self.crcs[1:]))
        return as_written, Written(rows, total)

    def sorted_well(self) -> bool:
        """Whether look-ups can work: hashes ascend, the directory is theirs, and what is not erased is found at one place."""
        if not (self.hashes[1:] >= self.hashes[:-1]).all() or (len(self) and int(self.places.max()) >= len(self.rows)):
            return False
        counts = np.zeros(2 ** (64 - self.shift), np.int64)
        _count(counts, self.hashes, self.shift)  # of what ascends
        return np.array_equal(_directory(counts), self.directory)

    def zeros_elsewhere(self) -> bool:
        """Whether zeros lie wherever no embedding and no id does: between two ids, and where something was erased."""
        erased = self.spans == np.uint64(ERASED)
        for start in range(0, len(self.rows), _STEP):
            block, gone = self.rows[start : start + _STEP], erased[start : start + _STEP]
            if block[gone].any() or not block[~gone, 0].all():
                return False
        alive = np.sort(self.spans[~erased])  # by their starts, which are the upper bits
        starts = (alive >> np.uint64(24)).astype(np.int64)
        ends = np.maximum.accumulate(starts + (alive & np.uint64(LONGEST_ID)).astype(np.int64))
        text = np.frombuffer(self.text, np.uint8, self.text_size, self.base)
        first = behind = 0
        while behind < len(text):
            last = max(first + 1, int(np.searchsorted(ends, behind + _BLOCK, "right")))  # some ids, or one long one
            stop = min(len(text), int(ends[last - 1]) if first < len(ends) else len(text))
            covered = np.zeros(stop - behind + 1, np.int32)
            np.add.at(covered, np.clip(starts[first:last] - behind, 0, stop - behind), 1)
            np.add.at(covered, np.clip(ends[first:last] - behind, 0, stop - behind), -1)
            if text[behind:stop][np.cumsum(covered[:-1]) <= 0].any():
                return False
            first, behind = last, stop
        return True


class _Writing:
    """A file that is being written. Left by an error, it is removed again."""

    def __init__(self, path: Path) -> None:
        self.path, self.crcs = path, [0] * len(_SECTIONS)
        self._at = self._pushed = 0

    def __enter__(self) -> Self:
        self._file = self.path.open("wb", buffering=_BLOCK)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            if error is not None:
                self.path.unlink(missing_ok=True)

    def put(self, section: str, place: int, data: NDArray[Any] | memoryview | bytearray) -> int:
        """Write a piece of a section, behind those that were there before; returns the place behind it."""
        if isinstance(data, np.ndarray):
            data = _bytes(data)
        number = _SECTIONS.index(section)
        self.crcs[number] = zlib.crc32(data, self.crcs[number])
        return self._write(place, data)

    def put_all(self, section: str, place: int, pieces: Iterable[NDArray[Any] | memoryview | bytearray]) -> None:
        for piece in pieces:
            place = self.put(section, place, piece)

    def put_index(self, places: _Places, index: Iterable[tuple[NDArray[np.uint64], NDArray[np.int64]]]) -> int:
        """Write the index, given as hashes and places piece by piece. Returns how many there were."""
        n, counts = 0, np.zeros(2 ** (64 - places.shift), np.int64)
        for hashes, found in index:
            self.put("hashes", places.hashes + 8 * n, hashes)
            self.put("places", places.places + 4 * n, found.astype("<u4"))
            _count(counts, hashes, places.shift)
            n += len(hashes)
        self.put("directory", places.directory, _directory(counts))
        return n

    def finish(self, places: _Places, n: int) -> None:
        """Write the header. On the disk when this returns."""
        filling = places.text + places.text_size
        self._write(filling, bytes(places.spans - filling))
        head = _HEADER.pack(
            _MAGIC, n, places.capacity, places.m, places.text_size, places.size, places.shift, *self.crcs
        )
        self._write(0, head + struct.pack("<II", zlib.crc32(head), 0))
        self._file.flush()
        os.fsync(self._file.fileno())
        sync(self.path.parent)

    def _write(self, place: int, data: Any) -> int:
        if place != self._at:
            self._file.seek(place)
        self._file.write(data)
        self._at = place + len(data)
        self._pushed += len(data)
        if self._pushed >= _PUSH and hasattr(os, "posix_fadvise"):
            # the disk begins with what is there while more is packed; else all its work would stand behind the last byte
            # (pages that are not on the disk yet stay where they are, for the reading back)
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), max(0, self._at - self._pushed), self._pushed, os.POSIX_FADV_DONTNEED)
            self._pushed = 0
        return self._at


def write_run(
    path: Path,
    parts: Sequence[Embeddings],
    text_sizes: Sequence[int],
    size: int,
    choose: Callable[[Embeddings], NDArray[np.bool_]],
) -> Written:
    """Write embeddings, as far as `choose` says of each piece; of an id that is there more than once the highest revision (of equal
    ones the first). Ids of what is left out are not written. On the disk when this returns; removed again if it raises."""
    hashes = np.concatenate([part.hashes for part in parts])
    row_bases, text_bases = _bases(list(map(len, parts))), _bases(text_sizes)

    def one(row: int) -> Embeddings:
        number = bisect_right(row_bases, row) - 1
        return parts[number].part(row - row_bases[number], row - row_bases[number] + 1)

    order = parts[0].order if len(parts) == 1 else None
    if order is None:
        order = sort_order(hashes, lambda row: one(row).raws()[0], lambda row: revision_of(one(row).rows[0]))
    kept = np.zeros(len(hashes), np.bool_)
    kept[order] = True
    spans: list[NDArray[np.uint64]] = []
    texts: list[Any] = []
    total, end = 0, _HEAD
    with _Writing(path) as file:
        for part, row_base, text_base, length in zip(parts, row_bases, text_bases, text_sizes, strict=True):
            left_out = []
            for start in range(0, len(part), _STEP):
                piece = part.part(start, start + _STEP)
                wanted = kept[row_base + start : row_base + start + len(piece)]
                wanted[wanted] = choose(piece if wanted.all() else piece.where(wanted))
                if not wanted.all():
                    left_out.append(piece.spans[~wanted])
                    piece = piece.where(wanted)
                end = file.put("values", end, piece.rows)
                total += checksum(checks(piece.rows))
                spans.append(piece.spans + np.uint64(text_base << 24))
            text = memoryview(part.text)[part.base : part.base + length]
            texts.append(_without(text, np.concatenate(left_out)) if left_out else text)
        m = sum(map(len, spans))
        if m < len(hashes):
            order = order[kept[order]]
            found = (np.cumsum(kept) - 1)[order]
        else:
            found = order
        places = _Places(m, m, sum(text_sizes), size, _shift(m))
        file.put_all("text", places.text, texts)
        file.put_all("spans", places.spans, spans)
        file.finish(places, file.put_index(places, [(hashes[order], found)]))
    return Written(m, total)


def merge_runs(path: Path, runs: Sequence[RunFile], size: int) -> None:
    """Write several runs as one. Values are copied in their order, but for those that another one hides: in their places zeros
    lie, as if they had been erased. Of all runs together nothing is in memory but the places of those."""
    row_bases, text_bases = _bases([len(run.rows) for run in runs]), _bases([run.text_size for run in runs])
    m, capacity = sum(len(run.rows) for run in runs), sum(map(len, runs))
    places = _Places(capacity, m, sum(run.text_size for run in runs), size, _shift(capacity))
    hidden: list[list[NDArray[np.int64]]] = [[] for _ in runs]

    def index() -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        bases = np.array(row_bases)
        for piece in merge(runs):
            for number in np.unique(piece.hidden[0]).tolist():
                hidden[number].append(piece.hidden[1][piece.hidden[0] == number])
            yield piece.hashes, bases[piece.numbers] + piece.places

    with _Writing(path) as file:
        n = file.put_index(places, index())
        lost = [np.sort(np.concatenate(each)) if each else np.empty(0, np.int64) for each in hidden]
        end = _HEAD
        for run, rows in zip(runs, lost, strict=True):
            for start in range(0, len(run.rows), _STEP):
                block = run.rows[start : start + _STEP]
                low, high = np.searchsorted(rows, (start, start + _STEP))
                if low < high:
                    block = block.copy()
                    block[rows[low:high] - start] = 0
                end = file.put("values", end, block)
        end = places.text
        for run, rows in zip(runs, lost, strict=True):
            text = memoryview(run.text)[run.base : run.base + run.text_size]
            end = file.put("text", end, _without(text, run.spans[rows]) if len(rows) else text)
        end = places.spans
        for run, rows, base in zip(runs, lost, text_bases, strict=True):
            spans = np.where(run.spans == np.uint64(ERASED), run.spans, run.spans + np.uint64(base << 24))
            spans[rows] = ERASED
            end = file.put("spans", end, spans)
        file.finish(places, n)


def open_run(path: Path, size: int) -> RunFile:
    """A file as a run of values of `size` bytes, mapped. `ValueError` if it is not whole."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size + 4)
        if len(head) < _HEADER.size + 4:
            raise ValueError(f"{path} was cut off")
        magic, n, capacity, m, text_size, found, shift, *crcs = _HEADER.unpack(head[:-4])
        if head[-4:] != struct.pack("<I", zlib.crc32(head[:-4])) or magic != _MAGIC or found != size or n > capacity:
            raise ValueError(f"the header of {path} is damaged")
        places = _Places(capacity, m, text_size, size, shift)
        if path.stat().st_size != places.end:
            raise ValueError(f"{path} has {path.stat().st_size} bytes in place of {places.end}")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def section(start: int, number: int, dtype: str) -> NDArray[Any]:
        return np.frombuffer(mapped, dtype, number, start)

    return RunFile(
        section(places.hashes, n, "<u8"),
        section(places.places, n, "<u4"),
        section(_HEAD, m * size, "u1").reshape(m, size),
        section(places.spans, m, "<u8"),
        mapped,
        places.text,
        section(places.directory, 2 ** (64 - shift) + 1, "<u4"),
        shift,
        text_size,
        tuple(crcs),
    )


def erase(path: Path, rows: Sequence[int]) -> None:
    """Overwrite embeddings, by their places; on the disk when this returns. Doing it again does no harm."""
    with path.open("r+b") as file:
        _, _, capacity, m, text_size, size, shift, *_ = _HEADER.unpack(file.read(_HEADER.size))
        places = _Places(capacity, m, text_size, size, shift)
        with mmap.mmap(file.fileno(), 0) as mapped:
            for row in sorted(row for row in rows if row < m):
                at = places.spans + 8 * row
                (span,) = struct.unpack_from("<Q", mapped, at)
                if span != ERASED:
                    start = places.text + (span >> 24)
                    mapped[start : start + (span & LONGEST_ID)] = bytes(span & LONGEST_ID)
                start = _HEAD + row * size
                mapped[start : start + size] = bytes(size)
                struct.pack_into("<Q", mapped, at, ERASED)
            mapped.flush()
        os.fsync(file.fileno())


def _bases(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes[:-1], initial=0))


def _shift(entries: int) -> int:
    return 64 - max(1, (entries // _PER_ENTRY).bit_length())


def _without(text: memoryview, spans: NDArray[np.uint64]) -> bytearray:
    """A text in which some ids are zeros."""
    left = bytearray(text)
    for span in spans.tolist():
        if span != ERASED:
            start, length = span >> 24, span & LONGEST_ID
            left[start : start + length] = bytes(length)
    return left


def _bytes(section: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(section).reshape(-1).view(np.uint8).data


def _crc_of(data: memoryview) -> int:
    crc = 0
    for start in range(0, len(data), _BLOCK):
        crc = zlib.crc32(data[start : start + _BLOCK], crc)
    return crc


def _count(counts: NDArray[np.int64], hashes: NDArray[np.uint64], shift: int) -> None:
    if len(hashes):
        buckets = (hashes >> np.uint64(shift)).astype(np.int64)
        found = np.bincount(buckets - buckets[0])
        counts[buckets[0] : buckets[0] + len(found)] += found


def _directory(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype("<u4")
