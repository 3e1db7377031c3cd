"""Logits of flat rows as a function of the meta embeddings of one task type, with all else computed beforehand.

Everything that does not depend on the meta embeddings is computed when a `RowScorer` is made, and shared by all inner
steps (design facts 3 to 5): each side's distinct entries are encoded once and gathered to the rows. What is left are three
maps, which the solvers differentiate one by one:

    condition(z)            once per task        meta embeddings [tasks, dim] → parts [tasks, …]
    rows(parts, piece)      gather and add       → parts of the rows [n, …]
    score(parts, piece)     once per row         → logits [n, heads]

A global block that is not cut has one part, the meta embedding itself, and does all its work in `score`.

Rows lie in one piece, or in several that are worked on one after the other: small enough for the cache where nothing is
kept of a piece, or for the memory where everything is. Pieces may cut a task.

Interactions stay where they are (on the CPU); what a batch needs of them is moved to the device of the global block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limaml.errors import LimamlError, ModelError
from limaml.meta.adapted import widened
from limaml.meta.blocks import add_parts
from limaml.meta.masks import SharedMasks
from limaml.meta.precision import Precision, precision_of_blocks
from limaml.meta.segments import Segments
from limaml.meta.spread import Spread
from limaml.types import CutBlock, Features, Interactions, Parts, Rows, embedding_name

__all__ = ["Held", "Piece", "RowScorer", "calling", "gather_parts", "take"]

Held = Mapping[str, Callable[[Tensor], Tensor]]
"""Task type → embeddings `[n, dim]` of the given entries `[n]` of its table: what the *other* task types are held at."""


def take(
    features: Features, entries: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Features:
    """The features of the given entries of a side, on `device`; floating ones as `dtype` where that is given."""
    whole = _counts(entries, next((len(values) for values in features.values()), 0))  # no copy then
    taken = {name: (values if whole else values[entries]).to(device) for name, values in features.items()}
    if dtype is None:
        return taken
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in taken.items()}


@contextmanager
def calling(what: str, precision: Precision, features: Callable[[], Features]) -> Iterator[None]:
    """A call of a user's block is made in here, in `precision`; an error is told with the shapes that it was given."""
    try:
        with precision.block():
            yield
    except (LimamlError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(values.shape)} {values.dtype}" for name, values in features().items())
        raise ModelError(f"{what} failed: {type(error).__name__}: {error} It was given: {shapes}.") from error


def gather_parts(parts: Parts, index: Tensor) -> Parts:
    """The parts of the entries `index` `[n]`."""
    return tuple(None if part is None else part.index_select(0, index) for part in parts)


@dataclass(frozen=True)
class Piece:
    """Some of the rows, one after the other, the tasks `tasks` that own them, and which of these owns which row."""

    rows: slice
    tasks: slice
    segments: Segments
    masks: SharedMasks


class RowScorer:
    """Logits of flat rows, given the meta embeddings of the one task type that is being adapted.

    `tasks` `[tasks]` are positions in the table of task type `task`, `rows.owner` counts within them. Every *other* task
    type stays at its `held` embeddings. A piece holds `rows_per_piece` rows, or all.
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
        rows_per_piece: int | None = None,
    ) -> None:
        self.block, self.name, self.tasks = block, embedding_name(task), len(tasks)
        like = next((p for p in block.parameters() if p.is_floating_point()), None)
        self.dtype = None if like is None else like.dtype
        self.device = None if like is None else like.device
        self.owner = rows.owner.to(self.device)
        self.precision = precision_of_blocks(self.device)
        self._cut_block = (
            block if hoist and isinstance(block, CutBlock) else None
        )  # asked once: a Protocol takes its time
        self.segments = Segments(self.owner, len(tasks))
        self.pieces = self.cut_into(rows_per_piece)
        self.sides: list[Parts] = []  # parts of the distinct entries of each side
        self.places: list[Tensor] = []  # which of them each row has
        self.in_order: list[bool] = []  # whether that is one after the other
        self._fixed: Parts | None = None
        self._features: Features = {}
        for side, index in data.index.items():
            table = data.sides.get(side, {})
            entry = tasks[rows.owner] if side == task else index[rows.rows]
            if self.cut:
                distinct, place = (tasks, rows.owner) if side == task else _distinct(entry, data.count(side))
                self._encode(table, distinct, place, held.get(side) if side != task else None, side)
            else:
                self._features |= take(table, entry, self.dtype, self.device)
                if side != task and side in held:
                    self._features[embedding_name(side)] = held[side](entry).to(self.device)

    @property
    def cut(self) -> bool:
        """Whether the block is cut, and what does not depend on the meta embeddings was computed beforehand."""
        return self._cut_block is not None

    def cut_into(self, rows_per_piece: int | None) -> list[Piece]:
        """The rows in pieces of so many, or in one."""
        owner, rows, pieces = self.owner, len(self.owner), []
        if rows_per_piece is None or rows <= rows_per_piece:
            return [Piece(slice(0, rows), slice(0, self.tasks), self.segments, SharedMasks(self.block))]
        starts = range(0, rows, rows_per_piece)
        ends = [min(rows, start + rows_per_piece) for start in starts]
        firsts, lasts = owner[list(starts)].tolist(), owner[[end - 1 for end in ends]].tolist()
        for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True):
            begin = (self.segments.begin[first : last + 1] - start).clamp(min=0)
            segments = Segments(owner[start:end] - first, last + 1 - first, begin=begin)
            pieces.append(Piece(slice(start, end), slice(first, last + 1), segments, SharedMasks(self.block)))
        return pieces

    def _encode(
        self, table: Features, distinct: Tensor, place: Tensor, held: Callable[[Tensor], Tensor] | None, side: str
    ) -> None:
        assert self._cut_block is not None
        features = take(table, distinct, self.dtype, self.device) if table else {}
        with self._naming(".encode", lambda: features):
            parts = self._wide(self._cut_block.encode(features)) if features else None
        if held is not None:
            condition = self.condition(held(distinct).to(self.device), embedding_name(side))
            parts = condition if parts is None else add_parts(parts, condition)
        if parts is not None:
            self.sides.append(parts)
            self.places.append(place.to(self.device))
            self.in_order.append(_counts(place, len(distinct)))

    def condition(self, z: Tensor, name: str | None = None) -> Parts:
        """What depends on the meta embeddings `z` `[n, dim]` alone: `[n, …]`."""
        if self._cut_block is None:
            return (z,)
        embeddings = {name or self.name: z}
        with self._naming(".condition", lambda: embeddings):
            return self._wide(self._cut_block.condition(embeddings))

    def rows(self, own: Parts, piece: Piece, sides: Sequence[Parts] | None = None) -> Parts:
        """Parts of the rows of `piece`, for the parts `[tasks, …]` of its tasks that `condition` made."""
        spread = tuple(None if part is None else piece.segments.rows(part) for part in own)
        fixed = self.fixed(piece, sides)
        return spread if fixed is None else add_parts(spread, fixed)

    def fixed(self, piece: Piece, sides: Sequence[Parts] | None = None) -> Parts | None:
        """What the meta embeddings do not touch, of the rows of `piece`: gathered out of the `sides`.

        Where all rows are one piece they are gathered once, for all steps.
        """
        if self._fixed is not None:
            return self._fixed
        fixed: Parts | None = None
        for parts, place in zip(self.sides if sides is None else sides, self.places, strict=True):
            spread = Spread(place[piece.rows, None], max((len(part) for part in parts if part is not None), default=0))
            more = tuple(None if part is None else spread.rows(part) for part in parts)
            fixed = more if fixed is None else add_parts(fixed, more)
        if len(self.pieces) == 1:
            self._fixed = fixed
        return fixed

    def score(self, parts: Parts, piece: Piece) -> Tensor:
        """Logits `[n, heads]` of the parts `[n, …]` of a piece's rows."""
        first = next(part for part in parts if part is not None)
        with piece.masks.drawn(first):
            if self._cut_block is not None:
                named = {f"slot {i}": part for i, part in enumerate(parts) if part is not None}
                with self._naming(".score", lambda: named):
                    logits = self._cut_block.score(parts)
            else:
                features = {name: values[piece.rows] for name, values in self._features.items()} | {self.name: first}
                with self._naming("", lambda: features):
                    logits = self.block(features)
        return self._checked(logits, piece.rows.stop - piece.rows.start)

    def logits(self, z: Tensor) -> Tensor:
        """Logits `[n, heads]` of all rows for meta embeddings `z` `[tasks, dim]`."""
        parts = self.condition(z)
        found = []
        for piece in self.pieces:
            own = tuple(None if part is None else part[piece.tasks] for part in parts)
            found.append(self.score(self.rows(own, piece), piece))
        return found[0] if len(found) == 1 else torch.cat(found)

    def per_row(self, z: Tensor, piece: Piece | None = None, sides: Sequence[Parts] | None = None) -> Tensor:
        """Logits `[n, heads]` of a piece's rows (default: the first's) for one meta embedding per row, `z` `[n, dim]`."""
        piece = piece or self.pieces[0]
        own, fixed = self.condition(z), self.fixed(piece, sides)
        return self.score(own if fixed is None else add_parts(own, fixed), piece)

    def _naming(self, method: str, features: Callable[[], Features]) -> AbstractContextManager[None]:
        return calling(f"The global block {type(self.block).__name__}{method}", self.precision, features)

    def _wide(self, parts: Parts) -> Parts:
        """Parts as the block's parameters are: rows are gathered out of them, and their slopes summed."""
        return tuple(None if part is None else widened(part, self.block) for part in parts)

    def _checked(self, logits: Tensor, rows: int) -> Tensor:
        logits = widened(logits, self.block)
        if logits.shape == (rows,):  # a block of one head that leaves the head's dimension out
            return logits.unsqueeze(1)
        if logits.dim() != 2 or logits.shape[0] != rows:
            raise ModelError(
                f"The global block {type(self.block).__name__} gives logits of shape {list(logits.shape)} for {rows} rows; "
                "[rows, heads] is needed."
            )
        return logits


def _counts(index: Tensor, entries: int) -> bool:
    """Whether `index` is 0, 1, 2, … `entries − 1`."""
    return len(index) == entries and torch.equal(index, torch.arange(entries, device=index.device))


def _distinct(entry: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The distinct values of `entry` `[n]`, which are less than `count`, and the place of each row's value in them."""
    if count > 64 * len(entry):
        distinct, place = torch.unique(entry, return_inverse=True)
        return distinct, place
    present = torch.zeros(count, dtype=torch.bool)
    present[entry] = True
    return present.nonzero().flatten(), (torch.cumsum(present, 0) - 1)[entry]
