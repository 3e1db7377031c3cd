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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, check_model, decode, names_of
from limaml.store.catalog import Record
from limaml.store.catalogued import CataloguedStore, Hold
from limaml.store.contract import Lookup, Size
from limaml.store.documents import Documents
from limaml.store.environment import DEFAULT_MAP_SIZE, Environment, acquire, release
from limaml.store.lease import Lease
from limaml.store.lmdb_values import estimate_bytes, key_prefix, remove_some, verify, walk, write, write_cold
from limaml.store.model_folders import ModelFolders
from limaml.store.packing import COLD
from limaml.store.publication import DEFAULT_BUFFER
from limaml.store.version import catalog_key, layouts_of, state_of

__all__ = ["LmdbStore"]

_REMOVED_PER_STEP = 20_000


class LmdbStore(CataloguedStore):
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
        self._catalog = Documents(self.environment)
        self._buffer_bytes = buffer_bytes
        self._layouts: dict[tuple[bytes, str], Layout] = {}
        self.folders: ModelFolders = ModelFolders(self.path / "models", lambda: self._lease("models"))
        try:
            self._catalog.check_layout()
        except BaseException:
            self.close()
            raise

    def get(self, model: str, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        environment = self.used()
        pointer = b"current/" + check_model(model).encode()

        def work(txn: Any) -> Lookup:
            version = txn.get(pointer, db=environment.catalog)
            if version is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            layout = self._layouts.get((version, task_type))
            if layout is None:
                if len(self._layouts) > 1000:
                    self._layouts.clear()
                layout = self._layouts[version, task_type] = self._layout(txn, model, version.decode(), task_type)
            return self._look(txn, layout, ids, fill)

        return environment.read(work)

    def look_up(self, layout: Layout, ids: Sequence[str], fill: bool) -> Lookup:
        def work(txn: Any) -> Lookup:
            self._still_there(txn, layout)
            return self._look(txn, layout, ids, fill)

        return self.used().read(work)

    def cold(self, layout: Layout) -> bytes | None:
        environment = self.used()

        def work(txn: Any) -> bytes | None:
            self._still_there(txn, layout)
            found: bytes | None = txn.get(layout.prefix + COLD, db=environment.values)
            return found

        return environment.read(work)

    def pieces(self, layout: Layout, limit: int) -> Iterator[list[tuple[bytes, bytes]]]:
        # a transaction for each piece: one that lasts as long as its caller likes would keep old pages from reuse
        environment = self.used()
        after: bytes | None = None
        while True:

            def work(txn: Any, after: bytes | None = after) -> list[tuple[bytes, bytes]]:
                self._still_there(txn, layout)
                return walk(txn, environment.values, layout, after, limit)

            pairs = environment.read(work)
            if not pairs:
                return
            yield pairs
            after = pairs[-1][0]

    def present(self, layout: Layout, names: Sequence[bytes]) -> list[bool]:
        environment = self.used()
        return environment.read(lambda txn: [txn.get(name, db=environment.values) is not None for name in names])

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

    def size(self) -> Size:
        keys, used, on_disk = self.used().usage()
        payload = sum(version.bytes for model in self.models() for version in self.versions(model))
        return Size(keys, payload, used, on_disk)

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

    def write_cold(self, model: str, version: str, layout: Layout, value: bytes) -> None:
        environment = self.used()

        def work(txn: Any) -> None:
            record = self._catalog.find(txn, model, version)
            totals = self._catalog.totals(txn, record)
            tally = write_cold(txn, environment.values, layout, value, totals.of(layout.task_type))
            self._catalog.save_totals(txn, record, totals.having(layout.task_type, tally))

        environment.write(work)

    def finish(self, record: Record, activate: bool, lease: Hold) -> int:
        environment, model, version = self.used(), record.model, record.id

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

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            release(self.environment)

    def used(self) -> Environment:
        """The environment, as long as the store is open."""
        if self._closed:
            raise StoreError(f"The store {self.path} is closed; open it again with open_store.")
        return self.environment

    # ------------------------------------------------------------------------------------------------------ pieces

    def _look(self, txn: Any, layout: Layout, ids: Sequence[str], fill: bool) -> Lookup:
        names = names_of(layout, ids)
        cold = txn.get(layout.prefix + COLD) if fill else None
        return decode(layout, names, list(map(txn.get, names)), cold, fill)

    def _lease(self, name: str) -> Lease:
        return Lease(self.path / "locks" / name)

    def _estimated(self, number: int, value: int) -> int:
        return estimate_bytes(number, 7 + 16, value)

    def _begun(self, record: Record) -> None:
        pass  # values need nothing before them

    def _delete_values(self, record: Record) -> None:
        environment, prefix = self.used(), key_prefix(record.number)
        while environment.write(lambda txn: remove_some(txn, environment.values, prefix, _REMOVED_PER_STEP)):
            pass

    def _drop_folder(self, digest: str) -> None:
        self.folders.remove(digest, lambda: digest not in self._artifacts())

    def _sweep_folders(self) -> list[str]:
        return self.folders.sweep(self._artifacts)

    def _still_there(self, txn: Any, layout: Layout) -> None:
        if txn.get(catalog_key("ready", layout.model, layout.version), db=self.used().catalog) is None:
            raise StoreError(f"Version {layout.version} of model '{layout.model}' was removed; open the current one.")
