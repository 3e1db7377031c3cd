"""`python -m benchmarks.engine.gpu`: the engine on a GPU, against the peers there and against itself on the processor.

python -m benchmarks.engine.gpu                    on `cuda`, about 5 minutes
python -m benchmarks.engine.gpu --quick            fewer tasks and repetitions
python -m benchmarks.engine.gpu --page             only make the page again, from the JSON

limaml's interactions lie in the machine's memory, as they do in training and generation, and move to the GPU batch by batch,
inside the time. The peers' problem lies on the GPU from the start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.blocks import SIZES, Blocks, blocks_of
from benchmarks.engine.contender import Contender, Outcome, relative_error
from benchmarks.engine.loops import LeanLoop
from benchmarks.engine.measure import interleaved
from benchmarks.engine.ours import TASK, Limaml, interactions_of, model_of
from benchmarks.engine.suite import Case
from benchmarks.engine.vmaps import VmapBuckets
from benchmarks.engine.workload import Problem, Table, Work, generated_table, problem_of, uniform_table
from limaml.config import Adaptation
from limaml.meta import MetaModel
from limaml.tasks import TaskRows

__all__ = ["compare_on", "curve", "page", "problem_on"]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
TOLERANCE = 1e-2
"""Largest relative difference between a float32 gradient of hundreds of tasks here and there that counts as equal."""
GIB = 2**30
PEER_MEMORY = 24 * GIB
"""Bytes that a bucket of the vmap peer is estimated to stay within on a GPU."""


def problem_on(device: torch.device, problem: Problem) -> Problem:
    """The problem with all its tensors on `device`."""

    def moved(rows: Any) -> Any:
        return replace(rows, rows=rows.rows.to(device), owner=rows.owner.to(device))

    return replace(
        problem,
        features=problem.features.to(device),
        vectors=problem.vectors.to(device),
        item=problem.item.to(device),
        label=problem.label.to(device),
        support=moved(problem.support),
        query=moved(problem.query),
    )


@lru_cache(maxsize=2)
def _table(tasks: int) -> Table:
    return generated_table(tasks)


def _settled(device: torch.device, work: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """The work, waited for."""
    if device.type != "cuda":
        return work

    def run() -> Outcome:
        found = work()
        torch.cuda.synchronize(device)
        return found

    return run


def _blocks(case: Case, device: torch.device) -> Blocks:
    with torch.device("cpu"):  # the generator of each device draws other weights
        blocks = blocks_of(SIZES[case.size])
    return replace(blocks, meta=blocks.meta.to(device), shared=blocks.shared.to(device))


class _LimamlThere(Limaml):
    """limaml with its blocks on the device, and its interactions where they always lie."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(make=lambda blocks, steps: model_of(blocks, steps).to(device))


def _peak(device: torch.device, work: Callable[[], Outcome]) -> int | None:
    """Bytes that the device's allocator held at most in one run, above what it held before."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def compare_on(
    device: torch.device, case: Case, tasks: int, *, every: int, repetitions: int, seconds_each: float
) -> list[dict[str, Any]]:
    """One entry per contender on the device, and limaml on the processor. Raises `AssertionError` where results differ."""
    size = SIZES[case.size]
    problem = problem_of(_table(tasks), case.work, case.cap, size.inputs, size.row_width)
    few = problem.thinned(every)
    here = torch.device("cpu")
    runs: list[tuple[str, torch.device, Contender, bool]] = [
        ("limaml", device, _LimamlThere(device), False),
        ("limaml, on the processor", here, Limaml(), True),
        ("lean loop", device, LeanLoop(), True),
        ("vmap, buckets", device, VmapBuckets(PEER_MEMORY), False),
    ]
    truth: Outcome = {}
    works: dict[str, Callable[[], Outcome]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, place, contender, thinned in runs:
        ours = isinstance(contender, Limaml)
        made: list[Callable[[], Outcome]] = []
        for part in (few, few if thinned else problem):
            with here if ours else place:
                work, _ = contender.prepare(_blocks(case, place), part if ours else problem_on(place, part), case.steps)
            made.append(_settled(place, _inside(here if ours else place, work)))
        outcome = {key: value.detach().cpu().clone() for key, value in made[0]().items()}
        truth = truth or outcome
        error = relative_error(truth, outcome)
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} differs by {error:.1e} in the case '{case}' on {device}.")
        made[1]()
        works[name] = made[1]
        done = few.tasks if thinned else problem.tasks
        entries[name] = {**asdict(case), "contender": name, "tasks": done, "relative_error": error}
        entries[name]["peak_bytes"] = _peak(place, made[1])
    for name, timing in interleaved(works, repetitions=repetitions, seconds_each=seconds_each).items():
        entries[name] |= {**asdict(timing), "tasks_per_second": entries[name]["tasks"] / timing.seconds}
    return list(entries.values())


def _inside(device: torch.device, work: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """The work, in which what names no device is made on this one."""

    def run() -> Outcome:
        with device:
            return work()

    return run


def curve(
    device: torch.device, solver: str, tasks: int, rows: int, chunks: list[int], repetitions: int
) -> list[dict[str, Any]]:
    """Generation of `tasks` with `rows` each, by rows per chunk: where a GPU has enough to do at once."""
    size = SIZES["small"]
    problem = problem_of(uniform_table(tasks, rows), "generate", None, size.inputs, size.row_width)
    model: MetaModel = model_of(blocks_of(size), STEPS)
    if solver == "newton":
        adaptation = Adaptation(solver="newton", max_support=None)
        model = MetaModel(model.global_block, {TASK: model.meta_blocks[TASK]}, adaptation=adaptation)
    model = model.to(device)
    data = interactions_of(problem, True)
    among = TaskRows.of(data.index[TASK], problem.tasks)
    found = []
    for chunk in chunks:

        def work(chunk: int = chunk) -> Outcome:
            return {"z": model.embed(data, TASK, among, rows_per_chunk=chunk)}

        run = _settled(device, work)
        run()
        timing = interleaved({"limaml": run}, repetitions=repetitions, seconds_each=10.0)["limaml"]
        found.append(
            {
                "solver": solver,
                "device": device.type,
                "tasks": tasks,
                "rows": rows,
                "rows_per_chunk": chunk,
                **asdict(timing),
                "tasks_per_second": tasks / timing.seconds,
                "peak_bytes": _peak(device, run),
            }
        )
    return found


def _measured(
    arguments: argparse.Namespace, tell: Callable[[str], None], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure; `keep` is given all that was found after each case, so that a run that is cut short is not lost."""
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    tasks = 512 if arguments.quick else arguments.tasks
    repetitions = 3 if arguments.quick else 4
    entries: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    found = {
        "command": "python -m benchmarks.engine.gpu " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": arguments.threads,
        "cores": os.cpu_count(),
        "versions": {"Python": platform.python_version(), "torch": torch.__version__},
        "cases": entries,
        "curves": curves,
    }
    works: tuple[Work, ...] = ("generate", "train")
    for size in SIZES:
        for work in works:
            for cap in (32, None):
                case = Case(cap, size, work, STEPS)
                count = tasks if cap or work == "generate" else tasks // 4
                entries += compare_on(device, case, count, every=16, repetitions=repetitions, seconds_each=3.0)
                rates = ", ".join(f"{e['contender']} {e['tasks_per_second']:,.0f}" for e in entries[-4:])
                tell(f"{case}: tasks/s {rates}")
                keep(found)
    for solver in ("gradient", "newton"):
        for place, count in ((device, arguments.curve), (torch.device("cpu"), arguments.curve // 32)):
            chunks = [2**14, 2**16, 2**18, 2**20, 2**22] if place.type == "cuda" else [2**16]
            curves += curve(place, solver, count, 32, chunks, repetitions)
            rates = ", ".join(
                f"{c['rows_per_chunk']:,} rows {c['tasks_per_second']:,.0f}/s" for c in curves[-len(chunks) :]
            )
            tell(f"{solver} on {place.type}: {rates}")
            keep(found)


def page(results: dict[str, Any]) -> str:
    """The page, made from the JSON alone."""
    lines = [
        "# The adaptation engine on a GPU",
        "",
        f"*Made by `{results['command'].strip()}` from `benchmarks/results/gpu.json`; do not edit.*",
        "",
        f"{results['device']}; the processor beside it with {results['threads']} of {results['cores']} cores. {results['date']}. "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + f". K = {STEPS}, float32. Tasks with the support sizes of MovieLens-1M, "
        "generated. Every result was checked against limaml's on the GPU (largest relative difference "
        f"{max(e['relative_error'] for e in results['cases']):.0e}).",
        "",
        "limaml's interactions lie in the machine's memory and move to the GPU batch by batch, inside the time; the peers' lie on the "
        "GPU. The loop, and limaml on the processor, take every 16th task in the order of support sizes.",
        "",
        "| case | tasks | limaml: tasks/s | lean loop | vmap, buckets | on the processor | limaml against: loop | vmap | processor "
        "| GPU memory: limaml | vmap |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in results["cases"]:
        case = Case(entry["cap"], entry["size"], entry["work"], entry["steps"])
        by_case.setdefault(str(case).rpartition(",")[0], {})[entry["contender"]] = entry
    for case, found in by_case.items():
        ours, here, loop, vmap = (
            found[name] for name in ("limaml", "limaml, on the processor", "lean loop", "vmap, buckets")
        )
        rates = [entry["tasks_per_second"] for entry in (ours, loop, vmap, here)]
        memory = [f"{(entry['peak_bytes'] or 0) / GIB:.2f} GiB" for entry in (ours, vmap)]
        cells = [case, f"{ours['tasks']:,}", *(f"{rate:,.0f}" for rate in rates)]
        cells += [f"{rates[0] / rate:.1f}×" for rate in rates[1:]] + memory
        lines.append("| " + " | ".join(cells) + " |")
    if not results["curves"]:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "## How much a GPU wants at once",
        "",
        f"Generation of tasks with {results['curves'][0]['rows']} rows each, small blocks, `MetaModel.embed`, by `rows_per_chunk`.",
        "",
        "| solver | where | tasks | rows a chunk | tasks/s | GPU memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for point in results["curves"]:
        held = "–" if point["peak_bytes"] is None else f"{point['peak_bytes'] / GIB:.2f} GiB"
        lines.append(
            f"| {point['solver']} | {point['device']} | {point['tasks']:,} | {point['rows_per_chunk']:,} "
            f"| {point['tasks_per_second']:,.0f} | {held} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.gpu", description="The engine on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--tasks", type=int, default=4096)
    parser.add_argument("--curve", type=int, default=262_144, help="tasks of the second table")
    parser.add_argument("--quick", action="store_true", help="fewer tasks and repetitions")
    parser.add_argument("--page", action="store_true", help="only make the page again, from the JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/gpu-benchmark.md")
    arguments = parser.parse_args()
    if not arguments.page:
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            sys.exit("There is no CUDA device here. Run this on a machine with a GPU and a CUDA build of torch.")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)

        def keep(found: dict[str, Any]) -> None:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")

        _measured(arguments, lambda text: print(text, file=sys.stderr, flush=True), keep)
    arguments.docs.write_text(page(json.loads(arguments.out.read_text())))
    print(f"Written: {arguments.docs}")


if __name__ == "__main__":
    main()
