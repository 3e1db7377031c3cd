"""The method `cavia`: a context vector per task, started from one point and moved by gradient steps.

Zintgraf et al., "Fast Context Adaptation via Meta-Learning", ICML 2019 (arXiv 1810.03642). It is the personalised model with a
meta block that has no input: its one weight is the context. Its start is zero before training; the outer loop may move it,
which CAVIA's bias of the layer that reads the context would do as well. Inner rates and prior count are learned, second order.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from limaml.config import Config
from limaml.evaluate.problem import Fitted, Problem
from limaml.evaluate.rivals.set_encoder import fit_meta
from limaml.meta.blocks import CONSTANT
from limaml.meta.build import build_global_block
from limaml.meta.model import MetaModel
from limaml.meta.outer import Progress
from limaml.types import Features

__all__ = ["Context", "cavia"]


class Context(nn.Module):
    """A meta block that gives every task the same vector `[dim]`, zero at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.context = nn.Linear(1, dim, bias=False)
        nn.init.zeros_(self.context.weight)

    def forward(self, features: Features) -> Tensor:
        z: Tensor = self.context(features[CONSTANT])
        return z


def cavia(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    dim = config.model.dim
    block = build_global_block(problem.specs, config.model, dict.fromkeys(problem.tasks, dim), len(problem.losses))
    contexts = {task: Context(dim) for task in problem.tasks}
    model = MetaModel(block, contexts, losses=problem.losses, adaptation=config.adapt)
    return fit_meta(model.to(config.train.device), problem, config, progress)
