"""The embedded store: an LMDB environment in a folder, with lock files and copies of model folders beside it.

    store/
      data.mdb  lock.mdb         two databases: `catalog` (JSON documents) and `embeddings`
      locks/                     publish.MODEL and read.VERSION: held by living processes
      models/DIGEST/             model folders

Catalog keys: `layout`; per model `current/M` and `pointers/M`; per version `record/M/V` (what is fixed), `totals/M/V`
(counts, checksums, watermark) and, while it may be read, `ready/M/V`. A write transaction that stores embeddings brings
the totals up to date too, so that at any moment a version can be read back and compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, check_dims, check_model, decode, names_of, prepare
from limaml.store.catalog import (
    Record,
    now,
)
from limaml.store.contract import Estimate, Expired, Lookup, Pointer, Size, Upserted, Version
from limaml.store.environment import DEFAULT_MAP_SIZE, Environment, acquire, release
from limaml.store.lease import Lease
from limaml.store.lmdb_catalog import LmdbCatalog
from limaml.store.lmdb_values import estimate_bytes, key_prefix, remove_some, verify, write, write_cold
from limaml.store.lmdb_version import LmdbReader, LmdbTarget, catalog_key, layouts_of, state_of
from limaml.store.model_folders import ModelFolders
from limaml.store.packing import COLD, value_size
from limaml.store.publication import DEFAULT_BUFFER, BufferedPublication

__all__ = ["LmdbStore"]

_REMOVED_PER_STEP = 20_000


class LmdbStore:
    """A `Store` in the folder `path`. Safe for several threads and processes, also on both sides of a fork."""

    def __init__(
        self,
        path: str | Path,
        *,
        create: bool = True,
        map_size: int = DEFAULT_MAP_SIZE,
        buffer_bytes: int = DEFAULT_BUFFER,
    ) -> None:
        self.path = Path(path).resolve()
        self._closed = True
        if not (self.path / "data.mdb").is_file():
            if not create:
                raise StoreError(f"There is no store at {self.path}; publish to it first, or correct the path.")
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise StoreError(f"{self.path} exists and is not a store; choose a new or an empty folder.")
            self.path.mkdir(parents=True, exist_ok=True)
        self.environment = acquire(self.path, map_size)
        self._closed = False
        self._catalog = LmdbCatalog(self.environment)
        self._buffer_bytes = buffer_bytes
        self._layouts: dict[tuple[bytes, str], Layout] = {}
        self.folders = ModelFolders(self.path / "models", lambda: self._lease("models"))
        try:
            self._catalog.check_layout()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------- reading

    def get(self, model: str, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        environment = self.used()
        pointer = b"current/" + check_model(model).encode()

        def work(txn: Any) -> Lookup:
            version = txn.get(pointer, db=environment.catalog)
            if version is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            layout = self._layouts.get((version, task_type)) or self._layout(txn, model, version.decode(), task_type)
            return self.look(txn, layout, ids, fill)

        return environment.read(work)

    def read(self, model: str, version: str | None = None) -> LmdbReader:
        environment = self.used()
        for _ in range(100):
            chosen = version if version is not None else self.current(model)
            if chosen is None:
                raise StoreError(environment.read(lambda txn: self._catalog.nothing_served(txn, model)))
            record = self._record(model, chosen)
            lease = self._lease(f"read.{chosen}")
            if record.state == "ready" and lease.take(exclusive=False):
                if self._is_ready(record):
                    return LmdbReader(self, record, lease)
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

    def verify(self, model: str, version: str | None = None) -> Mapping[str, int]:
        environment = self.used()

        def work(txn: Any) -> dict[str, int]:
            chosen = version or self._catalog.pointers(txn, model).current
            if chosen is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            record = self._catalog.find(txn, model, chosen)
            totals = self._catalog.totals(txn, record)
            return {
                layout.task_type: verify(txn, environment.values, layout, totals.of(layout.task_type))
                for layout in layouts_of(record).values()
            }

        return environment.read(work)

    def estimate(
        self, counts: Mapping[str, int], dims: Mapping[str, int], dtype: str | Mapping[str, str] = "float32"
    ) -> Estimate:
        dtypes = check_dims(dims, dtype)
        unknown = sorted(counts.keys() - dims.keys())
        if unknown:
            raise StoreError(f"The dimension of task type {unknown[0]!r} is missing: give every counted type one.")
        each = [
            (number, 7 + 16, value_size(dims[task_type], dtypes[task_type])) for task_type, number in counts.items()
        ]
        return Estimate(sum(counts.values()), sum(estimate_bytes(*sizes) for sizes in each))

    def size(self) -> Size:
        keys, used, on_disk = self.used().usage()
        payload = sum(version.bytes for model in self.models() for version in self.versions(model))
        return Size(keys, payload, used, on_disk)

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
            resumed = None
            for record in reversed(left):
                fits = (record.artifact, dict(record.dims), dict(record.dtypes)) == same
                if resume and resumed is None and record.state == "writing" and fits:
                    resumed = record
                else:
                    self.remove_version(record)
            record = resumed or environment.write(
                lambda txn: self._catalog.begin(txn, model, same, watermark, note, extra or {})
            )
            if artifact is not None and not self.folders.is_kept(artifact):
                self.remove_version(record)
                raise StoreError(
                    f"The store has no model folder {artifact!r}: call put_model first, and pass its digest."
                )
            lease.note(f"{began}, version {record.id}")
            return BufferedPublication(LmdbTarget(self, record, lease), self._buffer_bytes)
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
        applied = self.write_batches(model, version, [batch], ("writing", "ready"), watermark)
        return Upserted(applied, len(ids) - applied)

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
        swept = self.folders.sweep(self._artifacts)
        return removed + [f"model folder {digest}" for digest in swept]

    def put_model(self, folder: str | Path) -> str:
        self.used()
        return self.folders.put(folder)

    def model_path(self, digest: str) -> Path:
        self.used()
        return self.folders.path(digest)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            release(self.environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------- steps inside a transaction

    def look(self, txn: Any, layout: Layout, ids: Sequence[str], fill: bool) -> Lookup:
        names = names_of(layout, ids)
        cold = txn.get(layout.prefix + COLD) if fill else None
        return decode(layout, names, list(map(txn.get, names)), cold, fill)

    def write_batches(
        self, model: str, version: str, batches: Sequence[Batch], states: Sequence[str], watermark: int | None = None
    ) -> int:
        environment = self.used()

        def work(txn: Any) -> int:
            record = self._catalog.find(txn, model, version)
            if record.state not in states:
                raise StoreError(
                    f"Version {version} of model '{model}' is {state_of(record)}: it cannot be written to."
                )
            totals = self._catalog.totals(txn, record).seen(watermark)
            applied = 0
            for batch in batches:
                task_type = batch.layout.task_type
                tally, stored = write(txn, environment.values, batch, totals.of(task_type))
                totals, applied = totals.having(task_type, tally), applied + stored
            self._catalog.save_totals(txn, record, totals)
            return applied

        return environment.write(work)

    def remove_version(self, record: Record) -> bool:
        """Take a version out of sight, delete it piece by piece, forget it. False if it became current meanwhile."""
        environment = self.used()

        def hide(txn: Any) -> bool:
            if self._catalog.pointers(txn, record.model).current == record.id:
                return False
            if txn.get(catalog_key("record", record.model, record.id), db=environment.catalog) is not None:
                self._catalog.save(txn, replace(record, state="removing"))
                txn.delete(catalog_key("ready", record.model, record.id), db=environment.catalog)
            return True

        def forget(txn: Any) -> None:
            for kind in ("record", "totals"):
                txn.delete(catalog_key(kind, record.model, record.id), db=environment.catalog)

        if not environment.write(hide):
            return False
        prefix = key_prefix(record.number)
        while environment.write(lambda txn: remove_some(txn, environment.values, prefix, _REMOVED_PER_STEP)):
            pass
        environment.write(forget)
        if record.artifact is not None:
            self.folders.remove(record.artifact, lambda: record.artifact not in self._artifacts())
        return True

    def write_cold(self, model: str, version: str, layout: Layout, value: bytes) -> None:
        environment = self.used()

        def work(txn: Any) -> None:
            record = self._catalog.find(txn, model, version)
            totals = self._catalog.totals(txn, record)
            tally = write_cold(txn, environment.values, layout, value, totals.of(layout.task_type))
            self._catalog.save_totals(txn, record, totals.having(layout.task_type, tally))

        environment.write(work)

    def finish(self, model: str, version: str, activate: bool) -> int:
        """Make a verified version ready and, with `activate`, current: one transaction. Returns its bytes."""
        environment = self.used()

        def work(txn: Any) -> int:
            record = self._catalog.find(txn, model, version)
            if record.artifact is not None and not self.folders.has(record.artifact):
                raise StoreError(f"The model folder {record.artifact} of version {version} was removed; put it again.")
            self._catalog.save(txn, replace(record, state="ready"))
            txn.put(catalog_key("ready", model, version), b"1", db=environment.catalog)
            if activate:
                self._catalog.point(txn, model, self._catalog.pointers(txn, model).flipped(version, "publish"))
            return record.described(self._catalog.totals(txn, record)).bytes

        return environment.write(work)

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
        if len(self._layouts) > 1000:
            self._layouts.clear()
        self._layouts[version.encode(), task_type] = found[task_type]
        return found[task_type]

    def _record(self, model: str, version: str) -> Record:
        return self.used().read(lambda txn: self._catalog.find(txn, model, version))

    def _is_ready(self, record: Record) -> bool:
        environment, key = self.used(), catalog_key("ready", record.model, record.id)
        return environment.read(lambda txn: txn.get(key, db=environment.catalog) is not None)

    def _lease(self, name: str) -> Lease:
        return Lease(self.path / "locks" / name)

    def used(self) -> Environment:
        """The environment, as long as the store is open."""
        if self._closed:
            raise StoreError(f"The store {self.path} is closed; open it again with open_store.")
        return self.environment
