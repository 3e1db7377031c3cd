"""The domain's words as types, so that every folder means the same thing by them.

Nothing here computes. A reader who knows this file can read any signature in the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "MISSING",
    "PADDING",
    "ROW",
    "UNSEEN",
    "CutBlock",
    "FeatureKind",
    "FeatureSpec",
    "Features",
    "Interactions",
    "LayeredBlock",
    "LossKind",
    "Parts",
    "Rows",
    "embedding_name",
]

Features = dict[str, Tensor]
"""Feature name → tensor with one entry per thing described: `[n]` int64 for a categorical, `[n, length]` int64 padded
with 0 for tokens and sequences, `[n, width]` float for numerics and dense vectors. A meta embedding is one more such
feature, `[n, dim]`, named by `embedding_name`."""

PADDING = MISSING = 0
"""Id 0 of every vocabulary: no value (a null categorical, the padding of a token list)."""

UNSEEN = 1
"""Id 1 of every vocabulary: a value that the training rows did not have, or had too rarely."""

ROW = "row"
"""Name of the side whose features may differ from row to row inside a task."""


def embedding_name(task: str) -> str:
    """The name under which the global block finds the meta embedding of task type `task`."""
    return f"{task}_embedding"


class FeatureKind(StrEnum):
    CATEGORICAL = "categorical"
    NUMERIC = "numeric"
    TOKENS = "tokens"  # a set: order means nothing
    SEQUENCE = "sequence"  # a list: order means something, the last entries are kept
    VECTOR = "vector"


class LossKind(StrEnum):
    BINARY = "binary"  # binary cross-entropy on a logit
    SQUARED = "squared"  # squared error, with a learned noise variance


@dataclass(frozen=True)
class FeatureSpec:
    """What a block must know of one encoded feature.

    `size` is the number of ids, reserved ones included (categorical, tokens, sequence), else the width of the dense
    vector. `length` is the number of ids a tokens or sequence feature is padded to, else 1.
    """

    name: str
    kind: FeatureKind
    side: str  # a task type, or ROW
    size: int
    length: int = 1

    @property
    def is_id(self) -> bool:
        return self.kind in (FeatureKind.CATEGORICAL, FeatureKind.TOKENS, FeatureKind.SEQUENCE)


@dataclass(frozen=True)
class Interactions:
    """Encoded interactions: flat, sorted by time, each distinct thing described once.

    A *side* is what a feature is a property of: a task type (`user_id`), or `ROW` for what may change from row to row.
    `sides[side]` holds one entry per distinct member of that side; `index[side][n]` says which of them row `n` has. So
    an item that stands in a thousand supports is stored, and can be encoded, once.
    """

    sides: Mapping[str, Features]  # side → features of its distinct entries
    index: Mapping[str, Tensor]  # side → [rows] int64
    ids: Mapping[str, list[str]]  # task type → key of each entry of that side, as the store knows it
    labels: Tensor  # [rows, heads] float32; NaN where a label is missing
    weights: Tensor  # [rows] float32, ≥ 0
    time: Tensor  # [rows] int64, ascending; unit in `time_unit`
    time_unit: str = "order"  # "us" (microseconds since 1970), "integer" (as in the source), or "order"
    offset: Tensor | None = None  # [rows] float32 added to every logit (log-odds correction of sampled negatives)
    source_row: Tensor | None = field(default=None, repr=False)  # [rows] int64: position in the table that was read

    def __len__(self) -> int:
        return self.labels.shape[0]

    def labelled_weight(self, rows: Tensor) -> float:
        """Sum of the weights of those of the rows `[n]` that have a label: what a mean loss is divided by."""
        return float((self.weights[rows].double() * self.labels[rows].isfinite().any(1)).sum())

    def count(self, side: str) -> int:
        """Number of distinct entries of `side`."""
        if side in self.ids:
            return len(self.ids[side])
        return int(self.index[side].max()) + 1 if len(self) else 0


@dataclass(frozen=True)
class Rows:
    """A set of interaction rows and the task that owns each: flat, never padded.

    `rows[i]` is a position in `Interactions`; `owner[i]` is a position in the batch's list of tasks, ascending.
    """

    rows: Tensor  # [n] int64
    owner: Tensor  # [n] int64 in 0 … tasks − 1, ascending

    def __len__(self) -> int:
        return self.rows.shape[0]

    @staticmethod
    def empty() -> Rows:
        none = torch.empty(0, dtype=torch.int64)
        return Rows(none, none)


Parts = tuple[Tensor | None, ...]
"""What a cut block makes of some of its inputs: slots `[n, …]` that add up; `None`: a slot they don't touch."""


@runtime_checkable
class CutBlock(Protocol):
    """A global block that says which of its work depends on what, so that it is done once and not once per row.

    `forward(features)` must equal `score(parts)`, where `parts` is the sum, slot by slot, of `encode(some features)`,
    `encode(the others)` and `condition(embeddings)`, however the features are dealt out. (A first layer over
    `[z, x]` adds up by nature; what must be kept apart gets a slot of its own.) Each part is then computed once per
    distinct row, once per task, or once per task and inner step; only `score` runs on every row.
    """

    def encode(self, features: Features) -> Parts:
        """What depends on these features alone."""
        ...

    def condition(self, embeddings: Features) -> Parts:
        """What depends on these meta embeddings alone."""
        ...

    def score(self, parts: Parts) -> Tensor:
        """Logits `[n, heads]` of the summed parts."""
        ...


@runtime_checkable
class LayeredBlock(CutBlock, Protocol):
    """A cut block that says which of its `score` is a plain stack of layers: the engine passes through them by hand.

    `score(parts)` must equal `layers(parts[slot] + bias) + rest(parts)`, where `(slot, bias, layers) = stack()`.
    """

    def stack(self) -> tuple[int, Tensor | None, Sequence[nn.Module]]:
        """The slot that the layers read, what is added to it (or None), and the layers, one after the other."""
        ...

    def rest(self, parts: Parts) -> Tensor | None:
        """What the other slots add to the logits, `[n, heads]` or `[n, 1]`; None: nothing."""
        ...
