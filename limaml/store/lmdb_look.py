"""Embeddings out of an LMDB environment and the sorted files beside it: what was upserted, over what was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limaml.errors import StoreError
from limaml.store.batch import Layout, check_table, damaged, decoded, name_of, raws_of, text_of
from limaml.store.contract import Lookup
from limaml.store.hashing import check_one, hash_one, hashes_of
from limaml.store.lmdb_values import held, value_row
from limaml.store.packing import COLD, LONGEST_PLAIN_ID, unpack_one
from limaml.store.run_files import RunFile
from limaml.store.upsert_marks import marked

__all__ = ["View", "look"]


@dataclass(frozen=True)
class View:
    """What reading one task type of one version needs."""

    layout: Layout
    runs: tuple[RunFile, ...]


def look(txn: Any, view: View, ids: Sequence[str], fill: bool) -> Lookup:
    """The embeddings of `ids` in one transaction; with `fill`, the cold one where there is none."""
    layout, runs = view.layout, view.runs
    raws, n = raws_of(layout, ids), len(ids)
    if n == 1 and (one := _look_for_one(txn, view, raws[0])) is not None:
        return one
    hashes = hashes_of(raws)
    cold = txn.get(layout.prefix + COLD) if fill else None
    if not runs:
        table, found = held(layout, raws, hashes, _upserts_of(txn, layout, raws), runs)
        table = table[found]
    else:
        places = runs[0].find(raws, hashes)
        found = places >= 0
        some = marked(txn, layout, hashes).tolist()
        upserted = _upserts_of(txn, layout, [raws[row] for row in some])
        if upserted.count(None) < len(upserted):
            table = runs[0].rows[places] if len(runs[0].rows) else np.zeros((n, layout.size), np.uint8)
            for row, value in zip(some, upserted, strict=True):
                if value is not None:
                    table[row], found[row] = value_row(layout, raws[row], value), True
            table = table if found.all() else table[found]
        else:
            table = runs[0].rows[places if found.all() else places[found]]
    check_table(
        layout, table, hashes if len(table) == n else hashes[found], lambda row: ids[int(np.flatnonzero(found)[row])]
    )
    return decoded(layout, table, found, cold, fill)


def _upserts_of(txn: Any, layout: Layout, raws: list[bytes]) -> list[bytes | None]:
    plain = layout.prefix + b"\x00"
    if max(map(len, raws), default=0) <= LONGEST_PLAIN_ID:
        return [txn.get(plain + raw) for raw in raws]
    return [txn.get(name_of(layout.prefix, raw)) for raw in raws]


def _look_for_one(txn: Any, view: View, raw: bytes) -> Lookup | None:
    """A look-up of a single id, which is what an online model asks for, without steps over arrays; `None` if it is not there."""
    layout = view.layout
    h, value = hash_one(raw), txn.get(name_of(layout.prefix, raw))
    if value is not None:
        if len(value) != layout.size:  # an id that was hashed, or damage
            return None
    elif view.runs and (place := view.runs[0].find_one(raw, h)) >= 0:
        value = view.runs[0].rows[place].tobytes()
    else:
        return None
    if check_one(value, h + layout.seed) != int.from_bytes(value[-4:], "little"):
        raise StoreError(damaged(layout, text_of(raw)))
    vectors, count, event_time = unpack_one(value, layout.dim, layout.dtype)
    return Lookup(layout.version, vectors, np.array((True,)), np.array((count,)), np.array((event_time,)))
