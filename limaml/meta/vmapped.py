"""Engine `vmap`: every task has its own copy of the block's weights, and `torch.func.vmap` runs the copies as one.

Exact for any block that can be vmapped; memory is tasks × parameters. The support stays flat, without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vmap

from limaml.meta.adapted import adapted_parameters, call_with, layer_of, places_of
from limaml.meta.engine import Objective, Rate
from limaml.meta.masks import SharedMasks
from limaml.meta.support import Support
from limaml.meta.tables import by_task
from limaml.types import Features

__all__ = ["Vmap"]


class Vmap:
    """Adapts `block` for many tasks at once, each with weights, and if `tables` with tables, of its own."""

    name = "vmap"

    def __init__(self, block: nn.Module, tables: bool = False) -> None:
        self.block = block
        self.adapted, self.places = adapted_parameters(block, tables), places_of(block, tables)
        self.lookup = by_task({place for places in self.places.values() for place in places})

    def _forward(self, weights: dict[str, Tensor], features: Features) -> Tensor:
        def one(own: dict[str, Tensor], feature: Features) -> Tensor:
            batch = {name: value.unsqueeze(0) for name, value in feature.items()}
            return call_with(self.block, self.places, own, batch, self.lookup).squeeze(0)

        z: Tensor = vmap(one, randomness="different")(weights, features)
        return z

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
        like = next(iter(features.values()))
        tasks, outer = like.shape[0], torch.is_grad_enabled()
        masks = SharedMasks(self.block)
        weights: dict[str, Tensor] = {name: p.unsqueeze(0).expand(tasks, *p.shape) for name, p in self.adapted.items()}
        for step in range(steps if self.adapted else 0):
            with torch.enable_grad():
                if not outer:
                    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
                with masks.drawn(like):
                    z = self._forward(weights, features)
                loss = objective.loss(support, z).sum()
                slopes = torch.autograd.grad(
                    loss, list(weights.values()), create_graph=order == 2 and outer, allow_unused=True
                )
            weights = {
                name: w if g is None else w - rate(step, layer_of(name)) * g
                for (name, w), g in zip(weights.items(), slopes, strict=True)
            }
        with masks.drawn(like):
            z = self._forward(weights, features)
        return z if outer else z.detach()
