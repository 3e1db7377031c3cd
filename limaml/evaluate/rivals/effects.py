"""Random effects: one number per entry of a side and head, added to the logits, with a normal prior of learned width.

`logit = given + b[owner]`, `b ~ N(0, 1/λ)`. The effects are their posterior's mode, found by Newton steps; λ, and the noise
of squared heads, maximise the marginal likelihood by steps of EM, in which the posterior is taken to be normal around
its mode (Laplace). So how far the mean of a few rows is shrunk is learned from all of them, and no row is held out for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limaml.meta.losses import Losses
from limaml.types import LossKind

__all__ = ["Effects", "fit_effects"]

LARGEST_STEP = 2.0
"""In log-odds: Newton's step from a flat place of the logistic loss would overshoot."""


@dataclass(frozen=True)
class Effects:
    """Effects `[entries, heads]`, 0 for an entry without rows, and the precision of their prior `[heads]`."""

    values: Tensor
    precision: Tensor


@torch.no_grad()
def fit_effects(
    losses: Losses,
    labels: Tensor,
    weights: Tensor,
    given: Tensor,
    owner: Tensor,
    entries: int,
    precision: Tensor | None = None,
    *,
    rounds: int = 40,
) -> Effects:
    """Effects of the entries `owner` `[n]` on rows with labels `[n, heads]`, weights `[n]` and logits `given` `[n, heads]`.

    With `precision` `[heads]` the prior is that; else it is learned, and with it `losses.log_variance` of squared heads.
    """
    heads, dtype = labels.shape[1], given.dtype
    learned = precision is None
    prior = torch.ones(heads, dtype=dtype) if precision is None else precision.to(dtype)
    values = torch.zeros(entries, heads, dtype=dtype)
    known = labels.isfinite()
    owned = torch.zeros(entries, heads, dtype=dtype).index_add(0, owner, known * weights.to(dtype)[:, None]) > 0
    y, weight = losses.targets(labels, weights, dtype)
    total = weight.sum(0).clamp(min=1e-12)
    for _ in range(rounds):
        slope, curvature = losses.slope_and_curvature(given + values[owner], labels, weights)
        gradient = prior * values + torch.zeros_like(values).index_add(0, owner, slope)
        curve = prior + torch.zeros_like(values).index_add(0, owner, curvature)
        step = (gradient / curve).clamp(-LARGEST_STEP, LARGEST_STEP)
        values = torch.where(owned, values - step, 0.0)
        if not learned:
            if float(step.abs().max() if step.numel() else 0.0) < 1e-7:
                break
            continue
        spread = torch.where(owned, values**2 + 1 / curve, 0.0).sum(0)
        prior = (owned.sum(0) / spread.clamp(min=1e-12)).clamp(1e-3, 1e4)
        noise = ((given + values[owner] - y) ** 2 + 1 / curve[owner]) * weight
        squared = torch.tensor(losses.kinds_are(LossKind.SQUARED))
        variance = (noise.sum(0) / total).clamp(min=1e-6).log().to(losses.log_variance.dtype)
        losses.log_variance.copy_(torch.where(squared, variance, losses.log_variance))
    return Effects(values, prior)
