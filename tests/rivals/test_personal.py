"""Methods that give each member weights of its own, against a plain loop over members."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from rival_data import small_config, small_problem
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from limaml.evaluate.rivals.fine_tuned import paths
from limaml.evaluate.rivals.melu import Melu
from limaml.evaluate.rivals.padding import alike
from limaml.evaluate.rivals.personal import hold_out
from limaml.evaluate.rivals.random_effects import linear_effects
from limaml.meta.blocks import CONSTANT
from limaml.meta.build import build_global_block
from limaml.meta.losses import Losses
from limaml.tasks import TaskRows
from limaml.types import Features, Interactions, LossKind


def features_of(data: Interactions, rows: Tensor) -> Features:
    features: Features = {CONSTANT: torch.ones(len(rows), 1)}
    for side, table in data.sides.items():
        features |= {name: values[data.index[side][rows]] for name, values in table.items()}
    return features


@pytest.mark.parametrize("kind", [LossKind.BINARY, LossKind.SQUARED])
def test_random_effects_are_ridge_regressions(kind: LossKind) -> None:
    """As scikit-learn finds them: without a given logit (it has none), each row at its weight."""
    problem = small_problem(seed=4)
    labels = torch.nan_to_num(problem.data.labels)
    data, split = replace(problem.data, labels=labels), problem.split
    g = torch.Generator().manual_seed(0)
    inputs = torch.cat([torch.ones(len(data), 1), torch.randn(len(data), 2, generator=g)], 1).double()
    given = torch.zeros(len(data), 1).double()
    found = linear_effects(
        Losses((kind,)).double(), data, "user", split.support, inputs, given, torch.full((3,), 2.0).double()
    )
    compared = 0
    for member in range(data.count("user")):
        mine = data.index["user"] == member
        rows, every = (split.support & mine).nonzero().flatten(), mine.nonzero().flatten()
        y, weight = labels[rows, 0].double().numpy(), data.weights[rows].double().numpy()
        if len(set(y.tolist())) < 2:
            continue
        if kind is LossKind.BINARY:
            model = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=10000)
            expected = model.fit(inputs[rows].numpy(), y, weight).decision_function(inputs[every].numpy())
        else:
            model = Ridge(alpha=2.0, fit_intercept=False, tol=1e-12)
            expected = model.fit(inputs[rows].numpy(), y, weight).predict(inputs[every].numpy())
        torch.testing.assert_close(found[every, 0], torch.from_numpy(expected), rtol=0, atol=1e-4)
        compared += 1
    assert compared >= 5
    nobody = linear_effects(
        Losses((kind,)).double(), data, "user", split.support & False, inputs, given + 3, torch.ones(3).double()
    )
    assert bool((nobody == 3).all())


@pytest.mark.parametrize("heads", [1, 2])
def test_fine_tuning_is_a_loop_of_sgd_over_members(heads: int) -> None:
    problem = small_problem("new_tasks", heads=heads)
    data, split = problem.data, problem.split
    torch.manual_seed(0)
    block = build_global_block(problem.specs, small_config().model, {}, heads).eval()
    for parameter in block.parameters():
        parameter.data.normal_(std=0.3)
    losses = Losses(problem.losses).requires_grad_(False)
    losses.standardise(data.labels[split.train], data.weights[split.train])
    test = split.test.nonzero().flatten()
    found = torch.full((4, len(test), heads), torch.nan)
    for where, logits in paths(block, losses, data, "user", split, 0.4, 3, 2.0):
        found[:, where] = logits
    for member in torch.unique(data.index["user"][test]).tolist():
        mine = data.index["user"] == member
        rows, judged = (split.support & mine).nonzero().flatten(), (split.test & mine).nonzero().flatten()
        own = deepcopy(block)
        optimiser = torch.optim.SGD(own.parameters(), 0.4)
        known = data.labels[rows].isfinite().any(1)
        for step in range(4):
            with torch.no_grad():
                expected = own(features_of(data, judged))
            torch.testing.assert_close(found[step, torch.isin(test, judged)], expected, rtol=1e-4, atol=1e-5)
            optimiser.zero_grad()
            loss = losses.loss(own(features_of(data, rows)), data.labels[rows], data.weights[rows]).sum()
            (loss / (float((data.weights[rows] * known).sum()) + 2.0)).backward()
            optimiser.step()


@pytest.mark.parametrize("kind", ["interaction", "cross"])
@pytest.mark.parametrize("heads", [1, 2])
def test_melu_is_a_loop_over_members(heads: int, kind: str) -> None:
    """Logits, and their first-order slopes by every weight."""
    problem = small_problem(heads=heads)
    data, split = problem.data, problem.split
    config = small_config(model={"global_block": kind}, adapt={"solver": "gradient", "steps": 2, "rate": 0.5})
    torch.manual_seed(0)
    block = build_global_block(problem.specs, config.model, {}, heads)
    model = Melu(block, Losses(problem.losses), "user", config.adapt).double()  # type: ignore[arg-type]
    for parameter in block.parameters():
        parameter.data.normal_(std=0.3)
    model.losses.standardise(data.labels[split.train], data.weights[split.train])
    data = replace(data, weights=data.weights.double(), labels=data.labels.double())
    data.sides["row"]["price"] = data.sides["row"]["price"].double()
    tasks = torch.arange(data.count("user"))
    support = TaskRows.of(data.index["user"], len(tasks), split.support).of_tasks(tasks)
    query = TaskRows.of(data.index["user"], len(tasks), split.test).of_tasks(tasks)
    logits = model.logits(data, len(tasks), support, query)
    weight = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    learned = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logits * weight).sum(), learned, allow_unused=True)

    total = torch.zeros(())
    prior, steps = torch.exp(model.log_prior_count), range(config.adapt.steps)
    for task in tasks.tolist():
        rows, judged = support.rows[support.owner == task], query.rows[query.owner == task]
        own = model.decision()
        if len(rows):
            x, rest = (part.detach() for part in model.inputs(data, rows))
            known = float((data.weights[rows] * data.labels[rows].isfinite().any(1)).sum())
            for step in steps:
                at = {name: p.detach().requires_grad_() for name, p in own.items()}
                loss = model.losses.loss(model.score(at, x, rest), data.labels[rows], data.weights[rows]).sum()
                slopes = dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))
                rate = torch.exp(model.log_rate[step]) / (known + prior)
                own = {name: p - rate * slopes[name] for name, p in own.items()}
        if len(judged):
            expected = model.score(own, *model.inputs(data, judged))
            torch.testing.assert_close(logits[query.owner == task], expected, rtol=0, atol=1e-9)
            total = total + (expected * weight[query.owner == task]).sum()
    slow = torch.autograd.grad(total, learned, allow_unused=True)
    for a, b in zip(found, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    # With nothing adapted, the network is the global block.
    still = Melu(block, model.losses, "user", config.adapt.model_copy(update={"steps": 0})).double()  # type: ignore[arg-type]
    features = {n: v.double() if v.is_floating_point() else v for n, v in features_of(data, query.rows).items()}
    torch.testing.assert_close(still.logits(data, len(tasks), support, query), block(features), rtol=0, atol=1e-9)


def test_chunks_hold_every_task_once() -> None:
    size = torch.tensor([5, 0, 100, 7, 7, 1])
    for cells in (1, 20, 10**6):
        chunks = list(alike(size, cells))
        assert sorted(torch.cat(chunks).tolist()) == list(range(6))
        assert all(len(chunk) == 1 or len(chunk) * int(size[chunk].max()) <= cells for chunk in chunks)


@pytest.mark.parametrize("protocol", ["warm", "new_tasks"])
def test_what_is_held_out_lies_inside_the_training_rows(protocol: str) -> None:
    problem = small_problem(protocol)
    inner = hold_out(problem.data, problem.split, 0)
    assert inner.protocol == protocol
    assert bool((inner.test | inner.support | inner.train <= problem.split.train).all())
    assert bool(inner.test.any())
    assert not bool((inner.test & inner.support).any())
    assert math.isclose(float((inner.test | inner.support).sum()), float(problem.split.train.sum()))
