"""Is `limaml plan` right? Unit costs are measured, a plan is made of them, and then the same is done for real: all members' embeddings
from a log on disk, published, and those of one in a hundred refreshed. One thread, in one run on one machine."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.generate import ACTED, ROOT
from benchmarks.scale.generate import HERE as GENERATE
from benchmarks.scale.measure import in_child
from benchmarks.scale.workload import DAYS, make_source, rows_of

HERE = "benchmarks.scale.plan"
BEGIN, END = "<!-- check: begin -->", "<!-- check: end -->"


def unit_costs(repetitions: int) -> dict[str, Any]:
    from limaml.evaluate.calibrate import calibrate

    return calibrate((16, 32), repetitions=repetitions).model_dump(mode="json")


def check(folder: Path, tasks: int, buckets: int, repetitions: int) -> dict[str, Any]:
    """Planned and measured seconds and bytes."""
    from limaml.evaluate.plan import Demand, UnitCosts, plan

    told = in_child(HERE, "unit_costs", repetitions=repetitions)
    costs = UnitCosts.model_validate({name: value for name, value in told.items() if name in UnitCosts.model_fields})
    place = folder / f"plan-{tasks}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    source = make_source(folder, tasks)
    in_child(GENERATE, "prepare", folder=str(place), source=str(source), tasks=tasks, buckets=buckets)
    made = in_child(GENERATE, "generate", folder=str(place), engine="local", workers=1, keep=True)
    published = in_child(GENERATE, "publish", folder=str(place))
    log_bytes = sum(file.stat().st_size for file in (place / "log").rglob("*.parquet"))
    touched = in_child(GENERATE, "refresh", folder=str(place), tasks=tasks)
    shutil.rmtree(place)
    rows = rows_of(tasks)
    planned = plan(Demand(tasks, rows / DAYS, history_days=DAYS, versions=1), costs)
    support = planned["support of a member"]
    adapt = tasks * costs.adapt_seconds(16, support)
    again = costs.adapt_seconds(16, support) + support / costs.read_rows + 1 / costs.upsert_tasks
    lines = {
        "adapt all, s": (adapt, made["spent"]["adapt"]),
        "read and encode all, s": (rows / costs.read_rows, made["spent"]["read"] + made["spent"]["encode"]),
        "publish all, s": (tasks / costs.put_tasks, published["seconds"]),
        "full generation, s": (planned["full generation"] * 3600, made["seconds"] + published["seconds"]),
        f"refresh {ACTED:.0%} of the members, s": (ACTED * tasks * again, touched["seconds"]),
        "log, MB": (rows * costs.log_bytes / 1e6, log_bytes / 1e6),
    }
    return {
        "tasks": tasks,
        "rows": rows,
        "lines": {name: {"planned": left, "measured": right} for name, (left, right) in lines.items()},
        "costs": costs.model_dump(mode="json"),
    }


def table(result: dict[str, Any]) -> str:
    """The section of docs/plan.md."""
    sizes = result["sizes"]
    costs = sizes[0]["costs"]
    lines = [
        f"*Made by `{result['command']}` on {costs['machine']}, one thread, {costs['date']}.*",
        "",
        "| members | what | planned | measured | planned ÷ measured |",
        "|---|---|---|---|---|",
    ]
    for size in sizes:
        for name, found in size["lines"].items():
            planned, measured = found["planned"], found["measured"]
            lines.append(
                f"| {size['tasks']:,} | {name} | {planned:,.2f} | {measured:,.2f} | {planned / measured:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part plan", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100_000])
    parser.add_argument("--buckets", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "scale")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale" / "plan.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "plan.md")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = os.environ["POLARS_MAX_THREADS"] = "1"
    sizes = [check(given.folder, tasks, given.buckets, given.repetitions) for tasks in given.tasks]
    asked = " ".join(map(str, given.tasks))
    result = {"command": f"python -m benchmarks.scale --part plan --tasks {asked}", "sizes": sizes}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = given.page.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    given.page.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")
    print(table(result))
