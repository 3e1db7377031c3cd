"""Random effects against the slow way to the same posterior mode, and shrinkage that is learned."""

from __future__ import annotations

import pytest
import torch

from limaml.evaluate.rivals.effects import fit_effects
from limaml.meta.losses import Losses
from limaml.types import LossKind


@pytest.mark.parametrize("kind", [LossKind.BINARY, LossKind.SQUARED])
def test_effects_are_the_posterior_mode(kind: LossKind) -> None:
    g = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 7, (200,), generator=g)
    owner[owner == 3] = 2  # entry 3 has no row
    labels = (torch.rand(200, 1, generator=g) < 0.3).double()
    labels[::9] = torch.nan
    weights, given = torch.rand(200, generator=g).double(), torch.randn(200, 1, generator=g).double()
    losses = Losses((kind,)).double()
    found = fit_effects(losses, labels, weights, given, owner, 7, torch.tensor([0.7])).values
    effect = torch.zeros(7, 1, dtype=torch.float64, requires_grad=True)
    slow = torch.optim.LBFGS([effect], lr=0.5, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def objective() -> torch.Tensor:
        slow.zero_grad()
        loss = losses.loss(given + effect[owner], labels, weights).sum() + 0.7 * (effect**2).sum() / 2
        loss.backward()
        return loss

    slow.step(objective)
    torch.testing.assert_close(found, effect.detach(), rtol=0, atol=1e-6)
    assert float(found[3]) == 0.0


def test_the_width_of_the_prior_is_learned() -> None:
    """Of effects drawn with a known precision, about that precision is found; of labels without effects, a large one."""
    g = torch.Generator().manual_seed(1)
    owner = torch.arange(400).repeat_interleave(30)
    found = []
    for precision in (0.5, 4.0, 1e9):
        effect = torch.randn(400, 1, generator=g).double() / precision**0.5
        labels = (torch.rand(len(owner), 1, generator=g) < torch.sigmoid(effect[owner])).double()
        weights = torch.ones(len(owner))
        found.append(float(fit_effects(Losses(), labels, weights, torch.zeros_like(labels), owner, 400).precision))
    assert 0.35 < found[0] < 0.7
    assert 2.8 < found[1] < 5.7
    assert found[2] > 50


def test_noise_of_a_squared_head_is_learned() -> None:
    g = torch.Generator().manual_seed(2)
    owner = torch.arange(300).repeat_interleave(20)
    effect = torch.randn(300, 1, generator=g).double()
    labels = effect[owner] + 0.5 * torch.randn(len(owner), 1, generator=g).double()
    losses = Losses((LossKind.SQUARED,))
    fit = fit_effects(losses, labels, torch.ones(len(owner)), torch.zeros_like(labels), owner, 300)
    assert 0.8 < float(fit.precision) < 1.25
    assert abs(float(losses.log_variance.detach().exp()) - 0.25) < 0.02
