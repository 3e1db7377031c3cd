"""The part `implicit`: only what members chose is known; negatives are sampled to learn from, all candidates are ranked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.evidence.plan import MAIN, PROTOCOLS, Goal, Scale
from benchmarks.evidence.results import Entry
from benchmarks.evidence.sets import Table, source_of
from benchmarks.evidence.units import Cache, Runnable, Unit, trained_on, trained_where
from limaml.config import parse_config
from limaml.errors import LimamlError
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.compare import Job, work
from limaml.evaluate.ranking import Ranked
from limaml.evaluate.ranking_summary import rank_bootstrap
from limaml.interactions.digest import content_digest
from limaml.interactions.implicit import prepare_implicit

__all__ = ["METHODS", "METRICS", "RankUnit", "Ranking", "implicit_result", "make_choices", "rankings_of"]

METHODS = ("popularity", *MAIN)
METRICS = ("ndcg_10", "recall_20", "mrr")
NEGATIVES = 4
_COUNTS = ("task", "support", "positives")


@dataclass(frozen=True)
class RankUnit(Unit):
    """One training on choices and sampled negatives; a test ranks all candidates."""

    def run(self, folder: Path, device: str = "cpu") -> dict[str, Any]:
        """Train, write what came of it, and return it."""
        arrays: dict[str, Any] = {}
        found: dict[str, Any] = {}
        started, wall = time.process_time(), time.perf_counter()
        try:
            job = Job(self.protocol, self.method, self.seed, self.epochs)
            answer = work(job, self.table, self.schema, self.dataset, trained_on(device, self.config))
            found = {"cpu_seconds": time.process_time() - started, "seconds": time.perf_counter() - wall}
            found["epochs"] = max(1, answer.best)
            if self.epochs is not None:
                (ranked,) = answer.ranked
                arrays = {name: getattr(ranked, name) for name in _COUNTS} | dict(ranked.values)
        except LimamlError as error:
            found["error"] = str(error)
        of = {"dataset": self.dataset, "protocol": self.protocol, "method": self.method, "seed": self.seed}
        result = {"kind": self.kind, **of, **trained_where(device), **found}
        Cache(folder).write(self.key, result, arrays)
        return result

    def ranked(self, cache: Cache) -> Ranked:
        """What a test found."""
        with np.load(cache.folder / f"{self.key}.npz") as kept:
            counts = {name: kept[name].astype(np.int64) for name in _COUNTS}
            values = {name: kept[name].astype(np.float64) for name in kept.files if name not in _COUNTS}
        return Ranked(self.dataset, self.protocol, self.seed, self.method, **counts, values=values)


def make_choices(table: Table, data: Path, members: int | None, out: Path) -> Table:
    """The positives of a set as a table of their own."""
    which = table.which
    prepared = prepare_implicit(
        **source_of(which, data),
        task=[which.task],
        row=which.row,
        time=which.time,
        label=which.label,
        exclude=which.exclude,
        max_tasks=members,
    )
    path = out / f"{which.name}{'' if members is None else f'-{members}'}-choices.parquet"
    part = path.with_suffix(".part")
    prepared.frame.write_parquet(part)
    part.replace(path)
    kept: pl.DataFrame = prepared.frame
    return replace(
        table,
        path=path,
        schema=prepared.schema,
        digest=content_digest(kept),
        rows=kept.height,
        members=kept[which.task].n_unique(),
        items=kept[which.row].n_unique(),
        positive=1.0,
        notes=prepared.notes,
    )


@dataclass
class Ranking(Goal):
    """A method on a set's choices, with default settings: only the number of epochs is found on validation rows."""

    table: Table
    method: str
    seeds: range

    def unit(self, protocol: str, seed: int, epochs: int | None) -> RankUnit:
        config = parse_config({"compare": {"implicit": {"negatives": NEGATIVES}}})
        return RankUnit(
            "implicit",
            self.table.which.name,
            str(self.table.path),
            self.table.digest,
            self.table.schema.model_dump_json(),
            protocol,
            self.method,
            seed,
            config.model_dump_json(exclude_unset=True),
            "{}",
            epochs,
        )

    def tests(self, cache: Cache, protocol: str) -> list[RankUnit]:
        """The tests of a protocol; none before the number of epochs is known."""
        found = cache.get(self.unit(protocol, 0, None).key)
        if found is None or "error" in found:
            return []
        return [self.unit(protocol, seed, found["epochs"]) for seed in self.seeds]

    def units(self, cache: Cache) -> Sequence[Runnable]:
        searches = [self.unit(protocol, 0, None) for protocol in PROTOCOLS]
        return [*searches, *(unit for protocol in PROTOCOLS for unit in self.tests(cache, protocol))]


def rankings_of(tables: Sequence[Table], scale: Scale, methods: Sequence[str] | None = None) -> list[Ranking]:
    """The goals of the part, for tables of choices: every set with one seed first."""
    names = [m for m in METHODS if methods is None or m in methods]
    spans = [span for span in (range(1), range(1, scale.implicit_seeds)) if len(span)]
    return [
        Ranking(table, method, seeds, part="implicit", first=seeds.start == 0)
        for seeds in spans
        for table in tables
        for method in names
    ]


def implicit_result(table: Table, cache: Cache, scale: Scale) -> Entry | None:
    """What the cache holds of a set's rankings."""
    goals = rankings_of([table], scale)
    protocols: Entry = {}
    for protocol in PROTOCOLS:
        units = [unit for goal in goals for unit in goal.tests(cache, protocol)]
        done = {unit: result for unit in units if (result := cache.get(unit.key)) is not None and "error" not in result}
        if done:
            protocols[protocol] = _judged([unit.ranked(cache) for unit in done], scale.replicates)
            for method, entry in protocols[protocol]["methods"].items():
                own = [result for unit, result in done.items() if unit.method == method]
                entry |= {"epochs": own[0]["epochs"], "cpu_seconds": float(np.mean([r["cpu_seconds"] for r in own]))}
    if not protocols:
        return None
    counts = {"rows": table.rows, "members": table.members, "items": table.items, "negatives": NEGATIVES}
    return {**counts, "notes": list(table.notes), "protocols": protocols}


def _judged(ranked: Sequence[Ranked], replicates: int) -> Entry:
    draws = rank_bootstrap(ranked, replicates=replicates)
    personal = [m for m in draws.methods if m.startswith("limaml")]

    def three(found: Any) -> list[float | None]:
        return [round(v, 6) if np.isfinite(v) else None for v in (found.value, found.low, found.high)]

    return {
        "seeds": list(draws.seeds),
        "members": float(np.mean([len(item.task) for item in ranked])),
        "methods": {
            method: {"metrics": {metric: three(draws.interval(method, ALL, metric)) for metric in METRICS}}
            for method in draws.methods
        },
        "deltas": {
            method: {
                other: {metric: three(draws.difference(method, other, ALL, metric)) for metric in METRICS}
                for other in draws.methods
                if other != method
            }
            for method in personal
        },
    }
