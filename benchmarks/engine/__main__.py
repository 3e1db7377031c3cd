"""`python -m benchmarks.engine`: measure, write the JSON, and write the page made from it.

python -m benchmarks.engine                  all cases, about 10 minutes on one thread
python -m benchmarks.engine --quick          K = 3 only, fewer tasks and repetitions: about a minute
python -m benchmarks.engine --largest 1000000 --full
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.measure import gemm_peak
from benchmarks.engine.peers import contenders
from benchmarks.engine.profile import profiles
from benchmarks.engine.scaling import scaling
from benchmarks.engine.suite import Plan, cases, compare, table_of
from benchmarks.engine.table import page
from limaml.evaluate.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]
QUICK = Plan(generate_tasks=256, train_tasks=128, repetitions=3, seconds_each=0.4, steps=(3,), memory=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description="The engine against its peers.")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/ml-1m", help="a folder with MovieLens-1M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="K = 3 only, fewer tasks and repetitions")
    parser.add_argument("--full", action="store_true", help="loop peers run all tasks, and everybody more often")
    parser.add_argument("--steps", type=int, nargs="+", help="inner steps K")
    parser.add_argument("--only", default="", help="only cases whose name contains this, such as 'train, uncapped'")
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--largest", type=int, default=100_000, help="most tasks in the scaling runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/engine-benchmark.md")
    parser.add_argument("--profile", action="store_true", help="only profile limaml again, into the JSON")
    parser.add_argument("--render", action="store_true", help="only make the page again, from the JSON")
    return parser.parse_args()


def _data(arguments: argparse.Namespace) -> Path | None:
    folder: Path = arguments.data
    return folder if (folder / "interactions.parquet").exists() else None


def _plan(arguments: argparse.Namespace) -> Plan:
    plan = QUICK if arguments.quick else Plan()
    changes: dict[str, Any] = {"every": 1, "repetitions": 15, "seconds_each": 10.0} if arguments.full else {}
    if arguments.steps:
        changes["steps"] = tuple(arguments.steps)
    return Plan(**{**asdict(plan), **changes})


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in ("torch", "higher", "torchopt", "limaml"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def main() -> None:
    arguments = _arguments()
    if arguments.profile:
        results = json.loads(arguments.out.read_text())
        torch.set_num_threads(results["threads"])
        results["profile"] = profiles(Plan(**results["plan"]), _data(arguments), _tell)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    elif not arguments.render:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(_measured(arguments), indent=1) + "\n")
    text = page(json.loads(arguments.out.read_text()))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(text)
    print(text.partition("\n## Against the targets")[2].partition("\n## ")[0])
    print(f"Written: {arguments.out}, {arguments.page}")


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    data, plan, started = _data(arguments), _plan(arguments), time.perf_counter()
    missing = contenders()[1]
    for sentence in missing:
        _tell(sentence)
    entries: list[dict[str, Any]] = []
    peak = gemm_peak()
    for case in cases(plan):
        if arguments.only not in str(case):
            continue
        found = compare(case, plan, data)
        peak = max(peak, gemm_peak(0.15))
        entries += found
        fastest = {
            kind: max((e["tasks_per_second"] for e in found if e["kind"] == kind), default=0)
            for kind in ("loop", "vmap")
        }
        ours = found[0]["tasks_per_second"]
        ratios = ", ".join(f"{ours / rate:.1f}× {kind}" for kind, rate in fastest.items() if rate)
        _tell(f"[{time.perf_counter() - started:4.0f} s] {case}: {ours:,.0f} tasks/s, {ratios}")
    grown: list[dict[str, Any]] = []
    if not arguments.no_scaling:
        threads = tuple(sorted({1, min(2, os.cpu_count() or 1), arguments.threads}))
        largest = min(arguments.largest, 10_000) if arguments.quick else arguments.largest
        grown = scaling(largest=largest, threads=threads, repetitions=3 if arguments.quick else 5, tell=_tell)
    return {
        "command": "python -m benchmarks.engine " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        "threads": arguments.threads,
        "gemm_peak_flops": peak,
        "source": table_of(data, 2).source,
        "plan": asdict(plan),
        "missing": missing,
        "seconds": time.perf_counter() - started,
        "cases": entries,
        "profile": profiles(plan, data, _tell) if not arguments.only else [],
        "scaling": grown,
    }


if __name__ == "__main__":
    main()
