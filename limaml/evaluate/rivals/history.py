"""Global blocks that read a row's history: a mean over it, or DIN's attention over it.

`HistoryBlock` gives any cut block one more input, the history vector of the row. It is a feature of the row, not of the
task, and what it is made of is found by the row's number, the one feature of the side `HISTORY` (`with_history`).
So it is computed once per row, whoever trains the block, and a meta block can stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from limaml.evaluate.rivals.encoding import RowEncoder, outcomes
from limaml.evaluate.rivals.lookback import Lookback
from limaml.meta.blocks import add_parts
from limaml.meta.losses import Losses
from limaml.types import CutBlock, Features, Interactions, LayeredBlock, Parts

__all__ = ["HISTORY", "Attention", "HistoryBlock", "Mean", "history_block", "with_history"]

HISTORY = "the rows before"
"""Name of the side, and of its feature, that say which row a row is."""


ROWS_AT_ONCE = 2048
"""Rows whose histories are laid out at the same time where no gradients are asked for."""


def with_history(data: Interactions) -> Interactions:
    """`data` whose rows know which they are."""
    rows = torch.arange(len(data))
    return replace(data, sides={**data.sides, HISTORY: {HISTORY: rows}}, index={**data.index, HISTORY: rows})


class Mean(nn.Module):
    """Rows `[n]` → `[n, dim]`: the mean of what they look back on, and the mean of that times how it went.

    Covington, Adams and Sargin, "Deep Neural Networks for YouTube Recommendations", RecSys 2016, where the
    history is of watches; here it is of labelled rows, so that each label weighs the embeddings once more. Means are of
    `n + c` rows with a learned c, so that one row says less than fifty.
    """

    def __init__(self, rows: RowEncoder, losses: Losses, past: Lookback, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows, self.past = rows, past
        self.losses_of = (losses,)  # the model's: not a module of this one, too
        self.log_count = nn.Parameter(torch.zeros(1))
        width = (1 + losses.heads) * rows.width + losses.heads + 1
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, dim))

    def outcomes(self, rows: Tensor) -> Tensor:
        """How the rows `[…]` went, `[…, heads]`."""
        data, flat = self.past.data, rows.flatten()
        (losses,) = self.losses_of
        labels, weights = data.labels[flat].to(losses.squared.device), data.weights[flat].to(losses.squared.device)
        return outcomes(losses, labels, weights).view(*rows.shape, losses.heads)

    def pooled(self, rows: Tensor) -> Tensor:
        """The means that `out` reads, `[n, (1 + heads) · width + heads + 1]`."""
        past, encoder = self.past, self.rows
        before, owner = past.flat(rows)
        y = self.outcomes(before)
        length = past.length[rows]
        start = (torch.cumsum(length, 0) - length).to(y.device)
        count = length.to(y.dtype).to(y.device)[:, None]
        weights = [torch.ones_like(y[:, 0]), *y.unbind(1)]
        sums = [torch.zeros(len(rows), encoder.width, device=y.device) for _ in weights]
        for vectors, place in encoder.distinct(past.data, before):
            if len(vectors):
                for i, weight in enumerate(weights):
                    sums[i] = sums[i] + nn.functional.embedding_bag(
                        place, vectors, start, mode="sum", per_sample_weights=weight.to(vectors.dtype)
                    )
        went = torch.zeros(len(rows), y.shape[1], device=y.device).index_add(0, owner.to(y.device), y)
        share = 1 / (count + torch.exp(self.log_count))
        return torch.cat([*(total * share for total in sums), went * share, torch.log1p(count) / 4], 1)

    def forward(self, rows: Tensor) -> Tensor:
        vectors: Tensor = self.out(self.pooled(rows))
        return vectors


class Attention(Mean):
    """The same, and a sum over the history weighted by how much each row of it matters to the row that is scored.

    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018 (arXiv 1706.06978): the weights are
    an MLP's on the target, the row looked back on, their product, its label and its age in rows; they are not
    normalised to 1. What is summed is the row's embedding and its embedding times its label, and the label alone.
    """

    def __init__(
        self, rows: RowEncoder, losses: Losses, past: Lookback, dim: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__(rows, losses, past, dim, dropout)
        width, heads = rows.width, losses.heads
        self.of_target = nn.Linear(width, hidden)
        self.of_past = nn.Linear(width, hidden, bias=False)
        self.of_product = nn.Linear(width, hidden, bias=False)
        self.of_outcome = nn.Linear(heads, hidden, bias=False)
        self.of_age = nn.Embedding(past.most, hidden)
        nn.init.normal_(self.of_age.weight, std=0.01)
        self.weight = nn.Linear(hidden, 1)
        nn.init.constant_(self.weight.bias, 0.5)  # attention to all starts above nothing
        self.drop = nn.Dropout(dropout)
        self.attended = nn.Linear((1 + heads) * width + heads, dim, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        pooled: Tensor = super().forward(rows)
        before, there = self.past.padded(rows)
        y = self.outcomes(before)
        there = there.to(y.device)
        n, longest = there.shape
        target = sum(
            (v[place] for v, place in self.rows.distinct(self.past.data, rows)), y.new_zeros(n, self.rows.width)
        )
        looked = [
            nn.functional.embedding(place, v) for v, place in self.rows.distinct(self.past.data, before) if len(v)
        ]
        seen = sum(looked[1:], looked[0]) if looked else y.new_zeros(n, longest, self.rows.width)
        # (target ⊙ seen) W = seen (diag(target) W): one product per row of all that the hidden units read
        of_seen = target[:, :, None] * self.of_product.weight.t() + self.of_past.weight.t()
        of_outcome = self.of_outcome.weight.t().expand(n, -1, -1)
        read = torch.cat([seen, y, y.new_ones(n, longest, 1)], 2)
        hidden = torch.bmm(read, torch.cat([of_seen, of_outcome, self.of_target(target)[:, None]], 1))
        hidden = hidden + self.of_age.weight[:longest]
        weight = self.weight(nn.functional.silu(hidden)) * there[..., None]
        weights = torch.cat([weight, weight * y], 2)
        share = 1 / (there.sum(1, keepdim=True) + torch.exp(self.log_count))
        sums = torch.bmm(weights.transpose(1, 2), seen).flatten(1)
        summed = torch.cat([sums, weights[..., 1:].sum(1)], 1) * share
        attended: Tensor = self.attended(self.drop(summed))
        return pooled + attended


class HistoryBlock(nn.Module):
    """A cut block, and in its input `name` the history vectors that `reads` makes of the rows' numbers."""

    def __init__(self, inner: nn.Module, reads: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.inner = inner
        self.names = tuple(name for name, _ in reads)
        self.reads = nn.ModuleList(module for _, module in reads)

    @property
    def _cut(self) -> CutBlock:
        return cast(CutBlock, self.inner)

    def encode(self, features: Features) -> Parts:
        """Of the side `HISTORY` the history vectors' share; of any other what the inner block makes of it."""
        rest = {name: values for name, values in features.items() if name != HISTORY}
        if HISTORY not in features:
            return self._cut.encode(rest)
        rows = features[HISTORY].cpu()
        vectors = {name: _read(read, rows) for name, read in zip(self.names, self.reads, strict=True)}
        own = self._cut.condition(vectors)
        return add_parts(own, self._cut.encode(rest)) if rest else own

    def condition(self, embeddings: Features) -> Parts:
        return self._cut.condition(embeddings)

    def score(self, parts: Parts) -> Tensor:
        return self._cut.score(parts)

    def forward(self, features: Features) -> Tensor:
        given = {name: values for name, values in features.items() if name in getattr(self.inner, "embeddings", ())}
        own = {
            name: values for name, values in features.items() if name in (HISTORY, *getattr(self.inner, "names", ()))
        }
        parts = self.encode(own)
        return self.score(add_parts(parts, self.condition(given)) if given else parts)


def _read(module: nn.Module, rows: Tensor) -> Tensor:
    """History vectors of the rows `[n]`, of a few at once where nothing is kept of them."""
    parts = (rows,) if torch.is_grad_enabled() else torch.split(rows, ROWS_AT_ONCE)
    return torch.cat([module(part) for part in parts])


class _LayeredHistoryBlock(HistoryBlock):
    """The same around a block whose layers the engine can pass by hand."""

    def stack(self) -> tuple[int, Tensor | None, Sequence[nn.Module]]:
        return cast(LayeredBlock, self.inner).stack()

    def rest(self, parts: Parts) -> Tensor | None:
        return cast(LayeredBlock, self.inner).rest(parts)


def history_block(inner: nn.Module, reads: Sequence[tuple[str, nn.Module]]) -> HistoryBlock:
    """A `HistoryBlock`, layered if `inner` is."""
    kind = _LayeredHistoryBlock if isinstance(inner, LayeredBlock) else HistoryBlock
    return kind(inner, reads)
