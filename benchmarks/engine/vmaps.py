"""The peers that batch tasks with `torch.func.vmap`: supports padded to one length, or sorted into length buckets.

Both run bucket after bucket, so that what is in flight stays within `MEMORY`; the padded one has one length for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.engine.blocks import PRIOR, RATE, Blocks
from benchmarks.engine.contender import Kind, Outcome, gradients_of, zeroed
from benchmarks.engine.workload import Problem
from limaml.types import Rows

__all__ = ["VmapBuckets", "VmapPadded"]

MEMORY = 3 * 2**30
"""Bytes that a bucket's activations and weights are estimated to stay within."""

GROWTH = (1.2, 1.5, 2.0)
"""Longest to shortest support of a bucket: each is tried once, the fastest is kept."""


@dataclass(frozen=True)
class _Bucket:
    """Tasks of similar length. Positions `[tasks, length]` of rows, and which of them are there."""

    tasks: Tensor
    support: Tensor
    present: Tensor
    query: Tensor
    judged: Tensor


def _padded(rows: Rows, tasks: int, length: int) -> tuple[Tensor, Tensor]:
    """Row positions and whether each is real, `[tasks, length]`."""
    size = torch.bincount(rows.owner, minlength=tasks)
    present = torch.arange(length) < size[:, None]
    position = torch.zeros(tasks, length, dtype=torch.int64)
    position[present] = rows.rows
    return position, present


def _per_task_bytes(blocks: Blocks, length: int, work: str, steps: int) -> int:
    """Of the weights and activations of one task. Generating keeps one step; training all, and their gradients' graphs."""
    weights = sum(p.numel() for p in blocks.meta.parameters())
    floats = length * (sum(blocks.size.layers) * 2) + weights
    return 4 * floats * (3 if work == "generate" else 5 * steps + 3)


def _buckets(blocks: Blocks, problem: Problem, steps: int, growth: float | None, memory: int = MEMORY) -> list[_Bucket]:
    """In the order of length if `growth` is given; else in the given order, padded to the longest of all."""
    support, present = _padded(problem.support, problem.tasks, problem.longest)
    query, judged = _padded(problem.query, problem.tasks, problem.longest if problem.work == "train" else 0)
    size = torch.maximum(present.sum(1), judged.sum(1))
    order = torch.arange(problem.tasks) if growth is None else torch.sort(size, stable=True).indices
    found: list[list[int]] = []
    for task in order.tolist():
        length = problem.longest if growth is None else int(size[task])
        bucket = found[-1] if found else None
        fits = bucket is not None and (len(bucket) + 1) * _per_task_bytes(blocks, length, problem.work, steps) <= memory
        if bucket is not None and fits and (growth is None or length <= growth * int(size[bucket[0]])):
            bucket.append(task)
        else:
            found.append([task])

    def made(tasks: Tensor) -> _Bucket:
        wide = problem.longest if growth is None else int(present[tasks].sum(1).max())
        asked = judged.shape[1] if growth is None else int(judged[tasks].sum(1).max())
        return _Bucket(
            tasks,
            support[tasks, :wide],
            present[tasks, :wide].float(),
            query[tasks, :asked],
            judged[tasks, :asked].float(),
        )

    return [made(torch.tensor(tasks)) for tasks in found]


class VmapPadded:
    """`vmap` over supports that are padded to the longest."""

    name = "vmap, padded"
    kind: Kind = "vmap"

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        buckets = _buckets(blocks, problem, steps, None)
        return _work(blocks, problem, buckets, steps), max(len(bucket.tasks) for bucket in buckets)


class VmapBuckets:
    """`vmap` over supports sorted into buckets of similar length, each estimated to stay within `memory` bytes."""

    name = "vmap, buckets"
    kind: Kind = "vmap"

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        trials = []
        layouts = {}
        for growth in GROWTH:
            buckets = _buckets(blocks, problem, steps, growth, self.memory)
            layouts[tuple(len(bucket.tasks) for bucket in buckets)] = buckets
        for buckets in layouts.values():
            work = _work(blocks, problem, buckets, steps)
            started = time.perf_counter()
            if len(layouts) > 1:
                work()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            trials.append((time.perf_counter() - started, max(len(bucket.tasks) for bucket in buckets), work))
        _, in_flight, work = min(trials, key=lambda trial: trial[0])
        return work, in_flight


def _work(blocks: Blocks, problem: Problem, buckets: list[_Bucket], steps: int) -> Callable[[], Outcome]:
    start = dict(blocks.meta.named_parameters())

    def loss(z: Tensor, rows: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        x = torch.cat([z.expand(len(rows), -1), rows], 1)
        logits = blocks.shared(x).squeeze(1)
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (each * present).sum()

    def adapt(x: Tensor, rows: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        def inner(weights: dict[str, Tensor]) -> Tensor:
            z = functional_call(blocks.meta, weights, (x,))
            return loss(z, rows, labels, present) / (present.sum() + PRIOR)

        weights: dict[str, Tensor] = dict(start)
        for _ in range(steps):
            slopes = grad(inner)(weights)
            weights = {name: w - RATE * slopes[name] for name, w in weights.items()}
        z: Tensor = functional_call(blocks.meta, weights, (x,))
        return z

    def judged(x: Tensor, s: Tensor, s_labels: Tensor, s_there: Tensor, *query: Tensor) -> Tensor:
        return loss(adapt(x, s, s_labels, s_there), *query)

    def rows_of(positions: Tensor) -> tuple[Tensor, Tensor]:
        return problem.vectors[problem.item[positions]], problem.label[positions]

    def generate() -> Outcome:
        z = torch.empty(problem.tasks, blocks.size.dim)
        with torch.no_grad():
            for b in buckets:
                z[b.tasks] = vmap(adapt)(problem.features[b.tasks], *rows_of(b.support), b.present)
        return {"z": z}

    def train() -> Outcome:
        zeroed(blocks)
        for b in buckets:
            losses = vmap(judged)(
                problem.features[b.tasks], *rows_of(b.support), b.present, *rows_of(b.query), b.judged
            )
            losses.sum().backward()
        return gradients_of(blocks)

    return generate if problem.work == "generate" else train
