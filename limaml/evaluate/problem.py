"""What a compared method is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from limaml.config import Config
from limaml.meta.model import MetaModel
from limaml.meta.outer import History, Progress
from limaml.tasks import Split
from limaml.types import FeatureSpec, Interactions, LossKind

__all__ = ["Fitted", "Problem", "Run"]


@dataclass(frozen=True)
class Problem:
    """What a method is asked: learn from `split.train`, then score `split.test` with support from `split.support`.

    With a `validation` split (of the training rows) training stops early on it and the test rows are not scored.
    """

    data: Interactions
    specs: tuple[FeatureSpec, ...]
    losses: tuple[LossKind, ...]
    tasks: tuple[str, ...]
    split: Split
    validation: Split | None = None

    @property
    def judged(self) -> Split:
        """The split whose training rows are learned from and whose test rows are scored."""
        return self.validation or self.split


@dataclass(frozen=True)
class Fitted:
    """Outputs for `split.test` (or the validation rows), and how training went."""

    outputs: Tensor  # [test rows, heads]: log-odds of binary heads, values of squared heads
    rows: Tensor  # [test rows] positions in the data
    history: History
    model: MetaModel | None = None
    embeddings: Mapping[str, Tensor] | None = None  # task type → [entries, dim]
    chosen: Mapping[str, float] = field(default_factory=dict)  # what the method chose by itself, on training rows


Run = Callable[[Problem, Config, Callable[[Progress], None] | None], Fitted]
"""(problem, config of the method, progress) → fitted."""
