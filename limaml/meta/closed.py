"""Slopes of the support loss without autograd: for global blocks whose `score` is a stack of layers (`LayeredBlock`).

Used where nothing is differentiated twice, as in generating: the rows of a piece are gathered and added in one pass,
go through the layers and back by hand (`chain`), and are summed up for each task.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from limaml.meta.chain import Chain, chain_of
from limaml.meta.losses import Losses
from limaml.meta.scorer import Piece, RowScorer
from limaml.meta.spread import summed
from limaml.types import LayeredBlock, Parts

__all__ = ["ClosedForm"]


def _defines(block: object, method: str) -> type | None:
    return next((kind for kind in type(block).__mro__ if method in vars(kind)), None)


class ClosedForm:
    """The slopes of a scorer's rows. `of` gives None where its block or the way it is called does not allow it."""

    @staticmethod
    def of(scorer: RowScorer) -> ClosedForm | None:
        block = scorer.block
        if not scorer.cut or scorer.precision.dtype is not None or not isinstance(block, LayeredBlock):
            return None
        if _defines(block, "score") is not _defines(block, "stack"):  # a subclass scores in another way
            return None
        slot, bias, layers = block.stack()
        chain = chain_of(list(layers))
        return None if chain is None else ClosedForm(scorer, block, slot, bias, chain)

    def __init__(self, scorer: RowScorer, block: LayeredBlock, slot: int, bias: Tensor | None, chain: Chain) -> None:
        self.scorer, self.block, self.slot, self.bias, self.chain = scorer, block, slot, bias, chain
        self._gathers: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def _gather(self, slot: int, conditioned: bool) -> tuple[Tensor, Tensor]:
        """The entries of all rows in the table of a slot, row after row, and how many each has, times 0, 1, 2, …"""
        key, scorer = (slot, conditioned), self.scorer
        if key not in self._gathers:
            places, offset = [], 0
            for parts, place, in_order in zip(scorer.sides, scorer.places, scorer.in_order, strict=True):
                part = parts[slot]
                if part is not None and not in_order:
                    places.append(place + offset)
                    offset += len(part)
            if conditioned:
                places.append(scorer.owner + offset)
            longest = max(piece.rows.stop - piece.rows.start for piece in scorer.pieces)
            index = torch.stack(places, 1).flatten()
            self._gathers[key] = index, torch.arange(0, longest * len(places), len(places), device=index.device)
        return self._gathers[key]

    def _table(self, slot: int, own: Tensor | None) -> Tensor | None:
        """All entries that rows of this slot are gathered from, under each other."""
        scorer = self.scorer
        sides = [parts[slot] for parts, in_order in zip(scorer.sides, scorer.in_order, strict=True) if not in_order]
        tables = [part.detach() for part in (*sides, own) if part is not None]
        if not tables:
            return None
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def _rows(self, slot: int, table: Tensor | None, piece: Piece, conditioned: bool) -> Tensor | None:
        """The rows of a piece, `[n, …]`, in memory of their own; None where nothing fills the slot."""
        scorer, rows, found = self.scorer, piece.rows, None
        if table is not None:
            index, begin = self._gather(slot, conditioned)
            each, n = len(index) // len(scorer.owner), rows.stop - rows.start
            found = summed(table.flatten(1), index[rows.start * each : rows.stop * each], begin[:n])
            found = found.view(n, *table.shape[1:])
        for parts, in_order in zip(scorer.sides, scorer.in_order, strict=True):
            part = parts[slot]
            if part is not None and in_order:
                found = part.detach()[rows].clone() if found is None else found.add_(part.detach()[rows])
        return found

    @torch.no_grad()
    def slopes(
        self, own: Parts, losses: Losses, y: Tensor, weight: Tensor, offset: Tensor | None
    ) -> list[Tensor | None]:
        """Derivative of each task's loss by the parts `[tasks, …]` of its meta embedding.

        `y` and `weight` `[n, heads]` are what `Losses.targets` gave for all rows; `offset` `[n, 1]` is added to the logits.
        """
        scorer, slot = self.scorer, self.slot
        given = list(own)
        if self.bias is not None and given[slot] is not None:
            given[slot] = cast(Tensor, given[slot]) + self.bias
        tables = [self._table(i, part) for i, part in enumerate(given)]
        sums = [None if part is None else torch.zeros_like(part) for part in own]
        for piece in scorer.pieces:
            rows = [
                self._rows(i, table, piece, part is not None)
                for i, (table, part) in enumerate(zip(tables, given, strict=True))
            ]
            hidden = cast(Tensor, rows[slot])
            if self.bias is not None and given[slot] is None:
                hidden += self.bias
            logits = self.chain.forward(hidden)
            leaves = {
                i: cast(Tensor, rows[i]).requires_grad_()
                for i, part in enumerate(own)
                if part is not None and i != slot
            }
            with torch.enable_grad():
                rest = self.block.rest(tuple(rows))
            if rest is not None:
                logits = logits + rest.detach()
            if offset is not None:
                logits = logits + offset[piece.rows].to(logits.dtype)
            slope = losses.slope(logits, y[piece.rows], weight[piece.rows])
            found = {}
            if rest is not None and leaves and rest.requires_grad:
                outer = slope if rest.shape == slope.shape else slope.sum(1, keepdim=True)
                slopes = torch.autograd.grad(rest, list(leaves.values()), outer, materialize_grads=True)
                found = dict(zip(leaves, slopes, strict=True))
            if own[slot] is not None:
                found[slot] = self.chain.backward(slope)
            for i, one in found.items():
                cast(Tensor, sums[i])[piece.tasks] += piece.segments.sum(one)
        return sums
