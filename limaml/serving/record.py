"""A share of the live requests, kept as they were answered: `limaml check-served` scores them again.

    DIR/served-<time>-<random>.parquet     one row per request, `SCHEMA`

A request's columns are an Arrow stream within its row, since requests of one file may have different ones. Files are
written whole by a thread of their own, small and often, and the oldest go when all together pass the limit. What was not
written when a server is killed is lost: it was a sample.
"""

from __future__ import annotations

import io
import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import ConfigError, DataError
from limaml.serving.questions import SHADOWED, Answer, Question

__all__ = ["Recorder", "Served", "ServedTask", "read_served", "recording"]

logger = logging.getLogger("limaml.serving.record")

SCHEMA = pl.Schema(
    {
        "id": pl.String(),
        "time": pl.Int64(),  # microseconds since 1970
        "model": pl.String(),
        "version": pl.String(),
        "parameters": pl.String(),  # JSON
        "columns": pl.Binary(),  # an Arrow stream of [rows]
        "logits": pl.Binary(),  # float32, little-endian, [rows, heads]
        "tasks": pl.List(
            pl.Struct(
                {
                    "type": pl.String(),
                    "keys": pl.List(pl.String()),
                    "found": pl.List(pl.Boolean()),
                    "count": pl.List(pl.Int64()),
                    "event_time": pl.List(pl.Int64()),
                    "owner": pl.List(pl.Int64()),
                }
            )
        ),
    }
)

FILE_BYTES, LARGEST_RECORD = 4 * 2**20, 4 * 2**20
FILE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class ServedTask:
    """The tasks of one type in a request, and the revisions of the embeddings that it was answered with."""

    keys: Sequence[str]  # [k]
    owner: NDArray[np.int64]  # [n] which of them each row has
    found: NDArray[np.bool_]  # [k]
    count: NDArray[np.int64]  # [k]
    event_time: NDArray[np.int64]  # [k]


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One recorded request."""

    id: str
    time: int
    model: str
    version: str
    parameters: Mapping[str, Any]
    columns: pl.DataFrame  # [n]
    logits: NDArray[np.float32]  # [n, heads]
    tasks: Mapping[str, ServedTask]


class Recorder:
    """Keeps a random `share` of what it is given in `folder`, in at most `limit` bytes.

    May be used from several threads; `keep` never waits for the disk, and never raises: a disk that is full costs records
    (`lost`), not answers.
    """

    def __init__(self, folder: Path, *, share: float = 0.01, limit: int = 256 * 2**20) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"The share of requests to record is {share:g}; it must be above 0 and at most 1.")
        if limit < 2 * FILE_BYTES:
            raise ConfigError(f"Records may take {limit} bytes; at least {2 * FILE_BYTES} are needed, two files.")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.share, self.limit = folder, share, limit
        self.kept = self.lost = 0
        self._random = random.Random()
        self._buffer: list[dict[str, Any]] = []
        self._buffered = 0
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._writer = threading.Thread(target=self._write_forever, name="limaml-record", daemon=True)
        self._writer.start()

    def wants(self) -> bool:
        """Whether the next request is one of the sample."""
        return self.share >= 1 or self._random.random() < self.share

    def keep(self, served: Served) -> None:
        """Take a request that was answered."""
        try:
            row = _row(served)
        except Exception:  # whatever a request holds, its answer has been given
            logger.exception("Request %s could not be recorded.", served.id)
            self.lost += 1
            return
        size = len(row["columns"]) + len(row["logits"])
        with self._lock:
            if size > LARGEST_RECORD or self._buffered + size > 2 * FILE_BYTES:  # the disk does not keep up
                self.lost += 1
                return
            self._buffer.append(row)
            self._buffered += size
            full = self._buffered >= FILE_BYTES
        if full:
            self._wake.set()

    def close(self) -> None:
        """Write what is left."""
        self._closed = True
        self._wake.set()
        self._writer.join()

    def _write_forever(self) -> None:
        while not self._closed:
            self._wake.wait(FILE_SECONDS)
            self._wake.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            rows, self._buffer, self._buffered = self._buffer, [], 0
        if not rows:
            return
        name = f"served-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        part = self.folder / f".{name}.part"
        try:
            pl.DataFrame(rows, schema=SCHEMA, orient="row").write_parquet(part)
            part.replace(self.folder / name)
            self.kept += len(rows)
            self._expire()
        except (OSError, pl.exceptions.PolarsError) as error:
            self.lost += len(rows)
            logger.warning("%d requests could not be recorded in %s: %s.", len(rows), self.folder, error)
            part.unlink(missing_ok=True)

    def _expire(self) -> None:
        files = sorted(self.folder.glob("served-*.parquet"))
        sizes = {file: file.stat().st_size for file in files}
        excess = sum(sizes.values()) - self.limit
        for file in files:
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= sizes[file]


def recording(recorder: Recorder, model: str) -> Callable[[Question, Answer], None]:
    """An observer for `Service` that keeps what can be scored again: no draws, nothing answered without the store."""

    def observe(question: Question, answer: Answer) -> None:
        if answer.sampled or answer.store_down or SHADOWED in question.parameters or not recorder.wants():
            return
        columns = {name: column.repeated(question.rows).series() for name, column in question.columns.items()}
        tasks = {
            task: ServedTask(one.keys, one.owner.numpy(), one.found, one.count, one.event_time)
            for task, one in answer.entries.items()
        }
        name, now = question.id or uuid.uuid4().hex, time.time_ns() // 1000
        parameters = {key: value for key, value in question.parameters.items() if _is_plain(value)}
        recorder.keep(Served(name, now, model, answer.version, parameters, pl.DataFrame(columns), answer.logits, tasks))

    return observe


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _row(served: Served) -> dict[str, Any]:
    stream = io.BytesIO()
    served.columns.write_ipc_stream(stream)
    return {
        "id": served.id,
        "time": served.time,
        "model": served.model,
        "version": served.version,
        "parameters": json.dumps(dict(served.parameters)),
        "columns": stream.getvalue(),
        "logits": np.ascontiguousarray(served.logits, "<f4").tobytes(),
        "tasks": [
            {
                "type": task,
                "keys": list(one.keys),
                "found": one.found.tolist(),
                "count": one.count.tolist(),
                "event_time": one.event_time.tolist(),
                "owner": one.owner.tolist(),
            }
            for task, one in served.tasks.items()
        ],
    }


def read_served(folder: Path) -> Iterator[Served]:
    """The recorded requests, oldest file first. `DataError` where there are none, or a file is not what was written."""
    files = sorted(folder.glob("served-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no recorded requests. Record some with: limaml serve RUN --record {folder}")
    for file in files:
        try:
            rows = pl.read_parquet(file).match_to_schema(SCHEMA)
        except FileNotFoundError:
            continue  # a server that still records has just removed its oldest file
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{file} is no file of recorded requests: {str(error).splitlines()[0]}.") from error
        for row in rows.iter_rows(named=True):
            yield _served(row)


def _served(row: Mapping[str, Any]) -> Served:
    columns = pl.read_ipc_stream(io.BytesIO(row["columns"]))
    logits = np.frombuffer(row["logits"], "<f4")
    rows = max((len(task["owner"]) for task in row["tasks"]), default=columns.height)
    tasks = {
        task["type"]: ServedTask(
            task["keys"],
            np.array(task["owner"], np.int64),
            np.array(task["found"], np.bool_),
            np.array(task["count"], np.int64),
            np.array(task["event_time"], np.int64),
        )
        for task in row["tasks"]
    }
    return Served(
        row["id"],
        row["time"],
        row["model"],
        row["version"],
        json.loads(row["parameters"]),
        columns,
        logits.reshape(rows, -1) if rows else logits.reshape(0, 1),
        tasks,
    )
