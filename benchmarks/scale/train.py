"""One epoch of training from a log on disk, on a sample of its tasks: how much memory, how fast, and how long it waited for rows.

The first pass over all rows (the survey: vocabularies, moments) is timed apart from the epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.scale.measure import RESULTS, ROOT, in_child, keep, usage
from benchmarks.scale.workload import buckets_of, items, make_source, members, rows_of

HERE = "benchmarks.scale.train"
FEATURES: list[dict[str, Any]] = [
    {"name": "item_id", "kind": "categorical", "min_count": 2},
    {"name": "kind", "kind": "categorical"},
    {"name": "length", "kind": "numeric"},
    {"name": "country", "kind": "categorical", "side": "user_id"},
    {"name": "age", "kind": "numeric", "side": "user_id"},
]


def prepare(folder: str, source: str, tasks: int, buckets: int) -> dict[str, Any]:
    """The log, if the part `ingest` has not left it there, and the side tables."""
    from limaml.interactions.log import InteractionLog

    place = Path(folder)
    there = place / f"log-{tasks}"
    log = InteractionLog(there, "user_id", None if there.exists() else buckets)
    if log.rows != rows_of(tasks):
        log.append_all([source])
    side = place / f"side-{tasks}"
    side.mkdir(exist_ok=True)
    for key, table in {"user_id": members(tasks), "item_id": items()}.items():
        table.write_parquet(side / f"{key}.parquet")
    (side / "tables.json").write_text(json.dumps({key: f"{key}.parquet" for key in ("user_id", "item_id")}))
    return {"rows": log.rows, "buckets": log.bucket_count}


@dataclass
class Counted:
    """Buckets that know how many rows and tasks were read of them."""

    inner: Any
    rows_read: int = 0
    tasks_read: int = 0
    seconds: float = field(default=0.0)

    @property
    def count(self) -> int:
        return int(self.inner.count)

    @property
    def rows(self) -> int:
        return int(self.inner.rows)

    def read(self, number: int) -> pl.DataFrame:
        begun = time.perf_counter()
        frame: pl.DataFrame = self.inner.read(number)
        self.seconds += time.perf_counter() - begun
        self.rows_read, self.tasks_read = self.rows_read + frame.height, self.tasks_read + frame["user_id"].n_unique()
        return frame


def epoch(folder: str, tasks: int, sample: int, solver: str) -> dict[str, Any]:
    """Survey, and one epoch on about `sample` tasks."""
    from limaml.config import parse_config
    from limaml.interactions import Schema
    from limaml.interactions.buckets import LogBuckets
    from limaml.interactions.log import InteractionLog
    from limaml.interactions.side_tables import SideTables
    from limaml.meta.outer import Progress
    from limaml.meta.train import train

    place = Path(folder)
    told = {"tasks": ["user_id"], "labels": ["click"], "row": "item_id", "time": "time", "features": FEATURES}
    schema, log = Schema.model_validate(told), InteractionLog(place / f"log-{tasks}")
    buckets = Counted(LogBuckets(log, schema, log.position, SideTables(place / f"side-{tasks}")))
    config = parse_config({"adapt": {"solver": solver}, "train": {"epochs": 1, "tasks_per_epoch": sample}})
    surveyed: list[tuple[float, int, int]] = []
    last: list[Progress] = []

    def look(number: int, frame: pl.DataFrame) -> None:
        if number == buckets.count - 1:
            surveyed.append((time.perf_counter() - begun, buckets.rows_read, buckets.tasks_read))

    begun, used = time.perf_counter(), usage()
    done = train(buckets, schema, config, validation_share=0, look=look, progress=lambda _, news: last.append(news))
    seconds = done.history.epochs[0].seconds
    rows, members_read = buckets.rows_read - surveyed[0][1], buckets.tasks_read - surveyed[0][2]
    trained = last[-1].tasks / 2  # cross-fit judges every task twice
    return {
        "survey_s": surveyed[0][0],
        "survey_rows": surveyed[0][1],
        "epoch_s": seconds,
        "waited_s": done.waited,
        "share_training": 1 - done.waited / seconds,
        "tasks": trained,
        "tasks_read": members_read,
        "rows_read": rows,
        "tasks_per_s": trained / seconds,
        "rows_per_s": rows * trained / members_read / seconds,  # of those read, the part that was trained on
        "steps": last[-1].step,
        "loss": done.history.epochs[0].train_loss,
        "cpu_s": usage() - used,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part train", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--sample", type=int, default=100_000)
    parser.add_argument("--buckets", type=int, help="of a new log (64, or as many as keep one at 2 million rows)")
    parser.add_argument("--solver", choices=["newton", "gradient"], default="newton")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "scale")
    parser.add_argument("--out", type=Path, default=RESULTS / "train.json")
    given = parser.parse_args(arguments)
    for tasks in given.tasks:
        source = str(make_source(given.folder, tasks))
        prepared = in_child(
            HERE,
            "prepare",
            folder=str(given.folder),
            source=source,
            tasks=tasks,
            buckets=given.buckets or buckets_of(tasks),
        )
        found = in_child(HERE, "epoch", folder=str(given.folder), tasks=tasks, sample=given.sample, solver=given.solver)
        found = {"tasks": tasks, **prepared, "solver": given.solver, "trained": found.pop("tasks"), **found}
        print(found, flush=True)
        keep(given.out, found)
