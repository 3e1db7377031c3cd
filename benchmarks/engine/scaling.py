"""How limaml's time grows: with tasks, with support size, with the width of the meta block, on one and two threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.engine.blocks import SMALL, Size, blocks_of
from benchmarks.engine.measure import flops_of, interleaved
from benchmarks.engine.ours import Limaml
from benchmarks.engine.workload import ITEMS, Problem, generated_table, problem_of, uniform_table

__all__ = ["scaling"]

STEPS = 3
CAP = 32


def _many(tasks: int) -> Problem:
    """`tasks` members: those of a generated table, again and again with new items."""
    base = problem_of(generated_table(1000), "generate", CAP, SMALL.inputs, SMALL.row_width)
    times = tasks // base.tasks
    generator = torch.Generator().manual_seed(5)
    rows = len(base.support)
    count = times * rows
    owner = (torch.arange(times)[:, None] * base.tasks + base.support.owner).flatten()
    popular = base.item[base.support.rows]
    return replace(
        base,
        features=torch.randn(tasks, SMALL.inputs, generator=generator),
        item=popular[torch.randint(0, rows, (count,), generator=generator)],
        label=(torch.rand(count, generator=generator) < 0.5752).float(),
        support=replace(base.support, rows=torch.arange(count), owner=owner),
    )


def scaling(
    *, largest: int, threads: tuple[int, ...], repetitions: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Entries `{"against", "value", "threads", "seconds", …}`; `generate`, K = 3."""
    points: list[tuple[str, int, Size, Callable[[], Problem]]] = []
    tasks = 1000
    while tasks <= largest:
        points.append(("tasks", tasks, SMALL, lambda tasks=tasks: _many(tasks)))  # type: ignore[misc]
        tasks *= 10
    for rows in (1, 4, 16, 64, 256, 1024):
        points.append(
            (
                "support size",
                rows,
                SMALL,
                lambda rows=rows: problem_of(  # type: ignore[misc]
                    uniform_table(256, rows), "generate", None, SMALL.inputs, SMALL.row_width
                ),
            )
        )
    for width in (32, 64, 128, 256, 512, 1024):
        size = Size(f"meta width {width}", (64, width, width, 32), SMALL.layers)
        points.append(
            (
                "meta width",
                width,
                size,
                lambda size=size: problem_of(  # type: ignore[misc]
                    generated_table(512), "generate", CAP, size.inputs, size.row_width
                ),
            )
        )
    before, entries = torch.get_num_threads(), []
    try:
        for against, value, size, make in points:
            problem = make()
            work, _ = Limaml().prepare(blocks_of(size), problem, STEPS)
            for count in threads:
                torch.set_num_threads(count)
                work()
                timing = interleaved({"limaml": work}, repetitions=repetitions, seconds_each=2.0)["limaml"]
                entries.append(
                    {
                        "against": against,
                        "value": value,
                        "threads": count,
                        "tasks": problem.tasks,
                        "rows": len(problem.support),
                        "items": min(ITEMS, len(problem.item.unique())),
                        "meta_parameters": sum(a * b + b for a, b in zip(size.meta[:-1], size.meta[1:], strict=True)),
                        "flops": flops_of(work) if value * problem.tasks < 10**9 and against != "tasks" else None,
                        **asdict(timing),
                    }
                )
                tell(f"{against} {value}, {count} threads: {timing.seconds:.3f} s")
    finally:
        torch.set_num_threads(before)
    return entries
