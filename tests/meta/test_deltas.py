"""What is kept of a layer's inner steps: as few numbers as possible, and the same layer either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import DIM, LENGTH, WIDTH, Case, confirm_gradient, conforms, model_of, random_data
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limaml.meta.deltas import Call, Delta, LinearLayer, NormLayer, TableLayer
from limaml.meta.lowrank import LowRank
from limaml.meta.tables import Table
from limaml.tasks import TaskRows

TASKS = 2


def numbers(delta: Delta) -> int:
    """Kept for each task."""
    return sum(value[0].numel() for value in delta.values())


def calls_of(inputs: int, outputs: int, lengths: list[int], generator: torch.Generator) -> list[Call]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(normal(TASKS, length, inputs), normal(TASKS, length, outputs)) for length in lengths]


@settings(max_examples=60)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    bias=st.booleans(),
    steps=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
@example(inputs=4, outputs=4, bias=False, steps=2, lengths=[1])  # as many numbers either way: pairs
@example(inputs=4, outputs=4, bias=True, steps=1, lengths=[2, 1])  # 24 numbers of pairs, 20 of a dense delta
def test_a_linear_layer_keeps_the_smaller_of_pairs_and_a_dense_delta(
    inputs: int, outputs: int, bias: bool, steps: int, lengths: list[int]
) -> None:
    layer = LinearLayer(nn.Linear(inputs, outputs, bias=bias).double())
    generator = torch.Generator().manual_seed(0)
    each = [calls_of(inputs, outputs, lengths, generator) for _ in range(steps)]
    delta: Delta = {}
    pairs, dense = sum(lengths) * (inputs + outputs), (inputs + bias) * outputs
    for step, calls in enumerate(each):
        delta = layer.step(delta, calls, steps - step - 1)
        assert numbers(delta) <= min(steps * pairs, dense)
    assert numbers(delta) == min(steps * pairs, dense)
    assert ("weight" in delta) == (steps * pairs > dense)
    x = torch.randn(TASKS, 3, inputs, generator=generator, dtype=torch.float64)
    u = layer.module(x)
    for task in range(TASKS):
        change = sum(slope[task].T @ read[task] for calls in each for read, slope in calls)
        shift = sum(slope[task].sum(0) for calls in each for _, slope in calls) if bias else 0.0
        expected = u[task] + x[task] @ change.T + shift
        assert torch.allclose(layer.moved(x, u, delta)[task], expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(layer.dense(delta, task, "weight"), change, rtol=1e-12, atol=1e-12)
        if bias:
            assert torch.allclose(layer.dense(delta, task, "bias"), shift, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_called_more_often_than_at_first_is_switched_on_the_way() -> None:
    layer = LinearLayer(nn.Linear(4, 4).double())
    generator = torch.Generator().manual_seed(0)
    few, many = calls_of(4, 4, [1], generator), calls_of(4, 4, [5], generator)
    first = layer.step({}, few, 1)
    assert set(first) == {"inputs", "slopes"}
    delta = layer.step(first, many, 0)
    assert set(delta) == {"weight", "bias"}
    expected = sum(slope[0].T @ read[0] for read, slope in (*few, *many))
    assert torch.allclose(delta["weight"][0], expected, rtol=1e-12)


@pytest.mark.parametrize("norm", [nn.LayerNorm((2, 3)), nn.RMSNorm(3)], ids=["layer norm", "rms norm"])
def test_a_norm_keeps_its_vectors(norm: nn.Module) -> None:
    layer = NormLayer(norm)
    n, g = torch.randn(TASKS, 5, 2, 3), torch.randn(TASKS, 5, 2, 3)
    delta = layer.step(layer.step({}, [(n, g)], 1), [(n, g), (n, g)], 0)
    assert numbers(delta) == sum(p.numel() for p in norm.parameters())
    assert torch.allclose(delta["weight"], 3 * (n * g).flatten(1, -len(norm.normalized_shape) - 1).sum(1), atol=1e-5)


def kept_by(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], LowRank]:
    """Numbers kept for each task by each layer, after all steps."""
    states: list[Any] = []
    step = LowRank._step

    def watched(self: LowRank, *args: Any) -> Any:
        states.append(step(self, *args))
        return states[-1]

    model, data = model_of(case, "lowrank"), random_data(case)
    tasks = torch.arange(data.count("user"))
    engine = model.engine("user", model.features_of(data, "user", tasks))
    assert isinstance(engine, LowRank)
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "_step", watched)
        model.adapt(data, "user", tasks, TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks))
    assert len(states) == case.steps
    kept = {name: numbers(delta) for name, delta in states[-1].followed.items()}
    return kept | {name: delta[0].numel() for name, delta in states[-1].dense.items()}, engine


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence", ["feed forward", "length first"])
def test_a_sequence_switches_its_layers_one_by_one(steps: int, sequence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(sequence=sequence, steps=steps)
    kept, engine = kept_by(case, monkeypatch)
    switched, linear = [], 0
    for name, layer in engine.followed.items():
        if isinstance(layer, LinearLayer):
            module, linear = layer.module, linear + 1
            pairs = steps * (LENGTH if name.startswith("sequence") else 1) * (module.in_features + module.out_features)
            dense = sum(p.numel() for p in module.parameters())
            assert kept[name] == min(pairs, dense)
            switched += [name] if pairs > dense else []
    assert engine.flat == (sequence == "feed forward")  # a dense delta needs no vmap
    assert {1: not switched, 2: 0 < len(switched) < linear}.get(steps, bool(switched))
    conforms(case, "lowrank")


def test_the_meta_gradient_through_a_dense_delta_is_its_derivative() -> None:
    case = Case(sequence="feed forward", pieces=("called twice",), steps=3, sizes=(4, 0, 2))
    model, data = model_of(case, "lowrank"), random_data(case)
    tasks = torch.arange(3)
    support = TaskRows.of(data.index["user"], 3).of_tasks(tasks)
    slope = torch.sin(torch.arange(1.0, 3 * DIM + 1)).view(-1, DIM).double()
    confirm_gradient(model, lambda: (model.adapt(data, "user", tasks, support) * slope).sum())


@pytest.mark.parametrize("table", ["tokens", "shipped", "bag with padding", "one table twice"])
def test_a_table_keeps_pairs_of_an_id_and_a_slope(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, engine = kept_by(Case(table=table, adapt_tables=True, steps=2), monkeypatch)
    assert engine.flat and engine.dense == []
    tables = {name: layer for name, layer in engine.followed.items() if isinstance(layer, TableLayer)}
    assert len(tables) == 2
    look_ups = {"category": 1} | dict.fromkeys(tables.keys() - {"category"}, 7 if table == "one table twice" else 3)
    assert {name: kept[name] for name in tables} == {name: 2 * n * (1 + 2) for name, n in look_ups.items()}


@pytest.mark.parametrize("padding", [None, 3])
def test_a_table_moves_the_rows_that_were_looked_up(padding: int | None) -> None:
    table: Table = nn.Embedding(6, WIDTH, padding_idx=padding).double()
    layer = TableLayer(table)
    ids = torch.tensor([[1, 3, 1], [3, 0, 5]])
    slopes = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64)  # (step, task, …)
    delta = layer.step(
        layer.step({}, [(layer.read(table, ids), slopes[0])], 1), [(layer.read(table, ids), slopes[1])], 0
    )
    everything = torch.arange(6).expand(2, 6)
    moved = layer.moved(layer.read(table, everything), table(everything), delta)
    for task in range(2):
        expected = table.weight.detach().clone()
        for position, row in enumerate(ids[task].tolist()):
            expected[row] += (row != padding) * slopes[:, task, position].sum(0)
        assert torch.allclose(moved[task], expected, rtol=1e-13)
        assert torch.allclose(layer.dense(delta, task, "weight"), expected - table.weight, atol=1e-14)
