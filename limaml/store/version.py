"""One version of a store: read while a lease keeps it, or written while a lease keeps others out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, check_model, cold_vector, owners
from limaml.store.catalog import Record
from limaml.store.contract import Lookup
from limaml.store.lmdb_values import key_prefix

if TYPE_CHECKING:
    from limaml.store.catalogued import CataloguedStore, Hold, Stored

__all__ = ["VersionReader", "VersionTarget", "catalog_key", "layouts_of", "state_of"]


def catalog_key(kind: str, model: str, version: str) -> bytes:
    return f"{kind}/{check_model(model)}/{version}".encode("utf-8", "surrogatepass")


def layouts_of(record: Record) -> dict[str, Layout]:
    return {
        task_type: Layout(
            record.model, record.id, task_type, dim, record.dtypes[task_type], key_prefix(record.number, place)
        )
        for place, (task_type, dim) in enumerate(record.dims.items())
    }


def state_of(record: Record) -> str:
    return {"writing": "still being written", "ready": "ready", "removing": "being removed"}[record.state]


class VersionReader:
    """The `Reader` of one version."""

    def __init__(self, store: CataloguedStore, record: Record, lease: Hold) -> None:
        self._store, self._record, self._lease = store, record, lease
        self._layouts = layouts_of(record)
        self._closed = False

    @property
    def model(self) -> str:
        return self._record.model

    @property
    def version(self) -> str:
        return self._record.id

    @property
    def dims(self) -> Mapping[str, int]:
        return self._record.dims

    def get(self, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        layout = self._layout(task_type)
        return self._store.look_up(layout, ids, fill)

    def cold(self, task_type: str) -> NDArray[np.float32] | None:
        layout = self._layout(task_type)
        value = self._store.cold(layout)
        return None if value is None else cold_vector(layout, value)

    def ids(self, task_type: str) -> Iterator[str]:
        layout = self._layout(task_type)
        for ids, _ in self._store.pieces(layout, 4096):
            yield from ids

    def scan(self, task_type: str, batch: int = 4096) -> Iterator[tuple[list[str], Lookup]]:
        layout = self._layout(task_type)
        if batch < 1:
            raise StoreError(f"A scan reads at least one embedding at a time, got batch={batch}.")
        yield from self._store.pieces(layout, batch)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _layout(self, task_type: str) -> Layout:
        if self._closed:
            raise StoreError(f"This reader of version {self.version} is closed; open another one.")
        found = self._layouts.get(task_type)
        if found is None:
            raise StoreError(
                f"Version {self.version} of model '{self.model}' has no task type {task_type!r}; it has "
                f"{', '.join(map(repr, self._layouts))}."
            )
        return found


class VersionTarget:
    """What a publication does to its version."""

    def __init__(self, store: CataloguedStore, record: Record, lease: Hold) -> None:
        self._store, self._record, self._lease = store, record, lease
        self.version = record.id
        self.layouts: Mapping[str, Layout] = layouts_of(record)

    @property
    def valid(self) -> bool:
        return self._lease.valid

    def write(self, layout: Layout, batches: Sequence[Batch]) -> Stored:
        return self._store.write_published(self._record, layout, batches)

    def write_cold(self, layout: Layout, value: bytes) -> None:
        self._store.write_cold(self._record.model, self.version, layout, value)

    def written(self, layout: Layout, ids: Sequence[str]) -> NDArray[np.bool_]:
        return self._store.present(layout, ids)

    def forgotten(self, task_type: str) -> set[str]:
        return {task_id for owner in owners(task_type) for task_id in self._store.forgotten(owner)}

    def verify(self) -> Mapping[str, int]:
        self._store.compact(self._record)
        return self._store.verify(self._record.model, self.version)

    def finish(self, activate: bool) -> int:
        return self._store.finish(self._record, activate, self._lease)

    def remove(self) -> None:
        self._store.remove_version(self._record)

    def release(self) -> None:
        self._lease.release()
