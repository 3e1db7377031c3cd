"""The contract of the engines. A new way to carry out inner steps goes here: implement `Engine`, pass `tests/meta/engines.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from limaml.meta.support import Support
from limaml.types import Features

__all__ = ["Engine", "Objective", "Rate"]

Rate = Callable[[int, str], Tensor]
"""(step, layer) → learning rate, a scalar tensor."""


class Objective(Protocol):
    """What each task minimises, as a function of the meta embeddings `[tasks, dim]`: by its value or by its slope."""

    def loss(self, support: Support, z: Tensor) -> Tensor:
        """`[tasks]`."""
        ...

    def slope(self, support: Support, z: Tensor, create_graph: bool) -> Tensor:
        """The derivative of the loss by z, `[tasks, dim]`; differentiable itself with `create_graph`."""
        ...


class Engine(Protocol):
    """How inner gradient steps are carried out. All engines give the same meta embeddings and meta-gradients."""

    name: str

    def adapt(
        self, features: Features, support: Support, objective: Objective, steps: int, rate: Rate, order: int
    ) -> Tensor:
        """Meta embeddings `[tasks, dim]` after `steps` steps; differentiable if gradients are on, and through the steps
        themselves if `order` is 2."""
        ...
