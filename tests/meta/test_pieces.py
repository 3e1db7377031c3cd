"""Rows in pieces give what rows in one piece give: slopes, Gauss-Newton sums, and what is differentiated through them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limaml.meta.budget import free_bytes, kept_bytes
from limaml.meta.chain import chain_of
from limaml.meta.closed import ClosedForm
from limaml.meta.model import MetaModel
from limaml.meta.newton import NewtonSolver
from limaml.meta.spread import Spread
from limaml.meta.support import Support
from limaml.tasks import TaskRows
from limaml.types import Interactions, Rows
from tests.meta.engines import DIM, Case, model_of, random_data

cases = st.builds(
    Case,
    sizes=st.lists(st.sampled_from([0, 1, 2, 7, 30]), min_size=1, max_size=5).filter(any),
    losses=st.sampled_from([("binary",), ("binary", "squared")]),
    global_block=st.sampled_from(["interaction", "cross", "concat", "straight", "short", "plain"]),
    types=st.sampled_from([("user",), ("user", "item")]),
    missing=st.booleans(),
)


def support_of(case: Case, rows_per_piece: int | None, hoist: bool = True) -> tuple[Support, Tensor]:
    model, data = model_of(case, "auto"), random_data(case)
    tasks = torch.arange(data.count("user"))
    rows = TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks)
    block, losses, held = model.global_block, model.losses, model.held_cold(data, "user")
    support = Support(block, losses, data, "user", tasks, rows, held, hoist=hoist, rows_per_piece=rows_per_piece)
    return support, model.cold(data, "user", tasks).detach().requires_grad_()


def derived(support: Support, values: list[Tensor], z: Tensor) -> list[Tensor]:
    """The derivatives of some function of `values` by z and by all parameters of the global block and the losses."""
    total = torch.stack([(torch.sin(v) * torch.arange(1.0, v.numel() + 1).view_as(v)).sum() for v in values]).sum()
    module = nn.ModuleList([support.scorer.block, support.losses])
    sources = [z, *(p for p in module.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True, materialize_grads=True))


def assert_same(found: list[Tensor], truth: list[Tensor]) -> None:
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@settings(max_examples=40)
@given(cases, st.integers(1, 40))
def test_slopes(case: Case, rows_per_piece: int) -> None:
    whole, z = support_of(case, None, hoist=False)  # nothing by hand, nothing hoisted
    truth = torch.autograd.grad(whole.loss(z).sum(), z, create_graph=True)[0]
    for size in (None, rows_per_piece):
        support, _ = support_of(case, size)
        assert_same([support.slope(z.detach())], [truth.detach()])
        found = support.slope(z, create_graph=True)
        assert_same([found.detach()], [truth.detach()])
        assert_same(derived(support, [found], z), derived(whole, [truth], z))


@settings(max_examples=20)
@given(cases, st.integers(1, 40))
def test_gauss_newton_sums(case: Case, rows_per_piece: int) -> None:
    whole, z = support_of(case, None, hoist=False)
    solver = NewtonSolver(DIM, steps=2, precision=0.7).double()
    truth = list(solver(whole, z))
    support, _ = support_of(case, rows_per_piece)
    found = list(solver(support, z))
    assert_same(found, truth)
    assert_same(derived(support, found, z), derived(whole, truth, z))
    with torch.no_grad():
        assert_same(list(solver(support, z)), truth)


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh")]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("first", [True, False])
def test_a_chain_is_what_autograd_does(activation: nn.Module, heads: int, first: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0), activation, nn.Identity(), nn.Linear(4, heads, bias=first))
    layers = (nn.Sequential(activation, *layers) if first else layers).double()
    chain = chain_of(list(layers))
    assert chain is not None
    for rows in (7, 3, 9):  # a smaller piece, then one that needs larger buffers
        x = torch.randn(rows, 5).double().requires_grad_()
        truth = layers(x.clone())
        slope = torch.randn(rows, heads).double()
        with torch.no_grad():
            torch.testing.assert_close(chain.forward(x.detach().clone()), truth)
            for weight in (1.0, 2.0):  # back a second time, as Newton does for each head
                expected = torch.autograd.grad(truth, x, slope * weight, retain_graph=True)[0]
                torch.testing.assert_close(chain.backward(slope * weight), expected)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 6),
    st.integers(0, 1000),
)
def test_to_turn_is_to_take_a_tangent_and_reverse(kinds: list[tuple[bool, bool, bool]], rows: int, seed: int) -> None:
    generator, widths = torch.Generator().manual_seed(seed), [*[5, 4, 3, 6][: len(kinds)], 1]
    layers: list[nn.Module] = []
    frozen: list[bool] = []
    for width, out, (active, bias, still) in zip(widths[:-1], widths[1:], kinds, strict=True):
        layers += [nn.ReLU()] if active else []
        layers.append(nn.Linear(width, out, bias=bias))
        frozen += [still, not still] if bias else [still]
    chain = chain_of([layer.double() for layer in layers])
    assert chain is not None and chain.straight
    for parameter in chain.parameters:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.detach().copy_(
            torch.where(values.abs() < 0.2, 0.0, values)
        )  # some weights are 0: nothing divides by one
    h, v = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    q, p = (torch.randn(rows, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    found, truth = (
        [None if still else torch.ones_like(w) for still, w in zip(frozen, chain.parameters, strict=True)]
        for _ in range(2)
    )
    with torch.no_grad():
        chain.forward(h.clone())
        expected = chain.tangent(v.clone()).clone(), chain.reverse(q, p, truth).clone()
        steepest = chain.steepest()
        along = chain.along(steepest, v).clone()
        chain.turn(q, p, v.clone(), found)
    assert_same([along, chain.scaled(steepest, q)], list(expected))
    assert [g is None for g in found] == frozen
    assert_same([g for g in found if g is not None], [g for g in truth if g is not None])


def test_what_bends_or_has_several_heads_is_not_straight() -> None:
    for layers in (
        [nn.Linear(3, 2)],
        [nn.Tanh(), nn.Linear(3, 1)],
        [nn.Linear(3, 2), nn.GELU("tanh"), nn.Linear(2, 1)],
    ):
        chain = chain_of(layers)
        assert chain is not None and not chain.straight


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(3, 3), nn.ReLU()],
        [nn.ReLU(), nn.Tanh(), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)],
        [],
    ],
    ids=str,
)
def test_what_is_no_chain_is_left_to_autograd(layers: list[nn.Module]) -> None:
    assert chain_of(layers) is None


def test_a_hook_is_not_passed_over() -> None:
    layer = nn.Linear(3, 3)
    assert chain_of([layer]) is not None
    layer.register_forward_hook(lambda module, args, out: out * 2)
    assert chain_of([layer]) is None


def test_a_subclass_that_scores_in_another_way_is_not_passed_by_hand() -> None:
    support, _ = support_of(Case(global_block="concat"), None)
    assert ClosedForm.of(support.scorer) is not None
    block = support.scorer.block

    class Doubled(type(block)):  # type: ignore[misc]
        def score(self, parts: tuple[Tensor | None, ...]) -> Tensor:
            doubled: Tensor = super().score(parts) * 2
            return doubled

    block.__class__ = Doubled
    assert ClosedForm.of(support.scorer) is None


@settings(max_examples=50)
@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 6), st.integers(0, 100))
def test_spread_and_its_transpose(rows: int, each: int, entries: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, entries, (rows, each), generator=generator)
    spread = Spread(index, entries)
    table = torch.randn(entries, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(spread.rows(table), table[index].sum(1))
    torch.testing.assert_close((spread.rows(table) * values).sum(), (table * spread.sums(values)).sum())
    if rows:
        assert torch.autograd.gradcheck(spread.rows, table) and torch.autograd.gradgradcheck(spread.sums, values)


@settings(max_examples=20)
@given(cases, st.integers(1, 40))
def test_query_logits(case: Case, rows_per_piece: int) -> None:
    whole, z = support_of(case, None, hoist=False)
    truth = whole.shifted(whole.scorer.logits(z))
    for size in (None, rows_per_piece):
        support, _ = support_of(case, size)
        found = support.logits(z)
        assert_same([found.detach()], [truth.detach()])
        assert_same(derived(support, [found], z), derived(whole, [truth], z))


@pytest.mark.parametrize("solver", ["gradient", "newton"])
@pytest.mark.parametrize("global_block", ["plain", "interaction"])
def test_a_long_task_is_cut_where_memory_is_scarce(
    solver: str, global_block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task with more rows than memory has room for: the meta-gradient is the same, and far less of it is kept."""
    monkeypatch.setattr("limaml.meta.model.FEW_ROWS", 64)
    case = Case(sizes=(20_000, 3, 0), global_block=global_block)
    found, kept = [], []
    for memory in (1, 4096):
        adaptation = {"solver": solver, "memory_mib": memory}
        model, data = model_of(replace(case, adaptation=adaptation), "auto"), random_data(case)
        rows = TaskRows.of(data.index["user"], 3).of_tasks(torch.arange(3))

        def run(model: MetaModel = model, data: Interactions = data, rows: Rows = rows) -> Tensor:
            z = model.adapt(data, "user", torch.arange(3), rows)
            query = model.scored(data, "user", torch.arange(3), rows, model.held_cold(data, "user"))
            return model.losses.loss(query.logits(z), query.labels, query.weights).sum()

        kept.append(kept_bytes(run, model.parameters()))
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(run(), parameters, allow_unused=True, materialize_grads=True))
    assert_same(list(found[0]), list(found[1]))
    if global_block == "plain":  # the other keeps nothing in either case
        assert kept[0] < kept[1] / 3


def test_few_tasks_are_in_flight_where_memory_is_scarce() -> None:
    case = Case(sizes=(5,) * 40)
    data, seen, results = random_data(case), [], []
    for memory in (1, None):
        model = model_of(replace(case, adaptation={"memory_mib": memory}), "auto")
        done: list[int] = []
        grouped = TaskRows.of(data.index["user"], 40)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("limaml.meta.model.ROW_BYTES", 2**16)
            results.append(model.embed(data, "user", grouped, progress=lambda n, _, done=done: done.append(n)))
        seen.append(done)
    assert len(seen[0]) > len(seen[1]) == 1 and seen[0][-1] == 40
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


def test_free_memory_is_what_the_group_leaves(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert free_bytes(cpu, tmp_path) == 2**32  # nothing to read
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_bytes(cpu, tmp_path) == 5000 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert free_bytes(cpu, tmp_path) == 5000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000000\n")
    assert free_bytes(cpu, tmp_path) == 2_000_000
