"""What a caller hands to a store, checked and packed; and what a store found, decoded. The same for every backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.contract import Lookup
from limaml.store.hashing import LONGEST_ID, Texts, hash_one, hashes_of, id_bytes
from limaml.store.packing import (
    COLD,
    COLD_HASH,
    DTYPES,
    LONGEST_PLAIN_ID,
    MAX_COUNT,
    finite,
    hashed,
    identities,
    intact,
    pack,
    seal,
    unpack,
    value_size,
)
from limaml.store.runs import Embeddings, LaterEmbeddings, revision_of, sort_order, spans_of

__all__ = [
    "Batch",
    "Layout",
    "check_dims",
    "check_model",
    "check_table",
    "check_values",
    "cold_rows",
    "cold_value",
    "cold_vector",
    "damaged",
    "decode",
    "decoded",
    "distinct",
    "merged",
    "name_of",
    "names_of",
    "owners",
    "prepare",
    "raw_of",
    "raws_of",
    "readable",
    "text_of",
    "texts_of",
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

    @cached_property
    def size(self) -> int:
        return value_size(self.dim, self.dtype)

    @cached_property
    def seed(self) -> int:
        """Part of the values' checks: a value of another version or task type is not taken for one of this."""
        return hash_one(self.prefix)

    def where(self, task_id: str) -> str:
        return f"{self.task_type} {task_id!r} in version {self.version} of model '{self.model}'"


@dataclass(frozen=True)
class Batch:
    """Values of distinct ids, ready to be stored. `stale` were superseded inside the batch."""

    layout: Layout
    embeddings: Embeddings
    text_size: int  # bytes of their ids
    stale: int = 0

    @property
    def nbytes(self) -> int:
        return len(self.embeddings) * (self.layout.size + 16) + self.text_size

    @cached_property
    def raws(self) -> list[bytes]:
        return [raw or b"" for raw in self.embeddings.raws()]

    @cached_property
    def names(self) -> list[bytes]:
        """Keys."""
        return [name_of(self.layout.prefix, raw) for raw in self.raws]

    @cached_property
    def values(self) -> list[bytes]:
        """Values as they lie under the keys: an id that was hashed stands behind its value."""
        rows = self.embeddings.rows
        values: list[bytes] = np.ascontiguousarray(rows).view(f"V{rows.shape[1]}")[:, 0].tolist()
        for row, raw in enumerate(self.raws):
            if len(raw) > LONGEST_PLAIN_ID:
                values[row] += raw
        return values


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
    later: bool = False,
) -> Batch:
    """Check and pack a call's embeddings. Of repeated ids the highest revision stays (of equal ones the first). With `later`
    values are packed when they are written: the arrays must stay as they are until then."""
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
    texts = texts_of(layout, ids)
    hashes, spans, raw = texts.hashes(), spans_of(texts), texts.raw
    order = sort_order(
        hashes,
        lambda row: raw[(at := int(texts.starts[row])) : at + int(texts.lengths[row])],
        lambda row: (int(counts[row]), int(times[row])),
    )
    single = finite(array, layout.dtype, ids, f"{layout.task_type} ")
    if len(order) < n:
        kept, order = np.sort(order), np.argsort(hashes[np.sort(order)])
        single, counts, times, hashes, spans = single[kept], counts[kept], times[kept], hashes[kept], spans[kept]

    def packed(start: int, stop: int) -> NDArray[np.uint8]:
        some = slice(start, stop)
        return seal(pack(single[some], counts[some], times[some], layout.dtype), hashes[some] + np.uint64(layout.seed))

    size, stale = len(raw) - 8, n - len(order)
    if later:
        none = np.empty((0, layout.size), np.uint8)
        return Batch(layout, LaterEmbeddings(hashes, none, spans, raw, order=order, pack=packed), size, stale)
    return Batch(layout, Embeddings(hashes, packed(0, len(order)), spans, raw, order=order), size, stale)


def merged(batches: Sequence[Batch]) -> Batch:
    """Batches of one layout as one, in memory."""
    if len(batches) == 1:
        return batches[0]
    layout, parts = batches[0].layout, [batch.embeddings for batch in batches]
    bases = np.cumsum([0, *(batch.text_size for batch in batches[:-1])]).tolist()
    whole = Embeddings(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.part(0, len(part)).rows for part in parts]),
        np.concatenate([part.spans + np.uint64(base << 24) for part, base in zip(parts, bases, strict=True)]),
        (text := b"".join(batch.embeddings.text[: batch.text_size] for batch in batches)) + bytes(8),
    )
    order = sort_order(whole.hashes, lambda row: whole.raws([row])[0], lambda row: revision_of(whole.rows[row]))
    stale = sum(batch.stale for batch in batches) + len(whole) - len(order)
    return Batch(layout, whole.where(np.sort(order)), len(text), stale)


def texts_of(layout: Layout, ids: Sequence[str]) -> Texts:
    try:
        if isinstance(ids, (str, bytes)):
            raise TypeError
        texts = Texts.of(ids)
    except (AttributeError, TypeError):
        raise _no_strings(layout, ids) from None
    if len(ids) and int(texts.lengths.max()) >= LONGEST_ID:
        raise StoreError(
            f"An id of task type '{layout.task_type}' has {texts.lengths.max()} bytes; 16 MB are too many."
        )
    return texts


def distinct(task_type: str, ids: Sequence[str]) -> list[bytes]:
    """Ids in UTF-8, each once."""
    texts_of(Layout("", "", task_type, 1, "float32", b""), ids)
    return sorted(set(map(id_bytes, ids)))


def cold_value(layout: Layout, vector: NDArray[np.floating[Any]]) -> bytes:
    """The packed cold embedding, to be stored under `layout.prefix + COLD`."""
    array = np.asarray(vector)
    if array.shape != (layout.dim,) or array.dtype.kind not in "fiu":
        raise StoreError(
            f"The cold embedding of task type '{layout.task_type}' must be {layout.dim} numbers; got shape {array.shape} "
            f"of {array.dtype}."
        )
    none = np.zeros(1, np.int64)
    single = finite(array[None], layout.dtype, ["(cold)"], f"{layout.task_type} ")
    return seal(pack(single, none, none, layout.dtype), _cold_seed(layout)).tobytes()


def cold_rows(layout: Layout, value: bytes) -> NDArray[np.uint8]:
    """The cold embedding as a row `[1, size]`, checked."""
    rows = np.frombuffer(value[: layout.size].ljust(layout.size, b"\0"), np.uint8).reshape(1, -1)
    if len(value) != layout.size or not intact(rows, _cold_seed(layout)).all():
        raise StoreError(damaged(layout, "(cold)"))
    return rows


def _cold_seed(layout: Layout) -> NDArray[np.uint64]:
    return np.array([(COLD_HASH + layout.seed) % 2**64], np.uint64)


def names_of(layout: Layout, ids: Sequence[str]) -> list[bytes]:
    """The keys of `ids`: the layout's prefix and each id's identity."""
    try:
        if isinstance(ids, (str, bytes)):
            raise TypeError
        return identities(ids, layout.prefix)
    except (AttributeError, TypeError):
        raise _no_strings(layout, ids) from None


def raws_of(layout: Layout, ids: Sequence[str]) -> list[bytes]:
    """Ids in UTF-8."""
    try:
        if isinstance(ids, (str, bytes)):
            raise TypeError
        return [task_id.encode() for task_id in ids]
    except UnicodeEncodeError:
        return list(map(id_bytes, ids))
    except (AttributeError, TypeError):
        raise _no_strings(layout, ids) from None


def _no_strings(layout: Layout, ids: Any) -> StoreError:
    bad = [(row, each) for row, each in enumerate(ids) if not isinstance(each, str)]
    found = f"{bad[0][1]!r} at position {bad[0][0]}" if bad and not isinstance(ids, (str, bytes)) else repr(ids)
    return StoreError(
        f"Ids of task type '{layout.task_type}' must be a list of strings, as they were published; got {found}."
    )


def name_of(prefix: bytes, raw: bytes) -> bytes:
    """The key of an id in UTF-8."""
    return prefix + b"\x00" + raw if len(raw) <= LONGEST_PLAIN_ID else prefix + hashed(raw)


def raw_of(layout: Layout, name: bytes, value: bytes) -> bytes:
    """The id in UTF-8 behind a key and its value."""
    start = len(layout.prefix)
    return name[start + 1 :] if name[start] == 0 else value[layout.size :]


def text_of(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def owners(task_type: str) -> list[str]:
    """The task types whose forgotten tasks it must not hold: itself, and `member` for `member.features`."""
    places = [place for place, letter in enumerate(task_type) if letter == "." and place]
    return [*(task_type[:place] for place in places), task_type]


def check_values(layout: Layout, names: Sequence[bytes], values: Sequence[bytes]) -> NDArray[np.uint8]:
    """Stored values as rows `[n, size]`, each checked against its key. Raises `StoreError` naming a damaged one."""
    size, start = layout.size, len(layout.prefix)
    joined = b"".join(values)
    raws = [name[start + 1 :] for name in names]
    if len(joined) != len(values) * size or any(name[start] for name in names):
        for row, (name, value) in enumerate(zip(names, values, strict=True)):
            tail = value[size:]
            if len(value) < size or (hashed(tail) if name[start] == 1 else name[start:]) != name[start:]:
                raise StoreError(damaged(layout, readable(layout, name)))
            if tail and name[start] != 1:
                raise StoreError(damaged(layout, readable(layout, name)))
            if tail:
                raws[row] = tail
        joined = b"".join(value[:size] for value in values)
    table = np.frombuffer(joined, np.uint8).reshape(-1, size)
    check_table(layout, table, hashes_of(raws), lambda row: readable(layout, names[row]))
    return table


def check_table(
    layout: Layout, table: NDArray[np.uint8], hashes: NDArray[np.uint64], name: Callable[[int], str]
) -> None:
    """Raises `StoreError`, with the `name` of a row, if one of the values `[n, size]` is not what was written."""
    fine = intact(table, hashes + np.uint64(layout.seed))
    if not fine.all():
        raise StoreError(damaged(layout, name(int(np.argmin(fine)))))


def decode(
    layout: Layout,
    names: Sequence[bytes],
    values: Sequence[bytes | None],
    cold: bytes | None = None,
    fill: bool = False,
) -> Lookup:
    """What a look-up found (`None`: not there) as arrays. Every value is checked; a damaged one raises `StoreError`."""
    here = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    table = check_values(layout, [name for name, _ in here], [value for _, value in here])
    found = np.array([value is not None for value in values], np.bool_)
    return decoded(layout, table, found, cold, fill)


def decoded(
    layout: Layout, table: NDArray[np.uint8], found: NDArray[np.bool_], cold: bytes | None = None, fill: bool = False
) -> Lookup:
    """Values `[k, size]` of those of `n` ids that were found `[n]`, as arrays."""
    vectors, count, event_time = unpack(table, layout.dim, layout.dtype)
    n = len(found)
    if len(table) == n:
        return Lookup(layout.version, vectors, found, count, event_time)
    lookup = Lookup(layout.version, np.zeros((n, layout.dim), np.float32), found, *np.zeros((2, n), np.int64))
    lookup.vectors[found], lookup.count[found], lookup.event_time[found] = vectors, count, event_time
    if fill:
        lookup.vectors[~found] = cold_vector(layout, cold)
    return lookup


def cold_vector(layout: Layout, cold: bytes | None) -> NDArray[np.float32]:
    if cold is None:
        raise StoreError(
            f"Version {layout.version} of model '{layout.model}' has no cold embedding for task type "
            f"'{layout.task_type}': unknown ids cannot be filled. Publish one with put_cold, or leave fill out."
        )
    vector: NDArray[np.float32] = unpack(cold_rows(layout, cold), layout.dim, layout.dtype)[0][0]
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


def _whole(numbers: NDArray[np.int64], what: str, n: int, whose: str) -> NDArray[np.int64]:
    array = np.asarray(numbers)
    if array.shape != (n,) or (n and array.dtype.kind not in "iu"):
        raise StoreError(
            f"The {what} of {whose} must be {n} whole numbers, one for each id; got shape {array.shape} of {array.dtype}."
        )
    if array.dtype == np.uint64 and n and array.max() > np.uint64(2**63 - 1):
        raise StoreError(f"The {what} of {whose} has {array.max()}, which is above the largest 64-bit integer.")
    return array.astype(np.int64, copy=False)
