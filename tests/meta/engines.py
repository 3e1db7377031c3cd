"""What every engine must do, as functions that a test of a new engine can call.

`random_block` builds meta blocks out of what people put into them; `random_data` builds interactions with heavy-tailed
support sizes; `outcome` gives the meta embeddings and the meta-gradient of one engine; `assert_equal` compares two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from limaml.config import Adaptation
from limaml.meta.blocks import CONSTANT, CrossNetwork, FeatureEmbedding, InteractionMLP, MetaMLP
from limaml.meta.cut import ConcatMLP
from limaml.meta.model import MetaModel
from limaml.meta.support import Support
from limaml.tasks import TaskRows
from limaml.types import FeatureKind, Features, FeatureSpec, Interactions, embedding_name

WIDTH, DIM, LENGTH, ITEMS = 6, 3, 3, 5

USER = (FeatureSpec("c", FeatureKind.CATEGORICAL, "user", 4),)
ITEM = (FeatureSpec("ic", FeatureKind.CATEGORICAL, "item", 6), FeatureSpec("it", FeatureKind.TOKENS, "item", 5, 3))
ROW_ = (FeatureSpec("r", FeatureKind.NUMERIC, "row", 1),)


# ---- pieces of a meta block: each maps (…, WIDTH) to (…, WIDTH) ----------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), nn.SiLU(), nn.Linear(4, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(h)) * self.value(input=h)  # by keyword: hooks must see it


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.layer(torch.tanh(self.norm(self.layer(h)))))


class SharedModule(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first

    def forward(self, h: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(h)))


class Tied(nn.Module):
    """Two modules, one weight; and the weight used a third time behind their backs, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(h)))) @ self.first.weight


class ReadBehindItsBack(nn.Module):
    """A Linear that is called, and whose weight is read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h) + 0.3 * nn.functional.linear(torch.sin(h), self.layer.weight)


class Free(nn.Module):
    """Free parameters: a scale and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * h + self.shift


class Cross(nn.Module):
    """Two layers of a cross network, with biases that are parameters of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        x = h
        for layer, bias in zip(self.layers, self.bias, strict=True):
            x = h * (layer(x) + bias) + x
        return x


class OwnLinear(nn.Linear):
    """A subclass that does something else than its parent."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(torch.cos(input))


class HalfFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_only, self.frozen = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight_only.bias.requires_grad_(False)
        self.frozen.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return self.frozen(torch.tanh(self.weight_only(h)))


def _batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean = torch.linspace(-1, 1, WIDTH)
    norm.running_var = torch.linspace(0.5, 2, WIDTH)
    return norm.eval()


PIECES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer norm without parameters": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "rms norm without parameters": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
    "residual": Residual,
    "gate": Gate,
    "called twice": CalledTwice,
    "shared module": SharedModule,
    "tied": Tied,
    "read behind its back": ReadBehindItsBack,
    "free": Free,
    "subclass": lambda: OwnLinear(WIDTH, WIDTH),
    "half frozen": HalfFrozen,
    "prelu": lambda: nn.PReLU(WIDTH),
    "in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(inplace=True), nn.Linear(WIDTH, WIDTH)),
    "batch norm": _batch_norm,
    "dropout off": lambda: nn.Dropout(0.0),
    "dropout in evaluation mode": lambda: nn.Dropout(0.5).eval(),
    "cross": Cross,
}


# ---- what turns a task's features into (tasks, WIDTH) --------------------------------------------------------------------


class OwnAttention(nn.Module):
    """Self-attention with its own query, key and value layers; `(n, length, WIDTH)`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))


class Multihead(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, h: Tensor) -> Tensor:
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.attention(h, h, h, need_weights=False)[0]
        return h if self.batch_first else h.transpose(0, 1)


class Ffn(nn.Module):
    """A wide layer over a sequence: with more pairs than it has weights, its delta is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.narrow(torch.tanh(self.wide(h)))


class LengthFirst(nn.Module):
    """Layers that are called on `(length, tasks, WIDTH)`: the tasks are not in the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h.transpose(0, 1)).transpose(0, 1)


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU()),
    "norm of two dimensions": lambda: nn.LayerNorm((LENGTH, WIDTH)),
    "own attention": OwnAttention,
    "multihead": lambda: Multihead(True),
    "multihead, length first": lambda: Multihead(False),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
    "encoder with dropout": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True),
    "length first": LengthFirst,
    "feed forward": Ffn,
}

STEADY_SEQUENCES = sorted(SEQUENCES.keys() - {"encoder with dropout"})
"""Those that draw no masks, which engines draw in different shapes."""


class LearnedQuery(nn.Module):
    """Attention pooling by a learned query, `(n, length, WIDTH)` → `(n, WIDTH)`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.linspace(-1, 1, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        attention = torch.softmax(self.key(h) @ self.query, 1)
        return (attention.unsqueeze(-1) * h).sum(1)


class Pool(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


POOLS: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: Pool(lambda h: h.mean(1)),
    "max": lambda: Pool(lambda h: h.max(1).values),
    "last": lambda: Pool(lambda h: h[:, -1]),
    "learned query": LearnedQuery,
}


# ---- what turns a task's ids, `t` `(n, 3)` of 7, into (n, 2) -------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 2, **options)

    def forward(self, features: Features) -> Tensor:
        return self.table(features["t"]).sum(1)


class Shipped(nn.Module):
    """The embedding of the blocks that ship: a masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = FeatureEmbedding(FeatureSpec("t", FeatureKind.TOKENS, "user", 7, 3), 2, scale=0.5)

    def forward(self, features: Features) -> Tensor:
        return self.embed(features["t"])


class Bag(nn.Module):
    def __init__(self, offsets: bool = False, **options: object) -> None:
        super().__init__()
        self.offsets, self.table = offsets, nn.EmbeddingBag(7, 2, **options)

    def forward(self, features: Features) -> Tensor:
        ids = features["t"]
        if not self.offsets:
            return self.table(ids)
        return self.table(input=ids.flatten(), offsets=torch.arange(0, ids.numel(), ids.shape[1]))


class WeightedBag(nn.Module):
    """Weights that are learned: slopes go through the bag."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weigh = nn.EmbeddingBag(7, 2, mode="sum"), nn.Linear(4, 3)

    def forward(self, features: Features) -> Tensor:
        return self.table(features["t"], per_sample_weights=torch.softmax(self.weigh(features["x"]), 1))


class OneTableTwice(nn.Module):
    """One weight in two modules, of which one knows padding and one adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(7, 2, padding_idx=0)
        self.second = nn.EmbeddingBag(7, 2, mode="sum", padding_idx=3)
        self.second.weight = self.first.weight

    def forward(self, features: Features) -> Tensor:
        return torch.tanh(self.first(features["t"]).mean(1)) * self.second(features["t"]) + self.first(features["c"])


class TiedTable(nn.Module):
    """A table that is the weight of a Linear as well, and is read behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.score = nn.Embedding(7, 2, padding_idx=0), nn.Linear(2, 7)
        self.score.weight = self.table.weight

    def forward(self, features: Features) -> Tensor:
        return torch.softmax(self.score(self.table(features["t"]).mean(1)), 1) @ self.table.weight


class OwnTable(nn.Embedding):
    """A subclass that looks up in its own way."""

    def __init__(self) -> None:
        super().__init__(7, 2)

    def forward(self, features: Features) -> Tensor:  # type: ignore[override]
        return torch.sin(super().forward(features["t"])).sum(1)


TABLES: dict[str, Callable[[], nn.Module]] = {
    "tokens": Tokens,
    "tokens with padding": lambda: Tokens(padding_idx=0),
    "sparse tokens": lambda: Tokens(sparse=True, padding_idx=2),
    "shipped": Shipped,
    "bag": lambda: Bag(mode="sum"),
    "bag of offsets": lambda: Bag(offsets=True, mode="mean", padding_idx=1),
    "bag with padding": lambda: Bag(mode="mean", padding_idx=0),
    "bag of the largest": lambda: Bag(mode="max", padding_idx=0),
    "weighted bag": WeightedBag,
    "one table twice": OneTableTwice,
    "tied table": TiedTable,
    "own table": OwnTable,
}


class Block(nn.Module):
    """Inputs → pieces → meta embedding."""

    def __init__(
        self, pieces: Sequence[str], sequence: str | None, pool: str, table: str | None, initial: bool
    ) -> None:
        super().__init__()
        self.dim = DIM
        self.category = nn.Embedding(4, 2)
        self.table = TABLES[table]() if table is not None else None
        self.start = nn.Linear(4 + 1 + 2 + 2 * (table is not None), WIDTH)
        self.initial = nn.Parameter(torch.linspace(-0.5, 0.5, WIDTH)) if initial else None
        self.sequence = SEQUENCES[sequence]() if sequence is not None else None
        self.pool = POOLS[pool]() if sequence is not None else None
        self.pieces = nn.Sequential(*(PIECES[name]() for name in pieces))
        self.out = nn.Linear(WIDTH, DIM)

    def forward(self, features: Features) -> Tensor:
        x = [features["x"], features[CONSTANT], self.category(features["c"])]
        if self.table is not None:
            x.append(self.table(features))
        h = self.start(torch.cat(x, -1))
        if self.initial is not None:
            h = h + torch.tanh(self.initial)
        if self.sequence is not None:
            h = h + self.pool(self.sequence(features["seq"] + h.unsqueeze(1)))
        z: Tensor = self.out(torch.tanh(self.pieces(h)))
        return z


class PlainGlobal(nn.Module):
    """An existing model that reads one more feature, and is not cut."""

    def __init__(self, embeddings: Sequence[str], heads: int) -> None:
        super().__init__()
        self.names = [f"{name}_embedding" for name in embeddings]
        self.item = nn.Embedding(6, 4)
        self.net = nn.Sequential(nn.Linear(4 + 1 + DIM * len(self.names), 8), nn.Tanh(), nn.Linear(8, heads))

    def forward(self, features: Features) -> Tensor:
        x = [self.item(features["ic"]), features["r"], *(features[name] for name in self.names)]
        logits: Tensor = self.net(torch.cat(x, -1))
        return logits


@dataclass(frozen=True)
class Case:
    """Everything an engine's answer may depend on."""

    pieces: Sequence[str] = ("linear",)
    sequence: str | None = None
    pool: str = "mean"
    table: str | None = None
    adapt_tables: bool = False
    initial: bool = False
    sizes: Sequence[int] = (3, 0, 1, 5)
    losses: Sequence[str] = ("binary",)
    global_block: str = "interaction"
    types: Sequence[str] = ("user",)
    order: int = 2
    steps: int = 2
    learn_rate: str = "layer_step"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    missing: bool = False  # labels
    weightless: bool = False  # some rows
    time_unit: str = "order"
    adaptation: dict[str, object] = field(default_factory=dict)


def random_data(case: Case) -> Interactions:
    generator = torch.Generator().manual_seed(case.seed)
    rows = sum(case.sizes)
    user = torch.repeat_interleave(torch.arange(len(case.sizes)), torch.tensor(case.sizes))
    order = torch.randperm(rows, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(size: int, *shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=generator)

    tasks, heads = len(case.sizes), len(case.losses)
    labels = torch.stack(
        [ids(2, rows).float() if kind == "binary" else normal(rows) for kind in case.losses], 1
    ).reshape(rows, heads)
    if case.missing:
        labels[torch.rand(rows, heads, generator=generator) < 0.3] = torch.nan
    weights = torch.rand(rows, generator=generator) + 0.5
    if case.weightless:
        weights[torch.rand(rows, generator=generator) < 0.4] = 0.0
    user_side: Features = {"x": normal(tasks, 4), "c": ids(4, tasks), "t": ids(7, tasks, 3)}
    user_side["seq"] = normal(tasks, LENGTH, WIDTH)
    return Interactions(
        sides={
            "user": user_side,
            "item": {"ic": ids(6, ITEMS), "it": ids(5, ITEMS, 3)},
            "row": {"r": normal(rows, 1)},
        },
        index={"user": user[order], "item": ids(ITEMS, rows), "row": torch.arange(rows)},
        ids={"user": [f"u{i}" for i in range(tasks)], "item": [f"i{i}" for i in range(ITEMS)]},
        labels=labels,
        weights=weights,
        time=torch.arange(rows) * (40_000_000_000 if case.time_unit == "us" else 1),  # about half a day apart
        time_unit=case.time_unit,
        offset=0.2 * normal(rows),
    )


def model_of(case: Case, engine: str) -> MetaModel:
    torch.manual_seed(case.seed)
    blocks: dict[str, nn.Module] = {"user": Block(case.pieces, case.sequence, case.pool, case.table, case.initial)}
    if "item" in case.types:
        blocks["item"] = MetaMLP(ITEM, DIM, hidden=(4,))
    heads, embeddings = len(case.losses), {embedding_name(name): DIM for name in case.types}
    features = (*USER, *ITEM, *ROW_)
    if case.global_block == "interaction":
        shared: nn.Module = InteractionMLP(features, embeddings, heads=heads, embedding_dim=3, hidden=(5, 4), factors=2)
    elif case.global_block == "cross":
        shared = CrossNetwork(features, embeddings, heads=heads, embedding_dim=2, layers=2, hidden=(4,))
    elif case.global_block == "concat":
        layers = nn.Sequential(nn.Linear(4 + 1 + DIM * len(case.types), 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU())
        shared = ConcatMLP({"ic": nn.Embedding(6, 4), "r": 1, **embeddings}, layers.append(nn.Linear(6, heads)))
    elif case.global_block == "straight":  # nothing bends, so that with one head a chain can `turn`
        layers = nn.Sequential(nn.Linear(4 + 1 + DIM * len(case.types), 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
        layers.extend([nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, heads)])
        shared = ConcatMLP({"ic": nn.Embedding(6, 4), "r": 1, **embeddings}, layers)
    elif case.global_block == "short":  # of two layers behind the first: their slopes are kept
        layers = nn.Sequential(nn.Linear(4 + 1 + DIM * len(case.types), 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
        layers.append(nn.Linear(6, heads))
        shared = ConcatMLP({"ic": nn.Embedding(6, 4), "r": 1, **embeddings}, layers)
    else:
        shared = PlainGlobal(case.types, heads)
    settings = Adaptation.model_validate(
        {
            "solver": "gradient",
            "steps": case.steps,
            "order": case.order,
            "rate": 0.7,
            "learn_rate": case.learn_rate,
            "prior_count": 1.5,
            "engine": engine,
            "adapt_embeddings": case.adapt_tables,
            **case.adaptation,
        }
    )
    model = MetaModel(shared, blocks, losses=case.losses, adaptation=settings).to(case.dtype)
    with torch.no_grad():  # so that nothing is zero that need not be
        noise = torch.Generator().manual_seed(case.seed + 1)
        for name, parameter in model.named_parameters():
            if "log_" not in name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=noise))
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return model


@dataclass(frozen=True)
class Outcome:
    engine: str
    z: Tensor
    gradients: dict[str, Tensor]


def outcome(case: Case, engine: str, task: str = "user") -> Outcome:
    """Meta embeddings adapted on the first half of each task's rows, and the gradient of the loss on all of them."""
    model, data = model_of(case, engine), random_data(case)
    tasks = torch.arange(data.count(task))
    grouped = TaskRows.of(data.index[task], len(tasks))
    first = TaskRows.of(data.index[task], len(tasks), torch.arange(len(data)) % 2 == 0)
    z = model.adapt(data, task, tasks, first.of_tasks(tasks))
    query = Support(
        model.global_block, model.losses, data, task, tasks, grouped.of_tasks(tasks), model.held_cold(data, task)
    )
    loss = query.loss(z).sum() + (z * torch.linspace(-1, 1, DIM)).sum()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    dense = {
        name: torch.zeros_like(p) if g is None else g.to_dense()
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
    return Outcome(engine, z.detach(), dense)


def assert_equal(one: Outcome, other: Outcome, tolerance: float) -> None:
    """Equal to `tolerance`, relative to the largest entry of each tensor (or a thousandth of the largest of all)."""
    pairs = {"meta embeddings": (one.z, other.z)}
    pairs |= {name: (one.gradients[name], other.gradients[name]) for name in one.gradients}
    largest = max(float(a.abs().max()) for a, _ in pairs.values() if a.numel())
    assert largest > 0
    for name, (a, b) in pairs.items():
        size = (float(a.abs().max()) if a.numel() else 0.0) + 1e-3 * largest
        error = float((a - b).abs().max()) if a.numel() else 0.0
        assert error <= tolerance * size, f"{name}: {one.engine} and {other.engine} differ by {error / size:.1e} of it"


def conforms(case: Case, engine: str, oracle: Outcome | None = None, task: str = "user") -> None:
    """The engine's answer to `case` is that of the `loop` engine."""
    oracle = outcome(case, "loop", task) if oracle is None else oracle
    assert_equal(oracle, outcome(case, engine, task), 1e-9 if case.dtype == torch.float64 else 5e-3)


def confirm_gradient(model: MetaModel, value: Callable[[], Tensor]) -> dict[str, nn.Parameter]:
    """The gradient of `value()` by every parameter is its derivative along a random direction; returns the parameters."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(value(), list(parameters.values()), allow_unused=True)
    generator, step, checked = torch.Generator().manual_seed(5), 1e-5, 0
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(step * direction)
            above = float(value())
            parameter.sub_(2 * step * direction)
            below = float(value())
            parameter.add_(step * direction)
        expected = (above - below) / (2 * step)
        found = 0.0 if gradient is None else float((gradient * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        checked += abs(expected) > 1e-6
    assert checked > len(parameters) / 2
    return parameters
