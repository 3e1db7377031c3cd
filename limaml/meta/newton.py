"""Solver `newton`: the support's maximum a posteriori estimate, in the space of the meta embedding.

With the cold embedding z₀, a learned diagonal prior precision Λ, and J = ∂logit/∂z of each support row,

    H = Σ κ J Jᵀ + Λ        g = Σ (dloss/dlogit) J + Λ (z − z₀)        z ← z − H⁻¹ g

a few times (Gauss-Newton). κ is the loss's curvature by the logit, ≥ 0, and Λ > 0, so H is positive definite. A step that
makes a task's objective worse is halved for that task, and given up if halving does not help. All of it is differentiated by the outer loop.

Recursively, what was found before is the prior of what comes: z₀ and Λ are then the posterior's mean and its H, a full matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from limaml.errors import ConfigError
from limaml.meta.scorer import Piece
from limaml.meta.support import Support
from limaml.types import Parts

__all__ = ["NewtonSolver", "Prior"]


@dataclass(frozen=True)
class Prior:
    """What is believed of the meta embeddings before the support: normal around `mean` `[tasks, dim]`."""

    mean: Tensor
    precision: Tensor  # (dim,): a diagonal for all tasks; or (tasks, dim, dim)

    def _times(self, off: Tensor) -> Tensor:
        if self.precision.ndim == 1:
            return self.precision * off
        return (self.precision @ off.unsqueeze(-1)).squeeze(-1)

    def slope(self, z: Tensor) -> Tensor:
        """Gradient of `loss`, `[tasks, dim]`."""
        return self._times(z - self.mean)

    def loss(self, z: Tensor) -> Tensor:
        """Negative log density of each task's z up to a constant, `[tasks]`."""
        off = z - self.mean
        return (self._times(off) * off).sum(1) / 2

    @property
    def matrix(self) -> Tensor:
        """The precision, `[dim, dim]` or `[tasks, dim, dim]`."""
        return torch.diag_embed(self.precision) if self.precision.ndim == 1 else self.precision


class NewtonSolver(nn.Module):
    """Gauss-Newton steps from the cold embedding. Parameter: `log_precision` `[dim]`, the prior's."""

    def __init__(self, dim: int, *, steps: int = 2, precision: float = 1.0, halvings: int = 3) -> None:
        super().__init__()
        if steps < 0 or not precision > 0:
            raise ConfigError(f"The Newton solver needs steps ≥ 0 and precision > 0, but got {steps} and {precision}.")
        self.steps, self.halvings = steps, halvings
        self.log_precision = nn.Parameter(torch.full((dim,), math.log(precision)))

    def prior(self, cold: Tensor) -> Prior:
        """The learned prior: around the cold embeddings `[tasks, dim]`, with the learned precision."""
        return Prior(cold, torch.exp(self.log_precision))

    def prior_factor(self, cold: Tensor) -> Tensor:
        """Lower Cholesky factor of the prior's precision, `[tasks, dim, dim]`."""
        return torch.diag_embed(torch.exp(self.log_precision / 2).expand_as(cold))

    def forward(
        self, support: Support, cold: Tensor, before: tuple[Tensor, Tensor] | None = None, steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adapted meta embeddings `[tasks, dim]`, and the lower Cholesky factor of H `[tasks, dim, dim]` of the last
        step (of the prior alone where there were no steps): H⁻¹ is the posterior covariance.

        `before`, such a result for earlier rows, takes the place of the learned prior; `cold` is then not read. So many
        `steps` are taken, if given, in place of the solver's own."""
        outer = torch.is_grad_enabled()
        if before is None:
            prior, factor = self.prior(cold), self.prior_factor(cold)
        else:
            prior, factor = Prior(before[0], before[1] @ before[1].mT), before[1]
        z = prior.mean
        for _ in range((self.steps if steps is None else steps) if len(support) else 0):
            slope, hessian, loss = self._system(support, z, prior, outer)
            factor = _cholesky(hessian)
            step = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
            z = z - self._damping(support, z, step, prior, loss) * step
            if not outer:
                z, factor = z.detach(), factor.detach()
        return z, factor

    def _system(self, support: Support, z: Tensor, prior: Prior, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient `[tasks, dim]`, Gauss-Newton matrix `[tasks, dim, dim]` and objective `[tasks]` at z."""

        def sums(piece: Piece, own: Parts, sides: Sequence[Parts], weights: Tensor, graph: bool) -> Sequence[Tensor]:
            (z,) = own
            assert z is not None
            with torch.enable_grad():
                per_row = piece.segments.rows(z)
                if not graph or not per_row.requires_grad:
                    per_row = per_row.detach().requires_grad_()
                logits = support.scorer.per_row(per_row, piece, sides)
                heads = logits.shape[1]
                jacobians = [
                    torch.autograd.grad(
                        logits[:, head].sum(),
                        per_row,
                        create_graph=graph,
                        retain_graph=graph or head + 1 < heads,
                        allow_unused=True,  # a head need not read every meta embedding
                        materialize_grads=True,
                    )[0]
                    for head in range(heads)
                ]
            if not graph:
                logits = logits.detach()
            slopes, curvatures = support.slope_and_curvature(logits, piece, weights)
            segments = piece.segments
            tasks, dim = z.shape
            slope, gram = z.new_zeros(tasks, dim), z.new_zeros(tasks, dim, dim)
            for a, k, jacobian in zip(slopes.unbind(1), curvatures.unbind(1), jacobians, strict=True):
                slope = slope + segments.sum(a[:, None] * jacobian)
                gram = gram + segments.gram(k[:, None] * jacobian, jacobian)
            with torch.no_grad():
                loss = segments.sum(support.row_losses(logits, piece, weights))
            return [slope, gram, loss]

        slope, gram, loss = support.over_pieces(sums, (z,), create_graph)
        return slope + prior.slope(z), gram + prior.matrix, loss.detach() + prior.loss(z).detach()

    @torch.no_grad()
    def _damping(self, support: Support, z: Tensor, step: Tensor, prior: Prior, before: Tensor) -> Tensor:
        """Share of the step each task takes, `[tasks, 1]`: halved while it makes the objective worse than `before`
        `[tasks]`, and 0 if it still does in the end."""
        share = torch.ones(len(z), 1, dtype=z.dtype, device=z.device)
        rounding = (1e-6 if z.dtype == torch.float32 else 1e-12) * (1 + before.abs())
        for halving in range(self.halvings + 1):
            after = support.loss(z - share * step) + prior.loss(z - share * step)
            worse = ~(after <= before + rounding)  # true also where `after` is not a number
            if not bool(worse.any()):
                break
            smaller = share / 2 if halving < self.halvings else torch.zeros_like(share)
            share = torch.where(worse[:, None], smaller, share)
        return share


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of each matrix. One that rounding has made indefinite gets a little more diagonal; one that
    is not finite gives NaN, for its task alone."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return cast(Tensor, factor)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    extra = (failed > 0)[:, None] * 1e-5 * diagonal.detach().mean(1, keepdim=True).nan_to_num()
    factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(extra.expand_as(diagonal)))
    return torch.where((failed > 0)[:, None, None], torch.nan, factor)
