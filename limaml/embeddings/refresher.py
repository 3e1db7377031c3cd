"""What was appended to the log reaches every live version: the tasks that changed are adapted again, each by the model of its
version, on their windows.

A *live* version is the current one, or a newer one, ready or still being written. How far each is refreshed is remembered
by append, so that a refresh that is killed half-way, a version that becomes current again, and one that is new are all
caught up in the same way: by looking at what changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from limaml.config import Config
from limaml.embeddings.upsert import upsert_adapted
from limaml.embeddings.windows import CaughtUp, Layout, Windows
from limaml.errors import ConfigError, StoreError
from limaml.interactions import Encoder, InteractionLog
from limaml.interactions.side_tables import SideTables
from limaml.meta.model import MetaModel
from limaml.meta.saved import TrainedModel, load_model
from limaml.store.contract import Store, Version

__all__ = ["RefreshReport", "Refresher", "VersionRefreshed", "live_versions", "log_position"]

ROWS_PER_CHUNK = 1 << 20
TASKS_PER_CHUNK = 2048


@dataclass(frozen=True)
class VersionRefreshed:
    """What one version was given. `applied + stale + forgotten` tasks were adapted."""

    version: str
    applied: Mapping[str, int] = field(default_factory=dict)  # task type → embeddings that are new in the store
    stale: Mapping[str, int] = field(default_factory=dict)  # those that it had already, or newer ones
    forgotten: Mapping[str, int] = field(default_factory=dict)  # those of tasks that it must not keep
    watermark: int | None = None  # event time up to which the version is refreshed now

    @property
    def tasks(self) -> int:
        return sum(sum(counts.values()) for counts in (self.applied, self.stale, self.forgotten))


@dataclass(frozen=True)
class RefreshReport:
    """What a run did."""

    caught_up: CaughtUp
    versions: tuple[VersionRefreshed, ...] = ()


def live_versions(store: Store, name: str) -> list[Version]:
    """The current version of a model and every newer one, oldest first; those being written, where none is current."""
    versions, current = store.versions(name), store.current(name)
    if current is None:
        return [version for version in versions if version.state == "writing"]
    at = next((i for i, version in enumerate(versions) if version.id == current), len(versions))
    return versions[at:]


def log_position(log: InteractionLog, position: int) -> dict[str, object]:
    """What a publisher notes in a version (`extra`): that it holds what the log had at append `position`."""
    return {"log": log.id, "log_position": position}


class Refresher:
    """Keeps the versions of model `name` in `store` fresh from `log`. To be held, and closed: models are loaded once.

    `windows` is the folder of the windows, `side` holds the side tables, `build` makes blocks that are your own
    (`load_model`). `where` tells this store from others that are refreshed from the same log (its address). With `version`
    only that one is refreshed.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        log: InteractionLog,
        windows: Path | str,
        side: SideTables | None = None,
        *,
        build: Callable[[Encoder, Config], MetaModel] | None = None,
        where: str = "",
        version: str | None = None,
    ) -> None:
        self._store, self._name, self._log = store, name, log
        self._folder, self._side = Path(windows), side or SideTables(None)
        self._build, self._where, self._only = build, where, version
        self._models: dict[str, TrainedModel] = {}
        self._windows: Windows | None = None

    def run(
        self, progress: Callable[[str, str, int, int], None] | None = None, *, since: int | None = None
    ) -> RefreshReport:
        """Take in what was appended, adapt what changed, upsert it into every live version, and remember that.

        With `since`, an event time, all tasks with a newer interaction are adapted as well: what a store lost comes back.
        `progress` is called with (version, task type, tasks done, tasks in all). Killed at any moment, the next run does the
        rest. Raises `StoreError` if the store cannot be reached: nothing is then remembered as done.
        """
        while True:
            versions = self._live()
            models = {version.id: self._model(version) for version in versions}
            self._models = {version.artifact or "": models[version.id] for version in versions}
            windows = self._opened(list(models.values()))
            caught = windows.catch_up()
            epoch, position, newest = windows.epoch, windows.position, windows.newest
            done = []
            for version in versions:
                label = "\n".join((self._where, self._name, version.id, version.created))
                known = self._since(windows, label, version)
                if known < position or since is not None:
                    changed = self._changed(windows, models[version.id], known, since)
                    try:
                        done.append(self._refresh(windows, version, models[version.id], changed, newest, progress))
                    except StoreError:
                        if version.state != "writing":
                            raise
                        continue  # its publisher died as it began; not settled, so whoever resumes it is caught up then
                if windows.epoch != epoch:
                    break
                if known < position:
                    windows.settle(label, position)
            else:
                return RefreshReport(caught, tuple(done))

    @property
    def windows(self) -> Windows:
        """The windows, caught up as far as the last run came."""
        return self._windows or self._opened([self._model(version) for version in self._live()])

    def behind(self) -> dict[str, int]:
        """Live version → tasks that changed since it was refreshed last, as far as the windows have come."""
        windows = self.windows
        result = {}
        for version in self._live():
            label = "\n".join((self._where, self._name, version.id, version.created))
            since = self._since(windows, label, version)
            result[version.id] = sum(len(windows.changed_since(t, since)) for t in self._model(version).model.tasks)
        return result

    @property
    def missed(self) -> int:
        """Appends to the log that the windows have not taken in."""
        return max(0, self._log.position - self.windows.position)

    def close(self) -> None:
        if self._windows is not None:
            self._windows.close()
            self._windows = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- one version -------------------------------------------------------------------------------------------------

    def _refresh(
        self,
        windows: Windows,
        version: Version,
        trained: TrainedModel,
        changed: Mapping[str, list[str]],
        newest: int | None,
        progress: Callable[[str, str, int, int], None] | None,
    ) -> VersionRefreshed:
        applied, stale, forgotten = dict[str, int](), dict[str, int](), dict[str, int]()
        last = next((task for task in reversed(trained.model.tasks) if changed[task]), None)
        most = trained.model.adaptation.max_support
        columns = self._columns(trained)
        for task, keys in changed.items():
            done = 0
            for chunk in _chunks(keys, most):
                done += len(chunk)
                watermark = newest if task == last and done == len(keys) else None
                told = self._adapt(windows, version, trained, columns, task, chunk, watermark)
                for counts, number in zip((applied, stale, forgotten), told, strict=True):
                    counts[task] = counts.get(task, 0) + number
                if progress is not None:
                    progress(version.id, task, done, len(keys))
        return VersionRefreshed(
            version.id, applied, stale, forgotten, newest if last is not None else version.watermark
        )

    def _changed(
        self, windows: Windows, trained: TrainedModel, position: int, since: int | None
    ) -> dict[str, list[str]]:
        """Task type → keys of the tasks that changed after append `position`, or have an interaction after `since`."""
        changed = {task: windows.changed_since(task, position) for task in trained.model.tasks}
        if since is not None:
            for task, keys in changed.items():
                changed[task] = list(dict.fromkeys([*keys, *windows.newer_than(task, since)]))
        return changed

    def _adapt(
        self,
        windows: Windows,
        version: Version,
        trained: TrainedModel,
        columns: list[str],
        task: str,
        keys: list[str],
        watermark: int | None,
    ) -> tuple[int, int, int]:
        held = windows.read(task, keys, columns=columns, most=trained.model.adaptation.max_support)
        there = held.count > 0  # else forgotten since they were listed
        keys = [key for key, alive in zip(keys, there, strict=True) if alive]
        if not keys:
            return 0, 0, 0
        data = trained.encoder.encode(self._side.join(held.frame, trained.encoder.schema.columns))
        revision = held.count[there], held.newest[there]
        done = upsert_adapted(self._store, version, trained, data, task, keys, revision=revision, watermark=watermark)
        return done.applied, done.stale, done.forgotten

    def _columns(self, trained: TrainedModel) -> list[str]:
        """Columns of the log that the model reads, or that a side table is joined by."""
        there = self._log.schema
        read = trained.encoder.schema.columns | set(self._side.columns(there))
        return [column for column in there if column in read]

    # --- what is live ------------------------------------------------------------------------------------------------

    def _live(self) -> list[Version]:
        if self._only is not None:
            return [self._store.describe(self._name, self._only)]
        return [version for version in live_versions(self._store, self._name) if version.artifact is not None]

    def _model(self, version: Version) -> TrainedModel:
        digest = version.artifact
        if digest is None:
            raise StoreError(
                f"Version {version.id} of '{self._name}' has no model beside its embeddings, so that it cannot be refreshed. "
                "Publish it with one (limaml embed)."
            )
        if digest not in self._models:
            self._models[digest] = load_model(self._store.model_path(digest), self._build)
        return self._models[digest]

    def _opened(self, models: list[TrainedModel]) -> Windows:
        """The windows, with room for all these models."""
        wanted = None if self._windows is None else self._windows.layout
        for trained in models:
            schema = trained.encoder.schema
            if tuple(schema.tasks[0].columns) != self._log.task_columns:
                raise ConfigError(
                    f"The log in {self._log.folder} is partitioned by {list(self._log.task_columns)}, but a model's first task "
                    f"is named by {list(schema.tasks[0].columns)}. Refresh it from a run folder of its own."
                )
            layout = Layout.of(schema, trained.model.adaptation.max_support)
            wanted = layout if wanted is None else wanted.with_room_for(layout)
        if wanted is None:
            raise StoreError(f"Nothing of '{self._name}' is published yet. Type: limaml embed RUN")
        if self._windows is None or self._windows.layout != wanted:
            self.close()
            self._windows = Windows(self._folder, self._log, wanted)
        return self._windows

    def _since(self, windows: Windows, label: str, version: Version) -> int:
        """The append up to which a version has everything; 0 if that is not known, and all is looked at."""
        known = windows.refreshed(label)
        noted = version.extra.get("log_position") if version.extra.get("log") == self._log.id else None
        return max((int(n) for n in (known, noted) if n is not None), default=0)


def _chunks(keys: list[str], most: int | None) -> Iterator[list[str]]:
    size = max(32, min(TASKS_PER_CHUNK, ROWS_PER_CHUNK // (most or 512)))
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
