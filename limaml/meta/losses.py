"""Losses on logits, one kind per head, with what both solvers need of them.

For a label y, a logit ℓ and a row weight w (0 where the label is missing):

| kind      | loss                          | dloss/dlogit     | curvature    |
|-----------|-------------------------------|------------------|--------------|
| binary    | w (softplus(ℓ) − y ℓ)         | w (σ(ℓ) − y)     | w σ(ℓ)(1−σ(ℓ)) |
| squared   | w ((ℓ − y)² / σ² + ln σ²) / 2 | w (ℓ − y) / σ²   | w / σ²       |

The squared loss is the negative log likelihood of a normal distribution with a learned variance σ² per head, so that its
curvature and the prior precision of the Newton solver are in the same unit. Its y is the label in standard units of the
training rows (`standardise`): so ratings from 1 to 5 and prices in cents start from the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limaml.errors import ModelError
from limaml.meta.adapted import widened
from limaml.types import Interactions, LossKind

__all__ = ["LabelMoments", "Losses"]


@dataclass(frozen=True)
class LabelMoments:
    """Weighted sums over labels, all `[heads]` float64: of the weights, of the labels, and of squares around their mean."""

    weight: Tensor
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(labels: Tensor, weights: Tensor) -> LabelMoments:
        """Of labels `[n, heads]`, NaN where one is missing, and weights `[n]`."""
        weight = labels.isfinite() * weights[:, None].double()
        y = torch.where(labels.isfinite(), labels, 0.0).double()
        total, summed = weight.sum(0), (y * weight).sum(0)
        mean = summed / total.clamp(min=1e-12)
        return LabelMoments(total, summed, ((y - mean) ** 2 * weight).sum(0))

    @property
    def mean(self) -> Tensor:
        return self.total / self.weight.clamp(min=1e-12)


class Losses(nn.Module):
    """The losses of a model's heads.

    Targets are `[n, heads]`, NaN where a label is missing; weights `[n]`. The only parameter is `log_variance`
    `[heads]`, used by the squared heads.
    """

    squared: Tensor
    centre: Tensor  # [heads]; 0 for a binary head
    scale: Tensor  # [heads]; 1 for a binary head

    def __init__(self, kinds: Sequence[LossKind | str] = (LossKind.BINARY,)) -> None:
        super().__init__()
        self.kinds = tuple(LossKind(kind) for kind in kinds)
        self.register_buffer(
            "squared", torch.tensor([kind is LossKind.SQUARED for kind in self.kinds]), persistent=False
        )
        self.register_buffer("centre", torch.zeros(len(self.kinds)))
        self.register_buffer("scale", torch.ones(len(self.kinds)))
        self.log_variance = nn.Parameter(torch.zeros(len(self.kinds)), requires_grad=LossKind.SQUARED in self.kinds)

    @property
    def heads(self) -> int:
        return len(self.kinds)

    @torch.no_grad()
    def standardise(self, labels: Tensor, weights: Tensor) -> None:
        """Take centre and scale of the squared heads from the training rows' labels `[n, heads]` and weights `[n]`."""
        self.take_scale([LabelMoments.of(labels, weights)])

    @torch.no_grad()
    def take_scale(self, parts: Sequence[LabelMoments]) -> None:
        """Take them from the moments of labels that are seen in parts."""
        total = torch.stack([part.weight for part in parts]).sum(0).clamp(min=1e-12)
        mean = torch.stack([part.total for part in parts]).sum(0) / total
        # around the common mean: each part's own squares, and those of its mean; exactly 0 where there is one part
        own = torch.stack([part.squares for part in parts]).sum(0)
        apart = torch.stack([part.weight * (part.mean - mean) ** 2 for part in parts]).sum(0)
        deviation = ((own + apart) / total).sqrt()
        squared = self.squared.cpu()
        self.centre.copy_(torch.where(squared, mean, 0.0))
        self.scale.copy_(torch.where(squared & (deviation > 0), deviation, 1.0))

    def _targets(self, labels: Tensor, known: Tensor, dtype: torch.dtype) -> Tensor:
        return (torch.where(known, labels, 0.0).to(dtype) - self.centre.to(dtype)) / self.scale.to(dtype)

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Weighted loss of each row, `[n]`, summed over heads; a missing label adds nothing."""
        logits = self._checked(logits, labels)
        known = labels.isfinite()
        y = self._targets(labels, known, logits.dtype)
        parts = []
        if not all(self.kinds_are(LossKind.SQUARED)):
            parts.append(nn.functional.softplus(logits) - y * logits)
        if any(self.kinds_are(LossKind.SQUARED)):
            log_variance = self.log_variance.to(logits.dtype)
            parts.append(((logits - y) ** 2 * torch.exp(-log_variance) + log_variance) / 2)
        loss = parts[0] if len(parts) == 1 else torch.where(self.squared, parts[1], parts[0])
        return (loss * known).sum(1) * weights.to(logits.dtype)

    def of_rows(self, data: Interactions, rows: Tensor, logits: Tensor) -> Tensor:
        """Weighted loss `[n]` of the rows `[n]` of `data` with these logits `[n, heads]`, in training and in validation
        alike: sampled rows have the log-odds correction, without which their labels are not what the logits speak of."""
        if data.offset is not None:
            logits = logits + data.offset[rows, None].to(logits)
        return self.loss(logits, data.labels[rows].to(logits.device), data.weights[rows].to(logits.device))

    def targets(self, labels: Tensor, weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What each logit is compared with (0 where a label is missing), and how much that weighs, both `[n, heads]`."""
        known = labels.isfinite()
        return self._targets(labels, known, dtype), known * weights.to(dtype)[:, None]

    def slope(self, logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """First derivative of the loss by each logit, `[n, heads]`, for what `targets` gave."""
        logits = self._checked(logits, y)
        slope = torch.sigmoid(logits) - y
        if any(self.kinds_are(LossKind.SQUARED)):
            slope = torch.where(self.squared, (logits - y) * torch.exp(-self.log_variance.to(logits.dtype)), slope)
        return slope * weight

    def slope_and_curvature_of(self, logits: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`slope`, and the Gauss-Newton curvature, both `[n, heads]`, for what `targets` gave."""
        p = torch.sigmoid(widened(logits, self))
        curvature = p * (1 - p)
        if any(self.kinds_are(LossKind.SQUARED)):
            precision = torch.exp(-self.log_variance.to(p.dtype)).expand_as(p)
            curvature = torch.where(self.squared, precision, curvature)
        return self.slope(logits, y, weight), curvature * weight

    def slope_and_curvature(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The same for labels `[n, heads]` and weights `[n]`."""
        return self.slope_and_curvature_of(logits, *self.targets(labels, weights, widened(logits, self).dtype))

    def _checked(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape != labels.shape or logits.shape[1] != self.heads:  # broadcasting would hide it
            raise ModelError(
                f"The global block gives logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)} and "
                f"{self.heads} losses; both must be [rows, heads], with one loss per head."
            )
        return widened(logits, self)  # a sum over rows of rounded losses would be of rounded rows

    def predictions(self, logits: Tensor) -> Tensor:
        """Probabilities of binary heads, values in the label's unit of squared heads, `[n, heads]`."""
        return torch.where(self.squared, self.outputs(logits), torch.sigmoid(logits))

    def outputs(self, logits: Tensor) -> Tensor:
        """Log-odds of binary heads, values in the label's unit of squared heads, `[n, heads]`."""
        return logits * self.scale.to(logits.dtype) + self.centre.to(logits.dtype)

    def kinds_are(self, kind: LossKind) -> list[bool]:
        return [k is kind for k in self.kinds]
