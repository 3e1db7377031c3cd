"""Rows as vectors, for methods that read other rows of a task: what a row is about, and how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from limaml.meta.blocks import FeatureEmbedding
from limaml.meta.losses import Losses
from limaml.meta.scorer import take
from limaml.types import FeatureSpec, Interactions

__all__ = ["RowEncoder", "outcomes"]


def outcomes(losses: Losses, labels: Tensor, weights: Tensor) -> Tensor:
    """Labels `[n, heads]` as inputs: binary ones −1 or 1, others in standard units; times the row's weight, 0 where
    missing."""
    known = labels.isfinite()
    y, _ = losses.targets(labels, weights, torch.float32)
    y = torch.where(losses.squared, y, 2 * y - 1)
    return torch.where(known, y, 0.0) * weights[:, None].float().clamp(max=1.0)


class RowEncoder(nn.Module):
    """What a row of task type `task` is about → `[n, width]`: the sum of the embeddings of all its features.

    Features of the task itself are left out: they are the same in all its rows. Entries of other task types that have
    been trained on have an embedding of their own; the others share one of zeros.
    """

    def __init__(
        self, specs: Sequence[FeatureSpec], task: str, width: int, others: Mapping[str, Tensor], scale: float = 0.1
    ) -> None:
        super().__init__()
        self.task, self.width = task, width
        self.specs = [spec for spec in specs if spec.side != task]
        self.embed = nn.ModuleList(FeatureEmbedding(spec, width, scale) for spec in self.specs)
        self.ids = nn.ModuleDict({other: nn.Embedding(len(known) + 1, width) for other, known in others.items()})
        self.known = dict(others)
        for table in self.ids.values():
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=scale)
            nn.init.zeros_(table.weight[0])  # of entries nobody trained on: it says nothing, and is never moved

    @property
    def sides(self) -> list[str]:
        """The sides that say something of a row."""
        return list(dict.fromkeys([*(spec.side for spec in self.specs), *self.ids]))

    def entries(self, data: Interactions, side: str, entries: Tensor) -> Tensor:
        """What the entries `[n]` of `side` add, `[n, width]`."""
        vectors = torch.zeros(len(entries), self.width, device=self.device)
        for spec, embed in zip(self.specs, self.embed, strict=True):
            if spec.side == side:
                values = take({spec.name: data.sides[side][spec.name]}, entries, device=self.device)
                vectors = vectors + embed(values[spec.name])
        if side in self.ids:
            ids = torch.where(self.known[side][entries], entries + 1, 0)
            vectors = vectors + self.ids[side](ids.to(self.device))
        return vectors

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def distinct(self, data: Interactions, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each side: vectors of its distinct entries in the rows `[…]`, and which of them each row has, `[…]`."""
        found = []
        for side in self.sides:
            entry = data.index[side][rows]
            present = torch.zeros(data.count(side), dtype=torch.bool)
            present[entry] = True
            place = (torch.cumsum(present, 0) - 1)[entry]
            found.append((self.entries(data, side, present.nonzero().flatten()), place.to(self.device)))
        return found
