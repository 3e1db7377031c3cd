"""The standard deviation of a logit is the posterior's, and its scale is found where it is known."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from engines import DIM, Case, model_of, random_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_newton import LinearInZ
from torch import Tensor

from limaml.errors import DataError, ModelError
from limaml.meta.blocks import MetaMLP
from limaml.meta.model import MetaModel
from limaml.meta.uncertainty import Posterior, calibrate, logit_sd
from limaml.tasks import Split, TaskRows
from limaml.types import Features, Interactions, Rows, embedding_name

NEWTON: dict[str, object] = {"solver": "newton", "precision": 0.7}


def linear_model(losses: tuple[str, ...], steps: int) -> MetaModel:
    """logit = W(x) z + b(x), z ~ N(0.3, 1 / 0.7)."""
    case = Case(losses=losses, steps=steps, adaptation=NEWTON)
    torch.manual_seed(1)
    settings = model_of(case, "auto").adaptation
    model = MetaModel(LinearInZ(len(losses)), {"user": MetaMLP([], DIM)}, losses=losses, adaptation=settings).double()
    with torch.no_grad():
        for parameter in model.meta_blocks.parameters():
            parameter.zero_()
        model.losses.log_variance.fill_(-0.5)
    return model


def posteriors_of(model: MetaModel, data: Interactions, among: Tensor | None = None) -> dict[str, Posterior]:
    return {
        task: model.embed(data, task, TaskRows.of(data.index[task], data.count(task), among), uncertainty=True)
        for task in model.tasks
    }


@pytest.mark.parametrize("heads", [1, 2])
def test_on_a_linear_block_it_is_that_of_bayesian_regression(heads: int) -> None:
    """Task 1 has no support: its sd is the prior's."""
    losses = ("squared",) * heads
    model, data = linear_model(losses, steps=1), random_data(Case(losses=losses, sizes=(5, 1, 1, 12), missing=True))
    support = data.index["user"] != 1
    found = logit_sd(model, data, torch.arange(len(data)), posteriors_of(model, data, support))
    w = model.global_block.factors(data.sides["row"]["r"].double()).view(-1, heads, DIM).detach()
    for row in range(len(data)):
        precision = 0.7 * torch.eye(DIM).double()
        for other in ((data.index["user"] == data.index["user"][row]) & support).nonzero().flatten().tolist():
            for head in range(heads):
                if data.labels[other, head].isfinite():
                    weight = float(data.weights[other]) * math.exp(0.5)
                    precision += weight * torch.outer(w[other, head], w[other, head])
        for head in range(heads):
            expected = float(w[row, head] @ torch.linalg.solve(precision, w[row, head]))
            assert float(found[row, head]) ** 2 == pytest.approx(expected, rel=1e-6)


@settings(max_examples=10)
@given(
    losses=st.sampled_from([("binary",), ("binary", "squared")]),
    global_block=st.sampled_from(["interaction", "cross", "plain"]),
    types=st.sampled_from([("user",), ("user", "item"), ("item", "user")]),
    seed=st.integers(0, 100),
)
def test_it_adds_up_over_task_types(
    losses: tuple[str, ...], global_block: str, types: tuple[str, ...], seed: int
) -> None:
    """Against Jacobians of the whole block that torch.func works out, row by row."""
    case = Case(losses=losses, global_block=global_block, types=types, sizes=(4, 0, 9), seed=seed, adaptation=NEWTON)
    model, data = model_of(case, "auto"), random_data(case)
    posteriors = posteriors_of(model, data)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    found = logit_sd(model, data, rows, posteriors)
    features: Features = {}
    for side, table in data.sides.items():
        entries = data.index[side][rows]
        features |= {n: v[entries].double() if v.is_floating_point() else v[entries] for n, v in table.items()}
    variance = torch.zeros_like(found)
    for task, posterior in posteriors.items():
        entries = {other: data.index[other][rows] for other in types}
        held = {embedding_name(other): posteriors[other].mean[entries[other]] for other in types}
        for row in range(len(rows)):

            def logits(z: Tensor, row: int = row, task: str = task, held: Features = held) -> Tensor:
                one = {name: values[row : row + 1] for name, values in {**features, **held}.items()}
                out: Tensor = model.global_block({**one, embedding_name(task): z[None]})[0]
                return out

            entry = int(entries[task][row])
            jacobian = torch.func.jacrev(logits)(posterior.mean[entry])
            covariance = torch.cholesky_inverse(posterior.factor[entry])
            variance[row] += torch.einsum("hi,ij,hj->h", jacobian, covariance, jacobian)
    assert torch.allclose(found, variance.sqrt().detach(), rtol=1e-9)
    assert (found > 0).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 500), more=st.integers(1, 10))
def test_more_support_never_makes_it_larger(seed: int, more: int) -> None:
    """With a squared loss on a linear block each row adds to H, whatever its label."""
    model, data = linear_model(("squared",), steps=1), random_data(Case(losses=("squared",), sizes=(15, 6), seed=seed))
    every = torch.arange(len(data))
    few = logit_sd(model, data, every, posteriors_of(model, data, every < 3))
    many = logit_sd(model, data, every, posteriors_of(model, data, every < 3 + more))
    assert (many <= few * (1 + 1e-9)).all() and (many < few * (1 - 1e-4)).any()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_embed_and_adapt_give_the_same_posterior(chunk: int) -> None:
    case = Case(sizes=(5, 0, 3, 7), adaptation=NEWTON)
    model, data = model_of(case, "auto"), random_data(case)
    grouped, tasks = TaskRows.of(data.index["user"], 4), torch.arange(4)
    found = model.embed(data, "user", grouped, rows_per_chunk=chunk, uncertainty=True)
    assert torch.allclose(found.mean, model.embed(data, "user", grouped), rtol=1e-12)
    z, factor = model.adapt(data, "user", tasks, grouped.of_tasks(tasks), uncertainty=True)
    assert torch.allclose(found.mean, z, rtol=1e-12) and torch.allclose(found.factor, factor, rtol=1e-9)
    prior = torch.diag(torch.exp(model.solvers["user"].log_precision / 2)).detach()
    assert torch.allclose(found.factor[1], prior, rtol=1e-12) and not torch.allclose(found.factor[0], prior, atol=1e-2)
    for z, factor in (
        model.adapt(data, "user", tasks, Rows.empty(), uncertainty=True),
        model.adapt(replace(data, weights=0 * data.weights), "user", tasks, grouped.of_tasks(tasks), uncertainty=True),
    ):
        assert torch.equal(z, model.cold(data, "user", tasks))
        assert torch.allclose(factor, prior.expand(4, -1, -1), rtol=1e-12)


def test_a_task_that_overflows_has_the_prior(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(sizes=(5, 3, 7), adaptation=NEWTON)
    model, data = model_of(case, "auto"), random_data(case)
    data.sides["row"]["r"][int((data.index["user"] == 1).nonzero()[0])] = torch.nan
    with caplog.at_level(logging.WARNING, "limaml"):
        found = posteriors_of(model, data)["user"]
    assert "1 of 3 tasks" in caplog.text
    assert torch.allclose(found.factor[1], torch.diag(torch.exp(model.solvers["user"].log_precision / 2)))
    assert found.factor.isfinite().all() and found.mean.isfinite().all()


def test_samples_have_the_covariance() -> None:
    case = Case(sizes=(5, 2), adaptation=NEWTON)
    mean, factor = posteriors_of(model_of(case, "auto"), random_data(case))["user"]
    many = Posterior(mean[:1].expand(200_000, -1), factor[:1].expand(200_000, -1, -1))
    drawn = many.sample(2.0, torch.Generator().manual_seed(0)) - mean[0]
    expected = 4 * torch.cholesky_inverse(factor[0])
    assert torch.allclose(drawn.mT @ drawn / len(drawn), expected, atol=0.03 * float(expected.abs().max()))
    assert float(drawn.mean(0).abs().max()) < 0.03


def test_the_gradient_solver_has_none() -> None:
    case = Case()
    model, data = model_of(case, "auto"), random_data(case)
    grouped = TaskRows.of(data.index["user"], 4)
    with pytest.raises(ModelError, match=r"The solver of 'user' is 'gradient'.*adapt\.solver=newton"):
        model.embed(data, "user", grouped, uncertainty=True)
    with pytest.raises(ModelError, match=r"adapt\.solver=newton"):
        model.adapt(data, "user", torch.arange(4), Rows.empty(), uncertainty=True)
    with pytest.raises(ModelError, match="no meta block for 'nobody'"):
        model.adapt(data, "nobody", torch.arange(4), Rows.empty(), uncertainty=True)


def test_embeddings_of_every_type_are_needed() -> None:
    case = Case(types=("user", "item"), adaptation=NEWTON)
    model, data = model_of(case, "auto"), random_data(case)
    posteriors = posteriors_of(model, data)
    del posteriors["item"]
    with pytest.raises(ModelError, match=r"'item'.* missing"):
        logit_sd(model, data, torch.arange(3), posteriors)
    assert logit_sd(model, data, torch.arange(0), posteriors_of(model, data)).shape == (0, 1)


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("loss", ["binary", "squared"])
def test_the_scale_is_found_where_it_is_known(loss: str, truth: float) -> None:
    """Tasks whose true embeddings lie `truth` posterior standard deviations off, with labels drawn from those."""
    tasks, generator = 400, torch.Generator().manual_seed(3)
    model = linear_model((loss,), steps=2)
    data = random_data(Case(losses=(loss,), sizes=(30,) * tasks))
    data = replace(data, weights=torch.ones(len(data)), offset=None)
    rank = torch.empty(len(data), dtype=torch.int64)
    grouped = TaskRows.of(data.index["user"], tasks)
    rank[grouped.rows] = torch.arange(30).repeat(tasks)
    none = torch.zeros(len(data), dtype=torch.bool)
    split = Split("new_tasks", "user", none, rank < 6, rank >= 6)
    posterior = posteriors_of(model, data, split.support)["user"]
    with torch.no_grad():
        logits = model.logits(data, torch.arange(len(data)), {"user": posterior.sample(truth, generator)})
    noise = torch.rand(logits.shape, generator=generator)
    drawn = (noise < torch.sigmoid(logits)).float()
    if loss == "squared":
        drawn = (logits + math.exp(-0.25) * torch.randn(logits.shape, generator=generator)).float()
    labels = torch.where(split.support[:, None], data.labels, drawn)
    assert calibrate(model, replace(data, labels=labels), split) == pytest.approx(truth, rel=0.1)


def test_a_scale_needs_labels() -> None:
    case = Case(sizes=(5, 4), adaptation=NEWTON)
    model, data = model_of(case, "auto"), random_data(case)
    none = torch.zeros(len(data), dtype=torch.bool)
    with pytest.raises(DataError, match="no labelled test rows of task 'user'"):
        calibrate(model, data, Split("new_tasks", "user", none, ~none, none))
