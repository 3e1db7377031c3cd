"""Engine `loop`: one task after the other, in plain PyTorch. Slow, and right for any block: the oracle of the tests.

Nothing is shared with the other engines but the words: no hoisting, no batching over tasks, no formula of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limaml.meta.adapted import adapted_parameters, call_with, layer_of, places_of
from limaml.meta.engine import Objective, Rate
from limaml.meta.masks import SharedMasks
from limaml.meta.support import Support
from limaml.types import Features

__all__ = ["Loop"]


class Loop:
    """Adapts a functional copy of `block` for each task in turn, with tables of its own if `tables`."""

    name = "loop"

    def __init__(self, block: nn.Module, tables: bool = False) -> None:
        self.block = block
        self.adapted, self.places = adapted_parameters(block, tables), places_of(block, tables)

    def adapt(
        self,
        features: Features,
        support: Support,
        objective: Objective,
        steps: int,
        rate: Rate,
        order: int,
    ) -> Tensor:
        """Meta embeddings `[tasks, dim]` after `steps` inner steps on `objective`."""
        tasks = next(iter(features.values())).shape[0]
        outer = torch.is_grad_enabled()
        adapted = []
        for task in range(tasks):
            own = {name: values[task : task + 1] for name, values in features.items()}
            rows = support.of(task)
            weights: dict[str, Tensor] = dict(self.adapted)
            masks = SharedMasks(self.block)
            for step in range(steps if len(rows) and weights else 0):
                with torch.enable_grad():
                    if not outer:
                        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
                    with masks.drawn(next(iter(own.values()))):
                        z = call_with(self.block, self.places, weights, own)
                    slopes = torch.autograd.grad(
                        objective.loss(rows, z).sum(),
                        list(weights.values()),
                        create_graph=order == 2 and outer,
                        allow_unused=True,
                    )
                weights = {
                    name: w if g is None else w - rate(step, layer_of(name)) * g
                    for (name, w), g in zip(weights.items(), slopes, strict=True)
                }
            with masks.drawn(next(iter(own.values()))):
                adapted.append(call_with(self.block, self.places, weights, own))
        z = torch.cat(adapted)
        return z if outer else z.detach()
