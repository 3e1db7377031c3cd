"""Supports that real data has, on every engine: one row, one class, copies, weights of zero, extreme and missing values."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from engines import Case, conforms, model_of, outcome, random_data
from torch import Tensor

from limaml.meta.model import MetaModel
from limaml.tasks import TaskRows
from limaml.types import Interactions

ENGINES = ("lowrank", "vmap", "loop")
CASE = Case(
    pieces=("residual",), sequence="feed forward", table="shipped", adapt_tables=True, sizes=(4, 0, 3, 6), steps=3
)


def adapted(model: MetaModel, data: Interactions) -> Tensor:
    tasks = torch.arange(data.count("user"))
    return model.adapt(data, "user", tasks, TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks))


def rows_of(data: Interactions, rows: Tensor) -> Interactions:
    """The data with the given rows alone, which may repeat."""
    return replace(
        data,
        index={side: index[rows] for side, index in data.index.items()},
        labels=data.labels[rows],
        weights=data.weights[rows],
        time=data.time[rows],
        offset=None if data.offset is None else data.offset[rows],
    )


@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (0, 1), (200, 0, 1)], ids=str)
def test_supports_of_one_row_and_of_many(sizes: tuple[int, ...], steps: int) -> None:
    case = replace(CASE, sizes=sizes, steps=steps)
    if sum(sizes) == 1:  # `outcome` adapts on every second row
        found = {engine: adapted(model_of(case, engine), random_data(case)) for engine in ENGINES}
        assert torch.allclose(found["lowrank"], found["loop"], rtol=1e-9)
        assert torch.allclose(found["vmap"], found["loop"], rtol=1e-9)
        return
    oracle = outcome(case, "loop")
    for engine in ("lowrank", "vmap"):
        conforms(case, engine, oracle)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_support_of_one_class_moves_towards_it(label: float, engine: str) -> None:
    case = replace(CASE, adaptation={"rate": 0.1})
    model, data = model_of(case, engine), random_data(case)
    data = replace(data, labels=torch.full_like(data.labels, label))
    tasks = torch.arange(4)
    cold, z = model.cold(data, "user", tasks).detach(), adapted(model, data).detach()
    assert z.isfinite().all()
    rows = torch.arange(len(data))
    before, after = (model.predict(data, rows, {"user": table})[:, 0] for table in (cold, z))
    gain = torch.zeros(4, dtype=torch.float64).index_add(0, data.index["user"], after - before)
    assert ((gain > 0) == (label == 1)).logical_or(torch.tensor([False, True, False, False])).all()
    assert float(gain[1]) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_of_a_row_are_a_row_that_weighs_as_much(engine: str) -> None:
    model, data = model_of(CASE, engine), random_data(CASE)
    data = replace(data, weights=data.weights.double())
    first = torch.stack([(data.index["user"] == task).nonzero()[0, 0] for task in (0, 2, 3)])
    copies = adapted(model, rows_of(data, first.repeat(5)))
    once = rows_of(data, first)
    assert torch.allclose(copies, adapted(model, replace(once, weights=5 * once.weights)), rtol=1e-12)
    assert not torch.allclose(copies, adapted(model, once), rtol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_without_weight_is_no_row(engine: str) -> None:
    model, data = model_of(CASE, engine), random_data(CASE)
    weightless = torch.arange(len(data)) % 3 == 0
    z = adapted(model, replace(data, weights=data.weights.masked_fill(weightless, 0.0)))
    assert torch.allclose(z, adapted(model, rows_of(data, (~weightless).nonzero()[:, 0])), rtol=1e-12)


def spoiled(data: Interactions, where: str, value: float) -> Interactions:
    """Task 3's rows, or its own features, hold `value`."""
    sides = {name: dict(features) for name, features in data.sides.items()}
    if where == "row":
        sides["row"]["r"] = sides["row"]["r"].masked_fill((data.index["user"] == 3)[:, None], value)
    else:
        sides["user"]["x"] = sides["user"]["x"].clone()
        sides["user"]["x"][3] = value
    return replace(data, sides=sides)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("where", "value"), [("row", 1e6), ("row", torch.nan), ("task", 1e6), ("task", -1e6)])
@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_a_task_of_extreme_values_disturbs_no_other(
    solver: str, where: str, value: float, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = replace(CASE, dtype=torch.float32, adaptation={"solver": solver})
    model, data = model_of(case, engine), random_data(case)
    grouped = TaskRows.of(data.index["user"], 4)
    whole = model.embed(data, "user", grouped)
    data = spoiled(data, where, value)
    with caplog.at_level(logging.WARNING, "limaml"):
        found = model.embed(data, "user", grouped)
    assert torch.equal(found[:3], whole[:3])
    assert found.isfinite().all()
    cold = model.cold(data, "user", torch.arange(4)).detach()
    if value != value:
        assert torch.equal(found[3], cold[3])
        assert "1 of 4 tasks" in caplog.text and "user:u3" in caplog.text
    elif solver == "gradient":  # newton gives up a step that makes matters worse
        assert ("user:u3" in caplog.text) == torch.equal(found[3], cold[3])  # kept cold only if that is said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_of_extreme_values_disturbs_no_others_gradient(engine: str) -> None:
    """The derivative of another task's meta embedding by all parameters, second order."""
    model, data = model_of(CASE, engine), random_data(CASE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = [
        torch.autograd.grad(adapted(model, each)[[0, 2]].sum(), parameters, allow_unused=True)
        for each in (data, spoiled(data, "row", 1e6))
    ]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_at_the_largest_rate_are_finite_or_reported(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    model, data = model_of(replace(CASE, dtype=torch.float32), engine), random_data(CASE)
    with torch.no_grad():
        model.solvers["user"].log_rate.fill_(1e4)
    with caplog.at_level(logging.WARNING, "limaml"):
        z = model.embed(data, "user", TaskRows.of(data.index["user"], 4))
    assert z.isfinite().all()
    assert "A learned inner rate reached 700" in caplog.text
    cold = model.cold(data, "user", torch.arange(4)).detach()
    assert torch.equal(z[1], cold[1])
    lost = int((z[[0, 2, 3]] == cold[[0, 2, 3]]).all(1).sum())
    assert (f"overflowed for {lost} of 4 tasks" in caplog.text) == (lost > 0)
