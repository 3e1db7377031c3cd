"""Tasks a second that a refresh adapts again and publishes, on one core, and where the time goes: `python -m benchmarks.refresh`.

Members with 32 interactions each, features of members and items in side tables, a model trained briefly by `limaml train`, an
LMDB store. A batch is `--batch` events of as many members, appended to the log as a stream does; then `Refresher.run`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import limaml
from limaml.cli import main as command
from limaml.cli.workspace import Workspace
from limaml.embeddings import upsert
from limaml.embeddings.refresher import Refresher
from limaml.embeddings.windows import Windows
from limaml.interactions import Encoder, InteractionLog
from limaml.interactions.side_tables import SideTables

SUPPORT, ITEMS = 32, 2000
OPTIONS = [
    "--task",
    "user_id",
    "--row",
    "item_id",
    "--time",
    "timestamp",
    "--label",
    "click",
    "--no-refit",
    "train.epochs=2",
    "adapt.max_support=32",
]


def trained_run(folder: Path, solver: str) -> Workspace:
    """A run folder with a model, published from few members."""
    made = limaml.make_interactions(tasks=400, items=ITEMS, seed=0)
    tables = {"interactions": made.interactions, "users": made.users, "items": made.items}
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    features = ["--task-features", folder / "users.parquet", "--row-features", folder / "items.parquet"]
    arguments = ["train", folder / "interactions.parquet", *OPTIONS, f"adapt.solver={solver}", *features]
    command([str(a) for a in (*arguments, "--out", folder / "run")])
    command(["embed", str(folder / "run")])
    return Workspace(folder / "run")


def many_members(place: Workspace, folder: Path, members: int, rng: np.random.Generator) -> None:
    """`SUPPORT` interactions of each of `members` new members, in the log; their features in the side table."""
    users = pl.read_parquet(folder / "users.parquet")
    some = users[rng.integers(0, users.height, members)].with_columns(user_id=pl.Series(range(10**6, 10**6 + members)))
    some.write_parquet(folder / "more.parquet")
    place.add_features("user_id", folder / "more.parquet")
    place.log(place.schema).append(events(np.repeat(np.arange(members), SUPPORT), 0, rng))


def events(members: np.ndarray[Any, np.dtype[np.int64]], start: int, rng: np.random.Generator) -> pl.DataFrame:
    n = len(members)
    return pl.DataFrame(
        {
            "user_id": members + 10**6,
            "item_id": rng.integers(0, ITEMS, n),
            "timestamp": 2_000_000_000 + start + np.arange(n),
            "click": rng.integers(0, 2, n).astype(np.int8),
        }
    )


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the processor time that the steps of a refresh take."""
    steps: list[tuple[Any, str, str]] = [
        (InteractionLog, "append", "append to the log"),
        (Windows, "catch_up", "catch windows up"),
        (Windows, "changed_since", "list what changed"),
        (Windows, "read", "read windows"),
        (SideTables, "join", "join side tables"),
        (Encoder, "encode", "encode"),
        (upsert, "generate", "adapt"),
    ]
    held = [(place, name, getattr(place, name)) for place, name, _ in steps]

    def wrapped(call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                seconds[what] += time.process_time() - begun

        return run

    for (place, name, call), (_, _, what) in zip(held, steps, strict=True):
        setattr(place, name, wrapped(call, what))
    try:
        yield
    finally:
        for place, name, call in held:
            setattr(place, name, call)


def measure(refresher: Refresher, store: Any, log: InteractionLog, given: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    seconds: dict[str, float] = defaultdict(float)
    upsert_call = store.upsert

    def timed_upsert(*arguments: Any, **named: Any) -> Any:
        begun = time.process_time()
        try:
            return upsert_call(*arguments, **named)
        finally:
            seconds["upsert"] += time.process_time() - begun

    store.upsert = timed_upsert
    rates, tasks, whole, busy = [], 0, 0.0, 0.0
    for number in range(given.batches + 3):
        if number == 3:  # the first ones warm up
            seconds.clear()
            tasks, whole, busy = 0, 0.0, 0.0
        members = rng.choice(given.members, given.batch, replace=False)
        batch = events(members, (number + 1) * 10**6, rng)
        begun, worked = time.perf_counter(), time.process_time()
        with timed(seconds):
            log.append(batch, positions={"bench": number + 1})
            report = refresher.run()
        took = time.perf_counter() - begun
        applied = sum(report.versions[0].applied.values())
        assert applied == given.batch, report
        tasks, whole, busy = tasks + applied, whole + took, busy + time.process_time() - worked
        rates.append(applied / took)
    seconds["the rest"] = busy - sum(seconds.values())
    return {
        "tasks": tasks,
        "tasks_per_second": tasks / whole,
        "tasks_per_second_of_processor": tasks / busy,
        "slowest_batch": min(rates[3:]),
        "microseconds_per_task": {name: 1e6 * took / tasks for name, took in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=1000, help="events, each of another member")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--solver", choices=("newton", "gradient"), default="newton")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refresh.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = trained_run(folder, given.solver)
        many_members(place, folder, given.members, np.random.default_rng(0))
        log = place.log(place.schema)
        with place.store() as store, place.refresher(store) as refresher:
            begun = time.perf_counter()
            first = refresher.run()
            took = time.perf_counter() - begun
            found = {
                "members": given.members,
                "batch": given.batch,
                "solver": given.solver,
                "first_run": {"rows": first.caught_up.rows, "tasks": first.versions[0].tasks, "seconds": took},
                **measure(refresher, store, log, given),
            }
    print(
        f"{found['tasks_per_second']:,.0f} tasks a second (slowest batch {found['slowest_batch']:,.0f}), and "
        f"{found['tasks_per_second_of_processor']:,.0f} a second of processor time: what a core gives that has nothing else "
        "to do. µs of processor time a task:"
    )
    for step, took in sorted(found["microseconds_per_task"].items(), key=lambda entry: -entry[1]):
        print(f"  {step:20} {took:7.1f}")
    print(
        f"The first run, windows of {first.caught_up.rows:,} rows and {first.versions[0].tasks:,} tasks: {found['first_run']['seconds']:.1f} s"
    )
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps({**results, given.solver: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
