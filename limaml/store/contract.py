"""What every store of meta embeddings does, whatever keeps the bytes. `tests/store/conformance.py` holds a backend to it.

A *version* is one global block and every meta embedding made with it; several models share a store under names. The
operations marked *one step* are atomic in the store itself: whoever reads meanwhile, in any process, sees them done or
not begun, and a process that is killed leaves them so.

    state     writing ──commit──► ready ──expire──► (gone)
                 └───next publish, or gc, once the publisher is dead───► (gone)

A task's *revision* (interactions it was computed from, event time of the newest) orders the embeddings of one task in
one version: the higher one stays, an equal one changes nothing. So duplicates, replays and reorderings of writes end in
the same state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Estimate",
    "Expired",
    "Forgotten",
    "Lookup",
    "Pointer",
    "Publication",
    "Published",
    "Reader",
    "Size",
    "Store",
    "Upserted",
    "Version",
]


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """The embeddings of `n` ids, in the order in which they were asked for, all from version `version`."""

    version: str
    vectors: NDArray[np.float32]  # [n, dim]; zeros, or the cold embedding, where not found
    found: NDArray[np.bool_]  # [n]
    count: NDArray[np.int64]  # [n] interactions it was computed from; 0 where not found
    event_time: NDArray[np.int64]  # [n] of the newest of them; 0 where not found


@dataclass(frozen=True)
class Version:
    """What a store knows of one version. `id` sorts by age: `v000007-1f3a9c02`, the end being the artifact's digest."""

    model: str
    id: str
    state: str  # "writing" or "ready"
    created: str  # ISO 8601, UTC
    dims: Mapping[str, int]  # task type → dimension
    dtypes: Mapping[str, str]  # task type → "float32", "float16" or "int8"
    artifact: str | None = None  # digest of the model folder
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON of the publisher's
    watermark: int | None = None  # event time up to which the embeddings are refreshed
    counts: Mapping[str, int] = field(default_factory=dict)  # task type → embeddings, the cold one not counted
    cold: tuple[str, ...] = ()  # task types that have a cold embedding
    bytes: int = 0  # of keys and values, without what the backend adds


@dataclass(frozen=True)
class Pointer:
    """One entry of a model's history: since `at` (ISO 8601, UTC), `version` was served, because of `reason`."""

    version: str
    at: str
    reason: str  # "publish", "activate" or "rollback"


@dataclass(frozen=True)
class Upserted:
    """`applied` embeddings are in the store now; `stale` were not above what it had; `forgotten` are of tasks that it must not
    keep (`Store.forget`). Together: as many as were given."""

    applied: int
    stale: int
    forgotten: int = 0


@dataclass(frozen=True)
class Published:
    version: str
    counts: Mapping[str, int]  # task type → embeddings in the version
    applied: int
    stale: int  # puts that a higher or equal revision of the same task made void
    bytes: int
    active: bool  # whether the pointer was flipped to it
    forgotten: int = 0  # puts of tasks that the store must not keep (`Store.forget`)


@dataclass(frozen=True)
class Expired:
    removed: tuple[str, ...]
    held: tuple[str, ...]  # old enough to go, but read by somebody


@dataclass(frozen=True)
class Forgotten:
    """What `Store.forget` removed: model → version → embeddings. `tombstones` stand now for as many of the ids as had none."""

    removed: Mapping[str, Mapping[str, int]]
    tombstones: int


@dataclass(frozen=True)
class Estimate:
    """What so many embeddings will take. `bytes` includes what the backend adds to keys and values."""

    keys: int
    bytes: int


@dataclass(frozen=True)
class Size:
    """What there is: `payload` bytes of keys and values; `bytes` as the backend holds them, `file_bytes` on the disk."""

    keys: int
    payload: int
    bytes: int
    file_bytes: int


@runtime_checkable
class Reader(Protocol):
    """Reads one version, and keeps it from expiring until closed. May be used from several threads."""

    @property
    def model(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def dims(self) -> Mapping[str, int]: ...

    def get(self, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        """Embeddings of `ids`, in one look-up; repeated ids are repeated. `fill` gives unknown ids the cold embedding
        of the task type (`StoreError` if there is none) in place of zeros; `found` is False for them all the same."""
        ...

    def cold(self, task_type: str) -> NDArray[np.float32] | None:
        """The cold embedding `[dim]` of a task type, for ids that the store does not know."""
        ...

    def ids(self, task_type: str) -> Iterator[str]:
        """All ids, each once, in the store's own order, read piece by piece."""
        ...

    def scan(self, task_type: str, batch: int = 4096) -> Iterator[tuple[list[str], Lookup]]:
        """All ids with their embeddings, piece by piece."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Publication(Protocol):
    """A version that is being written. Left without `commit`, it is never served; the next publish removes it."""

    @property
    def version(self) -> str: ...

    def put(
        self,
        task_type: str,
        ids: Sequence[str],
        vectors: NDArray[np.floating[Any]],
        count: NDArray[np.int64],
        event_time: NDArray[np.int64],
    ) -> None:
        """Add embeddings: `vectors [n, dim]`, `count [n]` and `event_time [n]` their revisions. Any number of calls."""
        ...

    def put_cold(self, task_type: str, vector: NDArray[np.floating[Any]]) -> None:
        """Set the cold embedding `[dim]` of a task type; the last call counts."""
        ...

    def written(self, task_type: str, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which ids the version has already `[n]`: what a resumed publication need not compute again."""
        ...

    def commit(self, *, expected: Mapping[str, int] | None = None, activate: bool = True) -> Published:
        """Read everything back, compare counts (with `expected` as well, where given: forgotten tasks may be missing, and
        tasks that a refresh brought meanwhile come on top) and checksums, then make the version ready and, with
        `activate`, the current one: *one step*."""
        ...

    def abandon(self) -> None:
        """Remove what was written, now."""
        ...

    def close(self) -> None:
        """Stop without committing: what reached the store may be resumed, or is removed by the next publish."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Store(Protocol):
    """Versioned meta embeddings of several models."""

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
    ) -> Publication:
        """Begin a new version. `StoreError` if another live process publishes this model.

        `dtype` is one for all task types, or for each that is not float32. `artifact` is a digest that `put_model`
        gave. `resume` goes on with a version that a dead publisher of the same artifact, dims and dtypes left half
        written, if there is one; else half-written versions of the model are removed."""
        ...

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
        """Write embeddings into a version (ready, or still being written), each only if its revision is above the
        stored one's: *one step* for the whole call (in a Redis cluster, for each bucket that it touches). `watermark`
        moves the version's, never back."""
        ...

    def get(self, model: str, task_type: str, ids: Sequence[str], *, fill: bool = False) -> Lookup:
        """As `Reader.get`, from the version that is current at this moment: pointer and values in *one step*."""
        ...

    def read(self, model: str, version: str | None = None) -> Reader:
        """A reader of one ready version, by default the current one."""
        ...

    def models(self) -> list[str]:
        """Names of the models that have a version, sorted."""
        ...

    def versions(self, model: str) -> list[Version]:
        """All versions of a model, oldest first, half-written ones included."""
        ...

    def describe(self, model: str, version: str | None = None) -> Version:
        """One version, by default the current one."""
        ...

    def current(self, model: str) -> str | None: ...

    def history(self, model: str) -> list[Pointer]:
        """What was served since when, oldest first (the last 200 flips)."""
        ...

    def activate(self, model: str, version: str) -> None:
        """Serve a ready version: *one step*."""
        ...

    def rollback(self, model: str, to: str | None = None) -> str:
        """Serve `to`, or what was served before the current version (again: before that one): *one step*. Returns it."""
        ...

    def expire(self, model: str, keep: int = 3) -> Expired:
        """Remove all but the newest `keep` ready versions; never the current one, nor one that a reader holds."""
        ...

    def gc(self) -> list[str]:
        """Remove what dead publishers and interrupted removals left; says what."""
        ...

    def verify(self, model: str, version: str | None = None) -> Mapping[str, int]:
        """Read a version back and compare counts and checksums; returns task type → count, or raises `StoreError`."""
        ...

    def forget(self, task_type: str, ids: Sequence[str]) -> Forgotten:
        """Remove tasks from every version of every model, from `task_type` and from the types below it (`member` and
        `member.features`), and leave tombstones: whatever is put or upserted of these tasks later, also by a publication that
        is open now, is left out, in the same step that would have stored it. Once this returns, nobody reads them; if it is
        killed, doing it again completes it."""
        ...

    def recall(self, task_type: str, ids: Sequence[str]) -> int:
        """Take tombstones away: tasks that come back may be stored again. Returns how many there were."""
        ...

    def forgotten(self, task_type: str) -> list[str]:
        """The ids of a task type that have a tombstone, sorted."""
        ...

    def put_model(self, folder: str | Path) -> str:
        """Keep a copy of a model folder beside the embeddings; returns its digest. It goes with the last version
        that names it (one that no version names: with a `gc` an hour later)."""
        ...

    def model_path(self, digest: str) -> Path:
        """Where the copy is, as a folder that can be read."""
        ...

    def estimate(
        self, counts: Mapping[str, int], dims: Mapping[str, int], dtype: str | Mapping[str, str] = "float32"
    ) -> Estimate:
        """Size of a version before it is published."""
        ...

    def size(self) -> Size:
        """Size of the whole store."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
