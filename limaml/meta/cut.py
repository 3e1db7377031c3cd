"""Makes the usual "look up, concatenate, MLP" block a cut block, out of the modules it is made of.

    block = ConcatMLP({"item_id": mine.item, "price": 1, "user_id_embedding": 16}, mine.mlp)

computes `mine.mlp(cat([mine.item(features["item_id"]), features["price"], features["user_id_embedding"]], 1))` with the
very same parameters, but the first Linear of the MLP is taken apart by its input columns: each input's share of it is
computed once per distinct row, per task, or per inner step, as what it depends on allows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limaml.errors import ModelError
from limaml.meta.blocks import add_parts
from limaml.types import Features, Parts

__all__ = ["ConcatMLP"]


def _width(name: str, module: nn.Module) -> int:
    for attribute in ("embedding_dim", "out_features", "width", "dim"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    raise ModelError(
        f"The width of what input '{name}' ({type(module).__name__}) gives is not known: set an attribute 'dim' on it."
    )


class ConcatMLP(nn.Module):
    """`mlp(cat(inputs))`, cut behind the first Linear.

    `inputs`, in the order of concatenation, maps a feature's name to the module that makes `[n, width]` of it, or to its
    width if it is concatenated as it is (a dense feature, a meta embedding). `mlp` starts with a Linear.
    """

    def __init__(self, inputs: Mapping[str, nn.Module | int], mlp: nn.Sequential) -> None:
        super().__init__()
        first = mlp[0] if len(mlp) else None
        if not isinstance(first, nn.Linear):
            raise ModelError(f"The MLP must start with a Linear to be cut behind it, but it starts with {first!r}.")
        self.inputs = nn.ModuleDict({name: m for name, m in inputs.items() if isinstance(m, nn.Module)})
        self.mlp = mlp
        self._columns: dict[str, slice] = {}
        start = 0
        for name, given in inputs.items():
            width = given if isinstance(given, int) else _width(name, given)
            self._columns[name] = slice(start, start + width)
            start += width
        if start != first.in_features:
            widths = ", ".join(f"{name} {c.stop - c.start}" for name, c in self._columns.items())
            raise ModelError(
                f"The inputs are {start} wide together ({widths}), but the first Linear takes {first.in_features}. List "
                "every input, in the order in which they are concatenated."
            )

    def forward(self, features: Features) -> Tensor:
        """Logits `[n, heads]`."""
        logits: Tensor = self.mlp(torch.cat([self._input(name, features) for name in self._columns], -1))
        return logits

    def _input(self, name: str, features: Features) -> Tensor:
        values = features[name]
        return self.inputs[name](values) if name in self.inputs else values

    def _part(self, features: Features) -> Parts:
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        part: Parts = (None,)
        for name, columns in self._columns.items():
            if name in features:
                part = add_parts(part, (self._input(name, features) @ first.weight[:, columns].T,))
        return part

    def encode(self, features: Features) -> Parts:
        return self._part(features)

    def condition(self, embeddings: Features) -> Parts:
        return self._part(embeddings)

    def score(self, parts: Parts) -> Tensor:
        (hidden,) = parts
        if hidden is None:
            raise ModelError("None of the block's inputs was given.")
        _, bias, layers = self.stack()
        logits: Tensor = layers(hidden if bias is None else hidden + bias)
        return logits

    def stack(self) -> tuple[int, Tensor | None, nn.Sequential]:
        first, layers = self.mlp[0], self.mlp[1:]
        assert isinstance(first, nn.Linear) and isinstance(layers, nn.Sequential)
        return 0, first.bias, layers

    def rest(self, parts: Parts) -> None:
        return None
