"""What adaptation minimises: the loss of a batch's support rows, as a function of the meta embeddings alone.

Everything that does not depend on the meta embeddings is computed when a `RowScorer` is made, and shared by all inner
steps (design facts 3 to 5): each side's distinct entries are encoded once and gathered to the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from limaml.meta.blocks import CONSTANT, add_parts
from limaml.meta.losses import Losses
from limaml.meta.segments import Segments
from limaml.types import CutBlock, Features, Interactions, Parts, Rows, embedding_name

__all__ = ["Held", "RowScorer", "Support", "side_features", "take"]

Held = Mapping[str, Callable[[Tensor], Tensor]]
"""Task type → embeddings `[n, dim]` of the given entries `[n]` of its table: what the *other* task types are held at."""


def take(features: Features, entries: Tensor) -> Features:
    """The features of the given entries of a side."""
    return {name: values[entries] for name, values in features.items()}


def side_features(data: Interactions, side: str, entries: Tensor, dtype: torch.dtype) -> Features:
    """The features of a task type's entries `[n]`, with the constant that every meta block is given."""
    features = take(data.sides.get(side, {}), entries)
    features[CONSTANT] = torch.ones(len(entries), 1, dtype=dtype, device=entries.device)
    return features


def _gather(parts: Parts, index: Tensor) -> Parts:
    return tuple(None if part is None else part.index_select(0, index) for part in parts)


class RowScorer:
    """Logits of flat rows, given the meta embeddings of the one task type that is being adapted.

    `tasks` `[tasks]` are positions in the table of task type `task`, `rows.owner` counts within them. Every *other* task
    type stays at its `held` embeddings.
    """

    def __init__(
        self,
        block: nn.Module,
        data: Interactions,
        task: str,
        tasks: Tensor,
        rows: Rows,
        held: Held,
        *,
        hoist: bool = True,
    ) -> None:
        self.block, self.name, self.owner = block, embedding_name(task), rows.owner
        self.cut = hoist and isinstance(block, CutBlock)
        self._fixed: Parts | None = None
        self._features: Features = {}
        for side, index in data.index.items():
            table = data.sides.get(side, {})
            entry = tasks[rows.owner] if side == task else index[rows.rows]
            if self.cut:
                distinct, place = (tasks, rows.owner) if side == task else torch.unique(entry, return_inverse=True)
                self._add(table, distinct, place, held.get(side) if side != task else None, side)
            else:
                self._features |= take(table, entry)
                if side != task and side in held:
                    self._features[embedding_name(side)] = held[side](entry)

    def _add(
        self, table: Features, distinct: Tensor, place: Tensor, held: Callable[[Tensor], Tensor] | None, side: str
    ) -> None:
        assert isinstance(self.block, CutBlock)
        parts = self.block.encode(take(table, distinct)) if table else None
        if held is not None:
            condition = self.block.condition({embedding_name(side): held(distinct)})
            parts = condition if parts is None else add_parts(parts, condition)
        if parts is not None:
            parts = _gather(parts, place)
            self._fixed = parts if self._fixed is None else add_parts(self._fixed, parts)

    def logits(self, z: Tensor) -> Tensor:
        """Logits `[n, heads]` for meta embeddings `z` `[tasks, dim]`."""
        if not self.cut:
            return self.per_row(z.index_select(0, self.owner))
        assert isinstance(self.block, CutBlock)
        return self._score(_gather(self.block.condition({self.name: z}), self.owner))

    def per_row(self, z: Tensor) -> Tensor:
        """Logits `[n, heads]` for one meta embedding per row, `z` `[n, dim]`."""
        if not self.cut:
            logits: Tensor = self.block({**self._features, self.name: z})
            return logits
        assert isinstance(self.block, CutBlock)
        return self._score(self.block.condition({self.name: z}))

    def _score(self, parts: Parts) -> Tensor:
        assert isinstance(self.block, CutBlock)
        return self.block.score(parts if self._fixed is None else add_parts(self._fixed, parts))


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
        hoist: bool = True,
    ) -> None:
        self._rebuild = (block, losses, data, task, tasks, rows, held or {})
        self.losses = losses
        self.scorer = RowScorer(block, data, task, tasks, rows, held or {}, hoist=hoist)
        self.labels, self.weights = data.labels[rows.rows], data.weights[rows.rows]
        self.offset = None if data.offset is None else data.offset[rows.rows, None]
        self.segments = Segments(rows.owner, len(tasks))
        known = self.labels.isfinite().any(1)
        self.weight = self.segments.sum(self.weights * known)  # (tasks,): total weight of each support

    def __len__(self) -> int:
        return self.labels.shape[0]

    def shifted(self, logits: Tensor) -> Tensor:
        """Logits as the sampled rows have them: with the log-odds correction, where there is one."""
        return logits if self.offset is None else logits + self.offset.to(logits.dtype)

    def loss(self, z: Tensor) -> Tensor:
        """Sum of the weighted losses of each task's support, `[tasks]`; 0 for a task without rows."""
        logits = self.shifted(self.scorer.logits(z))
        return self.segments.sum(self.losses.loss(logits, self.labels, self.weights))

    def of(self, task: int) -> Support:
        """The support of one task of the batch, scored the plain way, with nothing hoisted: for the `loop` engine."""
        block, losses, data, name, tasks, rows, held = self._rebuild
        mine = rows.rows[rows.owner == task]
        one = Rows(mine, torch.zeros_like(mine))
        return Support(block, losses, data, name, tasks[task : task + 1], one, held, hoist=False)
