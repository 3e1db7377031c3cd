"""Where limaml's time goes: the profile that stands beside a number that misses its target.

Each work runs once under `torch.profiler`; what its kernels took is grouped by what they do. What is left to the whole
is Python, autograd's bookkeeping and the calls themselves. The profiler slows calls down a little, not kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.engine.blocks import SIZES, blocks_of
from benchmarks.engine.contender import Outcome
from benchmarks.engine.measure import flops_of
from benchmarks.engine.ours import Limaml
from benchmarks.engine.suite import Case, Plan, cases, table_of
from benchmarks.engine.workload import problem_of

__all__ = ["GROUPS", "profiles"]

GROUPS = ("matrix products", "element-wise", "gathers and sums", "other kernels", "calls and bookkeeping")

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear")
_GATHERS = ("index_select", "_embedding_bag_forward_only", "index_add_", "index_add", "scatter_add_", "index", "gather")
_OTHER = ("empty", "as_strided", "view", "slice", "t", "transpose", "detach", "select", "expand", "resize_", "reshape")


def _group(op: str) -> str:
    name = op.removeprefix("aten::")
    if name in _PRODUCTS:
        return GROUPS[0]
    if name in _GATHERS:
        return GROUPS[2]
    if not op.startswith("aten::") or name.startswith("empty") or name in _OTHER:
        return GROUPS[4]
    if name in ("sort", "bincount", "cumsum", "arange", "nonzero", "cat", "stack", "_local_scalar_dense", "equal"):
        return GROUPS[3]
    return GROUPS[1]


def shares(work: Callable[[], Outcome]) -> dict[str, float]:
    """Share of each of `GROUPS` in one run."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        work()
        whole = time.perf_counter() - started
    found = dict.fromkeys(GROUPS, 0.0)
    for event in profiler.key_averages():
        found[_group(event.key)] += event.self_cpu_time_total / 1e6
    found[GROUPS[4]] = max(0.0, whole - sum(found[group] for group in GROUPS[:4]))
    total = sum(found.values())
    return {group: seconds / total for group, seconds in found.items()}


def profiles(plan: Plan, data: Path | None, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Entries of all cases at K = 3, rows shared: seconds of a run (the fastest of three), its arithmetic, and `shares`."""
    entries: list[dict[str, Any]] = []
    for case in cases(plan):
        if case.steps != 3:
            continue
        tell(f"profile: {case}")
        entries.append(_entry(case, plan, data))
    return entries


def _entry(case: Case, plan: Plan, data: Path | None) -> dict[str, Any]:
    size = SIZES[case.size]
    members = plan.generate_tasks if case.work == "generate" else plan.train_tasks
    problem = problem_of(table_of(data, members), case.work, case.cap, size.inputs, size.row_width)
    work, _ = Limaml().prepare(blocks_of(size), problem, case.steps)
    work()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return {
        "case": str(case),
        "tasks": members,
        "seconds": min(seconds),
        "flops": flops_of(work),
        "shares": shares(work),
    }
