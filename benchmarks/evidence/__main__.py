"""`python -m benchmarks.evidence`: measure what is not measured yet, write the result files, and the page made of them.

python -m benchmarks.evidence --data DIR            everything: hours; may be killed, and goes on
python -m benchmarks.evidence --data DIR --quick    the same in small: about 20 minutes
python -m benchmarks.evidence --page                only docs/results.md and README's table, from the result files
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.implicits import make_choices, rankings_of
from benchmarks.evidence.page import write_pages
from benchmarks.evidence.pictures import draw
from benchmarks.evidence.plan import Goal, Plan, Scale, goals_of, turn
from benchmarks.evidence.replays import replays_of
from benchmarks.evidence.results import read_results
from benchmarks.evidence.runner import run_plan
from benchmarks.evidence.sets import PARTS, make_table, sets_in
from benchmarks.evidence.units import Cache
from benchmarks.evidence.write import in_order, write_results
from limaml.errors import LimamlError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/evidence"
QUICK = Scale(
    trials=1,
    seeds=1,
    ablation_seeds=1,
    ablation_sets=("ml-100k",),
    ablation_methods=("limaml_newton",),
    implicit_seeds=1,
    replay_seeds=1,
    replicates=500,
    sets={"rivals": 2, "replay": 2, "implicit": 2},
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="What the method is worth on real data sets."
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("LIMAML_DATA", "data")),
        help="the folder with the sets' folders (default: $LIMAML_DATA, else ./data)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer members, seeds and trials, and sets in all parts but main; results go to runs/",
    )
    parser.add_argument("--sets", nargs="+", default=[], help="only these (default: all that are in --data)")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--seeds", type=int, help="seeds of the comparison")
    parser.add_argument("--trials", type=int, help="settings tried per method and set, the defaults first")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread")
    parser.add_argument("--device", default="cpu", help="where the blocks are trained: cpu, cuda, …")
    parser.add_argument("--hours", type=float, help="start nothing new after so many hours")
    parser.add_argument("--out", type=Path, help="folder of the cache and the reports (default: runs/evidence)")
    parser.add_argument(
        "--results", type=Path, help="folder of the result files (default: benchmarks/results/evidence)"
    )
    parser.add_argument("--page", action="store_true", help="only write the page, from the result files")
    return parser.parse_args(given)


def main() -> None:
    chosen = arguments()
    out = chosen.out or ROOT / ("runs/evidence-quick" if chosen.quick else "runs/evidence")
    results = chosen.results or (out / "results" if chosen.quick else RESULTS)
    scale = QUICK if chosen.quick else Scale()
    if chosen.seeds is not None:
        scale = replace(scale, seeds=chosen.seeds)
    if chosen.trials is not None:
        scale = replace(scale, trials=chosen.trials)
    if not chosen.page:
        measure(chosen, scale, out, results)
    found = in_order(read_results(results))
    if not found:
        raise LimamlError(f"There are no result files in {results} to make a page of. Measure first: --data DIR.")
    whole = results == RESULTS
    page = ROOT / "docs/results.md" if whole else results.parent / "results.md"
    for path in write_pages(found, page, ROOT / "README.md" if whole else None, draw):
        print(f"Written: {path}")


def measure(chosen: argparse.Namespace, scale: Scale, out: Path, results: Path) -> None:
    tables = []
    for which in sets_in(chosen.data, chosen.sets):
        tables.append(make_table(which, chosen.data, which.members[chosen.quick], out / "tables"))
        print(f"{which.title}: {tables[-1].rows:,} rows of {tables[-1].members:,} members", flush=True)
    choices = {
        table.which.name: make_choices(table, chosen.data, table.which.members[chosen.quick], out / "tables")
        for table in (scale.of_part(tables, "implicit") if "implicit" in chosen.part else ())
    }
    if not tables:
        raise LimamlError(
            f"There is no data set in {chosen.data}. Give the folder that holds their folders with --data, or set LIMAML_DATA."
        )
    cache = Cache(out / "cache")
    print(f"{cache.load()} results are there already.", flush=True)
    goals: list[Goal] = [*goals_of(tables, scale, chosen.part, chosen.methods)]
    goals += replays_of(tables, scale, chosen.part)
    goals += rankings_of(list(choices.values()), scale, chosen.methods)
    failed = run_plan(
        Plan(sorted(goals, key=turn)),
        cache,
        workers=chosen.workers,
        device=chosen.device,
        hours=chosen.hours,
        tell=lambda text: print(text, flush=True),
    )
    for name, fault in failed.items():
        print(f"Failed: {name}: {fault}", file=sys.stderr)
    for path in write_results(tables, scale, cache.folder, results, out, chosen.workers, choices):
        print(f"Written: {path}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LimamlError as error:
        sys.exit(str(error))
