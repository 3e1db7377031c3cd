"""Interactions taken into a log, beside polars' own scan-and-write of the same files, in turns."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import RESULTS, ROOT, in_child, keep, usage
from benchmarks.scale.workload import buckets_of, make_source, rows_of

HERE = "benchmarks.scale.ingest"


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


def compact(target: str) -> dict[str, Any]:
    from limaml.interactions.log import InteractionLog

    begun = time.perf_counter()
    done = InteractionLog(target).compact()
    return {"seconds": time.perf_counter() - begun, "rows": done.rows, "before": done.before, "after": done.after}


def retain(target: str, last: int) -> dict[str, Any]:
    from limaml.interactions.log import InteractionLog

    begun = time.perf_counter()
    done = InteractionLog(target).retain("time", last=last)
    return {"seconds": time.perf_counter() - begun, "rows": done.rows, "removed": done.removed, "last": last}


def measure(folder: Path, tasks: int, buckets: int, repeats: int, upkeep: bool) -> dict[str, Any]:
    source, log, copy = str(make_source(folder, tasks)), folder / f"log-{tasks}", folder / "copy.parquet"
    ours, limit = [], []
    for _ in range(repeats):
        shutil.rmtree(log, ignore_errors=True)
        limit.append(in_child(HERE, "rewrite", source=source, target=str(copy)))
        copy.unlink()
        ours.append(in_child(HERE, "append", source=source, target=str(log), buckets=buckets))
    rows = rows_of(tasks)
    assert all(found["rows"] == rows for found in ours)
    shares = [theirs["seconds"] / own["seconds"] for theirs, own in zip(limit, ours, strict=True)]
    found = {
        "tasks": tasks,
        "rows": rows,
        "buckets": buckets,
        "rows_per_s": rows / statistics.median(one["seconds"] for one in ours),
        "rows_per_s_polars": rows / statistics.median(one["seconds"] for one in limit),
        "share": statistics.median(shares),
        "shares": shares,
        # of processor time: what other work on the machine does not change
        "cpu_share": statistics.median(theirs["cpu_s"] / own["cpu_s"] for theirs, own in zip(limit, ours, strict=True)),
        "peak_gib": max(one["peak_gib"] for one in ours),
        "peak_gib_polars": max(one["peak_gib"] for one in limit),
        "ours": ours,
        "limit": limit,
    }
    if upkeep:  # on a copy: the next parts read the log as it was taken in
        kept = folder / "upkeep"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(log, kept, copy_function=os.link)
        found["compact"] = in_child(HERE, "compact", target=str(kept))
        found["retain"] = in_child(HERE, "retain", target=str(kept), last=100)
        shutil.rmtree(kept)
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part ingest", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--buckets", type=int, help="of a new log (64, or as many as keep one at 2 million rows)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--upkeep", action=argparse.BooleanOptionalAction, default=True, help="compact and retain as well"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "scale")
    parser.add_argument("--out", type=Path, default=RESULTS / "ingest.json")
    given = parser.parse_args(arguments)
    for tasks in given.tasks:
        found = measure(given.folder, tasks, given.buckets or buckets_of(tasks), given.repeats, given.upkeep)
        print({name: value for name, value in found.items() if name not in ("ours", "limit")}, flush=True)
        keep(given.out, found)
