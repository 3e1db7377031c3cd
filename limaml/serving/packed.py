"""The shipped interaction block as serving runs it: one slot in place of four, and a third of torch's small operations.

    ids of a row ──encode───► [n, width] ─┐
    its numbers  ──encode───► [n, width] ─┼─ sum ─► first layer │ factors v │ linear − ½ Σ|vᵢ|²
    a task       ──condition► [k, width] ─┘            MLP(first) + linear + ½|v|²  = logits

At 100 rows torch's calls cost as much as their arithmetic, and numpy's less: torch is left what it computes faster, SiLU and products with a
layer. The slots of a row lie side by side, so that a kept row is gathered, and a task's share added, in one call each. The block's biases are in the task's share. A number `x` has the factors `x·m`,
so the share of all numbers of a row is one product of `[x, x²]` with a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from limaml.meta.blocks import FeatureEmbedding, InteractionMLP
from limaml.types import Features, Parts

__all__ = ["PackedInteraction"]

Array = NDArray[Any]


class PackedInteraction:
    """A `CutBlock` that equals an `InteractionMLP` in evaluation mode, without gradients.

    Its weights are copies: a block that is trained on must be packed anew.
    """

    @classmethod
    def of(cls, block: nn.Module) -> PackedInteraction | None:
        """The packed block; None for a block that is not exactly what ships, or is not on the CPU."""
        if type(block) is not InteractionMLP or block.bias.device.type != "cpu" or not block.embeddings:
            return None
        layers = [type(layer) for layer in block.mlp]
        return cls(block) if layers == [nn.SiLU, nn.Dropout, nn.Linear] * (len(layers) // 3) else None

    @torch.no_grad()
    def __init__(self, block: InteractionMLP) -> None:
        self._block, self._heads = block, block.heads
        self._first, self._tail = len(block.first_bias), len(block.first_bias) + block.heads * block.factors
        linears = [layer for layer in block.mlp if isinstance(layer, nn.Linear)]
        self._layers = [(layer.weight.T.contiguous(), layer.bias.clone()) for layer in linears]
        self.dtype = block.bias.numpy().dtype
        self.width = self._tail + block.heads
        self._numbers = self._numbers_of(block)
        self._products: dict[tuple[str, ...], Array] = {}
        sides = zip(block.embeddings, block.deep_of, block.factor_of, block.wide_of, strict=True)
        self._of = {name: _side_by_side(*modules) for name, *modules in sides}
        biases = torch.cat([block.first_bias, block.bias.new_zeros(self._tail - self._first), block.bias]).numpy()
        self._biases = {name: biases if place == 0 else np.zeros_like(biases) for place, name in enumerate(self._of)}

    def _numbers_of(self, block: InteractionMLP) -> Mapping[str, tuple[Array, Array]]:
        """Of features `[n, 1]`: what `x` and what `x²` is multiplied by, `[width]` each."""
        found = {}
        for name, embed, wide, deep, factor in zip(
            block.names, block.embed, block.wide, block.deep, block.factor, strict=True
        ):
            assert isinstance(embed, FeatureEmbedding) and isinstance(wide, FeatureEmbedding)
            if embed.linear is not None and wide.linear is not None and embed.spec.size == 1:
                x = embed.linear.weight.T  # [1, embedding_dim], of the number 1
                once = torch.cat([deep(x), factor(x), wide.linear.weight.T], 1)
                squared = torch.zeros_like(once)
                squared[:, self._tail :] = -self._by_head(factor(x).square()) / 2
                found[name] = once[0].numpy(), squared[0].numpy()
        return found

    def encode(self, features: Features) -> Parts:
        """The share of these features, `[n, width]`."""
        numbers = tuple(name for name in self._numbers if name in features)
        packed = self._share_of_numbers(numbers, features) if numbers else None
        if len(numbers) < len(features):
            rest = {name: values for name, values in features.items() if name not in self._numbers}
            linear, first, factors, squares = self._block.encode(rest)
            if linear is not None and first is not None and factors is not None and squares is not None:
                more = torch.cat([first, factors, linear - self._by_head(squares) / 2], 1)
                packed = more if packed is None else packed + more
        return (packed,)

    def _share_of_numbers(self, names: tuple[str, ...], features: Features) -> Tensor:
        s = len(names)
        x = np.empty((len(features[names[0]]), 2 * s), self.dtype)
        for place, name in enumerate(names):
            x[:, place] = features[name].numpy()[:, 0]
        np.square(x[:, :s], out=x[:, s:])
        return torch.from_numpy(x @ self.product(names))

    def takes(self, names: Sequence[str]) -> bool:
        """Whether these features are single numbers, as `product` needs them."""
        return all(name in self._numbers for name in names)

    def product(self, names: tuple[str, ...]) -> Array:
        """What numbers, side by side with their squares, are multiplied by to give their share: `[2 · names, width]`."""
        product = self._products.get(names)
        if product is None:
            rows = [self._numbers[name] for name in names]
            product = self._products[names] = np.stack([row[power] for power in (0, 1) for row in rows])
        return product

    def condition(self, embeddings: Features) -> Parts:
        """The share of these meta embeddings, `[k, width]`: the first task type's has the biases."""
        packed: Tensor | None = None
        for name in self._of:
            if name in embeddings:
                own = torch.from_numpy(self.share(name, embeddings[name].numpy()))
                packed = own if packed is None else packed + own
        return (packed,)

    def share(self, name: str, z: Array) -> Array:
        """The share `[k, width]` of one task type's meta embeddings `z` `[k, dim]`."""
        own: Array = z @ self._of[name]
        own[:, self._tail :] -= self._pairs(own)
        own += self._biases[name]
        return own

    def score(self, parts: Parts) -> Tensor:
        """Logits `[n, heads]`."""
        (packed,) = parts
        assert packed is not None
        return torch.from_numpy(self.logits(packed.numpy()))

    def logits(self, packed: Array) -> Array:
        """Logits `[n, heads]` of the whole sums `[n, width]`."""
        x = torch.from_numpy(packed[:, : self._first])
        for place, (weight, bias) in enumerate(self._layers):
            x = torch.addmm(bias, functional.silu(x, inplace=place > 0), weight)
        found: Array = x.numpy()
        found += self._pairs(packed)
        found += packed[:, self._tail :]
        return found

    def _pairs(self, packed: Array) -> Array:
        """½|v|² `[n, heads]` of the factors in a share."""
        factors = packed[:, self._first : self._tail]
        if self._heads == 1:
            found: Array = np.einsum("nf,nf->n", factors, factors)[:, None]
        else:
            factors = factors.reshape(len(packed), self._heads, -1)
            found = np.einsum("nhf,nhf->nh", factors, factors)
        found *= 0.5
        return found

    def _by_head(self, squares: Tensor) -> Tensor:
        """Sums `[n, heads]` over each head's factors."""
        if self._heads == 1:
            return squares.sum(1, keepdim=True)
        return squares.view(len(squares), self._heads, -1).sum(2)


def _side_by_side(deep: nn.Module, factor: nn.Module, wide: nn.Module) -> Array:
    """The weights of three maps of the same input, `[inputs, width]`."""
    assert isinstance(deep, nn.Linear) and isinstance(factor, nn.Linear) and isinstance(wide, nn.Linear)
    return torch.cat([deep.weight, factor.weight, wide.weight]).T.contiguous().numpy()
