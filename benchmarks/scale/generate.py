"""Every member's embedding from a log on disk: by one process and several, here and on Ray; published; and refreshed after one
member in a hundred acted. Each in a process of its own. The log is the one that the part `ingest` left, if it did."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.scale.measure import RESULTS, ROOT, in_child, keep
from benchmarks.scale.workload import DAYS, ITEMS, START, buckets_of, items, make_source, members, named, rows_of
from limaml.interactions.log import InteractionLog

HERE = "benchmarks.scale.generate"
SAMPLE = 5_000  # members that the model is trained on
ACTED = 0.01


def prepare(folder: str, source: str, tasks: int, buckets: int) -> dict[str, Any]:
    """A run folder: the log, the side tables, and a model of the default settings, trained on some members."""
    import limaml
    from limaml.config import parse_config

    place = Path(folder)
    log = InteractionLog(place / "log", "user_id", None if (place / "log").exists() else buckets)
    if not log.rows:
        log.append_all([source])
    (place / "side").mkdir()
    tables = {"user_id": members(tasks), "item_id": items()}
    for key, table in tables.items():
        table.write_parquet(place / "side" / f"{key}.parquet")
    (place / "side" / "tables.json").write_text(json.dumps({key: f"{key}.parquet" for key in tables}))
    chosen = named(np.linspace(0, tasks - 1, min(SAMPLE, tasks)).astype(np.int64), tasks)
    joined = limaml.join_tables(log.read(chosen.tolist()), tables)
    schema = limaml.infer_schema(
        joined.frame,
        task="user_id",
        row="item_id",
        time="time",
        label="click",
        task_columns={"user_id": joined.columns["user_id"]},
        row_columns=joined.columns["item_id"],
        exclude=["watched"],
    ).schema
    limaml.train(joined.frame, schema, parse_config({"train": {"epochs": 1}})).save(place / "model")
    written = sum(file.stat().st_size for file in (place / "log").rglob("*.parquet"))
    told = {"rows": log.rows, "buckets": log.bucket_count, "log_bytes": written}
    (place / "prepared.json").write_text(json.dumps(told))
    return told


def generate(folder: str, engine: str, workers: int, keep: bool) -> dict[str, Any]:
    """All shards, made anew; `keep` leaves them."""
    import limaml
    from limaml.embeddings.generation import generation
    from limaml.embeddings.shards import Made

    place, peaks = Path(folder), dict[int, float]()
    shutil.rmtree(place / "generation", ignore_errors=True)
    trained = limaml.load_model(place / "model")

    first: list[float] = []

    def look(_name: str, _done: int, _of: int) -> None:
        first.append(time.perf_counter())
        for process in {*peaks, os.getpid(), *_children()}:
            peaks[process] = max(peaks.get(process, 0.0), _peak_gib(process))

    begun = time.perf_counter()
    with generation(
        InteractionLog(place / "log"),
        trained,
        place / "model",
        place / "generation",
        side=place / "side",
        engine_name=engine,  # type: ignore[arg-type]
        workers=workers,
        progress=look,
    ) as made:
        ended = time.perf_counter()
        shards: Sequence[Made] = made.shards
        tasks = sum(shard.tasks for shard in shards)
        if not keep:
            made.clear()
    seconds, alone = ended - begun, min(shard.seconds["all"] for shard in shards)
    spent = {what: sum(shard.seconds[what] for shard in shards) for what in shards[0].seconds}
    return {
        "seconds": seconds,
        "starting_s": max(0.0, first[0] - begun - alone),  # processes, imports, the model; until the first job begins
        "working_s": min(seconds, ended - first[0] + alone),
        "tasks": tasks,
        "tasks_per_s": tasks / seconds,
        "spent": spent,
        "in_engine": spent["adapt"] / spent["all"],
        "workers_peak_gib": max(peaks.values()),
        "processes": len({shard.process for shard in shards}),
    }


def publish(folder: str) -> dict[str, Any]:
    """The shards that are there into a new store."""
    import limaml
    from limaml.embeddings.generation import generation

    place = Path(folder)
    shutil.rmtree(place / "store", ignore_errors=True)
    with (
        limaml.open_store(place / "store") as store,
        generation(
            InteractionLog(place / "log"),
            limaml.load_model(place / "model"),
            place / "model",
            place / "generation",
            side=place / "side",
        ) as made,
    ):
        assert made.kept == len(made.shards)
        begun = time.perf_counter()
        published = made.publish(store, "model")
        return {"seconds": time.perf_counter() - begun, "bytes": published.bytes}


def refresh(folder: str, tasks: int) -> dict[str, Any]:
    """One member in a hundred, whoever they are, acts once; and then others, for whom the process is warm."""
    import limaml
    from limaml.embeddings.refresher import Refresher
    from limaml.interactions.side_tables import SideTables

    place = Path(folder)
    log = InteractionLog(place / "log")
    seconds = list[float]()
    with (
        limaml.open_store(place / "store") as store,
        Refresher(store, "model", log, place / "windows", SideTables(place / "side")) as refresher,
    ):
        begun = time.perf_counter()
        refresher.windows.catch_up()
        made_windows = time.perf_counter() - begun
        rng = np.random.default_rng(9)
        for _ in range(2):
            acting = rng.choice(tasks, int(ACTED * tasks), replace=False)
            now = START + DAYS * 86_400 + log.position
            log.append(
                pl.DataFrame(
                    {
                        "user_id": acting,
                        "item_id": rng.integers(0, ITEMS, len(acting)),
                        "time": np.full(len(acting), now),
                        "watched": rng.exponential(30, len(acting)).astype(np.float32),
                        "click": rng.random(len(acting)) < 0.3,
                    }
                )
            )
            begun = time.perf_counter()
            (version,) = refresher.run().versions
            seconds.append(time.perf_counter() - begun)
            assert version.tasks == len(acting)
    return {
        "seconds": seconds[0],
        "warm_seconds": seconds[1],
        "tasks": version.tasks,
        "windows_s": made_windows,
    }


def measure(
    folder: Path,
    tasks: int,
    asked: Sequence[tuple[str, int]],
    buckets: int,
    repeats: int,
    refreshed: bool,
) -> dict[str, Any]:
    place, ingested = folder / f"generate-{tasks}", folder / f"log-{tasks}"
    if not (place / "prepared.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        source = str(make_source(folder, tasks))
        if ingested.exists() and InteractionLog(ingested).rows == rows_of(tasks):
            shutil.copytree(ingested, place / "log", copy_function=os.link)  # a log's files are never changed
        in_child(HERE, "prepare", folder=str(place), source=source, tasks=tasks, buckets=buckets)
    prepared = json.loads((place / "prepared.json").read_text())
    runs: list[dict[str, Any]] = []
    for turn in range(repeats):  # in turns, so that what else the machine does falls on all
        for engine, number in asked:
            last = turn == repeats - 1 and (engine, number) == asked[-1]
            found = in_child(HERE, "generate", folder=str(place), engine=engine, workers=number, keep=last)
            runs.append({"engine": engine, "workers": number, **found})
            print({name: value for name, value in runs[-1].items() if name != "spent"}, flush=True)
    best = {(run["engine"], run["workers"]): run for run in sorted(runs, key=lambda run: -run["seconds"])}
    published = in_child(HERE, "publish", folder=str(place))
    touched = in_child(HERE, "refresh", folder=str(place), tasks=tasks) if refreshed else None
    shutil.rmtree(place)  # the log has the refresh's rows now
    one = best[asked[0]]
    return {
        "tasks": tasks,
        "embedded": one["tasks"],
        **prepared,
        "in_engine": one["in_engine"],
        "tasks_per_s": {f"{engine} {number}": run["tasks_per_s"] for (engine, number), run in best.items()},
        "two_against_one": {
            engine: {what: best[engine, 1][what] / best[engine, 2][what] for what in ("seconds", "working_s")}
            for engine in dict.fromkeys(engine for engine, _ in asked)
            if (engine, 1) in best and (engine, 2) in best
        },
        "ray_against_local": {
            str(number): {
                what: best["ray", number][what] / best["local", number][what] for what in ("seconds", "working_s")
            }
            for number in sorted({number for _, number in asked})
            if ("ray", number) in best and ("local", number) in best
        },
        "workers_peak_gib": max(run["workers_peak_gib"] for run in runs),
        "publish": published,
        **({} if touched is None else {"refresh": touched}),
        "runs": runs,
    }


def _children() -> list[int]:
    """All processes below this one, and those of Ray, which has them adopted."""
    found, parents = list[int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        process = int(stat.parent.name)
        parents[process] = int(rest.split()[1])
        if name.startswith("ray::"):
            found.append(process)
    for process in parents:
        above = parents[process]
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if above == os.getpid():
            found.append(process)
    return found


def _peak_gib(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
    except (OSError, StopIteration):
        return 0.0


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part generate", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument(
        "--runs",
        nargs="+",
        default=["local:1", "local:2", "ray:1", "ray:2"],
        help="engines (local, ray) and their workers; the first is what a refresh is compared with",
    )
    parser.add_argument("--buckets", type=int, help="of a new log (64, or as many as keep one at 2 million rows)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--refresh", action=argparse.BooleanOptionalAction, default=True, help="windows, and a refresh, as well"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "scale")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    given = parser.parse_args(arguments)
    asked = [(engine, int(number)) for engine, _, number in (run.partition(":") for run in given.runs)]
    for tasks in given.tasks:
        found = measure(
            given.folder,
            tasks,
            asked,
            given.buckets or buckets_of(tasks),
            given.repeats,
            refreshed=given.refresh,
        )
        print({name: value for name, value in found.items() if name != "runs"}, flush=True)
        keep(given.out, found)
