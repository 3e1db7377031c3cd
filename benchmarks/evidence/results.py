"""From the cache to one small result file per set: metrics, intervals, paired differences, p-values, costs, settings."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.ablations import reading_name
from benchmarks.evidence.plan import PROTOCOLS, Chosen, Judging, Scale
from benchmarks.evidence.sets import Table, describe
from benchmarks.evidence.units import Cache, Unit, version_of
from limaml.evaluate import Predictions, bootstrap, quartiles
from limaml.evaluate.bootstrap import ALL, Interval, Replicates
from limaml.evaluate.predictions import QUARTILES

__all__ = ["HALVES", "METRICS", "Entry", "judge", "picked", "read_results", "result_of", "tested_units", "write_result"]

METRICS = ("auc", "gauc", "log_loss")
HALVES = ("less active half", "more active half")
FORMAT = 1

Entry = dict[str, Any]


def result_of(
    table: Table, goals: Sequence[Judging], cache: Cache, scale: Scale, before: Mapping[str, Any] | None = None
) -> Entry:
    """All that is known of a set. What `before`, the result file as it was, already says of the same units is kept, and so are parts of
    which the cache holds nothing; `measured_by` has the version of the methods (`version_of`) of each part."""
    mine = [goal for goal in goals if goal.table.which.name == table.which.name]
    plain = [goal for goal in mine if goal.variant is None]
    chosen = _choices(plain, cache)
    tests = tested_units(table, goals, cache)
    before = before or {}
    result: Entry = {"protocols": {}, "chosen": {}, "picked": None, "ablations": [], **before}
    result |= {"format": FORMAT, "scale": asdict(scale), "set": describe(table)}
    result["measured_by"] = dict(before.get("measured_by", {}))
    if any(tests.values()):
        result["protocols"], result["measured_by"]["main"] = {}, version_of("trial")
        result["chosen"] = {method: _chosen(found) for method, found in chosen.items()}
        result["picked"] = picked(chosen)
    for protocol, units in tests.items():
        if units:
            inputs = _inputs(units, scale)
            old = before.get("protocols", {}).get(protocol, {})
            judged = old if old.get("inputs") == inputs else judge(_load(cache, units), scale.replicates)
            judged["inputs"] = inputs
            for method in judged["methods"]:
                own = [cache.get(unit.key) or {} for unit in units if unit.method == method]
                judged["methods"][method]["cpu_seconds"] = float(np.mean([r["cpu_seconds"] for r in own]))
                judged["methods"][method]["epochs"] = own[0]["epochs"]
                judged["methods"][method]["trained_on"] = sorted({r["trained_on"] for r in own if "trained_on" in r})
            result["protocols"][protocol] = judged
    ablations = _ablations([goal for goal in mine if goal.variant is not None], plain, cache, scale, before)
    topics = {(e["topic"], e["method"]) for e in ablations}
    kept = [e for e in before.get("ablations", ()) if (e["topic"], e["method"]) not in topics]
    if ablations and not kept:
        result["measured_by"]["ablations"] = version_of("trial")
    result["ablations"] = [*ablations, *kept]
    result["date"] = datetime.date.today().isoformat()
    return result


def _choices(goals: Sequence[Judging], cache: Cache) -> dict[str, Chosen]:
    found = {goal.method: goal.chosen(cache) for goal in goals}
    return {method: chosen for method, chosen in found.items() if isinstance(chosen, Chosen)}


def tested_units(table: Table, goals: Sequence[Judging], cache: Cache) -> dict[str, list[Unit]]:
    """Protocol → the tests of a set's methods that the cache holds, variants left out."""
    tests: dict[str, list[Unit]] = {protocol: [] for protocol in PROTOCOLS}
    for goal in goals:
        if goal.variant is None and goal.table.which.name == table.which.name:
            chosen = goal.chosen(cache)
            if isinstance(chosen, Chosen):
                for unit in goal.tests(chosen):
                    if _good(cache, unit):
                        tests[unit.protocol].append(unit)
    return tests


def picked(chosen: Mapping[str, Chosen]) -> str | None:
    """The solver that validation rows like better on this set."""
    solvers = [chosen[m] for m in ("limaml_newton", "limaml_gradient") if m in chosen]
    return min(solvers, key=lambda one: one.loss).method if solvers else None


def judge(predictions: Sequence[Predictions], replicates: int) -> Entry:
    """Metrics of one protocol: for all members, by quarter and by half of their activity, with paired differences of every
    personalised method to every other method."""
    draws = bootstrap(predictions, replicates=replicates, metrics=METRICS)
    halves = bootstrap(predictions, replicates=replicates, metrics=METRICS, buckets=HALVES, assign=_half)
    plain = bootstrap(predictions, replicates=0, metrics=("gauc_coverage", "calibration"), buckets=())
    places: list[tuple[Replicates, str]] = [(draws, bucket) for bucket in (ALL, *QUARTILES)]
    places += [(halves, bucket) for bucket in HALVES]
    one_per_seed = list({p.seed: p for p in predictions}.values())
    found: Entry = {
        "seeds": list(draws.seeds),
        "rows": float(np.mean([len(p) for p in one_per_seed])),
        "tasks": float(np.mean([len(np.unique(p.task)) for p in one_per_seed])),
        "support": _supports(one_per_seed),
        "coverage": plain.interval(draws.methods[0], ALL, "gauc_coverage").value,
        "replicates": replicates,
        "methods": {},
        "deltas": {},
    }
    for method in draws.methods:
        metrics = {b: {m: _three(d.interval(method, b, m)) for m in METRICS} for d, b in places}
        found["methods"][method] = {
            "seeds": sum(p.method == method for p in predictions),
            "metrics": metrics,
            "calibration": _number(plain.interval(method, ALL, "calibration").value),
        }
    for method in draws.methods:
        if method.startswith("limaml"):
            others = [other for other in draws.methods if other != method]
            found["deltas"][method] = {other: _differences(places, method, other) for other in others}
    return found


def _differences(places: Sequence[tuple[Replicates, str]], method: str, other: str) -> Entry:
    """bucket → metric → [difference, low, high, p]."""
    return {
        bucket: {
            metric: [*_three(d.difference(method, other, bucket, metric)), _number(d.p_value(method, other, bucket, metric))]
            for metric in METRICS
        }
        for d, bucket in places
    }  # fmt: skip


def _half(support: Any) -> Any:
    return quartiles(support) // 2


def _supports(items: Sequence[Predictions]) -> Entry:
    """bucket → [fewest, most] support rows of its members, over all seeds."""
    found: Entry = {}
    for item in items:
        support = item.support[np.unique(item.task, return_index=True)[1]]
        bucket = quartiles(support)
        for position, name in enumerate(QUARTILES):
            inside = support[bucket == position]
            if len(inside):
                low, high = found.get(name, (math.inf, 0))
                found[name] = [min(low, int(inside.min())), max(high, int(inside.max()))]
    return found


def _ablations(
    variants: Sequence[Judging], plain: Sequence[Judging], cache: Cache, scale: Scale, before: Mapping[str, Any]
) -> list[Entry]:
    """One entry per variant: its metrics and its differences to the unchanged method, on the same seeds. A topic of which nothing
    but the unchanged method was measured is left out."""
    measured: set[tuple[str, str]] = set()
    known = {(e["topic"], e["label"], e["inputs"]): e for e in before.get("ablations", ()) if "inputs" in e}
    found: list[Entry] = []
    for goal in variants:
        assert goal.variant is not None
        chosen = goal.chosen(cache)
        own = next((p for p in plain if p.method == goal.method), None)
        base = None if own is None else own.chosen(cache)
        if isinstance(chosen, list) or own is None or base is None or isinstance(base, list):
            continue
        tests = [u for u in goal.tests(chosen) if _good(cache, u)]
        seeds = {(u.protocol, u.seed) for u in tests}
        against = [u for g in plain if g.method == goal.method for u in g.tests(base)]
        against = [u for u in against if (u.protocol, u.seed) in seeds and _good(cache, u)]
        if len(against) != len(tests) or not tests:
            continue
        if {u.key for u in tests} != {u.key for u in against}:
            measured.add((goal.variant.topic, goal.method))
        entry: Entry = {"topic": goal.variant.topic, "label": goal.variant.label, "method": goal.method}
        entry |= {"settings": dict(goal.variant.settings), "inputs": _inputs([*tests, *against], scale)}
        if goal.variant.readings:
            read = _readings(goal.variant.readings, tests, cache, scale, entry)
            measured |= {(one["topic"], one["method"]) for one in read}
            found += read
            continue
        if (old := known.get((goal.variant.topic, goal.variant.label, entry["inputs"]))) is not None:
            found.append(old)
            continue
        entry["protocols"] = {
            protocol: _against(
                [cache.predictions(u, "variant") for u in tests if u.protocol == protocol],
                [cache.predictions(u, "unchanged") for u in against if u.protocol == protocol],
                scale.replicates,
            )
            for protocol in PROTOCOLS
            if any(u.protocol == protocol for u in tests)
        }
        entry["cpu_seconds"] = float(np.mean([(cache.get(u.key) or {})["cpu_seconds"] for u in tests]))
        found.append(entry)
    return [entry for entry in found if (entry["topic"], entry["method"]) in measured]


def _readings(
    readings: Sequence[str], tests: Sequence[Unit], cache: Cache, scale: Scale, entry: Mapping[str, Any]
) -> list[Entry]:
    """The same trained models, read in other ways."""
    found = []
    for reading in readings:
        topic, label = reading_name(reading)
        protocols = {
            protocol: _against(
                [cache.predictions(u, "variant", reading) for u in tests if u.protocol == protocol],
                [cache.predictions(u, "unchanged") for u in tests if u.protocol == protocol],
                scale.replicates,
            )
            for protocol in dict.fromkeys(u.protocol for u in tests)
        }
        found.append(
            {"topic": topic, "label": label, "method": entry["method"], "settings": {}, "protocols": protocols}
        )
    return found


def _against(variant: Sequence[Predictions], unchanged: Sequence[Predictions], replicates: int) -> Entry:
    draws = bootstrap([*variant, *unchanged], replicates=replicates, metrics=METRICS, buckets=())
    return {
        metric: {
            "value": _three(draws.interval("variant", ALL, metric))[0],
            "delta": [
                *_three(draws.difference("variant", "unchanged", ALL, metric)),
                _number(draws.p_value("variant", "unchanged", ALL, metric)),
            ],
        }
        for metric in METRICS
    }


def _load(cache: Cache, units: Sequence[Unit]) -> list[Predictions]:
    return [cache.predictions(unit) for unit in units]


def _good(cache: Cache, unit: Unit) -> bool:
    result = cache.get(unit.key)
    return result is not None and "error" not in result


def _inputs(units: Sequence[Unit], scale: Scale) -> str:
    told = json.dumps([FORMAT, scale.replicates, sorted(unit.key for unit in units)])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _chosen(found: Chosen) -> Entry:
    trials = [{"settings": dict(t.settings), "loss": t.loss, "error": t.error} for t in found.trials]
    return {
        "settings": dict(found.settings),
        "loss": _number(found.loss),
        "losses": dict(found.losses),
        "epochs": dict(found.epochs),
        "trials": trials,
    }


def _three(found: Interval) -> list[float | None]:
    return [_number(found.value), _number(found.low), _number(found.high)]


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def read_results(folder: Path) -> dict[str, Entry]:
    """The result files of a folder: set → content."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def write_result(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """One result file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".part")
    text = json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False)
    flat = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    part.write_text(flat + "\n", "utf-8")
    part.replace(path)
    return path
