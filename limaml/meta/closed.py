"""Losses' slopes by the meta embeddings without autograd: for global blocks that say which of their `score` is a stack of
layers (`LayeredBlock`).

The rows of a piece are gathered and added in one pass, go through the layers and back by hand (`chain`), and are summed
up for each task, all within the cache. Where slopes are differentiated once more, the rows are gathered again (and, where memory is scarce,
multiplied again: else the layers' outputs are kept), and the derivative of a derivative is one tangent forward and two slopes back (`README.md` derives it).
What the block's other slots add to the logits (`rest`) is left to autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limaml.meta.budget import piece_rows
from limaml.meta.chain import Chain, chain_of
from limaml.meta.losses import Losses
from limaml.meta.scorer import Piece, RowScorer
from limaml.meta.spread import Spread, summed
from limaml.types import LayeredBlock, Parts

__all__ = ["ClosedForm"]


def _defines(block: object, method: str) -> type | None:
    return next((kind for kind in type(block).__mro__ if method in vars(kind)), None)


class ClosedForm:
    """A scorer's rows, passed through by hand. `of` gives None where the block, or the way it is called, does not allow it.

    Parts `own` are what `RowScorer.condition` gave for all tasks; the slot that the layers read must be among them.
    """

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
        self.scorer, self.block, self.slot, self.chain = scorer, block, slot, chain
        self._bias = bias
        self.pieces = scorer.cut_into(piece_rows(chain.linears, scorer.owner.device))
        self._read = [i for i, parts in enumerate(scorer.sides) if parts[slot] is not None]
        mixed = [i for i in self._read if not scorer.in_order[i]]
        places, offset = [], 0
        for i in mixed:
            places.append(scorer.places[i] + offset)
            offset += len(cast(Tensor, scorer.sides[i][slot]))
        index = torch.stack([*places, scorer.owner + offset], 1)
        longest = max(piece.rows.stop - piece.rows.start for piece in self.pieces)
        self._mixed, self._index, self._each = mixed, index.flatten(), index.shape[1]
        self._begin = torch.arange(0, longest * self._each, self._each, device=index.device)
        self._gathered: dict[int, Tensor | None] = {}

    @property
    def twice(self) -> bool:
        """Whether `differentiable_slopes` can be used."""
        return self.chain.twice

    def _biased(self, own: Parts) -> Tensor:
        """What the layers read of each task, with the bias: it is added here, not to each row."""
        part = cast(Tensor, own[self.slot])
        return part if self._bias is None else part + self._bias

    def _inputs(self) -> list[Tensor]:
        """What the layers read of the sides' entries, then the layers' parameters."""
        return [*(cast(Tensor, self.scorer.sides[i][self.slot]) for i in self._read), *self.chain.parameters]

    def hidden(self, own: Tensor, sides: Sequence[Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """What the layers read of the rows of each piece, `[n, width]`, in memory of its own."""
        of_side = dict(zip(self._read, sides, strict=True))
        table = torch.cat([*(of_side[i] for i in self._mixed), own]) if self._mixed else own
        for piece in self.pieces:
            rows = piece.rows
            index = self._index[rows.start * self._each : rows.stop * self._each]
            found = summed(table, index, self._begin[: rows.stop - rows.start])
            for i in self._read:
                if self.scorer.in_order[i]:
                    found += of_side[i][rows]
            yield piece, found

    def scattered(self, piece: Piece, slope: Tensor, own: Tensor, sides: Sequence[Tensor | None]) -> None:
        """Add the slopes `[n, width]` by what `hidden` gave for a piece to those by what it was made of."""
        own[piece.tasks] += piece.segments.sum(slope)
        for i, side in zip(self._read, sides, strict=True):
            if side is None:
                continue
            if self.scorer.in_order[i]:
                side[piece.rows] += slope
            else:
                side.index_add_(0, self.scorer.places[i][piece.rows], slope)

    def _beside(self, own: Parts) -> Parts:
        """The rows' parts in the slots that the layers do not read, `[n, …]`."""
        scorer, rows = self.scorer, []
        for i, part in enumerate(own):
            row = None if part is None or i == self.slot else scorer.segments.rows(part)
            fixed = None if i == self.slot else self._fixed(i)
            rows.append(fixed if row is None else row if fixed is None else row + fixed)
        return tuple(rows)

    def _fixed(self, slot: int) -> Tensor | None:
        """What all sides put into a slot of the rows; the same for all steps."""
        if slot not in self._gathered:
            scorer, total = self.scorer, None
            for parts, place in zip(scorer.sides, scorer.places, strict=True):
                part = parts[slot]
                if part is not None:
                    more = Spread(place[:, None], len(part)).rows(part)
                    total = more if total is None else total + more
            self._gathered[slot] = total
        return self._gathered[slot]

    def logits(self, own: Parts) -> Tensor:
        """Logits `[n, heads]` of all rows; differentiable once."""
        logits: Tensor = _Logits.apply(self, self._biased(own), *self._inputs())  # type: ignore[no-untyped-call]
        rest = self.block.rest(self._beside(own))
        return logits if rest is None else logits + rest

    def slopes(
        self,
        own: Parts,
        read: Sequence[int],
        losses: Losses,
        y: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        *,
        create_graph: bool,
    ) -> list[Tensor]:
        """Derivatives of each task's loss by `own` in the slots `read`, `[tasks, …]`; differentiable with `create_graph`.

        `y` and `weight` `[n, heads]` are what `Losses.targets` gave for all rows; `offset` `[n, 1]` is added to the logits.
        """
        beside = self._beside(own)
        others = [i for i in read if i != self.slot]
        if not create_graph:
            beside = tuple(None if part is None else part.detach() for part in beside)
        leaves = [cast(Tensor, beside[i]).requires_grad_() for i in others]
        rest = self.block.rest(beside)
        extra = rest if offset is None else offset if rest is None else rest + offset.to(rest.dtype)
        extra = y.new_zeros(()) if extra is None else extra.to(y.dtype)
        with torch.set_grad_enabled(create_graph):
            sums, outer = _Slopes.apply(  # type: ignore[no-untyped-call]
                self, losses, extra, y, weight, losses.log_variance, self._biased(own), *self._inputs()
            )
        found = {self.slot: sums}
        if leaves and rest is not None and rest.requires_grad:
            outer = outer if rest.shape == outer.shape else outer.sum(1, keepdim=True)
            slopes = torch.autograd.grad(
                rest, leaves, outer, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
            found |= {i: self.scorer.segments.sum(slope) for i, slope in zip(others, slopes, strict=True)}
        return [found[i] if i in found else torch.zeros_like(cast(Tensor, own[i])) for i in read]


def _room(closed: ClosedForm, like: Tensor, wanted: bool) -> list[Tensor]:
    """Where the layers' outputs of all rows are kept for the backward pass; none where memory is scarce."""
    scarce = len(closed.scorer.pieces) > 1
    return [] if scarce or not wanted else closed.chain.room(len(closed.scorer.owner), like)


def _zeros(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [torch.zeros_like(t) if want else None for t, want in zip(tensors, wanted, strict=True)]


class _Logits(torch.autograd.Function):
    """(…, what rows are made of, parameters) → the layers' outputs for all rows."""

    @staticmethod
    def forward(ctx: Any, closed: ClosedForm, own: Tensor, *given: Tensor) -> Tensor:
        sides, chain = given[: len(closed._read)], closed.chain
        kept = _room(closed, own, any(ctx.needs_input_grad))
        ctx.closed, ctx.kept = closed, kept
        ctx.save_for_backward(own, *given)
        logits = own.new_empty(len(closed.scorer.owner), chain.heads)
        for piece, hidden in closed.hidden(own, sides):
            logits[piece.rows] = chain.forward(hidden, [out[piece.rows] for out in kept] or None)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor) -> tuple[Tensor | None, ...]:
        closed, (own, *given), chain = ctx.closed, ctx.saved_tensors, ctx.closed.chain
        of_own, found, count = torch.zeros_like(own), _zeros(given, ctx.needs_input_grad[2:]), len(closed._read)
        for piece, hidden in closed.hidden(own, given[:count]):
            chain.again(hidden, [out[piece.rows] for out in ctx.kept]) if ctx.kept else chain.forward(hidden)
            slope = chain.reverse(q[piece.rows], None, found[count:])
            closed.scattered(piece, slope, of_own, found[:count])
        return None, of_own, *found


class _Slopes(torch.autograd.Function):
    """(…, what rows are made of, parameters) → sums of the slopes by `own`, and slopes by the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        closed: ClosedForm,
        losses: Losses,
        extra: Tensor,
        y: Tensor,
        weight: Tensor,
        log_variance: Tensor,
        own: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.closed, ctx.losses = closed, losses
        ctx.save_for_backward(extra, y, weight, own, *given)
        ctx.kept = kept = _room(closed, own, any(ctx.needs_input_grad))
        ctx.steepest = steepest = own.new_empty(len(y), own.shape[1]) if kept and closed.chain.short else None
        sums, slopes = torch.zeros_like(own), torch.empty_like(y)
        for piece, hidden in closed.hidden(own, given[: len(closed._read)]):
            rows = piece.rows
            logits = closed.chain.forward(hidden, [out[rows] for out in kept] or None)
            logits += extra[rows] if extra.dim() else extra
            slopes[rows] = slope = losses.slope(logits, y[rows], weight[rows])
            if steepest is None:
                sums[piece.tasks] += piece.segments.sum(closed.chain.backward(slope))
            else:
                sums[piece.tasks] += piece.segments.weighted(closed.chain.steepest(steepest[rows]), slope)
        return sums, slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
        closed, losses, (extra, y, weight, own, *given) = ctx.closed, ctx.losses, ctx.saved_tensors
        wants, count, chain = ctx.needs_input_grad, len(closed._read), closed.chain
        found, of_own = _zeros(given, wants[7:]), torch.zeros_like(own)
        of_extra, of_weight = torch.empty_like(e), torch.empty_like(e) if wants[4] else None
        of_variance = torch.zeros_like(losses.log_variance) if wants[5] else None
        for piece, hidden in closed.hidden(own, given[:count]):
            rows = piece.rows
            if ctx.kept:  # with what was added to the logits
                logits = chain.again(hidden, [out[rows] for out in ctx.kept])
            else:
                logits = chain.forward(hidden).add_(extra[rows] if extra.dim() else extra)
            moves, steepest = piece.segments.rows(v[piece.tasks]), None
            if chain.straight:
                steepest = chain.steepest() if ctx.steepest is None else ctx.steepest[rows]
                along = chain.along(steepest, moves)
            else:
                along = chain.tangent(moves)
            along = along + e[rows]
            slope, curvature = losses.slope_and_curvature_of(logits, y[rows], weight[rows])
            q = of_extra[rows] = curvature * along
            if of_weight is not None:
                of_weight[rows] = losses.slope(logits, y[rows], torch.ones_like(along)) * along
            if of_variance is not None:
                of_variance -= torch.where(losses.squared, (slope * along).sum(0), 0.0)
            if steepest is None:
                back = chain.reverse(q, slope, found[count:])
            else:
                chain.turn(q, slope, moves, found[count:])
                back = chain.scaled(steepest, q)
            closed.scattered(piece, back, of_own, found[:count])
        return (
            None,
            None,
            of_extra.sum_to_size(extra.shape) if wants[2] else None,
            None,
            of_weight,
            of_variance,
            of_own,
            *found,
        )
