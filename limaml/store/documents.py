"""The documents of a store, inside a transaction: models' pointers, versions' records and totals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from limaml.errors import StoreError
from limaml.store.batch import check_model
from limaml.store.catalog import (
    Pointers,
    Record,
    Totals,
    dump,
    load_pointers,
    load_record,
    load_totals,
    now,
    version_id,
)
from limaml.store.version import catalog_key

__all__ = ["Documents", "Transactions"]

T = TypeVar("T")


class Transactions(Protocol):
    """Where a store's documents are. Each call of `work` sees one state; what it writes is in whole, or not, or tried again."""

    @property
    def path(self) -> Path | str: ...

    @property
    def catalog(self) -> Any: ...

    def read(self, work: Callable[[Any], T]) -> T: ...

    def write(self, work: Callable[[Any], T]) -> T: ...


class Documents:
    """Reads and writes documents; every method but `check_layout` works in its caller's transaction."""

    def __init__(self, environment: Transactions, layout: int) -> None:
        """`layout`: the number of the form in which the backend keeps everything."""
        self._environment = environment
        self._layout = layout

    def save(self, txn: Any, record: Record) -> None:
        txn.put(catalog_key("record", record.model, record.id), dump(record), db=self._environment.catalog)

    def point(self, txn: Any, model: str, pointers: Pointers) -> None:
        if pointers.current is not None:
            txn.put(b"current/" + model.encode(), pointers.current.encode(), db=self._environment.catalog)
        txn.put(_pointers_key(model), dump(pointers), db=self._environment.catalog)

    def pointers(self, txn: Any, model: str) -> Pointers:
        return load_pointers(txn.get(_pointers_key(model), db=self._environment.catalog))

    def totals(self, txn: Any, record: Record) -> Totals:
        return load_totals(txn.get(catalog_key("totals", record.model, record.id), db=self._environment.catalog))

    def documents(self, txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with txn.cursor(self._environment.catalog) as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor.iternext():
                    if not key.startswith(prefix):
                        return
                    yield key, value

    def records(self, txn: Any, model: str | None) -> list[Record]:
        prefix = b"record/" if model is None else f"record/{check_model(model)}/".encode()
        return sorted((load_record(raw) for _, raw in self.documents(txn, prefix)), key=lambda record: record.number)

    def find(self, txn: Any, model: str, version: str) -> Record:
        raw = txn.get(catalog_key("record", model, version), db=self._environment.catalog)
        record = None if raw is None else load_record(raw)
        if record is None or record.state == "removing":
            known = [each.id for each in self.records(txn, model) if each.state != "removing"]
            raise StoreError(f"Model '{model}' has no version {version!r}; it has {', '.join(known) or 'none'}.")
        return record

    def nothing_served(self, txn: Any, model: str) -> str:
        known = sorted({record.model for record in self.records(txn, None)})
        return (
            f"The store {self._environment.path} serves no version of model {model!r}. Models with a version: "
            f"{', '.join(known) or 'none'}. Publish one first."
        )

    def begin(
        self,
        txn: Any,
        model: str,
        same: tuple[str | None, dict[str, int], dict[str, str]],
        watermark: int | None,
        note: str,
        extra: Mapping[str, Any],
    ) -> Record:
        catalog = self._environment.catalog
        layout = json.loads(txn.get(b"layout", db=catalog))
        number, created = layout["next"], now()
        artifact, dims, dtypes = same
        name = version_id(number, artifact, created, dims)
        record = Record(model, name, number, "writing", created, dims, dtypes, artifact, note, dict(extra))
        txn.put(b"layout", json.dumps({**layout, "next": number + 1}).encode(), db=catalog)
        self.save(txn, record)
        txn.put(catalog_key("totals", model, name), dump(Totals().seen(watermark)), db=catalog)
        return record

    def check_layout(self) -> None:
        environment = self._environment

        def work(txn: Any) -> Any:
            raw = txn.get(b"layout", db=environment.catalog)
            return None if raw is None else json.loads(raw)

        def begin(txn: Any) -> None:
            if txn.get(b"layout", db=environment.catalog) is None:
                txn.put(b"layout", json.dumps({"layout": self._layout, "next": 1}).encode(), db=environment.catalog)

        found = environment.read(work)
        if found is None:
            environment.write(begin)
        elif found.get("layout") != self._layout:
            older = found.get("layout") < self._layout
            raise StoreError(
                f"The store {self._environment.path} has layout {found.get('layout')!r}; this version of limaml knows {self._layout}: "
                + ("publish to a new store (`limaml embed`), and serve that one." if older else "update limaml.")
            )

    def save_totals(self, txn: Any, record: Record, totals: Totals) -> None:
        txn.put(catalog_key("totals", record.model, record.id), dump(totals), db=self._environment.catalog)


def _pointers_key(model: str) -> bytes:
    return b"pointers/" + check_model(model).encode()
