"""Embedding tables with sparse gradients: trained as dense ones are, in the rows that batches look up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from training import made_config, made_learner

from limaml.config import TrainConfig
from limaml.meta.learn import MetaLearner
from limaml.meta.optimiser import Optimiser
from limaml.meta.outer import fit


def sparse(learner: MetaLearner) -> MetaLearner:
    """The learner with all tables of its blocks made sparse."""
    for module in learner.module.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = True
    return learner


def assert_same(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert float((a - b).abs().max()) <= tolerance, name


@pytest.mark.parametrize("solver", ["gradient", "newton"])
@pytest.mark.parametrize("types", [("user",), ("user", "item")])
def test_tables_whose_rows_are_all_looked_up_train_as_dense_ones(solver: str, types: tuple[str, ...]) -> None:
    """All rows of the tables are in every batch, so sparse and dense training are the same: decay, clipping, running
    average, tables of the global block and of the meta blocks."""
    config = made_config(4, rows_per_batch=10**6, clip=0.05, table_decay=3.0, average=0.5)
    learners = [made_learner(config, solver, types=types, dropout=0.0, dtype=torch.float64) for _ in range(2)]
    for learner in learners:
        rest = learner.data.sides["user"]["age"]
        assert set(rest[learner.data.index["user"]].tolist()) == set(range(5))
    dense, thin = learners[0], sparse(learners[1])
    histories = [fit(learner, config) for learner in (dense, thin)]
    assert_same(dense.module, thin.module, 1e-10)
    assert histories[0].epochs[-1].train_loss == pytest.approx(histories[1].epochs[-1].train_loss, rel=1e-10)


def test_gradients_are_sparse_and_rows_that_nobody_looks_up_stay() -> None:
    config = made_config(2)
    learner = sparse(made_learner(config, "newton"))
    unused = torch.full_like(learner.data.sides["item"]["item"], 3)
    learner.data.sides["item"]["item"].copy_(torch.where(learner.data.sides["item"]["item"] > 9, unused, unused - 1))
    tables = {name: p for name, p in learner.module.named_parameters() if name == "global_block.embed.1.table.weight"}
    (table,) = tables.values()
    before = table.detach().clone()
    fit(learner, config)
    moved = (table != before).any(1)
    assert moved.nonzero().flatten().tolist() == [2, 3]
    assert table.grad is not None and table.grad.is_sparse


@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
def test_resuming_with_sparse_tables_changes_nothing(kind: str, tmp_path: Path) -> None:
    config = made_config(4, sparse_tables=kind)
    whole, resumed = sparse(made_learner(config)), sparse(made_learner(config))
    fit(whole, config)
    fit(sparse(made_learner(config)), config.model_copy(update={"epochs": 2}), checkpoint=tmp_path / "c")
    fit(resumed, config, checkpoint=tmp_path / "c")
    assert_same(whole.module, resumed.module, 0.0)


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=5), st.integers(0, 9))
def test_rowwise_adagrad_is_its_formula(looked_up: list[list[int]], seed: int) -> None:
    """Against a loop over rows, with decay; one number of state for each row."""
    generator = torch.Generator().manual_seed(seed)
    table = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    config = TrainConfig(sparse_tables="rowwise_adagrad", table_lr=0.1, table_decay=2.0)
    optimiser = Optimiser(table, [], 10.0, config)
    wanted, state = table.weight.detach().clone(), [0.0] * 5
    for rows in looked_up:
        slopes = torch.randn(len(rows), 3, generator=generator, dtype=torch.float64)
        optimiser.zero_grad()
        (table(torch.tensor(rows, dtype=torch.int64)) * slopes).sum().backward()
        optimiser.step()
        for row in set(rows):
            slope = slopes[[i for i, other in enumerate(rows) if other == row]].sum(0) + 0.2 * wanted[row]
            state[row] += float((slope**2).mean())
            wanted[row] -= 0.1 * slope / (state[row] ** 0.5 + 1e-8)
    assert float((table.weight.detach() - wanted).abs().max()) <= 1e-12
    assert [moment.shape for moment in optimiser.state().values()] == [(5,)]


class Tied(nn.Module):
    """A table that is looked up and also read as a whole, and a bag."""

    def __init__(self, thin: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 3, sparse=thin)
        self.out = nn.Linear(3, 6, bias=False)
        self.out.weight = self.table.weight
        self.bag = nn.EmbeddingBag(6, 3, mode="sum", sparse=thin)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(ids) + self.bag(ids[:, None])))


@given(
    st.lists(st.permutations(range(6)), max_size=3),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.sampled_from([0.01, 1.0, 100.0]),
)
def test_any_table_takes_the_steps_of_adam_in_the_rows_looked_up(
    full: list[list[int]], last: list[int], clip: float
) -> None:
    """The oracle is Adam on dense gradients, as far as every batch looks all rows up, and one step beyond."""
    config = TrainConfig(clip=clip, table_decay=2.0, decay=1.0)
    models = [Tied(False).double(), Tied(True).double()]
    steps = [Optimiser(model, [], 10.0, config) for model in models]
    for ids in [*full, last]:
        norms = []
        for model, optimiser in zip(models, steps, strict=True):
            optimiser.zero_grad()
            (model(torch.tensor(ids)) ** 2).sum().backward()  # type: ignore[no-untyped-call]
            norms.append(float(optimiser.clip()))
            optimiser.step()
        assert norms[0] == pytest.approx(norms[1], rel=1e-9)
        looked = sorted(set(ids))
        torch.testing.assert_close(models[1].table.weight, models[0].table.weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(models[1].bag.weight[looked], models[0].bag.weight[looked], rtol=1e-9, atol=1e-12)
