"""The two model sizes, as plain modules that every contender is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.engine.workload import Problem

__all__ = ["LARGE", "PRIOR", "RATE", "SIZES", "SMALL", "Blocks", "Size", "blocks_of", "mlp"]

RATE = 0.5
"""The inner learning rate, the same for all layers and steps."""

PRIOR = 5.0
"""Added to the number of support rows that the support loss is divided by."""


@dataclass(frozen=True)
class Size:
    """Widths of the meta block, and of the layers over [meta embedding, row features]."""

    name: str
    meta: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def inputs(self) -> int:
        return self.meta[0]

    @property
    def dim(self) -> int:
        return self.meta[-1]

    @property
    def row_width(self) -> int:
        return self.layers[0] - self.meta[-1]


SMALL = Size("small", (64, 128, 128, 32), (128, 128, 64, 1))
LARGE = Size("large", (64, 256, 256, 64), (512, 256, 64, 1))
SIZES = {size.name: size for size in (SMALL, LARGE)}


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Blocks:
    """A meta block `[tasks, in] → [tasks, dim]` and a global block `[rows, dim + width] → [rows, 1]`."""

    size: Size
    meta: nn.Sequential
    shared: nn.Sequential

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters, `meta.…` and `shared.…`."""
        named = {f"meta.{name}": p for name, p in self.meta.named_parameters()}
        return named | {f"shared.{name}": p for name, p in self.shared.named_parameters()}

    def scaled_loss(self, z: Tensor, problem: Problem, rows: Tensor) -> Tensor:
        """What a task's inner steps minimise: loss of its support `rows`, over their number and the prior count."""
        return self.loss(z, problem, rows) / (len(rows) + PRIOR)

    def loss(self, z: Tensor, problem: Problem, rows: Tensor) -> Tensor:
        """Sum of the losses of one task's `rows` for its meta embedding `z` `[1, dim]`, as it is usually written."""
        x = torch.cat([z.expand(len(rows), -1), problem.vectors[problem.item[rows]]], 1)
        logits = self.shared(x).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, problem.label[rows], reduction="sum")


def blocks_of(size: Size, seed: int = 0) -> Blocks:
    """Fresh blocks; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Blocks(size, mlp(size.meta), mlp(size.layers))
