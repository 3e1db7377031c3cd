"""The part `replay`: sets with a clock, walked through in time; what of it is kept, and what is demanded of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import Goal, Scale
from benchmarks.evidence.sets import Table
from benchmarks.evidence.units import LIMAML, VERSIONS, Cache, Runnable
from limaml.config import parse_config
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.replay import replay
from limaml.evaluate.summary import LOWER_IS_BETTER
from limaml.interactions import Schema

__all__ = ["ReplayUnit", "Replays", "delta_of", "replay_lines", "replay_result", "replays_of", "value_of"]

Entry = dict[str, Any]
METHOD = "limaml_newton"
NEVER, REFRESHED, RETRAINED = "limaml_never", "limaml_refreshed", "wide_and_deep_retrained"
ITEMS_REFRESHED, ITEMS_STREAMED = "limaml_items_refreshed", "limaml_items_streamed"
SHARE = 1 / 20
RATES = (15, 7, 3)
"""Refreshes in each period of the policies that stream; the tables of policies have the first."""

METRICS = ("auc", "gauc", "log_loss")


@dataclass(frozen=True)
class ReplayUnit:
    """A replay of all policies with `seeds` seeds; a later one with more seeds takes up what an earlier one did.

    Settings are the defaults, of every family alike: what `main` has tuned has seen validation rows of the replay's future.
    """

    dataset: str
    table: str
    rows: str
    schema: str
    seeds: int
    replicates: int

    @cached_property
    def key(self) -> str:
        told = ["replay", self.rows, json.loads(self.schema), METHOD, self.seeds, self.replicates]
        told += [VERSIONS["replay"], LIMAML]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        return f"{self.dataset} · replay · {METHOD} · {self.seeds} seeds"

    def run(self, folder: Path, device: str = "cpu") -> Entry:
        """Replay, keep what the page shows."""
        started = time.perf_counter()
        again = partial(
            replay,
            Path(self.table),
            Schema.model_validate_json(self.schema),
            dataset=self.dataset,
            config=parse_config({"train": {"device": device}}),
            method=METHOD,
            seeds=self.seeds,
            folder=folder.parent / f"replay-{VERSIONS['replay']}",
            workers=1,
        )
        often, *seldom = RATES
        done = again(refreshes=often)
        whole: Any = done.as_json()
        result = {"kind": "replay", "dataset": self.dataset, "seeds": self.seeds, **kept(whole)}
        result["by_rate"] = [_at_rate(result, ITEMS_STREAMED, often)]
        for rate in seldom:
            streamed: Any = again(refreshes=rate, policies=(RETRAINED, ITEMS_STREAMED)).as_json()
            result["by_rate"].append(_at_rate(kept(streamed), ITEMS_STREAMED, rate))
        result["by_rate"].append(_at_rate(result, ITEMS_REFRESHED, 1))
        result["seconds"] = time.perf_counter() - started
        Cache(folder).write(self.key, result, {})
        return result


def kept(whole: Mapping[str, Any]) -> Entry:
    """The part of a replay's JSON that a result file holds: all members of each slice, and AUC by age."""
    values = [
        {key: entry[key] for key in ("protocol", "method", "metric", "value", "low", "high")}
        for entry in whole["summary"]["intervals"]
        if entry["bucket"] == ALL and entry["metric"] in METRICS
    ]
    deltas = [
        {key: entry[key] for key in ("protocol", "method", "baseline", "metric", "delta", "low", "high")}
        for entry in whole["summary"]["deltas"]
        if entry["bucket"] == ALL and entry["metric"] in METRICS
    ]
    costs: dict[str, list[tuple[float, float]]] = {}
    for cost in whole["costs"]:
        costs.setdefault(cost["policy"], []).append((cost["first"], cost["total"]))
    mean = {p: [sum(c) / len(c) for c in zip(*all_of, strict=True)] for p, all_of in costs.items()}
    periods = ("train_end", "start", "end", "rows", "tasks", "rows_of_new_tasks", "rows_of_new_items")
    shown: Entry = {
        "method": whole["method"],
        "policies": whole["policies"],
        "train_rows": whole["train_rows"],
        "period_length": whole["period_length"],
        "periods": [{key: period[key] for key in periods if key in period} for period in whole["periods"]],
        "values": values,
        "deltas": deltas,
        "seconds_first": {policy: first for policy, (first, _) in mean.items()},
        "seconds_after": {policy: total for policy, (_, total) in mean.items()},
        "cost_ratio": whole["cost_ratio"],
        "by_age": [_aged(entry) for entry in whole["by_age"] if entry["metric"] in METRICS],
        "notes": whole["notes"],
    }
    rounded: Entry = _rounded(shown)
    return rounded


def _at_rate(result: Entry, policy: str, refreshes: int) -> Entry:
    """What so many refreshes of members and items in each period are worth, and cost, beside training again."""
    delta = delta_of(result, policy, RETRAINED, "auc")
    assert delta is not None
    return {"refreshes": refreshes, "auc": list(delta), "cost_ratio": result["cost_ratio"][policy]}


def _aged(entry: Mapping[str, Any]) -> Entry:
    return {k: v for k, v in entry.items() if k not in ("dataset", "baseline", "value", "low", "high")}


def _rounded(value: Any) -> Any:
    """Six decimals are enough for a result file."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 6) if isinstance(value, float) else value


@dataclass
class Replays(Goal):
    """A set's replay."""

    table: Table
    seeds: int
    replicates: int = 500

    def unit(self) -> ReplayUnit:
        table = self.table
        schema = table.schema.model_dump_json()
        return ReplayUnit(table.which.name, str(table.path), table.digest, schema, self.seeds, self.replicates)

    def units(self, cache: Cache) -> Sequence[Runnable]:
        return [self.unit()]


def replays_of(tables: Sequence[Table], scale: Scale, parts: Sequence[str]) -> list[Replays]:
    """The goals of the part: every set with a clock with one seed, then with all."""
    if "replay" not in parts:
        return []
    mine = scale.of_part([table for table in tables if table.which.clock], "replay")
    counts = dict.fromkeys((1, scale.replay_seeds))
    return [Replays(table, seeds, part="replay", first=seeds == 1) for seeds in counts for table in mine]


def replay_result(table: Table, cache: Cache, seeds: Sequence[int]) -> Entry | None:
    """What the cache holds of a set's replay: the one with the most seeds."""
    for count in sorted(seeds, reverse=True):
        found = cache.get(Replays(table, count).unit().key)
        if found is not None and "error" not in found:
            return {key: value for key, value in found.items() if key not in ("kind", "dataset")}
    return None


def delta_of(
    result: Mapping[str, Any], method: str, baseline: str, metric: str, protocol: str = "replay"
) -> tuple[float, float | None, float | None] | None:
    """(method − baseline, low, high); also where the file holds it the other way round."""
    for entry in result["deltas"]:
        if (entry["protocol"], entry["metric"]) != (protocol, metric) or entry["delta"] is None:
            continue
        if (entry["method"], entry["baseline"]) == (method, baseline):
            return entry["delta"], entry["low"], entry["high"]
        if (entry["method"], entry["baseline"]) == (baseline, method):
            low, high = entry["low"], entry["high"]
            return -entry["delta"], None if high is None else -high, None if low is None else -low
    return None


def value_of(result: Mapping[str, Any], method: str, metric: str, protocol: str = "replay") -> float | None:
    """The metric of a policy in a slice."""
    for entry in result["values"]:
        if (entry["protocol"], entry["method"], entry["metric"]) == (protocol, method, metric):
            return float(entry["value"]) if entry["value"] is not None else None
    return None


def better(found: tuple[float, float | None, float | None] | None, metric: str) -> bool | None:
    """Whether a difference's interval lies on the good side of zero; None where there is none."""
    if found is None or found[1] is None or found[2] is None:
        return None
    return found[2] < 0 if metric in LOWER_IS_BETTER else found[1] > 0


def affordable(result: Entry) -> Entry | None:
    """The most refreshes in each period that cost at most `SHARE` of training again; None where none does."""
    rates = [rate for rate in result.get("by_rate", ()) if rate["cost_ratio"] <= SHARE]
    return max(rates, key=lambda rate: int(rate["refreshes"]), default=None)


def replay_lines(results: Mapping[str, Entry]) -> Iterator[tuple[str, bool | None, str]]:
    """The demands on the replay: (demand, met, found)."""
    there = {name: result["replay"] for name, result in results.items() if "replay" in result}
    demands = (
        ("refreshing each period beats never refreshing", REFRESHED, NEVER),
        ("refreshing each period beats wide-and-deep IDs retrained each period", REFRESHED, RETRAINED),
        ("the same with items as a second task type, refreshed like members", ITEMS_REFRESHED, RETRAINED),
        (
            "members and items refreshed as their interactions come, within each period, beat it",
            ITEMS_STREAMED,
            RETRAINED,
        ),
    )
    for said, policy, other in demands:
        demand = f"`replay`: {said}, in AUC, on every set"
        found = {name: delta_of(result, policy, other, "auc") for name, result in there.items()}
        known = {name: delta for name, delta in found.items() if delta is not None}
        bad = [f"{name} ({delta[0]:+.4f})" for name, delta in known.items() if not better(delta, "auc")]
        if not known:
            yield demand, None, "not measured yet"
        else:
            rest = f"; not on {', '.join(bad)}" if bad else ""
            yield demand, not bad, f"on {len(known) - len(bad)} of {len(known)}{rest}"
    demand = "`replay`: members and items refreshed as often as 1/20 of the cost of retraining wide-and-deep IDs allows beat it, in AUC, on every set"
    chosen = {name: rate for name, result in there.items() if (rate := affordable(result)) is not None}
    if not chosen:
        yield demand, None, "not measured yet"
    else:
        won = {name: better(tuple(rate["auc"]), "auc") for name, rate in chosen.items()}
        told = ", ".join(f"{n} {r['auc'][0]:+.4f} at {r['refreshes']} a period" for n, r in chosen.items())
        yield demand, all(won.values()), f"surely on {sum(map(bool, won.values()))} of {len(won)}: {told}"
    for said, policy in (("refreshing", REFRESHED), ("refreshing members and items", ITEMS_REFRESHED)):
        ratios = {name: result["cost_ratio"].get(policy) for name, result in there.items()}
        ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        demand = f"`replay`: {said} costs at most 1/20 of retraining wide-and-deep IDs, on every set"
        if not ratios:
            yield demand, None, "not measured yet"
        else:
            shown = ", ".join(f"{name} 1/{1 / ratio:.0f}" for name, ratio in ratios.items())
            yield demand, all(ratio <= SHARE for ratio in ratios.values()), shown
