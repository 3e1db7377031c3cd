"""The folder in which a generation gathers its shards, so that whoever is killed goes on with what is there.

folder/
  plan.json      what is generated: which log, up to which append, by which model
  shards/        the embeddings of each bucket's tasks (shards.py)
  rows/          for task types that the log is not partitioned by: its rows, dealt out by task (deal.py)
  times/         where times only give an order: the time of each row (order.py)
  .lock          held by the process that generates
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from limaml.embeddings.shards import Made, whole_shards
from limaml.errors import StoreError
from limaml.interactions import InteractionLog
from limaml.interactions.atomic_files import file_sha256, locked, write_atomically, written

__all__ = ["Plan", "Spool", "plan_of"]

FORMAT = 1
GROWTH = 0.1
"""A generation that was killed is gone on with unless the log has grown by more than this share since: what was appended
meanwhile is adapted again once it is published, and that should be little."""


@dataclass(frozen=True)
class Plan:
    """What a generation makes. Two that differ in anything but `position` and `rows` share no shard."""

    log: str  # its id
    position: int  # the last append that is read
    rows: int  # in the log, when it began
    model: str  # digest
    tasks: tuple[str, ...]
    shards: int  # of each task type
    uncertainty: bool
    beside: str  # digest of the side tables, and of who is forgotten
    format: int = FORMAT

    def goes_on_with(self, earlier: Plan, fixed: bool) -> bool:
        """Whether shards of an `earlier` plan are those of this one; `fixed`: only if the log is as it was."""
        if replace(earlier, position=self.position, rows=self.rows) != self:
            return False
        return earlier.position == self.position or (
            not fixed and earlier.rows <= self.rows <= (1 + GROWTH) * earlier.rows
        )


def plan_of(
    log: InteractionLog, model: str, tasks: tuple[str, ...], side: Path | None, *, uncertainty: bool = False
) -> Plan:
    """The plan to generate from the log as it is now."""
    beside = hashlib.sha256()
    for path in sorted(side.rglob("*")) if side is not None and side.is_dir() else []:
        if path.is_file():
            beside.update(f"{path.name} {file_sha256(path)}\n".encode())
    forgotten = {task: sorted(keys) for task, keys in sorted(log.forgotten().items())}
    beside.update(json.dumps(forgotten).encode())
    position = log.position
    return Plan(log.id, position, log.rows, model, tasks, log.bucket_count, uncertainty, beside.hexdigest())


class Spool:
    """The folder of a generation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def rows(self) -> Path:
        return self.folder / "rows"

    @property
    def times(self) -> Path:
        return self.folder / "times"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out. `StoreError` if one is at work."""
        with written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = locked(self.folder / ".lock", 0)
            try:
                lock.__enter__()
            except StoreError as error:
                raise StoreError(
                    f"Another process generates embeddings in {self.folder}. Wait for it, or end it: what it has made by then "
                    "is gone on with."
                ) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def begin(self, plan: Plan, *, fixed: bool = False) -> tuple[Plan, list[Made]]:
        """The plan to follow and the shards that are there: of an earlier one if it can be gone on with, else none."""
        earlier = self._plan()
        if earlier is not None and plan.goes_on_with(earlier, fixed):
            return earlier, whole_shards(self.shards)
        self.clear()
        with written(self.folder):
            for place in (self.shards, self.rows, self.times):
                place.mkdir()
            write_atomically(self.folder / "plan.json", json.dumps(asdict(plan), indent=1).encode())
        return plan, []

    def clear(self) -> None:
        """Remove all but the lock."""
        (self.folder / "plan.json").unlink(missing_ok=True)  # first: what is half removed is not gone on with
        for place in (self.shards, self.rows, self.times):
            shutil.rmtree(place, ignore_errors=True)

    def _plan(self) -> Plan | None:
        try:
            raw = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
            return Plan(**{**raw, "tasks": tuple(raw["tasks"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None  # nothing that can be gone on with
