"""The comparison: every contender on every case, checked for equality, then timed in turns.

A case is a support cap, a model size, a kind of work and a number of inner steps. Loop peers, whose time is a sum over
tasks, run a part of the tasks with the same distribution of support sizes; so does the padded peer where supports are
uncapped, in chunks of that many tasks padded to the longest support of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.blocks import SIZES, blocks_of
from benchmarks.engine.contender import Contender, Outcome, relative_error
from benchmarks.engine.measure import flops_of, interleaved
from benchmarks.engine.memory import peaks
from benchmarks.engine.peers import contenders
from benchmarks.engine.workload import Problem, Table, Work, generated_table, movielens_table, problem_of

__all__ = ["TOLERANCE", "Case", "Plan", "cases", "compare", "table_of"]

TOLERANCE = 1e-3
"""Largest relative difference between float32 results that counts as equal: rounding through K steps and their slopes."""

MEMORY_STEPS = 3
"""Memory is measured at this number of inner steps."""


@dataclass(frozen=True)
class Plan:
    """How much is run. `every`: loop peers take each such task."""

    generate_tasks: int = 512
    train_tasks: int = 256
    every: int = 8
    repetitions: int = 7
    seconds_each: float = 1.0
    steps: tuple[int, ...] = (1, 3, 5)
    caps: tuple[int | None, ...] = (32, None)
    sizes: tuple[str, ...] = tuple(SIZES)
    works: tuple[Work, ...] = ("generate", "train")
    memory: bool = True


@dataclass(frozen=True)
class Case:
    cap: int | None
    size: str
    work: Work
    steps: int

    def __str__(self) -> str:
        support = "uncapped" if self.cap is None else f"support ≤ {self.cap}"
        return f"{self.work}, {support}, {self.size}, K = {self.steps}"


def cases(plan: Plan) -> Iterator[Case]:
    for cap in plan.caps:
        for size in plan.sizes:
            for work in plan.works:
                for steps in plan.steps:
                    yield Case(cap, size, work, steps)


def table_of(data: Path | None, members: int) -> Table:
    return generated_table(members) if data is None else movielens_table(data, members)


def _thinned(case: Case) -> list[str]:
    """The contenders, beside the loops, that run a part of the tasks."""
    return ["vmap, padded"] if case.cap is None else []


def compare(case: Case, plan: Plan, data: Path | None) -> list[dict[str, Any]]:
    """One entry per contender, in plain types. Raises `AssertionError` where results differ."""
    members = plan.generate_tasks if case.work == "generate" else plan.train_tasks
    size = SIZES[case.size]
    problem = problem_of(table_of(data, members), case.work, case.cap, size.inputs, size.row_width)
    thinned = problem.thinned(plan.every)
    found, _ = contenders()
    errors = check(case, found, thinned)
    blocks = blocks_of(size)
    works: dict[str, Callable[[], Outcome]] = {}
    tasks: dict[str, int] = {}
    in_flight: dict[str, int] = {}
    for contender in found:
        chosen = thinned if contender.kind == "loop" or contender.name in _thinned(case) else problem
        work, most = contender.prepare(blocks, chosen, case.steps)
        work()
        works[contender.name], in_flight[contender.name], tasks[contender.name] = work, most, chosen.tasks
    timings = interleaved(works, repetitions=plan.repetitions, seconds_each=plan.seconds_each)
    memory: dict[str, int | None] = {}
    if plan.memory and case.steps == MEMORY_STEPS:
        request = {**asdict(case), "data": None if data is None else str(data), "members": members}
        memory = peaks({**request, "every": plan.every, "thinned": _thinned(case)})
    entries = []
    for contender in found:
        name, timing = contender.name, timings[contender.name]
        entries.append(
            {
                **asdict(case),
                "contender": name,
                "kind": contender.kind,
                "tasks": tasks[name],
                "tasks_in_flight": in_flight[name],
                **asdict(timing),
                "tasks_per_second": tasks[name] / timing.seconds,
                "flops": flops_of(works[name]) if contender.kind == "limaml" else None,
                "peak_bytes": memory.get(name),
                "relative_error": errors[name],
            }
        )
    return entries


def check(case: Case, found: list[Contender], problem: Problem) -> dict[str, float]:
    """Relative difference of each contender's result from the first one's, on the same tasks."""
    blocks = blocks_of(SIZES[case.size])
    truth: Outcome = {}
    errors = {}
    for contender in found:
        work, _ = contender.prepare(blocks, problem, case.steps)
        outcome = {name: tensor.clone() for name, tensor in work().items()}
        truth = truth or outcome
        errors[contender.name] = relative_error(truth, outcome)
        if not errors[contender.name] <= TOLERANCE:
            raise AssertionError(
                f"{contender.name} and {found[0].name} differ by {errors[contender.name]:.1e} in the case '{case}'; "
                f"{TOLERANCE:.0e} would be rounding."
            )
    if not all(bool(tensor.isfinite().all()) for tensor in truth.values()):
        raise AssertionError(f"Results are not finite in the case '{case}'.")
    return errors
