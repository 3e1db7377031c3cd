"""A job makes one shard: it reads the rows of one bucket, and adapts the tasks that are in it. Doing it twice makes the same.

What a worker needs to know is a `Setting`, which is small and goes to wherever the worker is; what it holds, the model above
all, it loads there once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from limaml.config import Config
from limaml.embeddings.deal import deal, dealt
from limaml.embeddings.generate import generate
from limaml.embeddings.order import TIME, with_times
from limaml.embeddings.piece import Piece, adapted_piece, empty_piece, one_piece
from limaml.embeddings.shards import Made, write_shard
from limaml.embeddings.spool import Spool
from limaml.errors import ConfigError, DataError
from limaml.interactions import Encoder, InteractionLog, clean
from limaml.interactions.columns import factorise
from limaml.interactions.schema import Task
from limaml.interactions.side_tables import SideTables
from limaml.meta.model import MetaModel
from limaml.meta.saved import load_model
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["Job", "Setting", "Told", "Worker", "jobs_of"]

ROWS_PER_PART = 1_000_000
"""Rows of a bucket that are encoded at a time, tasks never cut: encoding takes several times the memory of the rows."""

TASKS_PER_CALL = 65_536
NUMBERS_PER_CALL = 2**24  # entries of the posteriors' factors, tasks · dim²

Told = Callable[[int, int], None]
"""Called with (tasks done, tasks of the job)."""


@dataclass(frozen=True)
class Job:
    task: int  # which of the task types
    number: int  # of the bucket


@dataclass(frozen=True)
class Setting:
    """What a worker needs to begin. The folders must be the same ones wherever a worker runs."""

    log: Path
    position: int
    model: Path
    digest: str  # of the model
    tasks: tuple[str, ...]  # the task types, that of the log's buckets first
    side: Path | None
    spool: Path
    order: str = (
        ""  # unit of the times that were worked out for the whole log; empty where each says by itself when it was
    )
    uncertainty: bool = False
    device: str = "cpu"
    threads: int | None = None  # None: as they are
    build: Callable[[Encoder, Config], MetaModel] | None = None


class Worker:
    """Does jobs. Made where they are done."""

    def __init__(self, setting: Setting) -> None:
        if setting.threads is not None:
            torch.set_num_threads(setting.threads)
        self._setting = setting
        self._trained = load_model(setting.model, setting.build)
        if self._trained.digest != setting.digest:
            raise DataError(
                f"The model folder {setting.model} was changed while embeddings were generated. Begin again."
            )
        self._trained.model.to(_device(setting.device))
        self._encoder = self._trained.encoder
        self._schema = self._encoder.schema
        self._named = {task.name: task for task in self._schema.tasks}
        if setting.order:  # the whole log's times stand in for the time column
            self._encoder = replace(self._encoder, schema=self._schema.model_copy(update={"time": TIME}))
        self._log = InteractionLog(setting.log)
        self._side = SideTables(setting.side)
        self._spool = Spool(setting.spool)
        self._seconds: dict[str, float] = {}

    def do(self, job: Job, told: Told | None = None) -> Made:
        """Make the shard of a job, and for the first task type deal out the rows for the others."""
        begun, self._seconds = time.perf_counter(), {}
        name = self._setting.tasks[job.task]
        with self._spent("read"):
            frame, dropped = self._bucket(job.number) if job.task == 0 else (self._part(job), {})
        rows, unit, pieces = frame.height, "", [empty_piece(self._trained, name, self._setting.uncertainty)]
        tasks, parts = self._split(frame, self._named[name])
        done = 0
        for part in parts:
            with self._spent("encode"):
                data = self._encoded(part)
            unit = data.time_unit
            for piece in self._adapted(data, name):
                pieces.append(piece)
                done += len(piece)
                if told is not None:
                    told(done, tasks or data.count(name))
        del frame, parts
        whole = one_piece(pieces)
        newest = int(whole.time[whole.count > 0].max()) if rows else 0
        made = Made(job.task, job.number, len(whole), rows, newest, unit, dropped, dict(self._seconds), os.getpid())
        with self._spent("write"):
            made = write_shard(self._spool.shards, whole, made)
        return replace(made, seconds={**self._seconds, "all": time.perf_counter() - begun})

    # --- rows --------------------------------------------------------------------------------------------------------

    def _bucket(self, number: int) -> tuple[pl.DataFrame, dict[str, int]]:
        """The rows of a bucket of the log without exact duplicates, and how many were dropped; dealt out on the way."""
        frame, dropped = self._log.bucket(number, through=self._setting.position), dict[str, int]()
        if not frame.height:
            return frame, dropped
        if self._setting.order:
            frame = with_times(frame, self._spool.times, number)
        frame, found = clean(self._side.join(frame, self._naming), self._schema)
        for task, name in list(enumerate(self._setting.tasks))[1:]:
            path = self._spool.rows / str(task) / f"{number:05d}.rows"
            deal(frame, self._named[name], self._log.bucket_count, path)
        return frame, asdict(found)

    @property
    def _naming(self) -> set[str]:
        """The columns that tell which rows are duplicates: where one of them is in a side table, it is needed at once."""
        columns = {column for task in self._schema.tasks for column in task.columns}
        columns |= {label.column for label in self._schema.labels}
        return columns | ({self._schema.time} if self._schema.time is not None else set())

    def _part(self, job: Job) -> pl.DataFrame:
        """The rows of the tasks of one part, from all buckets, in the log's order."""
        files = sorted((self._spool.rows / str(job.task)).glob("*.rows"))
        found = [part for file in files if (part := dealt(file, job.number)) is not None]
        return pl.concat(found) if found else pl.DataFrame()

    def _split(self, frame: pl.DataFrame, task: Task) -> tuple[int, Iterator[pl.DataFrame]]:
        """`frame` in parts of about `ROWS_PER_PART` rows, all rows of a task in one of them; and how many tasks there are,
        where that had to be found out."""
        if frame.height <= ROWS_PER_PART:
            return 0, iter([frame] if frame.height else [])
        codes, first = factorise(frame.select(task.columns))
        part = ((np.cumsum(np.bincount(codes)) - 1) // ROWS_PER_PART)[codes]
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part))
        bounds = [0, *ends.tolist()]
        return len(first), (frame[order[a:b]] for a, b in zip(bounds, bounds[1:], strict=False) if b > a)

    def _encoded(self, frame: pl.DataFrame) -> Interactions:
        data = self._encoder.encode(self._side.join(frame, self._schema.columns))
        return replace(data, time_unit=self._setting.order) if self._setting.order else data

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _adapted(self, data: Interactions, name: str) -> Iterator[Piece]:
        model, size = self._trained.model, TASKS_PER_CALL
        if self._setting.uncertainty:
            size = max(1, min(size, NUMBERS_PER_CALL // (model.dims[name] or 1) ** 2))
        among = TaskRows.of(data.index[name], data.count(name))
        for tasks in torch.split(torch.arange(data.count(name)), size):
            with self._spent("adapt"):
                generated = generate(model, data, name, among, tasks, uncertainty=self._setting.uncertainty)
            yield adapted_piece(self._trained, data, generated)

    @contextmanager
    def _spent(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - begun


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"There is no device '{name}': use cpu, cuda, or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "No GPU is seen here by PyTorch, so embeddings cannot be generated on --device cuda. Use cpu."
        )
    return device


def jobs_of(tasks: Sequence[str], shards: int) -> list[list[Job]]:
    """All jobs, in steps: those of the first task type deal out the rows that the others need."""
    first = [Job(0, number) for number in range(shards)]
    return [first, [Job(task, number) for task in range(1, len(tasks)) for number in range(shards)]]
