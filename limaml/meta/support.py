"""What adaptation minimises: the loss of a batch's support rows, as a function of the meta embeddings alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from limaml.errors import ModelError
from limaml.meta.age import HalfLife, ages
from limaml.meta.closed import ClosedForm
from limaml.meta.losses import Losses
from limaml.meta.recompute import recomputed
from limaml.meta.scorer import Held, Piece, RowScorer
from limaml.types import Interactions, Parts, Rows, embedding_name

__all__ = ["PieceSums", "Support"]

PieceSums = Callable[[Piece, Parts, Sequence[Parts], Tensor, bool], Sequence[Tensor]]
"""(piece, inputs of its tasks, parts of the sides' entries, weights of its rows, create_graph) → sums over its rows, for
each of its tasks."""


class Support:
    """The support loss of a batch of tasks, `[tasks]`, as a function of their meta embeddings `[tasks, dim]`."""

    def __init__(
        self,
        block: nn.Module,
        losses: Losses,
        data: Interactions,
        task: str,
        tasks: Tensor,
        rows: Rows,
        held: Held | None = None,
        *,
        half_life: HalfLife | None = None,
        hoist: bool = True,
        rows_per_piece: int | None = None,
    ) -> None:
        self._rebuild = (block, losses, data, task, tasks, rows, held or {}, half_life)
        self.losses = losses
        self.scorer = RowScorer(block, data, task, tasks, rows, held or {}, hoist=hoist, rows_per_piece=rows_per_piece)
        device = self.scorer.device
        self.labels, self.weights = data.labels[rows.rows].to(device), data.weights[rows.rows].to(device)
        if half_life is not None:
            self.weights = self.weights * half_life(ages(data, task, rows, len(tasks)))
        self.offset = None if data.offset is None else data.offset[rows.rows, None].to(device)
        self.segments = self.scorer.segments
        known = self.labels.isfinite().any(1)
        self.weight = self.segments.sum(self.weights * known)  # (tasks,): total weight of each support

    def __len__(self) -> int:
        return self.labels.shape[0]

    def shifted(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """Logits as the sampled rows have them: with the log-odds correction, where there is one."""
        return logits if self.offset is None else logits + self.offset[rows].to(logits.dtype)

    def loss(self, z: Tensor) -> Tensor:
        """Sum of the weighted losses of each task's support, `[tasks]`; 0 for a task without rows."""
        twice = torch.is_grad_enabled()  # somebody may differentiate the slopes again
        logits = self.shifted(self.scorer.logits(z)) if twice else self.logits(z)
        return self.segments.sum(self.losses.loss(logits, self.labels, self.weights))

    def logits(self, z: Tensor) -> Tensor:
        """Logits `[n, heads]` of all rows for meta embeddings `z` `[tasks, dim]`, as the losses see them; differentiable
        once."""
        scorer, parts = self.scorer, self.scorer.condition(z)
        one, graph = len(scorer.pieces) == 1, torch.is_grad_enabled()
        closed = self._closed(parts) if graph or not one else None  # for few rows it takes longer to make than it saves
        if closed is not None:
            return self.shifted(closed.logits(parts))
        if one or not graph:
            return self.shifted(scorer.logits(z))

        def logits(piece: Piece, own: Parts, sides: Sequence[Parts], weights: Tensor, graph: bool) -> Sequence[Tensor]:
            return [scorer.score(scorer.rows(own, piece, sides), piece)]

        return self.shifted(torch.cat([found[0] for _, found in self._each_piece(logits, parts, True)]))

    def _closed(self, parts: Parts) -> ClosedForm | None:
        """The closed form of the scorer, if it has one for meta embeddings that fill these slots."""
        closed = self._closed_form
        return closed if closed is not None and parts[closed.slot] is not None else None

    @cached_property
    def _closed_form(self) -> ClosedForm | None:
        return ClosedForm.of(self.scorer)

    @cached_property
    def targets(self) -> tuple[Tensor, Tensor]:
        """What each row's logits are compared with, and how much each label weighs, `[n, heads]`."""
        return self.losses.targets(self.labels, self.weights, self.scorer.dtype or self.weights.dtype)

    def row_losses(self, logits: Tensor, piece: Piece, weights: Tensor) -> Tensor:
        """Weighted losses of a piece's rows, `[n]`."""
        return self.losses.loss(self.shifted(logits, piece.rows), self.labels[piece.rows], weights)

    def slope(self, z: Tensor, *, create_graph: bool = False) -> Tensor:
        """Derivative of each task's `loss` by its meta embedding, `[tasks, dim]`; with `create_graph` it can be
        differentiated once more."""
        with torch.enable_grad():
            z = z if create_graph and z.requires_grad else z.detach().requires_grad_()
            parts = self.scorer.condition(z)
            read = [i for i, part in enumerate(parts) if part is not None and part.requires_grad]

            def slopes(
                piece: Piece, own: Parts, sides: Sequence[Parts], weights: Tensor, graph: bool
            ) -> Sequence[Tensor]:
                rows = self.scorer.rows(own, piece, sides)
                if not graph:
                    rows = tuple(None if part is None else part.detach() for part in rows)
                wanted = [cast(Tensor, rows[i]).requires_grad_() for i in read]
                logits = self.scorer.score(rows, piece)
                shifted = self.shifted(logits, piece.rows)
                outer = self.losses.slope(
                    shifted, *self.losses.targets(self.labels[piece.rows], weights, shifted.dtype)
                )
                found = torch.autograd.grad(
                    logits,
                    wanted,
                    outer if graph else outer.detach(),
                    create_graph=graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
                return [piece.segments.sum(slope) for slope in found]

            closed = self._closed(parts)
            if closed is not None and (closed.twice or not create_graph):
                sums = closed.slopes(parts, read, self.losses, *self.targets, self.offset, create_graph=create_graph)
            else:
                sums = self.over_pieces(slopes, parts, create_graph)
            return torch.autograd.grad([cast(Tensor, parts[i]) for i in read], z, sums, create_graph=create_graph)[0]

    def slope_and_curvature(self, logits: Tensor, piece: Piece, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the losses of a piece's rows, by each logit, `[n, heads]`."""
        return self.losses.slope_and_curvature(self.shifted(logits, piece.rows), self.labels[piece.rows], weights)

    def over_pieces(self, compute: PieceSums, inputs: Parts, create_graph: bool) -> list[Tensor]:
        """The sums over all rows of each task, `[tasks, …]`, of what `compute` finds for one piece after the other.

        `inputs` are `[tasks, …]`, and `compute` is given those of the piece's tasks. Nothing is kept of a piece where no
        graph is asked for; where there are several and a graph is asked for, the backward pass computes each again.
        """
        totals: list[Tensor] = []
        for piece, found in self._each_piece(compute, inputs, create_graph):
            if len(self.scorer.pieces) == 1:
                return list(found)
            if not totals:
                totals = [sums.new_zeros(self.scorer.tasks, *sums.shape[1:]) for sums in found]
            for total, sums in zip(totals, found, strict=True):
                total[piece.tasks] += sums
        return totals

    def _each_piece(
        self, compute: PieceSums, inputs: Parts, create_graph: bool
    ) -> Iterator[tuple[Piece, Sequence[Tensor]]]:
        scorer = self.scorer
        if len(scorer.pieces) == 1:
            yield scorer.pieces[0], compute(scorer.pieces[0], inputs, scorer.sides, self.weights, create_graph)
            return
        parameters = [p for p in (*scorer.block.parameters(), *self.losses.parameters()) if p.requires_grad]
        for piece in scorer.pieces:

            def one(given: Sequence[Tensor | None], graph: bool, piece: Piece = piece) -> Sequence[Tensor]:
                own, weights = given[: len(inputs)], cast(Tensor, given[len(inputs)])
                rest = iter(given[len(inputs) + 1 :])
                sides = [tuple(next(rest) for _ in parts) for parts in scorer.sides]
                with torch.enable_grad():
                    return compute(piece, tuple(own), sides, weights, graph)

            own = [None if part is None else part[piece.tasks] for part in inputs]
            given = [*own, self.weights[piece.rows], *(part for parts in scorer.sides for part in parts)]
            yield piece, recomputed(one, given, parameters) if create_graph else one(given, False)

    def refuse_unread(self, z: Tensor, task: str) -> None:
        """Raise `ModelError` unless the logits depend on the meta embeddings `z` of `task` (here `[tasks, dim]`)."""
        block, losses, data, name, tasks, rows, held, _ = self._rebuild
        few = Rows(rows.rows[:64], rows.owner[:64])
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
        ):  # masks are drawn: a resumed run must not draw more
            leaf = z.detach().requires_grad_()
            logits = Support(block, losses, data, name, tasks, few, held).scorer.logits(leaf)
            read = logits.requires_grad and torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None
        if not read:
            raise ModelError(
                f"The global block {type(self.scorer.block).__name__} does not use features['{embedding_name(task)}'], so "
                f"nothing would be personalised for '{task}'. Let its forward read that feature."
            )

    def of(self, task: int) -> Support:
        """The support of one task of the batch, scored the plain way, with nothing hoisted: for the `loop` engine."""
        block, losses, data, name, tasks, rows, held, half_life = self._rebuild
        mine = rows.rows[rows.owner == task]
        one = Rows(mine, torch.zeros_like(mine))
        return Support(block, losses, data, name, tasks[task : task + 1], one, held, half_life=half_life, hoist=False)
