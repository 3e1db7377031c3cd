"""What is known of models and versions, as plain documents, and how each step changes them. Pure: no bytes move here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from limaml.errors import StoreError
from limaml.store.contract import Pointer, Version

__all__ = [
    "Pointers",
    "Record",
    "Tally",
    "Totals",
    "dump",
    "load_pointers",
    "load_record",
    "load_totals",
    "now",
    "version_id",
]

_LONGEST_STACK, _LONGEST_LOG = 64, 200


@dataclass(frozen=True)
class Record:
    """What is fixed when a version begins (but for its state)."""

    model: str
    id: str
    number: int
    state: str  # "writing", "ready", "removing"
    created: str
    dims: Mapping[str, int]
    dtypes: Mapping[str, str]
    artifact: str | None
    note: str
    extra: Mapping[str, Any]

    def described(self, totals: Totals) -> Version:
        return Version(
            model=self.model,
            id=self.id,
            state=self.state,
            created=self.created,
            dims=dict(self.dims),
            dtypes=dict(self.dtypes),
            artifact=self.artifact,
            note=self.note,
            extra=dict(self.extra),
            watermark=totals.watermark,
            counts={task_type: totals.of(task_type).count for task_type in self.dims},
            cold=tuple(task_type for task_type in self.dims if totals.of(task_type).cold is not None),
            bytes=sum(totals.of(task_type).bytes for task_type in self.dims),
        )


@dataclass(frozen=True)
class Tally:
    """What one task type of a version must hold: kept up in the same step as the values themselves."""

    count: int = 0
    checksum: int = 0  # sum of the values' checks
    bytes: int = 0
    cold: int | None = None  # the cold embedding's check
    runs: tuple[str, ...] = ()  # files, where the backend has such: what stands in a later one is of a higher revision


@dataclass(frozen=True)
class Totals:
    """What changes in a version as embeddings come in."""

    watermark: int | None = None
    types: Mapping[str, Tally] = field(default_factory=dict)

    def of(self, task_type: str) -> Tally:
        return self.types.get(task_type, Tally())

    def having(self, task_type: str, tally: Tally) -> Totals:
        return replace(self, types={**self.types, task_type: tally})

    def seen(self, watermark: int | None) -> Totals:
        if watermark is None or (self.watermark is not None and self.watermark >= watermark):
            return self
        return replace(self, watermark=int(watermark))


@dataclass(frozen=True)
class Pointers:
    """What a model serves. `stack` is what roll-back goes back through, its end is current; `log` is all flips."""

    stack: tuple[str, ...] = ()
    log: tuple[Pointer, ...] = ()

    @property
    def current(self) -> str | None:
        return self.stack[-1] if self.stack else None

    def flipped(self, version: str, reason: str) -> Pointers:
        if version == self.current:
            return self
        return self._logged((*self.stack, version), version, reason)

    def rolled_back(self, model: str, to: str | None, ready: Sequence[str]) -> Pointers:
        """Back to `to`, or to the last version before the current one that is still in the store."""
        if self.current is None:
            raise StoreError(
                f"Model '{model}' serves no version yet: there is nothing to roll back. Publish one first."
            )
        if to is not None:
            if to not in ready:
                raise StoreError(
                    f"Model '{model}' has no ready version {to!r} to roll back to; it has {', '.join(ready) or 'none'}."
                )
            if to == self.current:
                return self
            below = self.stack[: self.stack.index(to) + 1] if to in self.stack else (*self.stack, to)
            return self._logged(below, to, "rollback")
        below = self.stack[:-1]
        while below and (below[-1] not in ready or below[-1] == self.current):
            below = below[:-1]
        if not below:
            others = [version for version in ready if version != self.current]
            raise StoreError(
                f"Model '{model}' served nothing before {self.current} that is still in the store. "
                + (f"Name one of {', '.join(others)}." if others else "There is no other version.")
            )
        return self._logged(below, below[-1], "rollback")

    def _logged(self, stack: tuple[str, ...], version: str, reason: str) -> Pointers:
        return Pointers(stack[-_LONGEST_STACK:], (*self.log, Pointer(version, now(), reason))[-_LONGEST_LOG:])


def version_id(number: int, artifact: str | None, created: str, dims: Mapping[str, int]) -> str:
    """`v000007-1f3a9c02`: sorts by age, and its end says which model folder it came from (else: a hash of its birth)."""
    tail = artifact or hashlib.sha256(f"{number} {created} {sorted(dims.items())}".encode()).hexdigest()
    return f"v{number:06d}-{tail[:8]}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def dump(document: Record | Totals | Pointers) -> bytes:
    return json.dumps(document, default=vars, separators=(",", ":"), allow_nan=False).encode()


def load_record(raw: bytes) -> Record:
    return Record(**json.loads(raw))


def load_totals(raw: bytes | None) -> Totals:
    if raw is None:
        return Totals()
    found = json.loads(raw)
    return Totals(
        found["watermark"],
        {name: Tally(**{**tally, "runs": tuple(tally["runs"])}) for name, tally in found["types"].items()},
    )


def load_pointers(raw: bytes | None) -> Pointers:
    if raw is None:
        return Pointers()
    found = json.loads(raw)
    return Pointers(tuple(found["stack"]), tuple(Pointer(**pointer) for pointer in found["log"]))
