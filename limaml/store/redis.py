"""The store beyond one machine: Redis or Valkey, one server or a cluster. Several stores share a server under prefixes.

    PREFIX:{PREFIX}:catalog          one hash, the documents of `catalogued` (but counts and checksums)
    PREFIX:{PREFIX}:catalog:lease:…  publishers and readers that are alive
    PREFIX:{TAG}:NUMBER:PLACE        embeddings (`redis_values`): version NUMBER, its task type PLACE; …:header beside it
    PREFIX:model:TOKEN               a model folder in pieces

A step on the catalogue is one script. A write of embeddings is one script on one server, and one for each bucket in a cluster: a
client that dies between two buckets leaves some embeddings of the call newer than others, and doing it again completes it.
What a server loses (eviction, a replica that was behind) `verify` finds; publish again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Batch, Layout, check_model, decode, distinct, merged, names_of, owners
from limaml.store.catalog import Record, Totals
from limaml.store.catalogued import CataloguedStore, Hold, Stored
from limaml.store.contract import Forgotten, Lookup, Size
from limaml.store.packing import COLD
from limaml.store.publication import DEFAULT_BUFFER
from limaml.store.redis_folders import RedisFolders
from limaml.store.redis_lease import Leases, RedisLease
from limaml.store.redis_server import Address, RedisDocuments, Server, parse_address
from limaml.store.redis_values import Values, estimate_bytes
from limaml.store.version import catalog_key, layouts_of

__all__ = ["RedisStore"]

_LAYOUT = 2
_AT_ONCE = 4096
"""Embeddings of a publication in one script: a server answers nobody else meanwhile."""


class _Documents(RedisDocuments):
    """Counts and checksums lie with the embeddings; the catalogue has the watermark."""

    def __init__(self, server: Server, values: Values) -> None:
        super().__init__(server, _LAYOUT)
        self._values = values

    def totals(self, txn: Any, record: Record) -> Totals:
        return replace(super().totals(txn, record), types=self._values.tallies(list(layouts_of(record).values())))

    def buckets(self, wanted: int) -> int:
        """How many the store was begun with; `wanted` where it begins now."""

        def work(txn: Any) -> int:
            layout = json.loads(txn.get(b"layout"))
            if "buckets" not in layout:
                txn.put(b"layout", json.dumps({**layout, "buckets": wanted}).encode())
            return int(layout.get("buckets", wanted))

        return self._environment.write(work)

    def watermark(self, txn: Any, record: Record) -> Totals:
        return super().totals(txn, record)


class RedisStore(CataloguedStore):
    """A `Store` at `address`, such as `redis://user:password@host:6379/0?prefix=feed`. Safe for several threads and processes.

    Options of the address: `cluster=true`, `prefix` (of all keys), `timeout` and `connect_timeout` (seconds that a call waits),
    `lease` (seconds after which a publisher or reader that was killed counts as dead), `cache` (folder for model folders),
    `buckets` (of a new store, 16: a request asks each that it needs, and more nodes than buckets do not help one task type),
    `ca`, `cert` and `key` (files, for rediss://). Uses commands of Redis 7.4 and Valkey 8; needs a server that does not evict.
    """

    def __init__(self, address: str | Address, *, create: bool = True, buffer_bytes: int = DEFAULT_BUFFER) -> None:
        self.address = parse_address(address) if isinstance(address, str) else address
        self._buffer_bytes = buffer_bytes
        self._server = Server(self.address)
        self._closed = False
        self._values = Values(self._server, self.address.buckets)
        self._catalog = self._documents = _Documents(self._server, self._values)
        self._leases = Leases(self._server)
        self.folders: RedisFolders = RedisFolders(self._server, self.address.cache)
        self._served: dict[tuple[str, str], Layout] = {}  # what was current at the last look-up
        try:
            if not create and self._server.read(lambda txn: txn.get(b"layout")) is None:
                raise StoreError(
                    f"There is no store at {self._server.path}; publish to it first, or correct the address."
                )
            self._catalog.check_layout()
            self._values.buckets = self._documents.buckets(self.address.buckets)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------- reading

    def get(self, model: str, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        # the pointer is asked for along with the values of the version it last named: one round trip, one step
        self.used()
        pointer = ("HGET", self._server.key, b"current/" + check_model(model).encode())
        layout = self._served.get((model, task_type)) or self._served_now(model, task_type)
        for _ in range(100):
            names = names_of(layout, ids)
            values, (version,) = self._values.fetch(layout, _with_cold(layout, names, fill), pointer)
            # in a cluster the values come from other servers than the pointer: what is missing may just have been removed
            removed = self.address.cluster and None in values and not self._readable(layout)
            if version == layout.version.encode() and not removed:
                return _decoded(layout, names, values, fill)
            layout = self._served_now(model, task_type)
        raise StoreError(f"The current version of model '{model}' changes faster than it can be read; try again.")

    def look_up(self, layout: Layout, ids: Sequence[str], fill: bool) -> Lookup:
        self.used()
        names = names_of(layout, ids)
        return _decoded(layout, names, self._values_of(layout, _with_cold(layout, names, fill)), fill)

    def cold(self, layout: Layout) -> bytes | None:
        return self._values_of(layout, [layout.prefix + COLD])[0]

    def pieces(self, layout: Layout, limit: int) -> Iterator[tuple[list[str], Lookup]]:
        self.used()
        some = False
        for ids, names, values in self._values.pieces(layout, limit):
            some = True
            yield ids, decode(layout, names, values)
        if not some:
            self._values_of(layout, [layout.prefix + COLD])  # an empty version, or one that is gone?

    def present(self, layout: Layout, ids: Sequence[str]) -> NDArray[np.bool_]:
        self.used()
        return np.array(self._values.present(layout, names_of(layout, ids)), np.bool_)

    def verify(self, model: str, version: str | None = None) -> Mapping[str, int]:
        record = self._record(model, version or self._current(model))
        return {layout.task_type: self._values.verify(layout) for layout in layouts_of(record).values()}

    def size(self) -> Size:
        """Memory as the servers count it; what they keep on disks is theirs."""
        records = self.used().read(lambda txn: self._catalog.records(txn, None))
        layouts = [layout for record in records for layout in layouts_of(record).values()]
        keys, used = self._values.usage(layouts)
        payload = sum(tally.bytes for record in records for tally in self._tallies(record))
        catalog = self._server.call("MEMORY USAGE", self._server.key) or 0
        return Size(keys, payload, used + catalog + self.folders.size(), 0)

    # ------------------------------------------------------------------------------------------------- writing

    def write_upserts(self, model: str, version: str, batch: Batch, watermark: int | None) -> Stored:
        self.used()
        done = self._values.write(batch)
        if watermark is not None:  # after the embeddings: it never says more than there is
            self._server.write(lambda txn: self._seen(txn, model, version, watermark))
        return done

    def write_published(self, record: Record, layout: Layout, batches: Sequence[Batch]) -> Stored:
        self.used()
        whole, applied, forgotten = merged(batches), 0, set[bytes]()
        for start in range(0, len(whole.embeddings), _AT_ONCE):
            part = replace(whole, embeddings=whole.embeddings.part(start, start + _AT_ONCE))
            stored, left_out = self._values.write(part)
            applied, forgotten = applied + stored, forgotten | left_out
        return Stored(applied, forgotten)

    def forget(self, task_type: str, ids: Sequence[str]) -> Forgotten:
        self.used()
        raws, done = distinct(task_type, ids), set[str]()
        removed: dict[str, dict[str, int]] = {}
        tombstones = 0
        while True:
            # a version that begins meanwhile may have taken some in before the tombstones stood, but none after
            records = self._server.read(lambda txn: self._catalog.records(txn, None))
            new = [record for record in records if record.id not in done and record.state != "removing"]
            if not new and done:
                return Forgotten(removed, tombstones)
            layouts = [
                layout
                for record in new
                for layout in layouts_of(record).values()
                if task_type in owners(layout.task_type)
            ]
            added, lost = self._values.forget(task_type, raws, layouts)
            tombstones += added
            for layout, count in zip(layouts, lost, strict=True):
                versions = removed.setdefault(layout.model, {})
                versions[layout.version] = versions.get(layout.version, 0) + count
            done |= {record.id for record in new} | {""}

    def recall(self, task_type: str, ids: Sequence[str]) -> int:
        self.used()
        return self._values.recall(task_type, distinct(task_type, ids))

    def forgotten(self, task_type: str) -> list[str]:
        self.used()
        return self._values.forgotten(task_type)

    def write_cold(self, model: str, version: str, layout: Layout, value: bytes) -> None:
        self.used()
        self._values.write_cold(layout, value)

    def finish(self, record: Record, activate: bool, lease: Hold) -> int:
        self.used()
        model, version = record.model, record.id

        def work(txn: Any) -> int:
            found = self._catalog.find(txn, model, version)
            if found.artifact is not None and txn.get(b"model/" + found.artifact.encode()) is None:
                raise StoreError(f"The model folder {found.artifact} of version {version} was removed; put it again.")
            self._catalog.save(txn, replace(found, state="ready"))
            txn.put(catalog_key("ready", model, version), b"1")
            if activate:
                self._catalog.point(txn, model, self._catalog.pointers(txn, model).flipped(version, "publish"))
            return found.described(self._catalog.totals(txn, found)).bytes

        return self._server.write(work, cast(RedisLease, lease).fence)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._leases.close()
            self._server.close()

    def used(self) -> Server:
        if self._closed:
            raise StoreError(f"The store {self._server.path} is closed; open it again with open_store.")
        return self._server

    # ------------------------------------------------------------------------------------------------------ pieces

    def _current(self, model: str) -> str:
        found = self.current(model)
        if found is None:
            raise StoreError(self._server.read(lambda txn: self._catalog.nothing_served(txn, model)))
        return found

    def _served_now(self, model: str, task_type: str) -> Layout:
        def work(txn: Any) -> Layout:
            version = self._catalog.pointers(txn, model).current
            if version is None:
                raise StoreError(self._catalog.nothing_served(txn, model))
            return self._layout(txn, model, version, task_type)

        found = self._served[model, task_type] = self._server.read(work)
        return found

    def _values_of(self, layout: Layout, names: Sequence[bytes]) -> list[bytes | None]:
        """The values of one version, which must still be there."""
        self.used()
        values, _ = self._values.fetch(layout, names)
        if None in values and not self._readable(layout):
            raise StoreError(f"Version {layout.version} of model '{layout.model}' was removed; open the current one.")
        return values

    def _readable(self, layout: Layout) -> bool:
        return (
            self._server.call("HGET", self._server.key, catalog_key("ready", layout.model, layout.version)) is not None
        )

    def _seen(self, txn: Any, model: str, version: str, watermark: int) -> None:
        record = self._catalog.find(txn, model, version)
        before = self._documents.watermark(txn, record)
        if before.seen(watermark) != before:
            self._catalog.save_totals(txn, record, before.seen(watermark))

    def _tallies(self, record: Record) -> Sequence[Any]:
        return list(self._values.tallies(list(layouts_of(record).values())).values())

    def _lease(self, name: str) -> RedisLease:
        return self._leases.lease(name)

    def _estimated(self, number: int, value: int) -> int:
        return estimate_bytes(number, 1 + 16, value, self._values.buckets)

    def _begun(self, record: Record, *, resumed: bool) -> None:
        if not resumed:  # a catalogue that lost its last writes gives a number again that has embeddings elsewhere
            self._delete_values(record)
        self._values.begin(list(layouts_of(record).values()))

    def _delete_values(self, record: Record) -> None:
        self._values.remove(list(layouts_of(record).values()))

    def _drop_folder(self, digest: str) -> None:
        self.folders.remove(digest, self._named)

    def _sweep_folders(self) -> list[str]:
        return self.folders.sweep(self._named)

    def _named(self, txn: Any) -> set[str | None]:
        return {record.artifact for record in self._catalog.records(txn, None)}


def _with_cold(layout: Layout, names: list[bytes], fill: bool) -> list[bytes]:
    return [*names, layout.prefix + COLD] if fill else names


def _decoded(layout: Layout, names: list[bytes], values: list[bytes | None], fill: bool) -> Lookup:
    cold = values.pop() if fill else None
    return decode(layout, names, values, cold, fill)
