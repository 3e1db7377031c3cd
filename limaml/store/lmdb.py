"""The embedded store: an LMDB environment in a folder, with files of embeddings, lock files and model folders beside it.

    store/
      data.mdb  lock.mdb         databases `catalog` (JSON documents), `embeddings` (`lmdb_values`) and `forgotten` (`tombstones`)
      runs/                      what was published, in sorted files (`run_files`)
      locks/                     publish.MODEL and read.VERSION: held by living processes
      models/DIGEST/             model folders

Catalog keys: `layout`; per model `current/M` and `pointers/M`; per version `record/M/V` (what is fixed), `totals/M/V`
(counts, checksums, files, watermark) and, while it may be read, `ready/M/V`. A file counts from the transaction on that names it
in the totals. A transaction that stores embeddings brings the totals up to date too, so that at any moment a version can be read
back and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store import tombstones
from limaml.store.batch import (
    Batch,
    Layout,
    check_model,
    decode,
    distinct,
    names_of,
    owners,
    text_of,
)
from limaml.store.catalog import Record
from limaml.store.catalogued import CataloguedStore, Hold, Stored
from limaml.store.contract import Forgotten, Lookup, Size
from limaml.store.documents import Documents
from limaml.store.environment import DEFAULT_MAP_SIZE, Environment, acquire, release
from limaml.store.hashing import hashes_of, id_bytes
from limaml.store.lease import Lease
from limaml.store.lmdb_look import View, look
from limaml.store.lmdb_publish import compact, write_published
from limaml.store.lmdb_values import (
    Change,
    held,
    key_prefix,
    remove_some,
    upsert,
    verify,
    walk,
    write_cold,
)
from limaml.store.model_folders import ModelFolders
from limaml.store.packing import COLD, checks, checksum
from limaml.store.run_files import RunFile
from limaml.store.run_folder import RunFolder
from limaml.store.runs import ids_at
from limaml.store.version import catalog_key, layouts_of, state_of

__all__ = ["LmdbStore"]

_T = TypeVar("_T")
_LAYOUT = 3
_REMOVED_PER_STEP = 20_000
_BUFFER = 256 * 2**20
"""Bytes of a publication that are gathered: what fits is one file; what does not is merged into one at the end."""


class LmdbStore(CataloguedStore):
    """A `Store` in the folder `path`. Safe for several threads and processes, also on both sides of a fork."""

    def __init__(
        self,
        path: str | Path,
        *,
        create: bool = True,
        map_size: int = DEFAULT_MAP_SIZE,
        buffer_bytes: int = _BUFFER,
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
        self._catalog = Documents(self.environment, _LAYOUT)
        self._buffer_bytes = buffer_bytes
        self._views: dict[tuple[str, str], View] = {}
        self.runs = RunFolder(self.path / "runs")
        self.folders: ModelFolders = ModelFolders(self.path / "models", lambda: self._lease("models"))
        try:
            self._catalog.check_layout()
            self._finish_erasing()
        except BaseException:
            self.close()
            raise

    def get(self, model: str, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        environment = self.used()
        pointer = b"current/" + check_model(model).encode()

        def work(txn: Any) -> Lookup:
            raw = txn.get(pointer, db=environment.catalog)
            if raw is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            version = raw.decode()
            view = self._views.get((version, task_type))
            if view is None:
                view = self._view(txn, self._layout(txn, model, version, task_type))
            return look(txn, view, ids, fill)

        return self._reading(work)

    def look_up(self, layout: Layout, ids: Sequence[str], fill: bool) -> Lookup:
        def work(txn: Any) -> Lookup:
            self._still_there(txn, layout)
            return look(txn, self._view(txn, layout), ids, fill)

        return self._reading(work)

    def cold(self, layout: Layout) -> bytes | None:
        environment = self.used()

        def work(txn: Any) -> bytes | None:
            self._still_there(txn, layout)
            found: bytes | None = txn.get(layout.prefix + COLD, db=environment.values)
            return found

        return environment.read(work)

    def pieces(self, layout: Layout, limit: int) -> Iterator[tuple[list[str], Lookup]]:
        # a transaction for each piece: one that lasts as long as its caller likes would keep old pages from reuse
        environment = self.used()

        def begin(txn: Any) -> View:
            self._still_there(txn, layout)
            return self._view(txn, layout)

        view = self._reading(begin)
        for run in view.runs:  # a version that is ready has one file, or none
            for start in range(0, len(run.rows), limit):
                raws = [raw for raw in ids_at(run.text, run.base, run.spans[start : start + limit]) if raw is not None]
                yield from self._reading(lambda txn, raws=raws: self._known(txn, view, raws))  # type: ignore[misc]
        after: bytes | None = None
        while True:

            def work(txn: Any, after: bytes | None = after) -> list[tuple[bytes, bytes]]:
                self._still_there(txn, layout)
                return walk(txn, environment.values, layout, after, limit)

            pairs = environment.read(work)
            if not pairs:
                return
            raws = [
                name[len(layout.prefix) + 1 :] if len(value) == layout.size else value[layout.size :]
                for name, value in pairs
            ]
            below = held(layout, raws, hashes_of(raws), [None] * len(raws), view.runs)[1].tolist()
            fresh = [pair for pair, seen in zip(pairs, below, strict=True) if not seen]
            if fresh:
                lookup = decode(layout, [name for name, _ in fresh], [value for _, value in fresh])
                yield [text_of(raw) for raw, seen in zip(raws, below, strict=True) if not seen], lookup
            after = pairs[-1][0]

    def present(self, layout: Layout, ids: Sequence[str]) -> NDArray[np.bool_]:
        raws = list(map(id_bytes, ids))

        def work(txn: Any) -> NDArray[np.bool_]:
            return self._held(txn, layout, raws, self._runs(txn, layout))[1]

        names_of(layout, ids)
        return self.used().read(work)

    def verify(self, model: str, version: str | None = None) -> Mapping[str, int]:
        environment = self.used()
        self._finish_erasing()

        def work(txn: Any) -> dict[str, int]:
            chosen = version or self._catalog.pointers(txn, model).current
            if chosen is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            record = self._catalog.find(txn, model, chosen)
            totals = self._catalog.totals(txn, record)
            counts = {}
            for layout in layouts_of(record).values():
                tally = totals.of(layout.task_type)
                counts[layout.task_type] = verify(
                    txn, environment.values, layout, tally, self.runs.opened(layout, tally.runs)
                )
            return counts

        return self._reading(work)

    def size(self) -> Size:
        _, used, on_disk = self.used().usage()
        versions = [version for model in self.models() for version in self.versions(model)]
        keys = sum(sum(version.counts.values()) + len(version.cold) for version in versions)
        in_files, files_on_disk = self.runs.sizes()
        return Size(keys, sum(version.bytes for version in versions), used + in_files, on_disk + files_on_disk)

    # ------------------------------------------------------------------------------------------------- writing

    def write_upserts(self, model: str, version: str, batch: Batch, watermark: int | None) -> Stored:
        environment, layout = self.used(), batch.layout

        def work(txn: Any) -> Stored:
            record = self._catalog.find(txn, model, version)
            if record.state not in ("writing", "ready"):
                raise StoreError(
                    f"Version {version} of model '{model}' is {state_of(record)}: it cannot be written to."
                )
            banned = tombstones.holds(txn, environment, layout.task_type, batch.raws)
            allowed = replace(batch, embeddings=batch.embeddings.where(~np.array(banned))) if any(banned) else batch
            totals = self._catalog.totals(txn, record).seen(watermark)
            tally = totals.of(layout.task_type)
            tally, applied = upsert(txn, environment.values, allowed, tally, self.runs.opened(layout, tally.runs))
            self._catalog.save_totals(txn, record, totals.having(layout.task_type, tally))
            return Stored(applied, {raw for raw, is_banned in zip(batch.raws, banned, strict=True) if is_banned})

        return environment.write(work)

    def write_published(self, record: Record, layout: Layout, batches: Sequence[Batch]) -> Stored:
        return write_published(self.used(), self._catalog, self.runs, record, layout, batches)

    def compact(self, record: Record) -> None:
        compact(self.used(), self._catalog, self.runs, record, self._finish_erasing)

    # --------------------------------------------------------------------------------------------- forgetting

    def forget(self, task_type: str, ids: Sequence[str]) -> Forgotten:
        environment = self.used()
        raws = distinct(task_type, ids)
        hashes = hashes_of(raws)

        def work(txn: Any) -> Forgotten:
            removed: dict[str, dict[str, int]] = {}
            for record in self._catalog.records(txn, None):
                if record.state == "removing":
                    continue
                totals = self._catalog.totals(txn, record)
                for layout in layouts_of(record).values():
                    if task_type not in owners(layout.task_type):
                        continue
                    tally = totals.of(layout.task_type)
                    runs = self.runs.opened(layout, tally.runs)
                    table, found = self._held(txn, layout, raws, runs, lenient=True)
                    there = [raws[row] for row in np.flatnonzero(found).tolist()]
                    for name in names_of(layout, list(map(text_of, there))):
                        txn.delete(name, db=environment.values)
                    for file, run in zip(tally.runs, runs, strict=True):
                        places = run.find(raws, hashes)
                        if (places >= 0).any():
                            tombstones.to_erase(txn, environment, file, places[places >= 0].tolist())
                    size = sum(
                        len(name) + layout.size + (len(raw) if name[len(layout.prefix)] else 0)
                        for name, raw in zip(names_of(layout, list(map(text_of, there))), there, strict=True)
                    )
                    tally = Change().less(len(there), checksum(checks(table[found])), size).on(tally)
                    totals = totals.having(layout.task_type, tally)
                    versions = removed.setdefault(record.model, {})
                    versions[record.id] = versions.get(record.id, 0) + len(there)
                self._catalog.save_totals(txn, record, totals)
            return Forgotten(removed, tombstones.add(txn, environment, task_type, raws))

        done = environment.write(work)
        self._finish_erasing()
        return done

    def recall(self, task_type: str, ids: Sequence[str]) -> int:
        environment, raws = self.used(), distinct(task_type, ids)
        return environment.write(lambda txn: tombstones.lift(txn, environment, task_type, raws))

    def forgotten(self, task_type: str) -> list[str]:
        environment = self.used()
        return sorted(
            environment.read(
                lambda txn: [text_of(raw) for raw in tombstones.forgotten_ids(txn, environment, task_type)]
            )
        )

    def gc(self) -> list[str]:
        self._finish_erasing()
        return super().gc()

    def _finish_erasing(self) -> None:
        """Overwrite what was forgotten. Whoever is killed before leaves it to the next who opens the store."""
        environment = self.used()
        found = environment.read(lambda txn: tombstones.list_erasures(txn, environment))
        for _, name, rows in found:
            self.runs.erase(name, rows)
        if found:
            environment.write(lambda txn: tombstones.erased(txn, environment, found))

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

    def _reading(self, work: Callable[[Any], _T]) -> _T:
        """Again, as long as something else stands in the way: an embedding may be half erased, or a file gone, of a version that
        is so no more, and so may the next one's be if versions follow each other fast."""
        environment, before = self.used(), ""
        while True:
            try:
                return environment.read(work)
            except (StoreError, FileNotFoundError) as error:
                self._views.clear()
                if str(error) != before:
                    before = str(error)
                    continue
                if isinstance(error, StoreError):
                    raise
                raise StoreError(
                    f"A file of the store {self.path} is gone: {error.filename}. Roll back to another version, or publish again."
                ) from None

    def _view(self, txn: Any, layout: Layout) -> View:
        """Files of a version that is ready do not change."""
        found = self._views.get((layout.version, layout.task_type))
        if found is None:
            if len(self._views) > 1000:
                self._views.clear()
            found = View(layout, self._runs(txn, layout))
            if txn.get(catalog_key("ready", layout.model, layout.version), db=self.used().catalog) is not None:
                self._views[layout.version, layout.task_type] = found
        return found

    def _runs(self, txn: Any, layout: Layout) -> tuple[RunFile, ...]:
        record = self._catalog.find(txn, layout.model, layout.version)
        return self.runs.opened(layout, self._catalog.totals(txn, record).of(layout.task_type).runs)

    def _known(self, txn: Any, view: View, raws: list[bytes]) -> list[tuple[list[str], Lookup]]:
        """The embeddings of ids that a run has, as they are now."""
        self._still_there(txn, view.layout)
        lookup = look(txn, view, ids := list(map(text_of, raws)), False)
        if lookup.found.all():
            return [(ids, lookup)]
        ids = [task_id for task_id, found in zip(ids, lookup.found.tolist(), strict=True) if found]
        return [(ids, look(txn, view, ids, False))] if ids else []

    def _held(
        self, txn: Any, layout: Layout, raws: list[bytes], runs: Sequence[RunFile], lenient: bool = False
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        names = names_of(layout, list(map(text_of, raws)))
        upserted = [txn.get(name, db=self.used().values) for name in names]
        return held(layout, raws, hashes_of(raws), upserted, runs, lenient)

    def _lease(self, name: str) -> Lease:
        return Lease(self.path / "locks" / name)

    def _estimated(self, number: int, value: int) -> int:
        return number * (8 + 8 + 2 + value + 16)

    def _begun(self, record: Record, *, resumed: bool) -> None:
        """Files that were written but not named before a publisher ended are no one's."""
        totals = self.used().read(lambda txn: self._catalog.totals(txn, record))
        named = {name for tally in totals.types.values() for name in tally.runs}
        self.runs.remove([name for name in self.runs.of_version(record.number) if name not in named])

    def _delete_values(self, record: Record) -> None:
        environment, prefix = self.used(), key_prefix(record.number)
        self._views.clear()
        self.runs.remove(self.runs.of_version(record.number))
        while environment.write(lambda txn: remove_some(txn, environment.values, prefix, _REMOVED_PER_STEP)):
            pass

    def _drop_folder(self, digest: str) -> None:
        self.folders.remove(digest, lambda: digest not in self._artifacts())

    def _sweep_folders(self) -> list[str]:
        return self.folders.sweep(self._artifacts)

    def _still_there(self, txn: Any, layout: Layout) -> None:
        if txn.get(catalog_key("ready", layout.model, layout.version), db=self.used().catalog) is None:
            raise StoreError(f"Version {layout.version} of model '{layout.model}' was removed; open the current one.")
