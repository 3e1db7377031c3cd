"""The windows of tasks of whose rows all are there, made at once: what `window_value.extended` makes of none, task by task."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.embeddings.window_value import HEAD, INDEX
from limaml.interactions.packed_rows import RowCodec

__all__ = ["built", "first_of_equals"]

Longs = NDArray[np.int64]


def first_of_equals(rows: pl.DataFrame, times: Longs, buckets: Longs, codes: Longs, codec: RowCodec) -> Longs:
    """Positions of the rows by task (`codes`), time and bucket, then as they stand; of equal rows only the first.

    All arrays are `[rows]`. Rows that are equal have one task, time and bucket.
    """
    order = np.lexsort((buckets, times, codes))
    tied = np.zeros(len(order), bool)
    tied[1:] = True
    for values in (codes, times, buckets):
        tied[1:] &= values[order[1:]] == values[order[:-1]]
    group = np.cumsum(~tied)
    involved = tied.copy()
    involved[:-1] |= tied[1:]
    places = np.flatnonzero(involved)
    if not len(places):
        return order
    seen, gone = set[tuple[int, bytes]](), list[int]()
    equals = zip(group[places].tolist(), codec.pack(rows[order[places]]), strict=True)
    for place, equal in zip(places.tolist(), equals, strict=True):
        if equal in seen:
            gone.append(place)
        seen.add(equal)
    return np.delete(order, gone)


def built(
    rows: pl.DataFrame,
    order: Longs,
    times: Longs,
    buckets: Longs,
    codes: Longs,
    appends: Longs,
    codec: RowCodec,
    keep: int | None,
) -> list[bytes]:
    """A window for each task 0 … of `codes`, as `first_of_equals` has put their rows in order; every task has one."""
    owner = codes[order]
    count = np.bincount(owner)
    end = np.cumsum(count)
    changed = np.maximum.reduceat(appends[order], end - count)
    held = count if keep is None else np.minimum(count, keep)
    order = order[end[owner] - np.arange(len(order)) <= held[owner]]
    packed, size = codec.pack_joined(rows[order])
    head, index = np.zeros(len(count), HEAD), np.zeros(len(order), INDEX)
    head["count"], head["changed"], head["rows"] = count, changed, held
    index["time"], index["bucket"], index["size"] = times[order], buckets[order], size
    heads, indexes = head.tobytes(), index.tobytes()
    ends = np.cumsum(held)
    bytes_before = np.concatenate([[0], np.cumsum(size)])
    spans = zip(
        range(0, len(heads), HEAD.itemsize),
        ((ends - held) * INDEX.itemsize).tolist(),
        (ends * INDEX.itemsize).tolist(),
        bytes_before[ends - held].tolist(),
        bytes_before[ends].tolist(),
        strict=True,
    )
    return [heads[h : h + HEAD.itemsize] + indexes[a:b] + packed[c:d] for h, a, b, c, d in spans]
