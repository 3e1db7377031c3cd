"""`python -m benchmarks.compiled`: does `torch.compile`, or bfloat16, pay? Measured on the engine benchmark's blocks.

Each way runs the same batches: `generate` (`MetaModel.embed`) and `train` (`MetaLearner.loss` and a backward pass). The
first call, in which torch compiles, is timed apart, with an empty cache. Ways take turns. What counts is the median of
the processor's time, which a neighbour on the same machine disturbs less than the clock's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.engine.blocks import SIZES, Blocks, blocks_of
from benchmarks.engine.contender import Outcome
from benchmarks.engine.ours import TASK, Limaml, model_of
from benchmarks.engine.workload import Problem, Work, generated_table, problem_of
from limaml.meta import ConcatMLP, MetaModel
from limaml.types import Parts, embedding_name

__all__ = ["main"]

WAYS = ("as it is", "by autograd", "bfloat16", "compiled score", "compiled both")
"""The closed form of stacked layers; autograd in its place; and with autograd the blocks in bfloat16, or compiled."""

AMORTISED = 100_000
"""Tasks over which the time to compile is spread."""


class _Scored(ConcatMLP):
    """The block as any other: a `score` of its own, so that it is differentiated by autograd and can be compiled."""

    def score(self, parts: Parts) -> Tensor:
        return super().score(parts)


def _model_of(way: str, blocks: Blocks, steps: int) -> MetaModel:
    model = model_of(blocks, steps)
    if way == "as it is":
        return model
    size = blocks.size
    block = _Scored({embedding_name(TASK): size.dim, "vector": size.row_width}, blocks.shared)
    if way.startswith("compiled"):
        block.score = torch.compile(block.score, dynamic=True)  # type: ignore[method-assign]
    if way == "compiled both":
        for meta in model.meta_blocks.values():
            meta.compile(dynamic=True)
    model.global_block = block
    return model


def _work_of(way: str, blocks: Blocks, problem: Problem, steps: int) -> Callable[[], Outcome]:
    run, _ = Limaml(make=partial(_model_of, way)).prepare(blocks, problem, steps)
    if way != "bfloat16":
        return run

    def rounded() -> Outcome:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return rounded


def _turns(runs: Mapping[str, Callable[[], Outcome]], seconds_each: float) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    while min(sum(found) for found in samples.values()) < seconds_each:
        for name, run in runs.items():
            started = time.process_time()
            run()
            samples[name].append(time.process_time() - started)
    return {name: median(found) for name, found in samples.items()}


def _report(work: Work, size: str, tasks: int, seconds_each: float, folder: str) -> None:
    chosen = SIZES[size]
    problem = problem_of(generated_table(tasks), work, 64, chosen.inputs, chosen.row_width)
    runs: dict[str, Callable[[], Outcome]] = {}
    first: dict[str, float] = {}
    torch.compiler.reset()
    for way in WAYS:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
        run = _work_of(way, blocks_of(chosen), problem, 3)
        started = time.perf_counter()
        try:
            run()
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print(f"{work:9} {size:6} {way:16} fails: {lines[0][:150]}", flush=True)
            continue
        first[way] = time.perf_counter() - started
        run()
        runs[way] = run
    seconds = _turns(runs, seconds_each)
    plain = seconds["as it is"]
    for way, own in seconds.items():
        compiling = max(0.0, first[way] - own) if way.startswith("compiled") else 0.0
        spread = own / tasks + compiling / AMORTISED
        print(
            f"{work:9} {size:6} {way:16} {1000 * own:8.1f} ms a batch, {plain / own:5.2f} times as fast; "
            f"compiling {compiling:5.1f} s, so {plain / tasks / spread:5.2f} times over {AMORTISED:,} tasks",
            flush=True,
        )


def main() -> None:
    """Print a line per work, size and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=512, help="tasks in a batch")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each way, size and work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, one thread, {arguments.tasks} tasks a batch, supports as in MovieLens-1M up to 64 rows"
    )
    works: tuple[Work, ...] = ("generate", "train")
    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            for size in SIZES:
                _report(work, size, arguments.tasks, arguments.seconds, folder)


if __name__ == "__main__":
    main()
