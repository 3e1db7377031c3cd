"""Unit costs of one core of this machine, measured with the code that does the work: about a minute.

Each cost is the median of some runs of a small piece of work on made-up interactions: rows into a log, out of a bucket and
encoded; tasks adapted with short and with long supports, for some sizes of the meta embedding; embeddings into a store; a
member looked up and candidates scored.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import torch

from limaml.config import parse_config
from limaml.embeddings.generate import generate
from limaml.embeddings.publish import publish
from limaml.evaluate.machine import processor_name
from limaml.evaluate.plan import AdaptCost, UnitCosts
from limaml.interactions import InteractionLog, infer_schema
from limaml.meta import TrainedModel, train
from limaml.serving import Predictor
from limaml.store import open_store
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["calibrate"]

SHORT, LONG = 8, 64
TASKS, ITEMS, CANDIDATES = 1024, 2000, 100
TASK = "user_id"


def calibrate(
    dims: Sequence[int] = (16, 32, 64, 128),
    *,
    solver: str = "newton",
    repetitions: int = 5,
    tasks: int = TASKS,
    progress: Callable[[str], None] = lambda _: None,
) -> UnitCosts:
    """Measure on one thread. `tasks` tasks of 64 rows are worked on; `progress` is called with what is measured next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="limaml-plan-") as folder:
            return _calibrated(Path(folder), dims, solver, repetitions, tasks, progress)
    finally:
        torch.set_num_threads(threads)


def _calibrated(
    folder: Path, dims: Sequence[int], solver: str, repetitions: int, tasks: int, progress: Callable[[str], None]
) -> UnitCosts:
    frame = _made_up(tasks)
    schema = infer_schema(
        frame, task=TASK, row="item_id", time="time", label="click", row_columns=["item_id", "kind"]
    ).schema
    progress("the log")
    log, ingest = _ingested(folder, frame, repetitions)
    size = sum(path.stat().st_size for path in (folder / "log-0" / "data").rglob("*.parquet")) / frame.height
    adapt: list[AdaptCost] = []
    trained = data = None
    for dim in dims:
        progress(f"adaptation, {dim} numbers")
        config = parse_config(
            {"model": {"dim": dim}, "adapt": {"solver": solver}, "train": {"epochs": 1, "rows_per_batch": 8192}}
        )
        trained = train(frame, schema, config, validation_share=0.1, refit=False).save(folder / f"model-{dim}")
        data = trained.encoder.encode(frame)
        adapt.append(_adapted(trained, data, dim, repetitions))
    assert trained is not None and data is not None
    encoder = trained.encoder
    progress("reading")
    read = _seconds(lambda: [encoder.encode(bucket) for _, bucket in log.buckets()], repetitions)
    progress("the store")
    put, upsert, request = _stored(folder, trained, data, frame, dims[-1], repetitions)
    return UnitCosts(
        machine=processor_name(),
        cores=os.cpu_count() or 1,
        date=datetime.date.today().isoformat(),
        solver=solver,
        adapt=tuple(adapt),
        ingest_rows=frame.height / ingest,
        read_rows=frame.height / read,
        log_bytes=size,
        put_tasks=put,
        upsert_tasks=upsert,
        request=request,
        request_rows=CANDIDATES,
    )


def _made_up(tasks: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = tasks * LONG
    item = rng.integers(0, ITEMS, rows)
    return pl.DataFrame(
        {
            TASK: rng.permutation(np.repeat(np.arange(tasks), LONG)),
            "item_id": item,
            "kind": item % 17,
            "time": np.arange(rows),
            "click": rng.integers(0, 2, rows),
        }
    )


def _seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median of some runs, after one that is not counted."""
    work()
    found = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return median(found)


def _ingested(folder: Path, frame: pl.DataFrame, repetitions: int) -> tuple[InteractionLog, float]:
    """A log with all rows, and the seconds that making one takes."""
    made: list[InteractionLog] = []

    def append() -> None:
        log = InteractionLog(folder / f"log-{len(made)}", TASK, 4)
        log.append(frame)
        made.append(log)

    seconds = _seconds(append, repetitions)
    return made[0], seconds


def _adapted(trained: TrainedModel, data: Interactions, dim: int, repetitions: int) -> AdaptCost:
    """From two lengths of the supports: the newest 8 rows of each task, and all 64."""
    count = data.count(TASK)
    behind = torch.zeros(len(data), dtype=torch.int64)
    rows = TaskRows.of(data.index[TASK], count)
    behind[rows.rows] = torch.cat([torch.arange(int(size) - 1, -1, -1) for size in rows.size.tolist()])
    seconds = {}
    for length in (SHORT, LONG):
        among = TaskRows.of(data.index[TASK], count, behind < length)
        adapt = partial(generate, trained.model, data, TASK, among)
        seconds[length] = _seconds(adapt, repetitions) / count
    per_row = max((seconds[LONG] - seconds[SHORT]) / (LONG - SHORT), 1e-9)
    return AdaptCost(dim=dim, per_task=max(0.0, seconds[SHORT] - SHORT * per_row), per_row=per_row)


def _stored(
    folder: Path, trained: TrainedModel, data: Interactions, frame: pl.DataFrame, dim: int, repetitions: int
) -> tuple[float, float, float]:
    """Embeddings a second that are published and upserted, and the seconds of a request."""
    rng = np.random.default_rng(1)
    many = 50 * data.count(TASK)
    ids = [str(i) for i in range(many)]
    vectors = rng.normal(size=(many, dim)).astype(np.float32)
    ones = np.ones(many, np.int64)
    with open_store(folder / "store") as store:
        version = publish(store, "model", trained, folder / f"model-{dim}", data).version

        def put() -> None:
            with store.publish("other", dims={TASK: dim}) as publication:
                publication.put(TASK, ids, vectors, ones, ones)
                publication.put_cold(TASK, vectors[0])
                publication.commit(expected={TASK: many})
            store.expire("other", 1)

        put_seconds = _seconds(put, repetitions)
        turns = iter(range(2, 10_000))
        keys = data.ids[TASK]
        found = vectors[: len(keys)]

        def upsert() -> None:
            revision = np.full(len(keys), 10**6 + next(turns), np.int64)
            store.upsert("model", version, TASK, keys, found, revision, revision)

        upsert_seconds = _seconds(upsert, repetitions)
        asked = pl.DataFrame(
            {TASK: [str(keys[0])] * CANDIDATES, "item_id": np.arange(CANDIDATES), "kind": np.arange(CANDIDATES) % 17}
        ).with_columns(pl.col(TASK).cast(frame.schema[TASK]))
        with Predictor(store, "model") as predictor:
            request = _seconds(lambda: predictor.score(asked), 20 * repetitions)
    return many / put_seconds, len(keys) / upsert_seconds, request
