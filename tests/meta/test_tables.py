"""Embedding tables in a meta block: outside the inner loop, or in it (`adapt.adapt_embeddings`)."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from engines import (
    DIM,
    TABLES,
    Bag,
    Block,
    Case,
    OneTableTwice,
    Tokens,
    confirm_gradient,
    conforms,
    model_of,
    random_data,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limaml.config import load_config
from limaml.errors import ModelError
from limaml.meta.loop import Loop
from limaml.meta.lowrank import LowRank
from limaml.meta.model import MetaModel
from limaml.meta.tables import bag, looked_up, plain
from limaml.tasks import TaskRows
from limaml.types import Features

SIZES = (3, 0, 1, 5)


def embeddings(case: Case, engine: str = "lowrank") -> Tensor:
    return adapted(model_of(case, engine), case)


def adapted(model: MetaModel, case: Case) -> Tensor:
    data = random_data(case)
    tasks = torch.arange(data.count("user"))
    return model.adapt(data, "user", tasks, TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks))


def with_table(
    table: nn.Module, engine: str = "auto", adapt: bool = True, dtype: torch.dtype = torch.float64
) -> MetaModel:
    """A model whose meta block reads ids by `table`."""
    case = Case(table="tokens", dtype=dtype, adapt_tables=adapt)
    like = model_of(case, engine)
    block = like.meta_blocks["user"]
    assert isinstance(block, Block)
    block.table = table
    return MetaModel(like.global_block, {"user": block}, adaptation=like.adaptation).to(dtype)


@st.composite
def bags(draw: st.DrawFn) -> tuple[nn.EmbeddingBag, tuple[Tensor | None, ...]]:
    mode, ragged = draw(st.sampled_from(["sum", "mean", "max"])), draw(st.booleans())
    last = ragged and draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    module = nn.EmbeddingBag(
        7, 4, mode=mode, padding_idx=draw(st.sampled_from([None, 0, 3])), include_last_offset=last
    ).double()
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    ids = torch.randint(0, 7, (sum(sizes),) if ragged else (len(sizes), 3))
    offsets = torch.tensor([0, *sizes]).cumsum(0)[: None if last else -1] if ragged else None
    weighted = mode == "sum" and draw(st.booleans())
    return module, (ids, offsets, torch.rand(ids.shape, dtype=torch.float64, requires_grad=True) if weighted else None)


@settings(max_examples=80)
@given(drawn=bags())
def test_a_bag_is_its_rows_reduced(drawn: tuple[nn.EmbeddingBag, tuple[Tensor, Tensor | None, Tensor | None]]) -> None:
    module, (ids, offsets, weights) = drawn
    expected = module(ids, offsets, weights)
    found = bag(module, partial(plain, "bag", module), ids, offsets, weights)
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-15)
    wanted = [module.weight, *([] if weights is None else [weights])]
    slope = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, wanted, slope), torch.autograd.grad(expected, wanted, slope), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-14)


def test_what_a_bag_refuses_is_refused_while_tables_are_watched() -> None:
    module = nn.EmbeddingBag(7, 2, mode="mean")
    ids = torch.tensor([[1, 2]])
    with looked_up(module, plain):
        with pytest.raises(ValueError, match="offsets"):
            module(ids.flatten())
        with pytest.raises(NotImplementedError, match="per_sample_weights"):
            module(ids, per_sample_weights=torch.ones(1, 2))
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("table", sorted(TABLES))
def test_adapted_rows_say_something(table: str) -> None:
    held, moved = (embeddings(Case(table=table, adapt_tables=adapt)) for adapt in (False, True))
    assert torch.equal(held[1], moved[1])  # a task without support
    assert not torch.isclose(held[[0, 2, 3]], moved[[0, 2, 3]], rtol=1e-4).all(1).any()


@pytest.mark.parametrize("table", ["tokens", "bag", "bag of the largest", "weighted bag", "own table"])
def test_finite_differences_confirm_the_gradient_of_adapted_tables(table: str) -> None:
    case = Case(table=table, adapt_tables=True, steps=2, sizes=(3, 0, 2))
    model, data = model_of(case, "lowrank"), random_data(case)
    block = model.meta_blocks["user"]
    if table == "bag of the largest":  # PyTorch gives padding no gradient, though the output depends on nothing of it
        assert isinstance(block, Block) and isinstance(block.table, Bag)
        block.table.table.padding_idx = None
    slope = torch.sin(torch.arange(1.0, 3 * DIM + 1)).view(-1, DIM).double()
    tasks = torch.arange(3)
    support = TaskRows.of(data.index["user"], 3).of_tasks(tasks)
    confirm_gradient(model, lambda: (model.adapt(data, "user", tasks, support) * slope).sum())


def test_padding_is_not_adapted() -> None:
    """A task whose ids are all padding moves as if its table were frozen; with one other id, it does not."""
    model = with_table(Tokens(padding_idx=0))
    data = random_data(Case())
    data.sides["user"]["t"] = torch.zeros_like(data.sides["user"]["t"])
    tasks = torch.arange(4)
    support = TaskRows.of(data.index["user"], 4).of_tasks(tasks)
    z = model.adapt(data, "user", tasks, support)
    held = copy.deepcopy(model)
    table = held.meta_blocks["user"].table.table
    table.requires_grad_(False)
    assert torch.allclose(z, held.adapt(data, "user", tasks, support), rtol=1e-12)
    data.sides["user"]["t"][:, 0] = 2
    moved = model.adapt(data, "user", tasks, support)
    assert not torch.allclose(moved, held.adapt(data, "user", tasks, support), rtol=1e-4)


@pytest.mark.parametrize(("table", "option"), [("Embedding", "max_norm"), ("EmbeddingBag", "scale_grad_by_freq")])
def test_options_that_no_inner_step_can_follow_are_refused(table: str, option: str) -> None:
    options = {option: 1.0 if option == "max_norm" else True}
    made = Tokens(**options) if table == "Embedding" else Bag(**options)
    with pytest.raises(
        ModelError, match=rf"table 'table\.table' \({table}\), because {option} .*remove {option}, call"
    ):
        with_table(made)
    made.table.requires_grad_(False)
    assert adapted(with_table(made), Case(sizes=SIZES)).shape == (4, DIM)
    made.table.requires_grad_(True)
    assert adapted(with_table(made, adapt=False), Case(sizes=SIZES)).shape == (4, DIM)


def test_a_table_with_max_norm_outside_the_inner_loop_is_exact() -> None:
    tables = {}
    for engine in ("lowrank", "loop"):
        torch.manual_seed(0)
        tables[engine] = adapted(with_table(Tokens(max_norm=0.3), engine, adapt=False), Case(sizes=SIZES))
    assert torch.allclose(tables["lowrank"], tables["loop"], rtol=1e-9)


def test_what_is_low_rank_and_what_is_dense() -> None:
    def engine_of(table: nn.Module) -> LowRank:
        model, data = with_table(table), random_data(Case())
        engine = model.engine("user", model.features_of(data, "user", torch.arange(3)))
        assert isinstance(engine, LowRank)
        return engine

    assert engine_of(OneTableTwice()).dense == []  # two modules, one table of pairs
    for table, dense in (("tied table", "table.table.weight"), ("own table", "table.weight")):
        assert dense in engine_of(TABLES[table]()).dense
    assert engine_of(TABLES["tied table"]()).followed.keys() >= {"category", "start", "out"}


class FunctionalBag(nn.Module):
    """A bag that is no module: nothing can stand in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.weigh = nn.Parameter(torch.randn(7, 2)), nn.Linear(4, 3)

    def forward(self, features: Features) -> Tensor:
        weights = torch.softmax(self.weigh(features["x"]), 1)
        return nn.functional.embedding_bag(features["t"], self.weight, mode="sum", per_sample_weights=weights)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_bag_without_a_second_derivative_is_refused_in_one_sentence() -> None:
    with pytest.raises(
        ModelError, match=r"block of 'user'.*F\.embedding_bag has no second derivative.*nn\.EmbeddingBag"
    ):
        adapted(with_table(FunctionalBag(), adapt=False), Case(sizes=SIZES))


def test_the_shipped_meta_block_adapts_its_tables() -> None:
    """Both task types of the blocks that ship: categorical ids and token lists."""
    conforms(Case(types=("item", "user"), adapt_tables=True, table="shipped"), "lowrank", task="item")


def test_a_block_of_a_table_alone_can_be_adapted() -> None:
    class Table(nn.Module):
        dim = DIM

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, DIM)

        def forward(self, features: Features) -> Tensor:
            z: Tensor = self.table(features["c"])
            return z

    case = Case(adapt_tables=True)
    like, found = model_of(case, "lowrank"), {}
    block = Table()
    with pytest.raises(ModelError, match=r"set adapt\.adapt_embeddings=true"):
        MetaModel(like.global_block, {"user": block}, adaptation=model_of(Case(), "lowrank").adaptation)
    for engine in ("lowrank", "vmap", "loop"):
        settings_ = like.adaptation.model_copy(update={"engine": engine})
        found[engine] = adapted(MetaModel(like.global_block, {"user": block}, adaptation=settings_).double(), case)
    assert torch.allclose(found["lowrank"], found["loop"], rtol=1e-9)
    assert torch.allclose(found["vmap"], found["loop"], rtol=1e-9)


def test_the_setting_comes_from_a_config() -> None:
    assert load_config(None, ["adapt.adapt_embeddings=true"]).adapt.adapt_embeddings
    assert not load_config().adapt.adapt_embeddings


def test_nothing_is_said_where_bags_are_held_outside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "limaml"):
        model = with_table(Bag(mode="mean"), adapt=False)
        adapted(model, Case(sizes=SIZES))
    assert not caplog.text
    assert not isinstance(next(iter(model._engines.values()))[1], Loop)
