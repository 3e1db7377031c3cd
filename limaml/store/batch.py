"""What a caller hands to a store, checked and packed; and what a store found, decoded. The same for every backend."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.contract import Lookup
from limaml.store.packing import (
    COLD,
    DTYPES,
    MAX_COUNT,
    all_intact,
    first_damaged,
    hashed,
    identities,
    pack,
    seal,
    unpack,
    value_size,
)

__all__ = [
    "Batch",
    "Layout",
    "check_dims",
    "check_model",
    "cold_value",
    "damaged",
    "decode",
    "id_of",
    "merge",
    "names_of",
    "prepare",
    "readable",
    "table_of",
]

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Layout:
    """What one needs to read and write one task type of one version. It never changes."""

    model: str
    version: str
    task_type: str
    dim: int
    dtype: str
    prefix: bytes  # of the backend's keys

    @property
    def size(self) -> int:
        return value_size(self.dim, self.dtype)

    def where(self, task_id: str) -> str:
        return f"{self.task_type} {task_id!r} in version {self.version} of model '{self.model}'"


@dataclass(frozen=True)
class Batch:
    """Values ready to be stored: distinct identities, ascending. `stale` were superseded inside the batch."""

    layout: Layout
    names: list[bytes]
    values: list[bytes]
    checks: NDArray[np.uint32]
    count: NDArray[np.int64]
    event_time: NDArray[np.int64]
    stale: int = 0


def check_model(model: str) -> str:
    if not isinstance(model, str) or not _MODEL.fullmatch(model):
        raise StoreError(f"A model cannot be called {model!r}: use letters, digits, '.', '_' and '-', at most 100.")
    return model


def check_dims(dims: Mapping[str, int], dtype: str | Mapping[str, str]) -> dict[str, str]:
    """The dtype of each task type; `dtype` is one for all, or for those that are not float32."""
    dtypes = {name: dtype if isinstance(dtype, str) else dtype.get(name, "float32") for name in dims}
    for name in () if isinstance(dtype, str) else sorted(dtype.keys() - dims.keys()):
        raise StoreError(
            f"A dtype is given for task type {name!r}, which has no dimension; give it one, or leave it out."
        )
    for each in [*dtypes.values(), *([dtype] if isinstance(dtype, str) else [])]:
        if each not in DTYPES:
            raise StoreError(f"Embeddings cannot be stored as {each!r}; choose one of {', '.join(DTYPES)}.")
    if not dims:
        raise StoreError("A version needs at least one task type with its dimension, such as {'member': 32}.")
    for task_type, dim in dims.items():
        if not isinstance(task_type, str) or not task_type:
            raise StoreError(f"A task type must be a word, got {task_type!r}.")
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or not 1 <= dim < 2**16:
            raise StoreError(f"The dimension of task type '{task_type}' must be from 1 to 65535, got {dim!r}.")
    return dtypes


def prepare(
    layout: Layout,
    ids: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    count: NDArray[np.int64],
    event_time: NDArray[np.int64],
) -> Batch:
    """Check and pack a call's embeddings. Of repeated ids the highest revision stays (of equal ones the first)."""
    whose = f"task type '{layout.task_type}', version {layout.version} of model '{layout.model}'"
    array = np.asarray(vectors)
    n = len(ids)
    if array.ndim != 2 or array.shape != (n, layout.dim) or array.dtype.kind not in "fiu":
        raise StoreError(
            f"Embeddings of {whose} must be numbers of shape ({n}, {layout.dim}), one row for each of the {n} ids; got "
            f"shape {array.shape} of {array.dtype}."
        )
    counts, times = _whole(count, "count", n, whose), _whole(event_time, "event_time", n, whose)
    if n and (counts.min() < 0 or counts.max() > MAX_COUNT):
        row = int(np.argmax((counts < 0) | (counts > MAX_COUNT)))
        raise StoreError(f"The count of {layout.where(ids[row])} is {counts[row]}; it must be from 0 to {MAX_COUNT}.")
    names = names_of(layout, ids)
    packed = pack(array, counts, times, layout.dtype, ids, f"{layout.task_type} ")
    values, checks = seal(packed, ids, names, len(layout.prefix))
    return _ordered(Batch(layout, names, values, checks, counts, times))


def merge(batches: Sequence[Batch]) -> Batch:
    """Batches of one layout as one."""
    if len(batches) == 1:
        return batches[0]
    return _ordered(
        Batch(
            batches[0].layout,
            [name for batch in batches for name in batch.names],
            [value for batch in batches for value in batch.values],
            np.concatenate([batch.checks for batch in batches]),
            np.concatenate([batch.count for batch in batches]),
            np.concatenate([batch.event_time for batch in batches]),
            sum(batch.stale for batch in batches),
        )
    )


def _ordered(batch: Batch) -> Batch:
    names = batch.names
    if all(map(operator.lt, names, names[1:])):
        return batch
    rows = sorted(range(len(names)), key=names.__getitem__)
    count, times = batch.count, batch.event_time
    if any(names[one] == names[other] for one, other in pairwise(rows)):
        best: dict[bytes, int] = {}
        for row, name in enumerate(names):
            kept = best.setdefault(name, row)
            if (count[row], times[row]) > (count[kept], times[kept]):
                best[name] = row
        rows = sorted(best.values(), key=names.__getitem__)
    index = np.asarray(rows, np.int64)
    values = batch.values
    return Batch(
        batch.layout,
        [names[row] for row in rows],
        [values[row] for row in rows],
        batch.checks[index],
        count[index],
        times[index],
        batch.stale + len(names) - len(rows),
    )


def cold_value(layout: Layout, vector: NDArray[np.floating[Any]]) -> bytes:
    """The packed cold embedding, to be stored under `layout.prefix + COLD`."""
    array = np.asarray(vector)
    if array.shape != (layout.dim,) or array.dtype.kind not in "fiu":
        raise StoreError(
            f"The cold embedding of task type '{layout.task_type}' must be {layout.dim} numbers; got shape {array.shape} "
            f"of {array.dtype}."
        )
    none = np.zeros(1, np.int64)
    packed = pack(array[None], none, none, layout.dtype, ["(cold)"], f"{layout.task_type} ")
    return seal(packed, ["(cold)"], [layout.prefix + COLD], len(layout.prefix))[0][0]


def names_of(layout: Layout, ids: Sequence[str]) -> list[bytes]:
    """The keys of `ids`: the layout's prefix and each id's identity."""
    try:
        if isinstance(ids, (str, bytes)):
            raise TypeError
        return identities(ids, layout.prefix)
    except (AttributeError, TypeError):
        bad = [(row, each) for row, each in enumerate(ids) if not isinstance(each, str)]
        found = f"{bad[0][1]!r} at position {bad[0][0]}" if bad and not isinstance(ids, (str, bytes)) else repr(ids)
        raise StoreError(
            f"Ids of task type '{layout.task_type}' must be a list of strings, as they were published; got {found}."
        ) from None


def table_of(layout: Layout, names: Sequence[bytes], values: Sequence[bytes]) -> NDArray[np.uint8]:
    """Stored values as rows `[n, size]`, each checked against its key. Raises `StoreError` naming a damaged one."""
    size = layout.size
    joined = b"".join(values)
    if len(joined) != len(values) * size:
        start = len(layout.prefix)
        for name, value in zip(names, values, strict=True):
            tail = value[size:]
            if len(value) < size or (hashed(tail) if name[start] == 1 else name[start:]) != name[start:]:
                raise StoreError(damaged(layout, readable(layout, name)))
            if tail and name[start] != 1:
                raise StoreError(damaged(layout, readable(layout, name)))
        values = [value[:size] for value in values]
        joined = b"".join(values)
    if not all_intact(values, names):
        raise StoreError(damaged(layout, readable(layout, names[first_damaged(values, names)])))
    return np.frombuffer(joined, np.uint8).reshape(-1, size)


def decode(
    layout: Layout,
    names: Sequence[bytes],
    values: Sequence[bytes | None],
    cold: bytes | None = None,
    fill: bool = False,
) -> Lookup:
    """What a look-up found (`None`: not there) as arrays. Every value is checked; a damaged one raises `StoreError`."""
    n = len(names)
    if n and None not in values:
        table = table_of(layout, names, values)  # type: ignore[arg-type]
        return Lookup(layout.version, *_apart(layout, table, np.ones(n, np.bool_)))
    found = np.array([value is not None for value in values], np.bool_)
    lookup = Lookup(layout.version, np.zeros((n, layout.dim), np.float32), found, *np.zeros((2, n), np.int64))
    if found.any():
        here = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
        table = table_of(layout, [name for name, _ in here], [value for _, value in here])
        lookup.vectors[found], _, lookup.count[found], lookup.event_time[found] = _apart(layout, table, found)
    if fill and not found.all():
        lookup.vectors[~found] = _cold_vector(layout, cold)
    return lookup


def _apart(
    layout: Layout, table: NDArray[np.uint8], found: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    vectors, count, event_time = unpack(table, layout.dim, layout.dtype)
    return vectors, found, count, event_time


def _cold_vector(layout: Layout, cold: bytes | None) -> NDArray[np.float32]:
    if cold is None:
        raise StoreError(
            f"Version {layout.version} of model '{layout.model}' has no cold embedding for task type "
            f"'{layout.task_type}': unknown ids cannot be filled. Publish one with put_cold, or leave fill out."
        )
    vector: NDArray[np.float32] = decode(layout, [layout.prefix + COLD], [cold]).vectors[0]
    return vector


def damaged(layout: Layout, task_id: str) -> str:
    return (
        f"The stored embedding of {layout.where(task_id)} is damaged: it is not what was written. Roll back to another "
        "version, or publish this one again."
    )


def readable(layout: Layout, name: bytes) -> str:
    """The id behind a key, for a message."""
    own = name[len(layout.prefix) :]
    if own[:1] == b"\x00":
        return own[1:].decode("utf-8", "backslashreplace")
    return "(cold)" if own == COLD else f"(hashed id {own[1:].hex()})"


def id_of(layout: Layout, name: bytes, value: bytes) -> str:
    """The id behind a key and its value."""
    start = len(layout.prefix)
    raw = name[start + 1 :] if name[start] == 0 else value[layout.size :]
    return raw.decode("utf-8", "surrogatepass")


def _whole(numbers: NDArray[np.int64], what: str, n: int, whose: str) -> NDArray[np.int64]:
    array = np.asarray(numbers)
    if array.shape != (n,) or (n and array.dtype.kind not in "iu"):
        raise StoreError(
            f"The {what} of {whose} must be {n} whole numbers, one for each id; got shape {array.shape} of {array.dtype}."
        )
    if array.dtype == np.uint64 and n and array.max() > np.uint64(2**63 - 1):
        raise StoreError(f"The {what} of {whose} has {array.max()}, which is above the largest 64-bit integer.")
    return array.astype(np.int64)
