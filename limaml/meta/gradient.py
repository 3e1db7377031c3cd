"""Solver `gradient`: the paper's. K gradient steps on the meta block's weights, from where the outer loop left them.

`φ ← φ − α ∇_φ L(support; φ)`, where the support loss is the weighted sum of row losses divided by (their weight + a learned
prior count): a task with little data moves little. Rates α are learned: one, per layer, per step, or per layer and step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from limaml.errors import ConfigError, ModelError
from limaml.meta.adapted import adapted_parameters, layer_of
from limaml.meta.engine import Engine
from limaml.meta.support import Support
from limaml.types import Features

__all__ = ["GradientSolver", "RateKind"]

logger = logging.getLogger("limaml")

LARGEST_GROWTH = 1e3
"""A learned rate may grow to this many times the one it started from; beyond that, inner steps overflow."""

RateKind = Literal["fixed", "scalar", "layer", "step", "layer_step"]


class GradientSolver(nn.Module):
    """K inner gradient steps of first or second order.

    `rate` is where learned rates start; `learn_rate` says how many there are. `prior_count` is where the learned prior
    count starts, in rows. Parameters: `log_rate` `[1 or steps, 1 or layers]`, `log_prior_count` `[]`.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        steps: int = 3,
        order: Literal[1, 2] = 2,
        rate: float = 0.3,
        learn_rate: RateKind = "layer_step",
        prior_count: float = 5.0,
        adapt_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if steps < 0 or order not in (1, 2) or not rate > 0 or not prior_count > 0:
            raise ConfigError(
                f"The gradient solver needs steps ≥ 0, order 1 or 2, rate > 0 and prior_count > 0, but got steps={steps}, "
                f"order={order}, rate={rate}, prior_count={prior_count}."
            )
        self.steps, self.order = steps, order
        layers: Sequence[str] = sorted({layer_of(name) for name in adapted_parameters(block, adapt_embeddings)})
        if steps and not layers:
            raise ModelError(
                "A meta block has no parameter that the gradient solver could adapt: all of them are embedding tables, or "
                "need no gradient. Add a layer behind the tables, set adapt.adapt_embeddings=true, or use the solver 'newton'."
            )
        self._layer = {layer: i for i, layer in enumerate(layers)}
        self._largest, self._warned = math.log(rate * LARGEST_GROWTH), False
        shape = (
            max(1, steps) if learn_rate in ("step", "layer_step") else 1,
            max(1, len(layers)) if learn_rate in ("layer", "layer_step") else 1,
        )
        self.log_rate = nn.Parameter(torch.full(shape, math.log(rate)), requires_grad=learn_rate != "fixed")
        self.log_prior_count = nn.Parameter(torch.tensor(math.log(prior_count)))

    def rate(self, step: int, layer: str) -> Tensor:
        """The inner learning rate of `layer` in step `step`, a scalar tensor."""
        rows, columns = self.log_rate.shape
        if columns > 1 and layer not in self._layer:
            raise ModelError(
                f"Layer '{layer}' of the meta block was added or unfrozen after the solver was made, so it has no inner "
                "rate. Make the MetaModel after the block has its final shape."
            )
        return torch.exp(self.log_rate[step if rows > 1 else 0, self._layer[layer] if columns > 1 else 0])

    def loss(self, support: Support, z: Tensor) -> Tensor:
        """Support loss divided by (support weight + prior count), `[tasks]`."""
        return support.loss(z) / self._counted(support, z)

    def slope(self, support: Support, z: Tensor, create_graph: bool) -> Tensor:
        """Its derivative by the meta embeddings, `[tasks, dim]`."""
        slope = support.slope(z, create_graph=create_graph) / self._counted(support, z)[:, None]
        return slope if create_graph else slope.detach()

    def _counted(self, support: Support, z: Tensor) -> Tensor:
        return support.weight.to(z.dtype) + torch.exp(self.log_prior_count)

    def forward(self, engine: Engine, features: Features, support: Support) -> Tensor:
        """Adapted meta embeddings `[tasks, dim]`."""
        self._bound_rates()
        return engine.adapt(features, support, self, self.steps, self.rate, self.order)

    @torch.no_grad()
    def _bound_rates(self) -> None:
        """Put learned rates that ran away back to the largest allowed one, and say so once."""
        if not self.log_rate.requires_grad or not bool((self.log_rate > self._largest).any()):
            return
        self.log_rate.clamp_(max=self._largest)
        if not self._warned:
            logger.warning(
                "A learned inner rate reached %.3g, %g times the one it started from, and is held there. Lower "
                "train.solver_lr, or start from a larger adapt.rate.",
                math.exp(self._largest),
                LARGEST_GROWTH,
            )
            self._warned = True
