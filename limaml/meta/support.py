"""What adaptation minimises: the loss of a batch's support rows, as a function of the meta embeddings alone.

Everything that does not depend on the meta embeddings is computed when a `RowScorer` is made, and shared by all inner
steps (design facts 3 to 5): each side's distinct entries are encoded once and gathered to the rows.

Interactions stay where they are (on the CPU); what a batch needs of them is moved to the device of the global block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from limaml.errors import LimamlError, ModelError
from limaml.meta.age import HalfLife, ages
from limaml.meta.blocks import add_parts
from limaml.meta.losses import Losses
from limaml.meta.masks import SharedMasks
from limaml.meta.segments import Segments
from limaml.types import CutBlock, Features, Interactions, Parts, Rows, embedding_name

__all__ = ["Held", "RowScorer", "Support", "gather_parts", "naming_shapes", "take"]

Held = Mapping[str, Callable[[Tensor], Tensor]]
"""Task type → embeddings `[n, dim]` of the given entries `[n]` of its table: what the *other* task types are held at."""


def take(
    features: Features, entries: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Features:
    """The features of the given entries of a side, on `device`; floating ones as `dtype` where that is given."""
    taken = {name: values[entries].to(device) for name, values in features.items()}
    if dtype is None:
        return taken
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in taken.items()}


@contextmanager
def naming_shapes(what: str, features: Callable[[], Features]) -> Iterator[None]:
    """An error from inside a user's block, with the shapes it was given."""
    try:
        yield
    except (LimamlError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(values.shape)} {values.dtype}" for name, values in features().items())
        raise ModelError(f"{what} failed: {type(error).__name__}: {error} It was given: {shapes}.") from error


def gather_parts(parts: Parts, index: Tensor) -> Parts:
    """The parts of the entries `index` `[n]`."""
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
        self.block, self.name = block, embedding_name(task)
        like = next((p for p in block.parameters() if p.is_floating_point()), None)
        self.dtype = None if like is None else like.dtype
        self.device = None if like is None else like.device
        self.owner = rows.owner.to(self.device)
        self.masks = SharedMasks(block)
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
                self._features |= take(table, entry, self.dtype, self.device)
                if side != task and side in held:
                    self._features[embedding_name(side)] = held[side](entry).to(self.device)

    def _add(
        self, table: Features, distinct: Tensor, place: Tensor, held: Callable[[Tensor], Tensor] | None, side: str
    ) -> None:
        assert isinstance(self.block, CutBlock)
        features = take(table, distinct, self.dtype, self.device) if table else {}
        with self._naming(".encode", lambda: features):
            parts = self.block.encode(features) if features else None
        if held is not None:
            condition = self._condition({embedding_name(side): held(distinct).to(self.device)})
            parts = condition if parts is None else add_parts(parts, condition)
        if parts is not None:
            parts = gather_parts(parts, place.to(self.device))
            self._fixed = parts if self._fixed is None else add_parts(self._fixed, parts)

    def logits(self, z: Tensor) -> Tensor:
        """Logits `[n, heads]` for meta embeddings `z` `[tasks, dim]`."""
        if not self.cut:
            return self.per_row(z.index_select(0, self.owner))
        with self.masks.drawn(z):
            return self._score(gather_parts(self._condition({self.name: z}), self.owner))

    def per_row(self, z: Tensor) -> Tensor:
        """Logits `[n, heads]` for one meta embedding per row, `z` `[n, dim]`."""
        with self.masks.drawn(z):
            if self.cut:
                return self._score(self._condition({self.name: z}))
            features = {**self._features, self.name: z}
            with self._naming("", lambda: features):
                logits: Tensor = self.block(features)
        return self._checked(logits)

    def _condition(self, embeddings: Features) -> Parts:
        assert isinstance(self.block, CutBlock)
        with self._naming(".condition", lambda: embeddings):
            return self.block.condition(embeddings)

    def _score(self, parts: Parts) -> Tensor:
        assert isinstance(self.block, CutBlock)
        parts = parts if self._fixed is None else add_parts(self._fixed, parts)
        named = {f"slot {i}": part for i, part in enumerate(parts) if part is not None}
        with self._naming(".score", lambda: named):
            logits = self.block.score(parts)
        return self._checked(logits)

    def _naming(self, method: str, features: Callable[[], Features]) -> AbstractContextManager[None]:
        return naming_shapes(f"The global block {type(self.block).__name__}{method}", features)

    def _checked(self, logits: Tensor) -> Tensor:
        rows = len(self.owner)
        if logits.shape == (rows,):  # a block of one head that leaves the head's dimension out
            return logits.unsqueeze(1)
        if logits.dim() != 2 or logits.shape[0] != rows:
            raise ModelError(
                f"The global block {type(self.block).__name__} gives logits of shape {list(logits.shape)} for {rows} rows; "
                "[rows, heads] is needed."
            )
        return logits


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
    ) -> None:
        self._rebuild = (block, losses, data, task, tasks, rows, held or {}, half_life)
        self.losses = losses
        self.scorer = RowScorer(block, data, task, tasks, rows, held or {}, hoist=hoist)
        device = self.scorer.device
        self.labels, self.weights = data.labels[rows.rows].to(device), data.weights[rows.rows].to(device)
        if half_life is not None:
            self.weights = self.weights * half_life(ages(data, task, rows, len(tasks)))
        self.offset = None if data.offset is None else data.offset[rows.rows, None].to(device)
        self.segments = Segments(self.scorer.owner, len(tasks))
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

    def refuse_unread(self, z: Tensor, task: str) -> None:
        """Raise `ModelError` unless the logits depend on the meta embeddings `z` of `task` (here `[tasks, dim]`)."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            logits = self.scorer.logits(leaf)
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
