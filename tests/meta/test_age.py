"""Rows weigh less the older they are, by a half-life that the outer loop learns, and by nothing but their own task."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from engines import DIM, Case, confirm_gradient, conforms, model_of, outcome, random_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training import made_config, made_learner

from limaml.config import load_config
from limaml.errors import ConfigError
from limaml.meta.age import DAY, HalfLife, ages
from limaml.meta.model import MetaModel
from limaml.meta.outer import fit
from limaml.tasks import TaskRows, cross_fit
from limaml.types import Interactions, Rows

UNITS = st.sampled_from(["us", "integer", "order"])
SOLVERS = pytest.mark.parametrize("solver", ["gradient", "newton"])


def adapted(model: MetaModel, data: Interactions, among: Tensor | None = None) -> Tensor:
    grouped = TaskRows.of(data.index["user"], data.count("user"), among)
    tasks = torch.arange(data.count("user"))
    return model.adapt(data, "user", tasks, grouped.of_tasks(tasks)).detach()


@settings(max_examples=8)
@given(
    unit=UNITS,
    half_life=st.sampled_from([0.3, 2.0, 50.0]),
    order=st.sampled_from([1, 2]),
    types=st.sampled_from([("user",), ("user", "item")]),
    weightless=st.booleans(),
    seed=st.integers(0, 100),
)
def test_all_engines_agree(
    unit: str, half_life: float, order: int, types: tuple[str, ...], weightless: bool, seed: int
) -> None:
    case = Case(
        pieces=("residual", "free"),
        losses=("binary", "squared"),
        sizes=(7, 0, 1, 12),
        types=types,
        order=order,
        missing=True,
        weightless=weightless,
        time_unit=unit,
        seed=seed,
        adaptation={"half_life": half_life},
    )
    oracle = outcome(case, "loop")
    for engine in ("lowrank", "vmap"):
        conforms(case, engine, oracle)
    # As with the prior count, order 1 learns no half-life: it acts through the slopes alone.
    assert (float(oracle.gradients["half_lives.user.log_half_life"].abs()) > 0) == (order == 2)


@settings(max_examples=20)
@given(unit=UNITS, solver=st.sampled_from(["gradient", "newton"]), seed=st.integers(0, 100))
def test_a_half_life_is_a_weight_that_halves(unit: str, solver: str, seed: int) -> None:
    """Against weights that plain Python works out, row by row; they are in the normalisation too."""
    case = Case(sizes=(6, 0, 1, 9), time_unit=unit, seed=seed, adaptation={"half_life": 3.0, "solver": solver})
    model, data = model_of(case, "lowrank"), random_data(case)
    plain = model_of(replace(case, adaptation={"solver": solver}), "lowrank")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "half_life" not in k})
    half_life = math.exp(float(model.half_lives["user"].log_half_life.detach()))
    weights = data.weights.double()
    for task in range(4):
        mine = (data.index["user"] == task).nonzero().flatten().tolist()
        for behind, row in enumerate(reversed(mine)):
            passed = int(data.time[mine[-1]] - data.time[row])
            age = {"us": passed / 86_400e6, "integer": passed, "order": behind}[unit]
            weights[row] *= 2 ** (-age / half_life)
    assert torch.allclose(adapted(model, data), adapted(plain, replace(data, weights=weights)), rtol=1e-9)
    assert not torch.allclose(adapted(model, data), adapted(plain, data), atol=1e-3)


@pytest.mark.parametrize("unit", ["us", "order"])
@SOLVERS
def test_finite_differences_confirm_its_gradient(solver: str, unit: str) -> None:
    case = Case(
        pieces=("residual",),
        losses=("binary", "squared"),
        sizes=(5, 0, 1, 12),
        steps=3,
        time_unit=unit,
        adaptation={"solver": solver, "precision": 3.0, "half_life": 4.0},
    )
    model, data = model_of(case, "lowrank"), random_data(case)
    tasks = torch.arange(4)
    support = TaskRows.of(data.index["user"], 4).of_tasks(tasks)
    slope = torch.sin(torch.arange(1.0, 4 * DIM + 1)).view(4, DIM).double()

    def value() -> Tensor:
        return (model.adapt(data, "user", tasks, support) * slope).sum()

    parameters = confirm_gradient(model, value)
    (gradient,) = torch.autograd.grad(value(), [parameters["half_lives.user.log_half_life"]])
    assert float(gradient.abs()) > 1e-4


@settings(max_examples=20)
@given(unit=UNITS, shift=st.integers(-(10**15), 10**15), seed=st.integers(0, 100))
def test_neither_the_clock_nor_other_tasks_matter(unit: str, shift: int, seed: int) -> None:
    case = Case(sizes=(6, 3, 8), time_unit=unit, seed=seed, adaptation={"solver": "newton", "half_life": 3.0})
    model, data = model_of(case, "lowrank"), random_data(case)
    whole = adapted(model, data)
    assert torch.equal(adapted(model, replace(data, time=data.time + shift)), whole)
    kept = (data.index["user"] == 1).nonzero().flatten()  # a table that holds but one task's rows
    one = replace(
        data,
        sides={**data.sides, "row": {"r": data.sides["row"]["r"][kept]}},
        index={"user": data.index["user"][kept], "item": data.index["item"][kept], "row": torch.arange(len(kept))},
        labels=data.labels[kept],
        weights=data.weights[kept],
        time=data.time[kept],
        offset=None if data.offset is None else data.offset[kept],
    )
    assert torch.allclose(adapted(model, one)[1], whole[1], rtol=1e-12)


@settings(max_examples=20)
@given(unit=UNITS, seed=st.integers(0, 100), cap=st.integers(1, 12))
def test_ages_count_from_the_newest_row_of_the_support(unit: str, seed: int, cap: int) -> None:
    data = random_data(Case(sizes=(9, 0, 1, 30), time_unit=unit, seed=seed))
    grouped, tasks = TaskRows.of(data.index["user"], 4), torch.arange(4)
    coin = torch.rand(len(data), generator=torch.Generator().manual_seed(seed)) < 0.5
    whole = torch.zeros(len(data), dtype=torch.float64)
    every = grouped.of_tasks(tasks)
    whole[every.rows] = ages(data, "user", every, 4)
    assert (whole >= 0).all()
    for rows in (grouped.of_tasks(tasks, cap), cross_fit(grouped, tasks, coin, True).support, Rows.empty()):
        age = ages(data, "user", rows, 4)
        for task in range(4):
            mine = rows.rows[rows.owner == task]
            expected = whole[mine] - (whole[mine].min() if len(mine) else 0)  # a part ages as fast as the whole
            assert torch.allclose(age[rows.owner == task], expected, rtol=1e-12, atol=1e-12)


@SOLVERS
def test_an_endless_half_life_is_none(solver: str) -> None:
    case = Case(adaptation={"solver": solver, "half_life": 1e15})
    off = outcome(replace(case, adaptation={"solver": solver}), "lowrank")
    on = outcome(case, "lowrank")
    assert torch.allclose(on.z, off.z, rtol=1e-6)
    for name, gradient in off.gradients.items():
        assert torch.allclose(on.gradients[name], gradient, rtol=1e-6, atol=1e-9), name  # float32 weights
    assert not any("half" in name for name in off.gradients)


def test_extreme_half_lives_are_numbers() -> None:
    age = torch.tensor([0.0, 1e-9, 1.0, 1e9])
    for log, expected in ((-80.0, [1.0, 0.0, 0.0, 0.0]), (300.0, [1.0, 1.0, 1.0, 1.0])):
        half_life = HalfLife(1.0)
        with torch.no_grad():
            half_life.log_half_life.fill_(log)
        factor = half_life(age)
        factor.sum().backward()
        assert factor.tolist() == expected
        assert half_life.log_half_life.grad is not None and bool(half_life.log_half_life.grad.isfinite())


@SOLVERS
def test_it_is_learned_at_the_rate_of_the_solvers(solver: str) -> None:
    config = made_config(1, rows_per_batch=10_000, solver_lr=0.2, average=0.0)
    learner = made_learner(config, solver, types=("user", "item"), half_life=4.0)
    fast = learner.fast_parameters()
    before = {task: float(learner.model.half_lives[task].log_half_life.detach()) for task in ("user", "item")}
    fit(learner, config)
    for task, log in before.items():
        parameter = learner.model.half_lives[task].log_half_life
        assert any(parameter is p for p in fast)
        assert log == pytest.approx(math.log(4))
        assert 0.01 < abs(float(parameter.detach()) - log) < 1  # four steps of Adam, of at most about 0.2


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_half_life_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"finite number greater than 0.*adapt\.half_life"):
        HalfLife(value)
    with pytest.raises(ConfigError, match=r"Setting 'adapt\.half_life' is .*: Input should be"):
        load_config(None, [f"adapt.half_life={'.inf' if value == math.inf else '.nan' if value != value else value}"])


def test_a_half_life_in_the_wrong_unit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "limaml"):
        made_learner(made_config(1), half_life=5.0)
        assert not caplog.text
        made_learner(made_config(1), half_life=1e-3)
    assert "adapt.half_life is 0.001, but half of the rows of 'user' lie more than" in caplog.text
    assert "counted in rows here" in caplog.text


def test_it_is_off_by_default() -> None:
    assert load_config(None, ["adapt.half_life=30"]).adapt.half_life == 30
    model = model_of(Case(), "lowrank")
    assert not any("half" in name for name in model.state_dict())
    assert DAY == 24 * 3600 * 10**6
