"""The engines give one result, whatever people put into a meta block, and it is the right one."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from engines import (
    DIM,
    PIECES,
    POOLS,
    STEADY_SEQUENCES,
    TABLES,
    WIDTH,
    Case,
    assert_equal,
    confirm_gradient,
    conforms,
    model_of,
    outcome,
    random_data,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limaml.errors import ModelError
from limaml.meta.blocks import CONSTANT
from limaml.meta.lowrank import LowRank
from limaml.meta.model import MetaModel
from limaml.meta.scorer import RowScorer
from limaml.meta.support import Support
from limaml.tasks import TaskRows
from limaml.types import Features, Rows

RATES = ("fixed", "scalar", "layer", "step", "layer_step")

heavy_tailed = st.lists(
    st.one_of(st.just(0), st.just(1), st.integers(2, 6), st.just(30)), min_size=2, max_size=6
).filter(lambda sizes: sum(sizes) > 0)

cases = st.builds(
    Case,
    pieces=st.lists(st.sampled_from(sorted(PIECES)), max_size=3),
    sequence=st.one_of(st.none(), st.sampled_from(STEADY_SEQUENCES)),
    pool=st.sampled_from(sorted(POOLS)),
    table=st.one_of(st.none(), st.sampled_from(sorted(TABLES))),
    adapt_tables=st.booleans(),
    initial=st.booleans(),
    sizes=heavy_tailed,
    losses=st.sampled_from([("binary",), ("squared",), ("binary", "squared"), ("binary", "binary")]),
    global_block=st.sampled_from(["interaction", "cross", "concat", "plain"]),
    types=st.sampled_from([("user",), ("user", "item"), ("item", "user")]),
    order=st.sampled_from([1, 2]),
    steps=st.integers(0, 4),
    learn_rate=st.sampled_from(RATES),
    seed=st.integers(0, 1000),
    missing=st.booleans(),
    weightless=st.booleans(),
)


@settings(max_examples=25)
@given(case=cases)
@example(
    case=Case(pieces=("tied", "called twice"), sequence="encoder", sizes=(0, 1, 30), steps=4, types=("user", "item"))
)
def test_all_engines_agree_in_float64(case: Case) -> None:
    oracle = outcome(case, "loop")
    for engine in ("lowrank", "vmap"):
        conforms(case, engine, oracle)


@settings(max_examples=8)
@given(case=cases)
def test_all_engines_agree_in_float32(case: Case) -> None:
    case = replace(case, dtype=torch.float32, steps=min(case.steps, 2))
    oracle = outcome(case, "loop")
    for engine in ("lowrank", "vmap"):
        conforms(case, engine, oracle)


@pytest.mark.parametrize("piece", sorted(PIECES))
def test_every_piece(piece: str) -> None:
    case = Case(pieces=(piece, "linear"), steps=3)
    oracle = outcome(case, "loop")
    for engine in ("lowrank", "vmap"):
        conforms(case, engine, oracle)


@pytest.mark.parametrize("sequence", STEADY_SEQUENCES)
def test_every_way_to_read_a_sequence(sequence: str) -> None:
    case = Case(sequence=sequence, steps=2)
    conforms(case, "lowrank")


@pytest.mark.parametrize("pool", sorted(POOLS))
def test_every_way_to_pool_a_sequence(pool: str) -> None:
    conforms(Case(sequence="own attention", pool=pool), "lowrank")


@pytest.mark.parametrize("adapt_tables", [False, True], ids=["held", "adapted"])
@pytest.mark.parametrize("table", sorted(TABLES))
def test_every_table(table: str, adapt_tables: bool) -> None:
    case = Case(table=table, adapt_tables=adapt_tables, steps=3)
    oracle = outcome(case, "loop")
    for engine in ("lowrank", "vmap"):
        conforms(case, engine, oracle)


@pytest.mark.parametrize("task", ["user", "item"])
@pytest.mark.parametrize("global_block", ["interaction", "cross", "plain"])
def test_two_task_types(global_block: str, task: str) -> None:
    case = Case(
        pieces=("residual",),
        global_block=global_block,
        types=("user", "item"),
        losses=("binary", "squared"),
        missing=True,
    )
    oracle = outcome(case, "loop", task)
    conforms(case, "lowrank", oracle, task)
    others = [
        name for name in oracle.gradients if name.startswith(f"meta_blocks.{'item' if task == 'user' else 'user'}")
    ]
    assert any(float(oracle.gradients[name].abs().max()) > 0 for name in others)  # held, but learned


def test_orders_differ() -> None:
    second, first = outcome(Case(order=2), "lowrank"), outcome(Case(order=1), "lowrank")
    assert torch.allclose(second.z, first.z, rtol=1e-12)
    with pytest.raises(AssertionError):
        assert_equal(first, second, 1e-3)


# ---- the gradient is the derivative of the value -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(pieces=("residual", "gate"), sequence="own attention", steps=3, losses=("binary", "squared")),
        Case(pieces=("tied", "free", "prelu"), sequence="multihead", table="tokens", initial=True),
        Case(pieces=("rms norm",), global_block="cross", types=("user", "item"), learn_rate="step"),
    ],
    ids=["low rank", "dense", "two types"],
)
def test_finite_differences_confirm_the_meta_gradient(case: Case) -> None:
    model, data = model_of(case, "lowrank"), random_data(case)
    tasks = torch.arange(data.count("user"))
    support = TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks)
    slope = torch.sin(torch.arange(1.0, len(tasks) * DIM + 1)).view(-1, DIM).double()

    def value() -> Tensor:
        return (model.adapt(data, "user", tasks, support) * slope).sum()

    parameters = confirm_gradient(model, value)
    assert any("log_rate" in name for name in parameters) and any("log_prior_count" in name for name in parameters)


def test_one_step_on_one_layer_by_hand() -> None:
    """Squared error, block z = Wx + b, logit = z: φ moves by −α g [xᵀ, 1], so z by −α g (|x|² + 1)."""

    class Affine(nn.Module):
        dim = 1

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, features: Features) -> Tensor:
            z: Tensor = self.layer(features["x"][:, :2])
            return z

    class Identity(nn.Module):
        def forward(self, features: Features) -> Tensor:
            return features["user_embedding"]

    data = random_data(Case(sizes=(3, 1, 0), losses=("squared",)))
    data = replace(data, offset=None)
    model = MetaModel(
        Identity(),
        {"user": Affine()},
        losses=("squared",),
        adaptation=model_of(Case(steps=1, adaptation={"rate": 0.4, "prior_count": 2.0}), "lowrank").adaptation,
    )
    tasks = torch.arange(3)
    support = TaskRows.of(data.index["user"], 3).of_tasks(tasks)
    cold = model.cold(data, "user", tasks)
    x, z = data.sides["user"]["x"][:, :2], cold.clone()
    for task in range(3):
        mine = data.index["user"] == task
        weight = data.weights[mine].sum()
        g = (data.weights[mine] * (cold[task] - data.labels[mine, 0])).sum() / (weight + 2.0)
        z[task] = cold[task] - 0.4 * g * ((x[task] ** 2).sum() + 1)
    assert torch.allclose(model.adapt(data, "user", tasks, support), z, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(z[:2], cold[:2], atol=1e-3)


# ---- tasks without data, and tasks that are nobody's business ------------------------------------------------------------


@pytest.mark.parametrize("engine", ["lowrank", "vmap", "loop"])
@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_a_task_without_interactions_gets_exactly_its_cold_embedding(engine: str, solver: str) -> None:
    case = Case(sizes=(0, 4, 0, 2), dtype=torch.float32, adaptation={"solver": solver})
    model, data = model_of(case, engine), random_data(case)
    tasks = torch.arange(4)
    support = TaskRows.of(data.index["user"], 4).of_tasks(tasks)
    cold, z = model.cold(data, "user", tasks), model.adapt(data, "user", tasks, support)
    assert torch.equal(z[[0, 2]], cold[[0, 2]])
    assert not torch.isclose(z[[1, 3]], cold[[1, 3]]).all(1).any()
    weightless = replace(data, weights=torch.zeros(len(data)))
    assert torch.equal(model.adapt(weightless, "user", tasks, support), cold)
    assert torch.equal(model.adapt(data, "user", tasks, Rows.empty()), cold)
    assert model.adapt(data, "user", tasks[:0], Rows.empty()).shape == (0, DIM)
    unlabelled = replace(data, labels=torch.full_like(data.labels, torch.nan))
    assert torch.equal(model.adapt(unlabelled, "user", tasks, support), cold)


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_no_steps_is_the_cold_embedding(solver: str) -> None:
    case = Case(steps=0, dtype=torch.float32, adaptation={"solver": solver})
    model, data = model_of(case, "lowrank"), random_data(case)
    tasks = torch.arange(4)
    support = TaskRows.of(data.index["user"], 4).of_tasks(tasks)
    assert torch.equal(model.adapt(data, "user", tasks, support), model.cold(data, "user", tasks))


@settings(max_examples=10)
@given(sizes=heavy_tailed, chunk=st.integers(1, 20), cap=st.one_of(st.none(), st.integers(1, 4)))
def test_embedding_in_chunks_is_embedding_at_once(sizes: list[int], chunk: int, cap: int | None) -> None:
    case = Case(sizes=sizes, adaptation={"max_support": cap})
    model, data = model_of(case, "lowrank"), random_data(case)
    grouped = TaskRows.of(data.index["user"], len(sizes))
    tasks = torch.arange(len(sizes))
    expected = model.adapt(data, "user", tasks, grouped.of_tasks(tasks, cap)).detach()
    seen: list[tuple[int, int]] = []
    found = model.embed(data, "user", grouped, rows_per_chunk=chunk, progress=lambda done, of: seen.append((done, of)))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert seen[-1] == (len(sizes), len(sizes))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_a_task_does_not_depend_on_the_others(solver: str) -> None:
    case = Case(sizes=(5, 3, 7), adaptation={"solver": solver})
    model, data = model_of(case, "lowrank"), random_data(case)
    grouped = TaskRows.of(data.index["user"], 3)
    together = model.embed(data, "user", grouped)
    alone = torch.cat([model.embed(data, "user", grouped, torch.tensor([task])) for task in range(3)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_a_task_that_overflows_is_isolated_and_reported(solver: str, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(sizes=(5, 3, 7), adaptation={"solver": solver})
    model, data = model_of(case, "lowrank"), random_data(case)
    grouped = TaskRows.of(data.index["user"], 3)
    whole = model.embed(data, "user", grouped)
    sides = {name: dict(features) for name, features in data.sides.items()}
    sides["row"]["r"] = sides["row"]["r"].clone()
    sides["row"]["r"][int((data.index["user"] == 1).nonzero()[0])] = torch.nan
    with caplog.at_level(logging.WARNING, "limaml"):
        found = model.embed(replace(data, sides=sides), "user", grouped)
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    assert torch.equal(found[1], model.cold(data, "user", torch.arange(3)).detach()[1])
    assert "1 of 3 tasks" in caplog.text and "user:u1" in caplog.text
    sides["user"] = {**sides["user"], "x": torch.full_like(sides["user"]["x"], torch.inf)}
    with pytest.raises(ModelError, match="user:u0"):
        model.embed(replace(data, sides=sides), "user", grouped)


# ---- hoisting -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(case=cases)
def test_hoisting_changes_nothing(case: Case) -> None:
    model, data = model_of(case, "lowrank"), random_data(case)
    for task in model.tasks:
        tasks = torch.arange(data.count(task))
        rows = TaskRows.of(data.index[task], len(tasks)).of_tasks(tasks)
        z = torch.randn(len(tasks), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        held = model.held_cold(data, task)
        cut, plain = (
            RowScorer(model.global_block, data, task, tasks, rows, held, hoist=hoist) for hoist in (True, False)
        )
        assert torch.allclose(cut.logits(z), plain.logits(z), rtol=1e-11, atol=1e-13)
        per_row = z[rows.owner]
        assert torch.allclose(cut.per_row(per_row), plain.logits(z), rtol=1e-11, atol=1e-13)


# ---- reach: what is low-rank, what is dense, what falls back ----------------------------------------------------------------


def engine_of(case: Case, wanted: str = "auto", train: bool = False) -> object:
    model, data = model_of(case, wanted), random_data(case)
    model.meta_blocks.train(train)
    return model.engine("user", model.features_of(data, "user", torch.arange(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_usual_blocks_need_no_dense_delta(dtype: torch.dtype) -> None:
    pieces = ("linear", "layer norm", "rms norm", "residual", "gate", "called twice", "shared module", "batch norm")
    plain = [piece for piece in pieces if piece != "batch norm"]
    for sequence in (None, "layers", "own attention"):
        engine = engine_of(Case(pieces=plain, sequence=sequence, table="tokens with padding", dtype=dtype), "lowrank")
        assert isinstance(engine, LowRank)
        assert engine.dense == []
        assert engine.flat
    engine = engine_of(Case(pieces=pieces), "lowrank")
    assert isinstance(engine, LowRank)
    assert engine.dense == ["pieces.7.weight", "pieces.7.bias"]


def test_only_what_must_be_dense_is_dense() -> None:
    engine = engine_of(Case(pieces=("tied", "linear", "read behind its back"), sequence="multihead", initial=True))
    assert isinstance(engine, LowRank)
    assert set(engine.followed) == {"start", "pieces.1", "out"}
    assert {"initial", "pieces.0.first.weight", "pieces.2.layer.weight", "sequence.attention.in_proj_weight"} <= set(
        engine.dense
    )
    engine = engine_of(Case(sequence="length first"), "lowrank")
    assert isinstance(engine, LowRank)
    assert engine.dense == [] and not engine.flat


class Recurrent(nn.Module):
    dim = DIM

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(WIDTH, 4, batch_first=True), nn.Linear(4, DIM)

    def forward(self, features: Features) -> Tensor:
        z: Tensor = self.out(self.gru(features["seq"])[0][:, -1])
        return z


def with_block(block: nn.Module, engine: str = "auto", **settings: object) -> MetaModel:
    case = Case(global_block="plain", dtype=torch.float32, adaptation=settings)
    like = model_of(case, engine)
    return MetaModel(like.global_block, {"user": block}, adaptation=like.adaptation)


def adapted(model: MetaModel) -> Tensor:
    data = random_data(Case())
    tasks = torch.arange(4)
    return model.adapt(data, "user", tasks, TaskRows.of(data.index["user"], 4).of_tasks(tasks))


def test_a_recurrent_block_falls_back_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    block = Recurrent()
    with caplog.at_level(logging.WARNING, "limaml"):
        z = adapted(with_block(block))
    assert "engine 'loop'" in caplog.text and "'gru' (GRU) is recurrent" in caplog.text
    assert torch.equal(z, adapted(with_block(block, "loop")))
    with pytest.raises(ModelError, match=r"'lowrank', because module 'gru' \(GRU\) is recurrent"):
        adapted(with_block(block, "lowrank"))
    with pytest.raises(ModelError, match="by the engine 'vmap'"):
        adapted(with_block(block, "vmap"))


class OverSequence(nn.Module):
    dim = DIM

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.out = norm, nn.Linear(WIDTH, DIM)

    def forward(self, features: Features) -> Tensor:
        z: Tensor = self.out(self.norm(features["seq"].transpose(1, 2)).mean(-1))
        return z


def test_batch_norm_in_training_falls_back_or_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = with_block(OverSequence(nn.BatchNorm1d(WIDTH)))
    with caplog.at_level(logging.WARNING, "limaml"):
        assert adapted(model).shape == (4, DIM)
    assert "'norm' (BatchNorm1d) normalises over the batch" in caplog.text
    assert "engine 'loop'" in caplog.text
    with pytest.raises(ModelError, match=r"'norm' \(BatchNorm1d\)"):
        adapted(with_block(OverSequence(nn.BatchNorm1d(WIDTH)), "lowrank"))
    flat = nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, DIM))
    with pytest.raises(ModelError, match=r"No engine can adapt .* 'net.1' \(BatchNorm1d\)"):
        adapted(with_block(OnX(flat)))
    caplog.clear()
    model.eval()
    with caplog.at_level(logging.WARNING, "limaml"):
        adapted(model)
    assert not caplog.text  # in evaluation mode nothing couples the tasks: lowrank


class OnX(nn.Module):
    dim = DIM

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: Features) -> Tensor:
        z: Tensor = self.net(features["x"])
        return z


def test_batch_norm_in_the_global_block_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'net.0' of the global block is a BatchNorm1d"):
        MetaModel(OnX(nn.Sequential(nn.BatchNorm1d(4))), {"user": OnX(nn.Linear(4, DIM))})


def test_an_unused_parameter_is_named() -> None:
    block = OnX(nn.Linear(4, DIM))
    block.forgotten = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"'user'.*forgotten\.weight, forgotten\.bias"):
        adapted(with_block(block))
    block.forgotten.requires_grad_(False)
    assert adapted(with_block(block)).shape == (4, DIM)


def test_a_block_with_nothing_to_adapt_is_refused_by_the_gradient_solver_only() -> None:
    class Table(nn.Module):
        dim = DIM

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, DIM)

        def forward(self, features: Features) -> Tensor:
            z: Tensor = self.table(features["c"])
            return z

    with pytest.raises(ModelError, match="embedding tables"):
        with_block(Table())
    model = with_block(Table(), solver="newton")
    assert not torch.allclose(adapted(model), model.cold(random_data(Case()), "user", torch.arange(4)), atol=1e-3)


def test_a_block_whose_weight_is_computed_is_exact() -> None:
    layer = nn.Linear(4, WIDTH)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    block = OnX(nn.Sequential(layer, nn.Tanh(), nn.Linear(WIDTH, DIM)))
    found, truth = adapted(with_block(block, "lowrank")), adapted(with_block(block, "loop"))
    assert torch.allclose(found, truth, atol=1e-5)
    extended = nn.Linear(4, DIM)
    extended.register_parameter("extra", nn.Parameter(torch.ones(DIM)))
    extended.register_forward_hook(lambda module, args, out: out * module.extra)
    block = OnX(extended)
    found, truth = adapted(with_block(block, "lowrank")), adapted(with_block(block, "loop"))
    assert torch.allclose(found, truth, atol=1e-5)


def test_a_block_that_starts_at_zero_is_not_misjudged() -> None:
    """Behind a layer of zeros every gradient is zero: a check on the block as it is would prove nothing."""
    block = OnX(nn.Sequential(PIECES["linear"](), PIECES["read behind its back"](), nn.Linear(WIDTH, DIM)))
    block.net[0] = nn.Linear(4, WIDTH)
    nn.init.zeros_(block.net[2].weight)
    engine = with_block(block).engine("user", {"x": torch.randn(3, 4), CONSTANT: torch.ones(3, 1)})
    assert isinstance(engine, LowRank)
    assert engine.dense == ["net.1.layer.weight", "net.1.layer.bias"]


def test_the_engine_follows_the_block_when_it_changes() -> None:
    block = OnX(nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, DIM)))
    model = with_block(block)
    adapted(model)
    state = {name: torch.randn_like(value) for name, value in block.state_dict().items()}
    block.load_state_dict(state, assign=True)  # other parameter objects
    assert torch.equal(adapted(model), adapted(with_block(block)))
    block.net[0].requires_grad_(False)
    expected = adapted(with_block(block, "loop", learn_rate="scalar"))
    assert torch.allclose(adapted(model), expected, atol=1e-5)
    block.net[1] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    with pytest.raises(ModelError, match=r"Layer 'net\.1\.0' .* added or unfrozen"):
        adapted(model)


def test_a_copy_of_a_model_adapts_its_own_weights() -> None:
    model = with_block(OnX(nn.Linear(4, DIM)))
    before = adapted(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.meta_blocks["user"].net.weight.add_(1.0)
    assert torch.equal(adapted(model), before)
    assert not torch.allclose(adapted(copied), before, atol=1e-2)


# ---- dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["lowrank", "vmap", "loop"])
def test_dropout_masks_are_shared_by_all_steps(engine: str) -> None:
    """With a mask that changed from step to step, K steps at rate → 0 would not be K = 0 under the same mask."""
    block = OnX(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, DIM)))
    results = []
    for steps in (1, 4):
        model = with_block(block, engine, steps=steps, rate=1e-9, learn_rate="fixed")
        adapted(model)  # so that the engine is made
        torch.manual_seed(7)
        results.append(adapted(model))
    assert torch.allclose(results[0], results[1], atol=1e-6)
    torch.manual_seed(8)
    assert not torch.allclose(results[1], adapted(model), atol=1e-3)  # another batch, other masks
    model.eval()
    assert torch.equal(adapted(model), adapted(model))


@pytest.mark.parametrize("engine", ["lowrank", "vmap", "loop"])
def test_the_meta_gradient_under_dropout_is_the_derivative_of_the_thinned_block(engine: str) -> None:
    """Engines draw other masks, so each is held to its own finite differences."""
    case = Case(sequence="encoder with dropout", sizes=(3, 0, 2))
    model, data = model_of(case, engine), random_data(case)
    tasks = torch.arange(3)
    support = TaskRows.of(data.index["user"], 3).of_tasks(tasks)
    slope = torch.sin(torch.arange(1.0, 3 * DIM + 1)).view(-1, DIM).double()
    model.adapt(data, "user", tasks, support)  # so that the engine is made

    def value() -> Tensor:
        torch.manual_seed(3)
        return (model.adapt(data, "user", tasks, support) * slope).sum()

    confirm_gradient(model, value)
    thinned = value()
    model.eval()
    assert not torch.allclose(value(), thinned, rtol=1e-3)  # there were masks


def test_dropout_in_the_global_block_is_shared_by_all_steps() -> None:
    class Thinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, features: Features) -> Tensor:
            return self.drop(features["user_embedding"]).sum(1, keepdim=True)

    case = Case(sizes=(6, 3))
    data = random_data(case)
    tasks = torch.arange(2)
    rows = TaskRows.of(data.index["user"], 2).of_tasks(tasks)
    model = MetaModel(Thinned(), {"user": OnX(nn.Linear(4, DIM))})
    support = Support(model.global_block, model.losses, data, "user", tasks, rows)
    z = torch.randn(2, DIM)
    assert torch.equal(support.loss(z), support.loss(z))
    other = Support(model.global_block, model.losses, data, "user", tasks, rows)
    assert not torch.equal(support.loss(z), other.loss(z))


# ---- errors that help ---------------------------------------------------------------------------------------------------


def test_errors_inside_blocks_name_shapes() -> None:
    with pytest.raises(ModelError, match=r"meta block OnX of 'user' failed.*x \[4, 4\] torch\.float32"):
        adapted(with_block(OnX(nn.Linear(5, DIM))))
    with pytest.raises(ModelError, match=r"must be \[4, 3\]"):
        adapted(with_block(OnX(nn.Linear(4, DIM + 1))))

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, features: Features) -> Tensor:
            return self.layer(torch.cat([features["user_embedding"], features["r"]], 1))

    data = random_data(Case())
    tasks = torch.arange(4)
    rows = TaskRows.of(data.index["user"], 4).of_tasks(tasks)
    model = MetaModel(Broken(), {"user": OnX(nn.Linear(4, DIM))})
    with pytest.raises(ModelError, match=r"global block Broken failed.*r \[9, 1\].*user_embedding \[9, 3\]"):
        model.adapt(data, "user", tasks, rows)


def test_a_global_block_that_ignores_the_embedding_is_refused() -> None:
    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, features: Features) -> Tensor:
            return self.layer(features["r"])

    for solver in ("gradient", "newton"):
        like = model_of(Case(dtype=torch.float32, adaptation={"solver": solver}), "auto")
        model = MetaModel(Ignores(), {"user": OnX(nn.Linear(4, DIM))}, adaptation=like.adaptation)
        with pytest.raises(ModelError, match=r"Ignores does not use features\['user_embedding'\]"):
            adapted(model)


def test_logits_without_a_heads_dimension_are_one_head_and_others_are_refused() -> None:
    class Flat(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, heads)

        def forward(self, features: Features) -> Tensor:
            logits: Tensor = self.layer(features["user_embedding"]).squeeze(-1)
            return logits

    torch.manual_seed(0)
    model = MetaModel(Flat(1), {"user": OnX(nn.Linear(4, DIM))})
    data = random_data(Case())
    table = model.cold(data, "user", torch.arange(4))
    logits = model.logits(data, torch.arange(9), {"user": table})
    assert logits.shape == (9, 1)
    assert torch.allclose(logits[:, 0], model.global_block.layer(table[data.index["user"]])[:, 0])
    assert adapted(model).shape == (4, DIM)
    with pytest.raises(ModelError, match=r"logits of shape \(9, 2\) for labels of shape \(9, 1\)"):
        adapted(MetaModel(Flat(2), {"user": OnX(nn.Linear(4, DIM))}))


# ---- runaway rates ------------------------------------------------------------------------------------------------------


def test_learned_rates_are_bounded_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = with_block(OnX(nn.Linear(4, DIM)), rate=0.1)
    solver = model.solvers["user"]
    with torch.no_grad():
        solver.log_rate.fill_(200.0)
    with caplog.at_level(logging.WARNING, "limaml"):
        z = adapted(model)
        adapted(model)
    assert z.isfinite().all()
    assert float(solver.log_rate.detach().exp().max()) == pytest.approx(100.0, rel=1e-4)
    assert len([r for r in caplog.records if "inner rate reached 100" in r.getMessage()]) == 1


def test_blocks_are_left_as_they_were() -> None:
    """Engines put weights and hooks into the block for a moment; nothing of it may stay."""
    case = Case(pieces=("shared module", "tied", "free", "called twice"), sequence="multihead")
    for engine in ("lowrank", "vmap", "loop"):
        model, data = model_of(case, engine), random_data(case)
        block, tasks = model.meta_blocks["user"], torch.arange(4)
        parameters = dict(block.named_parameters(remove_duplicate=False))
        model.adapt(data, "user", tasks, TaskRows.of(data.index["user"], 4).of_tasks(tasks))
        after = dict(block.named_parameters(remove_duplicate=False))
        assert parameters.keys() == after.keys()
        assert all(parameters[name] is after[name] for name in parameters)
        assert not any(module._forward_hooks for module in block.modules())
