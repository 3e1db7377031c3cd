"""What stores with a catalogue of documents have in common: versions, pointers, leases. Where values lie is a backend's.

Documents: `layout`; per model `current/M` and `pointers/M`; per version `record/M/V` (what is fixed), `totals/M/V` and,
while it may be read, `ready/M/V`.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, check_dims, check_model, prepare
from limaml.store.catalog import Record, load_record, now
from limaml.store.contract import Estimate, Expired, Forgotten, Lookup, Pointer, Size, Upserted, Version
from limaml.store.documents import Documents, Transactions
from limaml.store.hashing import id_bytes
from limaml.store.packing import value_size
from limaml.store.publication import DEFAULT_BUFFER, BufferedPublication
from limaml.store.version import VersionReader, VersionTarget, catalog_key, layouts_of, state_of

__all__ = ["CataloguedStore", "Folders", "Hold", "Stored"]


class Stored(NamedTuple):
    """How many embeddings a write stored, and which ids (in UTF-8) it left out, as they are forgotten."""

    applied: int
    forgotten: set[bytes]


class Hold(Protocol):
    """A lease, by whatever the backend holds it."""

    def take(self, *, exclusive: bool) -> bool: ...

    def release(self, *, remove: bool = False) -> None: ...

    @property
    def valid(self) -> bool: ...

    def note(self, text: str) -> None: ...

    def read_note(self) -> str: ...


class Folders(Protocol):
    """Where the model folders are."""

    def put(self, folder: str | Path) -> str: ...

    def is_kept(self, digest: str) -> bool: ...

    def path(self, digest: str) -> Path: ...


class CataloguedStore(ABC):
    """A `Store` but for the values. What takes `txn` works inside a transaction on the catalogue."""

    _catalog: Documents
    folders: Folders
    _buffer_bytes: int = DEFAULT_BUFFER

    # ------------------------------------------------------------------------------------- what a backend brings

    @abstractmethod
    def used(self) -> Transactions:
        """Where the documents are, as long as the store is open."""

    @abstractmethod
    def _lease(self, name: str) -> Hold: ...

    @abstractmethod
    def get(self, model: str, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup: ...

    @abstractmethod
    def look_up(self, layout: Layout, ids: Sequence[str], fill: bool) -> Lookup:
        """Embeddings from one version. `StoreError` once it is removed; so for `cold` and `pieces`."""

    @abstractmethod
    def cold(self, layout: Layout) -> bytes | None: ...

    @abstractmethod
    def pieces(self, layout: Layout, limit: int) -> Iterator[tuple[list[str], Lookup]]:
        """All embeddings of a task type, each once, up to `limit` at a time; not the cold embedding."""

    @abstractmethod
    def present(self, layout: Layout, ids: Sequence[str]) -> NDArray[np.bool_]: ...

    @abstractmethod
    def write_upserts(self, model: str, version: str, batch: Batch, watermark: int | None) -> Stored:
        """One step: what is above the stored revisions, and not forgotten, into a version that is written or ready."""

    @abstractmethod
    def write_published(self, record: Record, layout: Layout, batches: Sequence[Batch]) -> Stored:
        """The same of a publication, for batches of one task type."""

    def compact(self, record: Record) -> None:
        """Put a version that is whole now into the form in which it is read."""
        return

    @abstractmethod
    def write_cold(self, model: str, version: str, layout: Layout, value: bytes) -> None: ...

    @abstractmethod
    def verify(self, model: str, version: str | None = None) -> Mapping[str, int]: ...

    @abstractmethod
    def finish(self, record: Record, activate: bool, lease: Hold) -> int:
        """Make a verified version ready and, with `activate`, current: one step. Returns its bytes."""

    @abstractmethod
    def forget(self, task_type: str, ids: Sequence[str]) -> Forgotten: ...

    @abstractmethod
    def recall(self, task_type: str, ids: Sequence[str]) -> int: ...

    @abstractmethod
    def forgotten(self, task_type: str) -> list[str]: ...

    @abstractmethod
    def size(self) -> Size: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _estimated(self, number: int, value: int) -> int:
        """Bytes for so many embeddings of `value` bytes each."""

    @abstractmethod
    def _begun(self, record: Record, *, resumed: bool) -> None:
        """Prepare for values of a version whose record was just written, or is resumed."""

    @abstractmethod
    def _delete_values(self, record: Record) -> None: ...

    @abstractmethod
    def _drop_folder(self, digest: str) -> None:
        """Remove a model folder if no version names it."""

    @abstractmethod
    def _sweep_folders(self) -> list[str]: ...

    # ------------------------------------------------------------------------------------------------- reading

    def read(self, model: str, version: str | None = None) -> VersionReader:
        environment = self.used()
        for _ in range(100):
            chosen = version if version is not None else self.current(model)
            if chosen is None:
                raise StoreError(environment.read(lambda txn: self._catalog.nothing_served(txn, model)))
            record = self._record(model, chosen)
            lease = self._lease(f"read.{chosen}")
            if record.state == "ready" and lease.take(exclusive=False):
                if self._is_ready(record):
                    return VersionReader(self, record, lease)
                lease.release(remove=True)
            if version is not None:
                raise StoreError(f"Version {version} of model '{model}' is {state_of(record)}: it cannot be read.")
        raise StoreError(f"The current version of model '{model}' changes faster than it can be opened; try again.")

    def models(self) -> list[str]:
        records = self.used().read(lambda txn: self._catalog.records(txn, None))
        return sorted({record.model for record in records if record.state != "removing"})

    def versions(self, model: str) -> list[Version]:
        return self.used().read(
            lambda txn: [
                record.described(self._catalog.totals(txn, record))
                for record in self._catalog.records(txn, model)
                if record.state != "removing"
            ]
        )

    def describe(self, model: str, version: str | None = None) -> Version:
        environment = self.used()

        def work(txn: Any) -> Version:
            chosen = version or self._catalog.pointers(txn, model).current
            if chosen is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            record = self._catalog.find(txn, model, chosen)
            return record.described(self._catalog.totals(txn, record))

        return environment.read(work)

    def current(self, model: str) -> str | None:
        return self.used().read(lambda txn: self._catalog.pointers(txn, model).current)

    def history(self, model: str) -> list[Pointer]:
        return list(self.used().read(lambda txn: self._catalog.pointers(txn, model)).log)

    def estimate(
        self, counts: Mapping[str, int], dims: Mapping[str, int], dtype: str | Mapping[str, str] = "float32"
    ) -> Estimate:
        dtypes = check_dims(dims, dtype)
        unknown = sorted(counts.keys() - dims.keys())
        if unknown:
            raise StoreError(f"The dimension of task type {unknown[0]!r} is missing: give every counted type one.")
        each = [(number, value_size(dims[task_type], dtypes[task_type])) for task_type, number in counts.items()]
        return Estimate(sum(counts.values()), sum(self._estimated(*sizes) for sizes in each))

    # ------------------------------------------------------------------------------------------------- writing

    def publish(
        self,
        model: str,
        *,
        dims: Mapping[str, int],
        dtype: str | Mapping[str, str] = "float32",
        artifact: str | None = None,
        watermark: int | None = None,
        note: str = "",
        extra: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> BufferedPublication:
        environment = self.used()
        check_model(model)
        dtypes = check_dims(dims, dtype)
        try:
            json.dumps(dict(extra or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StoreError(f"The extra metadata of a version must be JSON: {error}.") from None
        lease = self._lease(f"publish.{model}")
        if not lease.take(exclusive=True):
            raise StoreError(
                f"Another publisher of model '{model}' is at work ({lease.read_note() or 'no details'}). Wait for it, or "
                "end its process; what it has written does no harm."
            )
        began = f"process {os.getpid()}, since {now()}"
        lease.note(began)
        try:
            same = (artifact, {name: int(dim) for name, dim in dims.items()}, dtypes)
            left = [
                record
                for record in environment.read(lambda txn: self._catalog.records(txn, model))
                if record.state != "ready"
            ]
            fits = [
                record
                for record in left
                if record.state == "writing" and (record.artifact, dict(record.dims), dict(record.dtypes)) == same
            ]
            resumed = fits[-1] if resume and fits else None
            record = resumed or environment.write(
                lambda txn: self._catalog.begin(txn, model, same, watermark, note, extra or {})
            )
            for other in left:  # now that a record names the model folder: their removal takes those that none names
                if other is not resumed:
                    self.remove_version(other)
            self._begun(record, resumed=resumed is not None)
            if artifact is not None and not self.folders.is_kept(artifact):
                self.remove_version(record)
                raise StoreError(
                    f"The store has no model folder {artifact!r}: call put_model first, and pass its digest."
                )
            lease.note(f"{began}, version {record.id}")
            return BufferedPublication(VersionTarget(self, record, lease), self._buffer_bytes)
        except BaseException:
            lease.release()
            raise

    def upsert(
        self,
        model: str,
        version: str,
        task_type: str,
        ids: Sequence[str],
        vectors: NDArray[np.floating[Any]],
        count: NDArray[np.int64],
        event_time: NDArray[np.int64],
        *,
        watermark: int | None = None,
    ) -> Upserted:
        layout = self.used().read(lambda txn: self._layout(txn, model, version, task_type))
        batch = prepare(layout, ids, vectors, count, event_time)
        done = self.write_upserts(model, version, batch, watermark)
        kept_out = sum(id_bytes(task_id) in done.forgotten for task_id in ids) if done.forgotten else 0
        return Upserted(done.applied, len(ids) - done.applied - kept_out, kept_out)

    def activate(self, model: str, version: str) -> None:
        def work(txn: Any) -> None:
            record = self._catalog.find(txn, model, version)
            if record.state != "ready":
                raise StoreError(f"Version {version} of model '{model}' is {state_of(record)}: it cannot be served.")
            self._catalog.point(txn, model, self._catalog.pointers(txn, model).flipped(version, "activate"))

        self.used().write(work)

    def rollback(self, model: str, to: str | None = None) -> str:
        def work(txn: Any) -> str:
            ready = [record.id for record in self._catalog.records(txn, model) if record.state == "ready"]
            pointers = self._catalog.pointers(txn, model).rolled_back(model, to, ready)
            self._catalog.point(txn, model, pointers)
            return pointers.stack[-1]

        return self.used().write(work)

    def expire(self, model: str, keep: int = 3) -> Expired:
        if keep < 1:
            raise StoreError(f"At least one version must be kept, got keep={keep}.")
        environment = self.used()
        ready = [r for r in environment.read(lambda txn: self._catalog.records(txn, model)) if r.state == "ready"]
        removed, held = [], []
        for record in ready[:-keep]:
            lease = self._lease(f"read.{record.id}")
            if record.id == self.current(model):
                continue
            if not lease.take(exclusive=True):
                held.append(record.id)
                continue
            gone = False
            try:
                gone = self.remove_version(record)
            finally:
                lease.release(remove=gone)
            if gone:
                removed.append(record.id)
        return Expired(tuple(removed), tuple(held))

    def gc(self) -> list[str]:
        environment = self.used()
        removed = []
        for record in environment.read(lambda txn: self._catalog.records(txn, None)):
            if record.state == "ready":
                continue
            lease = self._lease(f"publish.{record.model}")
            if lease.take(exclusive=True):
                try:
                    if self.remove_version(record):
                        removed.append(f"version {record.id} of model '{record.model}'")
                finally:
                    lease.release()
        return removed + [f"model folder {digest}" for digest in self._sweep_folders()]

    def put_model(self, folder: str | Path) -> str:
        self.used()
        return self.folders.put(folder)

    def model_path(self, digest: str) -> Path:
        self.used()
        return self.folders.path(digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- removing

    def remove_version(self, record: Record) -> bool:
        """Take a version out of sight, delete it piece by piece, forget it. False if it became current, or ready, meanwhile."""
        environment = self.used()

        def hide(txn: Any) -> bool:
            if self._catalog.pointers(txn, record.model).current == record.id:
                return False
            raw = txn.get(catalog_key("record", record.model, record.id), db=environment.catalog)
            if raw is not None:
                if record.state != "ready" and load_record(raw).state == "ready":
                    return False  # committed since it was looked at
                self._catalog.save(txn, replace(record, state="removing"))
                txn.delete(catalog_key("ready", record.model, record.id), db=environment.catalog)
            return True

        def forget(txn: Any) -> None:
            for kind in ("record", "totals"):
                txn.delete(catalog_key(kind, record.model, record.id), db=environment.catalog)

        if not environment.write(hide):
            return False
        self._delete_values(record)
        environment.write(forget)
        if record.artifact is not None:
            self._drop_folder(record.artifact)
        return True

    def _artifacts(self) -> set[str | None]:
        records = self.used().read(lambda txn: self._catalog.records(txn, None))
        return {record.artifact for record in records}

    def _layout(self, txn: Any, model: str, version: str, task_type: str) -> Layout:
        found = layouts_of(self._catalog.find(txn, model, version))
        if task_type not in found:
            raise StoreError(
                f"Version {version} of model '{model}' has no task type {task_type!r}; it has "
                f"{', '.join(map(repr, found))}."
            )
        return found[task_type]

    def _record(self, model: str, version: str) -> Record:
        return self.used().read(lambda txn: self._catalog.find(txn, model, version))

    def _is_ready(self, record: Record) -> bool:
        environment, key = self.used(), catalog_key("ready", record.model, record.id)
        return environment.read(lambda txn: txn.get(key, db=environment.catalog) is not None)
