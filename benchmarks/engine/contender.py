"""What a contender is: it is given blocks and a problem, prepares what it likes, and hands back the work to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from benchmarks.engine.blocks import Blocks
from benchmarks.engine.workload import Problem

__all__ = ["Contender", "Kind", "Outcome", "gradients_of", "relative_error", "zeroed"]

Kind = Literal["limaml", "loop", "vmap"]

Outcome = dict[str, Tensor]
"""`generate`: `{"z": [tasks, dim]}`. `train`: the gradient of the summed query loss by every parameter, by its name."""


class Contender(Protocol):
    """One way to adapt. Index arithmetic (padding, buckets) is preparation; gathering features is part of the work."""

    name: str
    kind: Kind

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        """The work, and the largest number of tasks in flight in it."""
        ...


def zeroed(blocks: Blocks) -> None:
    for parameter in blocks.parameters.values():
        parameter.grad = None


def gradients_of(blocks: Blocks) -> Outcome:
    return {name: _gradient(parameter) for name, parameter in blocks.parameters.items()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def relative_error(truth: Outcome, found: Outcome) -> float:
    """Largest difference, relative to the largest entry of each tensor (or a thousandth of the largest of all)."""
    largest = max(float(tensor.abs().max()) for tensor in truth.values())
    worst = 0.0
    for name, a in truth.items():
        worst = max(worst, float((a - found[name]).abs().max()) / (float(a.abs().max()) + 1e-3 * largest))
    return worst
