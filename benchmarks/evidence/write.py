"""Result files and HTML reports of all sets, from what the cache holds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.evidence.implicits import implicit_result
from benchmarks.evidence.plan import Judging, Scale, goals_of
from benchmarks.evidence.replays import replay_result
from benchmarks.evidence.results import Entry, read_results, result_of, tested_units, write_result
from benchmarks.evidence.sets import PARTS, Table, registered
from benchmarks.evidence.units import Cache, version_of
from limaml.cli.environment import environment
from limaml.errors import MissingExtra
from limaml.evaluate import summarise, write_report
from limaml.evaluate.compare import start_worker
from limaml.evaluate.machine import processor_name

__all__ = ["in_order", "write_results"]

COMMAND = "python -m benchmarks.evidence --data DIR"
_REPORT_REPLICATES = 200


def write_results(
    tables: Sequence[Table],
    scale: Scale,
    cache: Path,
    results: Path,
    out: Path,
    workers: int,
    choices: Mapping[str, Table] | None = None,
) -> list[Path]:
    """A result file per set in `results` (`choices`: set → its table of choices), an HTML report per set in `out`. Parts that the cache does not hold are kept as
    the result files have them. The paths that were written."""
    known = read_results(results)
    made_on = {"machine": _machine(), "versions": environment()}
    choices = choices or {}
    jobs = [(table, scale, cache, known.get(table.which.name), out, choices.get(table.which.name)) for table in tables]
    if workers == 1:
        found = [_result(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (None,)) as pool:
            found = [answer.result() for answer in [pool.submit(_result, *job) for job in jobs]]
    return [
        write_result(results, table.which.name, {**result, **made_on})
        for table, result in zip(tables, found, strict=True)
    ]


def in_order(results: Mapping[str, Entry]) -> dict[str, Entry]:
    """Registered sets in the order of `sets.yaml`, others behind them."""
    order = [name for name in registered() if name in results]
    return {name: results[name] for name in [*order, *(n for n in results if n not in order)]}


def _result(table: Table, scale: Scale, folder: Path, before: Entry | None, out: Path, choices: Table | None) -> Entry:
    cache = Cache(folder)
    cache.load()
    goals = goals_of([table], scale, PARTS)
    result = result_of(table, goals, cache, scale, before)
    replayed = replay_result(table, cache, range(1, scale.replay_seeds + 1))
    if replayed is not None:
        result["replay"], result["measured_by"]["replay"] = replayed, version_of("replay")
    ranked = None if choices is None else implicit_result(choices, cache, scale)
    if ranked is not None:
        result["implicit"], result["measured_by"]["implicit"] = ranked, version_of("implicit")
    _report(table, goals, cache, result, before, out / f"{table.which.name}.html")
    return result


def _report(
    table: Table, goals: Sequence[Judging], cache: Cache, result: Entry, before: Entry | None, path: Path
) -> None:
    """The page that `limaml compare` writes, unless it is there and nothing has changed."""
    old, new = ({} if entry is None else entry["protocols"] for entry in (before, result))
    if path.exists() and all(old.get(p, {}).get("inputs") == new[p]["inputs"] for p in new):
        return
    predictions = [cache.predictions(unit) for units in tested_units(table, goals, cache).values() for unit in units]
    if not predictions:
        return
    summary = summarise(predictions, replicates=_REPORT_REPLICATES)
    try:
        write_report(
            path, summary, predictions, notes=result["set"]["notes"], environment=environment(), command=COMMAND
        )
    except MissingExtra as missing:
        print(f"No {path.name}: {missing}")


def _machine() -> dict[str, Any]:
    return {"cpu": processor_name(), "cores": os.cpu_count()}
