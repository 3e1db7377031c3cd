"""Who must not be stored: the tombstones of the embedded store, and the erasures that are under way.

Database `forgotten`: 16 bytes of the task type's hash and the task's identity → the id. Catalog: `forgotten` counts the changes, so
that whoever looked at the tombstones before can tell whether they are still the same; `erase/FILE` lists places in a run that nobody
may read any more, until they have been overwritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.store.batch import name_of, owners
from limaml.store.hashing import hashes_of
from limaml.store.runs import Embeddings

__all__ = ["Banned", "add", "changes", "erased", "forgotten_ids", "holds", "lift", "list_erasures", "to_erase"]

_CHANGES, _ERASE = b"forgotten", b"erase/"


class Banned:
    """The tombstones that one task type must respect, as they were at one moment."""

    def __init__(self, txn: Any, environment: Any, task_type: str) -> None:
        self.changes = changes(txn, environment)
        raws = [raw for owner in owners(task_type) for raw in forgotten_ids(txn, environment, owner)]
        self._raws = set(raws)
        self._hashes = np.unique(hashes_of(raws))

    def mask(self, embeddings: Embeddings) -> NDArray[np.bool_]:
        """Which of them are of forgotten tasks `[n]`."""
        found = np.zeros(len(embeddings), np.bool_)
        if self._raws:
            rows = np.flatnonzero(np.isin(embeddings.hashes, self._hashes))
            found[rows] = [raw in self._raws for raw in embeddings.raws(rows)]
        return found


def changes(txn: Any, environment: Any) -> int:
    return int(txn.get(_CHANGES, b"0", db=environment.catalog))


def holds(txn: Any, environment: Any, task_type: str, raws: Sequence[bytes]) -> list[bool]:
    """Which ids have a tombstone for a task type."""
    if not txn.stat(db=environment.forgotten)["entries"]:
        return [False] * len(raws)
    keys = list(map(_key, owners(task_type)))
    return [any(txn.get(name_of(key, raw), db=environment.forgotten) is not None for key in keys) for raw in raws]


def add(txn: Any, environment: Any, task_type: str, raws: Iterable[bytes]) -> int:
    key = _key(task_type)
    added: int = sum(txn.put(name_of(key, raw), raw, overwrite=False, db=environment.forgotten) for raw in raws)
    _changed(txn, environment)
    return added


def lift(txn: Any, environment: Any, task_type: str, raws: Iterable[bytes]) -> int:
    key = _key(task_type)
    lifted: int = sum(txn.delete(name_of(key, raw), db=environment.forgotten) for raw in raws)
    _changed(txn, environment)
    return lifted


def forgotten_ids(txn: Any, environment: Any, task_type: str) -> Iterator[bytes]:
    key = _key(task_type)
    with txn.cursor(environment.forgotten) as cursor:
        if cursor.set_range(key):
            for name, raw in cursor.iternext():
                if not name.startswith(key):
                    return
                yield raw


def to_erase(txn: Any, environment: Any, run: str, rows: Iterable[int]) -> None:
    key = _ERASE + run.encode()
    before = json.loads(txn.get(key, b"[]", db=environment.catalog))
    txn.put(key, json.dumps(sorted({*before, *rows})).encode(), db=environment.catalog)


def list_erasures(txn: Any, environment: Any) -> list[tuple[bytes, str, list[int]]]:
    """Document, run and rows of each erasure that is under way."""
    found = []
    with txn.cursor(environment.catalog) as cursor:
        if cursor.set_range(_ERASE):
            for key, raw in cursor.iternext():
                if not key.startswith(_ERASE):
                    break
                found.append((raw, key[len(_ERASE) :].decode(), json.loads(raw)))
    return found


def erased(txn: Any, environment: Any, done: Sequence[tuple[bytes, str, list[int]]]) -> None:
    """Take note that these were done, but for those to which something was added meanwhile."""
    for raw, run, _ in done:
        key = _ERASE + run.encode()
        if txn.get(key, db=environment.catalog) == raw:
            txn.delete(key, db=environment.catalog)


def _changed(txn: Any, environment: Any) -> None:
    txn.put(_CHANGES, b"%d" % (changes(txn, environment) + 1), db=environment.catalog)


def _key(task_type: str) -> bytes:
    return hashlib.blake2b(task_type.encode("utf-8", "surrogatepass"), digest_size=16).digest()
