"""Is `limaml plan` right? Unit costs are measured, a plan is made of them, and held against what the part `generate` took for the
same: all members' embeddings from a log on disk, published, and those of one in a hundred refreshed. Run both on one machine."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale import page
from benchmarks.scale.generate import ACTED
from benchmarks.scale.measure import RESULTS, in_child
from benchmarks.scale.workload import DAYS

HERE = "benchmarks.scale.plan"


def unit_costs(repetitions: int) -> dict[str, Any]:
    from limaml.evaluate.calibrate import calibrate

    return calibrate((16, 32), repetitions=repetitions).model_dump(mode="json")


def check(done: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured core-seconds and bytes, for one size of `generate.json`."""
    from limaml.evaluate.plan import Demand, UnitCosts, plan

    costs = UnitCosts.model_validate({name: value for name, value in told.items() if name in UnitCosts.model_fields})
    tasks, rows = done["embedded"], done["rows"]
    run = min((run for run in done["runs"] if run["engine"] == "local"), key=lambda run: run["workers"])
    spent, published = run["spent"], done["publish"]["seconds"]
    planned = plan(Demand(tasks, rows / DAYS, history_days=DAYS, versions=1), costs)
    support = planned["support of a member"]
    lines = {
        "adapt all, s": (tasks * costs.adapt_seconds(16, support), spent["adapt"]),
        "read and encode all, s": (rows / costs.read_rows, spent["read"] + spent["encode"]),
        "publish all, s": (tasks / costs.put_tasks, published),
        "full generation, s": (planned["full generation"] * 3600, spent["all"] + published),
        "log, MB": (rows * costs.log_bytes / 1e6, done["log_bytes"] / 1e6),
    }
    if "refresh" in done:
        again = costs.refresh_run + ACTED * tasks * costs.refresh_seconds(16, support)
        lines[f"refresh {ACTED:.0%} of the members, s"] = (again, done["refresh"]["warm_seconds"])
    return {
        "tasks": done["tasks"],
        "rows": rows,
        "workers": run["workers"],
        "lines": {name: {"planned": left, "measured": right} for name, (left, right) in lines.items()},
        "costs": costs.model_dump(mode="json"),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part plan", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--generated", type=Path, default=RESULTS / "generate.json", help="what the part `generate` took"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.json")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = os.environ["POLARS_MAX_THREADS"] = "1"
    told = in_child(HERE, "unit_costs", repetitions=given.repetitions)
    done = json.loads(given.generated.read_text(encoding="utf-8"))["sizes"]
    result = {"sizes": [check(size, told) for size in done]}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(page.plan(result["sizes"])))
