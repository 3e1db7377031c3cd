"""Interactions taken into a log, beside polars' own scan-and-write of the same files, in turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import in_child, usage
from benchmarks.scale.workload import make_source, rows_of

HERE = "benchmarks.scale.ingest"
ROOT = Path(__file__).parent.parent.parent


def append(source: str, target: str, buckets: int) -> dict[str, Any]:
    """Every file of `source` appended to a new log at `target`."""
    from limaml.interactions.log import InteractionLog

    log = InteractionLog(target, "user_id", buckets)
    begun, used = time.perf_counter(), usage()
    rows = sum(done.new for done in log.append_all([source]).values())
    return {"seconds": time.perf_counter() - begun, "cpu_s": usage() - used, "rows": rows}


def rewrite(source: str, target: str) -> dict[str, Any]:
    """The limit: polars reads the same files and writes one, its own way."""
    import polars as pl

    begun, used = time.perf_counter(), usage()
    pl.scan_parquet(f"{source}/*.parquet").sink_parquet(target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return {"seconds": time.perf_counter() - begun, "cpu_s": usage() - used}


def measure(folder: Path, tasks: int, buckets: int, repeats: int) -> dict[str, Any]:
    source, log, copy = str(make_source(folder, tasks)), folder / f"log-{tasks}", folder / "copy.parquet"
    ours, limit = [], []
    for _ in range(repeats):
        copy.unlink(missing_ok=True)
        shutil.rmtree(log, ignore_errors=True)
        limit.append(in_child(HERE, "rewrite", source=source, target=str(copy)))
        ours.append(in_child(HERE, "append", source=source, target=str(log), buckets=buckets))
    copy.unlink(missing_ok=True)
    rows = rows_of(tasks)
    assert all(found["rows"] == rows for found in ours)
    shares = [theirs["seconds"] / own["seconds"] for theirs, own in zip(limit, ours, strict=True)]
    return {
        "tasks": tasks,
        "rows": rows,
        "buckets": buckets,
        "rows_per_s": rows / statistics.median(found["seconds"] for found in ours),
        "rows_per_s_polars": rows / statistics.median(found["seconds"] for found in limit),
        "share": statistics.median(shares),
        "shares": shares,
        "peak_gib": max(found["peak_gib"] for found in ours),
        "peak_gib_polars": max(found["peak_gib"] for found in limit),
        "ours": ours,
        "limit": limit,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part ingest", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--buckets", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "scale")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale" / "ingest.json")
    given = parser.parse_args(arguments)
    sizes = []
    for tasks in given.tasks:
        sizes.append(measure(given.folder, tasks, given.buckets, given.repeats))
        print({name: value for name, value in sizes[-1].items() if name not in ("ours", "limit")}, flush=True)
    result = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "sizes": sizes}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
