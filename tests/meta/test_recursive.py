"""The posterior of earlier rows is the prior of those that come: no row is needed twice."""

from __future__ import annotations

import pytest
import torch
from engines import DIM, Case, model_of, random_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_uncertainty import NEWTON, linear_model
from torch import Tensor

from limaml.errors import ModelError
from limaml.meta.model import MetaModel
from limaml.meta.uncertainty import Posterior
from limaml.tasks import TaskRows
from limaml.types import Interactions


def updated(model: MetaModel, data: Interactions, among: Tensor | None, before: Posterior | None = None) -> Posterior:
    rows = TaskRows.of(data.index["user"], data.count("user"), among)
    return model.embed(data, "user", rows, uncertainty=True, before=before)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 9]), min_size=1, max_size=5).filter(any),
    heads=st.integers(1, 2),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    seed=st.integers(0, 100),
)
def test_where_all_is_gaussian_it_is_what_all_rows_together_give(
    sizes: list[int], heads: int, cuts: list[float], seed: int
) -> None:
    """Any number of parts, in any order of rows, parts and tasks without rows included."""
    losses = ("squared",) * heads
    model, data = linear_model(losses, steps=1), random_data(Case(losses=losses, sizes=tuple(sizes), seed=seed))
    place = torch.rand(len(data), generator=torch.Generator().manual_seed(seed))
    whole, found = updated(model, data, None), None
    for low, high in zip([0.0, *sorted(cuts)], [*sorted(cuts), 1.0], strict=True):
        found = updated(model, data, (place >= low) & (place < high), found)
    assert found is not None
    assert torch.allclose(found.mean, whole.mean, atol=1e-9)
    assert torch.allclose(found.factor, whole.factor, atol=1e-9)


def test_one_update_is_the_mode_under_the_earlier_posterior() -> None:
    """Against the stationary point that autograd sees, one task after the other."""
    case = Case(sizes=(6, 9, 3), losses=("binary",), steps=40, adaptation={**NEWTON, "precision": 2.0})
    model, data = model_of(case, "auto"), random_data(case)
    early = torch.arange(len(data)) % 2 == 0
    before = updated(model, data, early)
    after = updated(model, data, ~early, before)
    rows = TaskRows.of(data.index["user"], data.count("user"), ~early).of_tasks(torch.arange(3))
    support = model.scored(data, "user", torch.arange(3), rows, model.held_cold(data, "user"))
    z = after.mean.clone().requires_grad_()
    off = (before.factor.mT @ (z - before.mean).unsqueeze(-1)).squeeze(-1)
    slope = torch.autograd.grad((support.loss(z) + off.square().sum(1) / 2).sum(), z)[0]
    assert float(slope.abs().max()) < 1e-6
    assert not torch.allclose(after.mean, before.mean, atol=1e-3)


def test_an_update_takes_as_many_steps_as_are_asked_for() -> None:
    case = Case(sizes=(6, 9, 3), losses=("binary",), steps=3, adaptation={**NEWTON, "precision": 2.0})
    model, data = model_of(case, "auto"), random_data(case)
    early = torch.arange(len(data)) % 2 == 0
    before = updated(model, data, early)
    rows = TaskRows.of(data.index["user"], data.count("user"), ~early)
    found = [model.embed(data, "user", rows, uncertainty=True, before=before, steps=n) for n in (0, 1, 3)]
    assert torch.equal(found[0].mean, before.mean) and torch.equal(found[0].factor, before.factor)
    assert torch.equal(found[2].mean, updated(model, data, ~early, before).mean)
    model.newton("user").steps = 1
    assert torch.equal(found[1].mean, updated(model, data, ~early, before).mean)
    assert not torch.allclose(found[1].mean, found[2].mean, atol=1e-6)


def test_a_task_without_new_rows_keeps_what_it_has() -> None:
    model, data = linear_model(("squared",), steps=2), random_data(Case(losses=("squared",), sizes=(4, 5)))
    before = updated(model, data, None)
    none = updated(model, data, torch.zeros(len(data), dtype=torch.bool), before)
    assert torch.equal(none.mean, before.mean) and torch.equal(none.factor, before.factor)
    first = updated(model, data, data.index["user"] == 0, before)
    assert torch.equal(first.mean[1], before.mean[1])
    assert torch.allclose(first.factor[1], before.factor[1], rtol=1e-12)


def test_a_posterior_of_other_tasks_is_refused() -> None:
    model, data = linear_model(("squared",), steps=2), random_data(Case(losses=("squared",), sizes=(4, 5)))
    before = updated(model, data, None)
    rows = TaskRows.of(data.index["user"], data.count("user"))
    with pytest.raises(ModelError, match=r"for 1 tasks and dim=\d+ they must be"):
        model.embed(data, "user", rows, torch.arange(1), uncertainty=True, before=before)
    wrong = Posterior(before.mean[:, : DIM - 1], before.factor)
    with pytest.raises(ModelError, match="has a mean of shape"):
        updated(model, data, None, wrong)
