"""One task's embedding as bytes: a header, then the vector, in a form that any backend can keep and compare.

    offset  size  content
    0       1     format (2)
    1       1     dtype: 0 float32, 1 float16, 2 int8
    2       2     dimension
    4       4     count: interactions that the embedding was computed from
    8       8     event time of the newest of them
    16      4     scale of an int8 vector (float32), else 1
    20      …     the vector, filled with zeros so that the check ends at a multiple of 8 bytes
    …       4     check (`hashing`): of all before, of the task id, and of where the value lies
    …       …     the task id in UTF-8, where it was too long to be a key

All numbers are little-endian. Count and event time are the *revision*; they stand at a fixed place so that a store can
compare two values where it keeps them. `n` values are packed and unpacked together, as one `[n, size]` array of bytes.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.hashing import check_rows, hash_one, id_bytes

__all__ = [
    "COLD",
    "COLD_HASH",
    "DTYPES",
    "FORMAT",
    "HEADER",
    "LONGEST_PLAIN_ID",
    "MAX_COUNT",
    "checks",
    "checksum",
    "finite",
    "hashed",
    "identities",
    "identity",
    "intact",
    "newer",
    "pack",
    "revisions",
    "seal",
    "unpack",
    "unpack_one",
    "value_size",
]

DTYPES = ("float32", "float16", "int8")
HEADER = np.dtype(
    [("format", "u1"), ("dtype", "u1"), ("dim", "<u2"), ("count", "<u4"), ("event_time", "<i8"), ("scale", "<f4")]
)
MAX_COUNT = 2**32 - 1
LONGEST_PLAIN_ID = 400  # bytes; LMDB keys end at 511
COLD = b"\x02"
"""The identity of a task type's cold embedding. No id has it: ids start with byte 0 or 1."""
COLD_HASH = hash_one(b"cold embedding")
"""What its check has in place of an id's hash."""
FORMAT = 2
"""The first byte of every value; 0 stands where a value was erased."""

_CHECK = 4
_AT_ONCE = 2**17  # numbers that stay in a core's cache
_ONE = struct.Struct("<BBHIqf")
_STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int8": np.dtype("i1")}
# above it, float16 rounds to infinity
_LARGEST = {name: np.float32(65519.996 if name == "float16" else np.finfo(np.float32).max) for name in DTYPES}


def value_size(dim: int, dtype: str) -> int:
    """Bytes of one packed value: 24 and the vector, a multiple of 8."""
    return -(-(HEADER.itemsize + dim * _STORED[dtype].itemsize + _CHECK) // 8) * 8


def identity(task_id: str) -> bytes:
    """What stands for the id in a key: byte 0 and the id, or byte 1 and a 256-bit hash of an id that is too long."""
    raw = id_bytes(task_id)
    return b"\x00" + raw if len(raw) <= LONGEST_PLAIN_ID else hashed(raw)


def hashed(raw: bytes) -> bytes:
    """The identity of an id that is too long."""
    return b"\x01" + hashlib.blake2b(raw, digest_size=32).digest()


def identities(ids: Sequence[str], prefix: bytes = b"") -> list[bytes]:
    """`prefix + identity(id)` of each id."""
    plain = prefix + b"\x00"
    try:
        keys = [plain + task_id.encode() for task_id in ids]
    except UnicodeEncodeError:
        return [prefix + identity(task_id) for task_id in ids]
    if max(map(len, keys), default=0) > len(plain) + LONGEST_PLAIN_ID:
        return [prefix + identity(task_id) for task_id in ids]
    return keys


def pack(
    single: NDArray[np.float32], count: NDArray[np.int64], event_time: NDArray[np.int64], dtype: str
) -> NDArray[np.uint8]:
    """Pack `finite` vectors `[n, dim]` with their revisions `[n]` into bytes `[n, value_size(dim, dtype)]`, not yet sealed.

    float32 is exact, float16 is off by at most 2⁻¹¹ of the number (and 2⁻²⁵ near zero), int8 by at most half its scale,
    which is the vector's largest absolute number / 127.
    """
    n, dim = single.shape
    packed = np.empty((n, value_size(dim, dtype)), np.uint8)
    kind = _STORED[dtype]
    end = HEADER.itemsize + kind.itemsize * dim
    for start in range(0, n, step := max(1, _AT_ONCE // dim)):
        some = slice(start, start + step)
        part, rows = single[some].astype(np.float32, copy=False), packed[some]
        header = rows[:, : HEADER.itemsize].view(HEADER)[:, 0]
        header["format"], header["dtype"], header["dim"] = FORMAT, DTYPES.index(dtype), dim
        header["count"], header["event_time"], header["scale"] = count[some], event_time[some], 1.0
        if dtype == "int8":
            header["scale"] = scale = _scales(part)
            part = np.rint(part / np.where(scale > 0, scale, np.float32(1))[:, None])
        rows[:, HEADER.itemsize : end] = _narrowed(part, kind).view(np.uint8)
        rows[:, end:] = 0
    return packed


def unpack(
    packed: NDArray[np.uint8], dim: int, dtype: str
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Vectors `[n, dim]`, counts `[n]` and event times `[n]` of values `[n, value_size(dim, dtype)]`.

    Raises `StoreError` if a header does not say this dimension and dtype.
    """
    words = packed.view("<u4")
    if (words[:, 0] != FORMAT + (DTYPES.index(dtype) << 8) + (dim << 16)).any():
        raise StoreError(f"A stored value is damaged: its header is not that of {dim} numbers in {dtype}.")
    kind = _STORED[dtype]
    vectors = packed[:, HEADER.itemsize : HEADER.itemsize + kind.itemsize * dim].view(kind).astype(np.float32)
    if dtype == "int8":
        vectors *= words[:, 4].view("<f4")[:, None]
    return vectors, *revisions(packed)


def unpack_one(value: bytes, dim: int, dtype: str) -> tuple[NDArray[np.float32], int, int]:
    """The same of one value: its vector `[1, dim]`, count and event time."""
    form, code, found, count, event_time, scale = _ONE.unpack_from(value)
    if (form, code, found) != (FORMAT, DTYPES.index(dtype), dim):
        raise StoreError(f"A stored value is damaged: its header is not that of {dim} numbers in {dtype}.")
    vector = np.frombuffer(value, _STORED[dtype], dim, HEADER.itemsize).astype(np.float32).reshape(1, dim)
    if dtype == "int8":
        vector *= np.float32(scale)
    return vector, count, event_time


def revisions(packed: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts `[n]` and event times `[n]` of values, or of their first 16 bytes or more."""
    return packed[:, 4:8].view("<u4")[:, 0].astype(np.int64), packed[:, 8:16].view("<i8")[:, 0].astype(np.int64)


def seal(packed: NDArray[np.uint8], seeds: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The same values, each with its check: ready to be stored."""
    packed[:, -_CHECK:].view("<u4")[:, 0] = check_rows(packed, seeds)
    return packed


def intact(packed: NDArray[np.uint8], seeds: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each value `[n, size]` is what was stored under its key."""
    fine: NDArray[np.bool_] = check_rows(packed, seeds) == checks(packed)
    return fine


def checks(packed: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The check `[n]` that each value carries."""
    found: NDArray[np.uint32] = packed[:, -_CHECK:].view("<u4")[:, 0]
    return found


def checksum(found: NDArray[np.uint32]) -> int:
    """The sum of checks: a checksum of a set of values that does not depend on their order, and that a store can keep
    up by adding the new value's check and taking off the old one's."""
    return int(found.sum(dtype=np.uint64))


def newer(
    count: NDArray[np.int64], event_time: NDArray[np.int64], old_count: NDArray[np.int64], old_time: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Where a revision is above the stored one: more interactions, or as many and a newer last one."""
    above: NDArray[np.bool_] = (count > old_count) | ((count == old_count) & (event_time > old_time))
    return above


def finite(vectors: NDArray[Any], dtype: str, ids: Sequence[str], where: str = "") -> NDArray[np.float32]:
    """Vectors `[n, dim]` in single precision. Raises `StoreError` naming the id whose vector has a number that is not finite
    or does not fit into `dtype`; `ids` and `where` serve the message only."""
    with np.errstate(over="ignore", invalid="ignore"):
        single: NDArray[np.float32] = vectors.astype(np.float32, copy=False)
        largest = _LARGEST[dtype]
        step = max(1, 2**17 // max(1, single.shape[1]))  # in a core's cache
        if all((np.abs(single[start : start + step]) <= largest).all() for start in range(0, len(single), step)):
            return single
        kept = single.astype(np.float16) if dtype == "float16" else single
    fine = np.isfinite(kept).all(axis=1)
    if not fine.all():
        row = int(np.argmin(fine))
        column = int(np.argmin(np.isfinite(kept[row])))
        number = vectors[row, column]
        reason = f"does not fit into {dtype}" if np.isfinite(number) else "is not a finite number"
        others = int((~fine).sum()) - 1
        raise StoreError(
            f"The vector of {where}{ids[row]!r} (row {row}) has {number} at position {column}, which {reason}"
            f"{f'; {others} more rows are like it' if others else ''}. Nothing of this call was stored; look for "
            "the cause in training."
        )
    return single


def _narrowed(part: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    """`part.astype(kind)`. A process that has torch gets the same numbers from it several times as fast."""
    torch = sys.modules.get("torch")
    if torch is None or kind == part.dtype:
        return np.ascontiguousarray(part, kind)
    part, narrowed = np.require(part, requirements=["C", "W"]), np.empty(part.shape, kind)
    for some in _for_one_thread(part):
        torch.from_numpy(narrowed[some]).copy_(torch.from_numpy(part[some]))
    return narrowed


def _largest(part: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row the largest absolute number."""
    torch, part = sys.modules.get("torch"), np.abs(part)
    largest = np.empty(len(part), np.float32)
    if torch is None:  # of columns numpy finds it sooner than of rows
        return np.maximum.reduce(np.ascontiguousarray(part.T), axis=0, out=largest)
    for some in _for_one_thread(part):
        torch.amax(torch.from_numpy(part[some]), 1, out=torch.from_numpy(largest[some]))
    return largest


def _for_one_thread(part: NDArray[np.float32]) -> Iterator[slice]:
    """Pieces for which torch starts no threads: they would not live on in a process that forks."""
    step = max(1, 2**15 // part.shape[1])
    return (slice(start, start + step) for start in range(0, len(part), step))


def _scales(single: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = _largest(single)
    scale = (largest / np.float32(127)).astype(np.float32)
    with np.errstate(over="ignore"):
        # at both ends of the range of float32 the division rounds coarsely: 127 scales must reach the largest number,
        # and must not be infinite
        scale = np.where(scale * 127.0 < largest * (1 - 1e-6), np.nextafter(scale, np.float32(np.inf)), scale)
        bounded: NDArray[np.float32] = np.where(
            np.isinf(scale * np.float32(127)), np.nextafter(scale, np.float32(0)), scale
        )
    return bounded
