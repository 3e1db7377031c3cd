"""Blocks that ship: enough that a config alone gives a good model. Any `nn.Module` of your own does as well.

A global block is `forward(features) -> logits [n, heads]`, where `features` holds, beside your columns, one meta embedding
`[n, dim]` per task type. A meta block is `forward(features) -> [tasks, dim]`, where `features` are constant within a task.

Both global blocks here are *cut* (`limaml.types.CutBlock`), so that the engine encodes each distinct item once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from limaml.types import PADDING, Features, FeatureSpec, Parts

__all__ = ["CONSTANT", "CrossNetwork", "FeatureEmbedding", "InteractionMLP", "MetaMLP", "add_parts"]

CONSTANT = "constant"
"""A feature `[n, 1]` of ones that every meta block is given, so that a task without features has an input too."""


def add_parts(first: Parts, second: Parts) -> Parts:
    """The sum of two parts, slot by slot."""
    return tuple(b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True))


class FeatureEmbedding(nn.Module):
    """One feature → `[n, width]`: a table for ids (mean over tokens and sequences), a linear map for dense vectors.

    Padding (id 0 of tokens and sequences) contributes nothing; a row without tokens gives zeros.
    """

    def __init__(self, spec: FeatureSpec, width: int, scale: float = 0.01) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        self.table: nn.Embedding | None = None
        self.linear: nn.Linear | None = None
        if spec.is_id:
            self.table = nn.Embedding(spec.size, width)
            nn.init.normal_(self.table.weight, std=scale)
        else:
            self.linear = nn.Linear(spec.size, width, bias=False)
            # As small as the tables: a large input would multiply the inner steps of a meta block.
            nn.init.normal_(self.linear.weight, std=scale)

    def forward(self, values: Tensor) -> Tensor:
        if self.linear is not None:
            dense: Tensor = self.linear(values.to(self.linear.weight.dtype))
            return dense
        assert self.table is not None
        looked_up: Tensor = self.table(values)
        if values.dim() == 1:
            return looked_up
        present = (values != PADDING).to(looked_up.dtype).unsqueeze(-1)  # (n, length, 1)
        return (looked_up * present).sum(1) / present.sum(1).clamp(min=1.0)


class InteractionMLP(nn.Module):
    """An MLP over all inputs, plus the pairwise products of their low-rank factors, plus a linear term of each.

    `logit = linear + ½(|Σ vᵢ|² − Σ|vᵢ|²) + MLP(Σ Wᵢ xᵢ)`, where i runs over features and meta embeddings: a factorisation
    machine and a deep network that share their feature embeddings. The bilinear term is what lets a small meta embedding
    say "more of this, less of that" without the MLP having to learn a product.
    """

    def __init__(
        self,
        features: Sequence[FeatureSpec],
        embeddings: Mapping[str, int],
        *,
        heads: int = 1,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        factors: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.factors = heads, factors
        self.names = tuple(spec.name for spec in features)
        self.embeddings = dict(embeddings)
        first = hidden[0]
        self.embed = nn.ModuleList(FeatureEmbedding(spec, embedding_dim) for spec in features)
        self.wide = nn.ModuleList(FeatureEmbedding(spec, heads) for spec in features)
        inputs = len(features) * embedding_dim + sum(embeddings.values())
        bound = 1 / math.sqrt(max(1, inputs))
        self.deep = nn.ModuleList(_uniform(embedding_dim, first, bound) for _ in features)
        self.deep_of = nn.ModuleList(_uniform(dim, first, bound) for dim in embeddings.values())
        self.factor = nn.ModuleList(nn.Linear(embedding_dim, heads * factors, bias=False) for _ in features)
        self.factor_of = nn.ModuleList(nn.Linear(dim, heads * factors, bias=False) for dim in embeddings.values())
        self.wide_of = nn.ModuleList(nn.Linear(dim, heads, bias=False) for dim in embeddings.values())
        self.bias = nn.Parameter(torch.zeros(heads))
        self.first_bias = nn.Parameter(torch.zeros(first))
        layers: list[nn.Module] = []
        for a, b in zip(hidden, [*hidden[1:], heads], strict=True):
            layers += [nn.SiLU(), nn.Dropout(dropout), nn.Linear(a, b)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, features: Features) -> Tensor:
        own = {name: features[name] for name in self.names}
        return self.score(
            add_parts(self.encode(own), self.condition({name: features[name] for name in self.embeddings}))
        )

    def encode(self, features: Features) -> Parts:
        parts: Parts = (None, None, None, None)
        for name, embed, wide, deep, factor in zip(
            self.names, self.embed, self.wide, self.deep, self.factor, strict=True
        ):
            if name in features:
                x = embed(features[name])
                parts = add_parts(parts, _slots(wide(features[name]), deep(x), factor(x)))
        return parts

    def condition(self, embeddings: Features) -> Parts:
        parts: Parts = (None, None, None, None)
        for name, wide, deep, factor in zip(self.embeddings, self.wide_of, self.deep_of, self.factor_of, strict=True):
            if name in embeddings:
                z = embeddings[name]
                parts = add_parts(parts, _slots(wide(z), deep(z), factor(z)))
        return parts

    def score(self, parts: Parts) -> Tensor:
        first = parts[1]
        assert first is not None
        logits: Tensor = self.mlp(first + self.first_bias)
        return logits + self.rest(parts)

    def stack(self) -> tuple[int, Tensor, nn.Sequential]:
        return 1, self.first_bias, self.mlp

    def rest(self, parts: Parts) -> Tensor:
        linear, _, factors, squares = parts
        assert linear is not None and factors is not None and squares is not None
        pairs = (factors.view(-1, self.heads, self.factors) ** 2).sum(-1)
        squares = squares.view(-1, self.heads, self.factors).sum(-1)
        return linear + self.bias + (pairs - squares) / 2


def _slots(linear: Tensor, first: Tensor, factors: Tensor) -> Parts:
    return linear, first, factors, factors**2


def _uniform(inputs: int, outputs: int, bound: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


class CrossNetwork(nn.Module):
    """A DCN-v2-like network: `x_{l+1} = x₀ ⊙ (W_l x_l + b_l) + x_l`, then an MLP, plus a linear term of each feature.

    Wang et al., "DCN V2", WWW 2021 (arXiv 2008.13535), the stacked form. `x₀` is the concatenation of all feature
    embeddings and meta embeddings; what each input adds to `x₀` and to `W₀ x₀` is hoisted.
    """

    def __init__(
        self,
        features: Sequence[FeatureSpec],
        embeddings: Mapping[str, int],
        *,
        heads: int = 1,
        embedding_dim: int = 16,
        layers: int = 2,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.names = tuple(spec.name for spec in features)
        self.embeddings = dict(embeddings)
        self.embed = nn.ModuleList(FeatureEmbedding(spec, embedding_dim, scale=0.1) for spec in features)
        self.wide = nn.ModuleList(FeatureEmbedding(spec, heads) for spec in features)
        self.width = embedding_dim * len(features) + sum(embeddings.values())
        self.cross = nn.ModuleList(nn.Linear(self.width, self.width, bias=False) for _ in range(layers))
        self.cross_bias = nn.Parameter(torch.zeros(layers, self.width))
        sizes = [self.width, *hidden, heads]
        deep: list[nn.Module] = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            deep += [nn.Linear(a, b), nn.SiLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*deep[:-2])
        self.bias = nn.Parameter(torch.zeros(heads))
        self._place: dict[str, int] = {}
        place = 0
        for name, dim in [*((name, embedding_dim) for name in self.names), *embeddings.items()]:
            self._place[name] = place
            place += dim

    def forward(self, features: Features) -> Tensor:
        own = {name: features[name] for name in self.names}
        return self.score(
            add_parts(self.encode(own), self.condition({name: features[name] for name in self.embeddings}))
        )

    def _input(self, name: str, x: Tensor, linear: Tensor | None) -> Parts:
        place = self._place[name]
        x0 = nn.functional.pad(x, (place, self.width - place - x.shape[-1]))
        return linear, x0, self.cross[0](x0) if len(self.cross) else None

    def encode(self, features: Features) -> Parts:
        parts: Parts = (None, None, None)
        for name, embed, wide in zip(self.names, self.embed, self.wide, strict=True):
            if name in features:
                parts = add_parts(parts, self._input(name, embed(features[name]), wide(features[name])))
        return parts

    def condition(self, embeddings: Features) -> Parts:
        parts: Parts = (None, None, None)
        for name in self.embeddings:
            if name in embeddings:
                parts = add_parts(parts, self._input(name, embeddings[name], None))
        return parts

    def score(self, parts: Parts) -> Tensor:
        linear, x0, crossed = parts
        assert x0 is not None
        x = x0
        for layer, cross in enumerate(self.cross):
            product: Tensor = crossed if layer == 0 and crossed is not None else cross(x)
            x = x0 * (product + self.cross_bias[layer]) + x
        logits: Tensor = self.mlp(x) + self.bias
        return logits if linear is None else logits + linear


class MetaMLP(nn.Module):
    """Task features → meta embedding: their embeddings and a constant, through an MLP."""

    def __init__(
        self,
        features: Sequence[FeatureSpec],
        dim: int,
        *,
        embedding_dim: int = 8,
        hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        self.dim = dim
        self.names = tuple(spec.name for spec in features)
        self.embed = nn.ModuleList(FeatureEmbedding(spec, embedding_dim, scale=0.1) for spec in features)
        sizes = [1 + embedding_dim * len(features), *hidden, dim]
        layers: list[nn.Module] = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, features: Features) -> Tensor:
        constant = features[CONSTANT]
        x = [constant, *(embed(features[name]) for name, embed in zip(self.names, self.embed, strict=True))]
        z: Tensor = self.mlp(torch.cat(x, -1))
        return z
