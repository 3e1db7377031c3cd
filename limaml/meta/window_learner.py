"""How the personalised model learns from more rows than fit into memory: one window of buckets after the other.

Inside a window everything is as if its rows were all there are: `MetaLearner` shuffles, batches, adapts and judges. What must be
the same in all windows (encoder, scale of the labels, weight of all rows, size of batches) comes from the survey. Where one
window holds everything, this *is* training in memory.

With several ranks and several windows, each rank takes windows of its own, and a step is a batch of each: ranks without
one add nothing and wait. With one window the ranks share every batch of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from limaml.config import TrainConfig
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.learn import MetaBatch, MetaLearner, fast_parameters, summed_loss
from limaml.meta.model import MetaModel
from limaml.meta.reader import Opened, WindowReader
from limaml.meta.survey import Held, Survey, held_out
from limaml.tasks import Split, Window

__all__ = ["WindowLearner"]


class RankWindow:
    """A window as one rank sees it.

    Without a `seed` all ranks have this window: they draw the same batches and share each. With one it is this rank's own,
    beside those of the others: its batches are drawn from the seed, depend on no other window, and there are as many on every
    rank; None is a batch that a rank does not have, and `inner` is None where it has no window. `covers`: windows of all ranks.
    """

    def __init__(self, inner: MetaLearner | None, seed: int | None = None, covers: int = 1) -> None:
        self.inner, self.seed, self.covers = inner, seed, covers
        self.steady = inner is None or inner.steady

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[MetaBatch | None]:
        made: list[MetaBatch | None] = []
        if self.inner is not None and self.seed is None:
            return made + self.inner.batches(generator, ranks)
        if self.inner is not None and self.seed is not None:
            made += self.inner.batches(torch.Generator().manual_seed(self.seed))
        return made + [None] * (ranks.most(len(made)) - len(made))

    def share(self, batch: MetaBatch | None, ranks: Ranks) -> MetaBatch | None:
        if self.inner is None or batch is None or self.seed is not None:
            return batch
        return self.inner.share(batch, ranks)

    def loss(self, batch: MetaBatch | None) -> tuple[Tensor, float]:
        assert self.inner is not None and batch is not None
        return self.inner.loss(batch)

    def tasks_in(self, batch: MetaBatch | None) -> int:
        return 0 if self.inner is None or batch is None else self.inner.tasks_in(batch)

    def blame(self, batch: MetaBatch | None) -> str:
        return "It is not of this rank's rows." if self.inner is None or batch is None else self.inner.blame(batch)


class WindowLearner:
    """Meta-learns `model` on all windows that `reader` opens. The rows of `held` are validated on and not trained on."""

    def __init__(
        self, model: MetaModel, reader: WindowReader, survey: Survey, config: TrainConfig, held: Held | None = None
    ) -> None:
        self.module: nn.Module = model
        self.model, self.reader, self.survey, self.config, self.held = model, reader, survey, config, held
        self.totals = survey.all if held is None else survey.kept
        self.weight = self.totals.weight
        model.losses.take_scale(self.totals.labels)
        self._plan = survey.windows
        self._validated = (
            [] if held is None else self._plan.ascending(None if self._plan.single else sorted(held.buckets))
        )
        self._warned = False

    def fast_parameters(self) -> list[nn.Parameter]:
        return fast_parameters(self.model)

    def windows_per_epoch(self) -> int:
        return self._plan.per_epoch(self.survey.tasks, self.config.tasks_per_epoch)

    def windows(self, generator: torch.Generator, ranks: Ranks = ALONE, start: int = 0) -> Iterator[RankWindow]:
        drawn = self._plan.epoch(generator, self.survey.tasks, self.config.tasks_per_epoch)
        if self._plan.single:
            yield RankWindow(self._learner(drawn[0], None, self.config))
            return
        rows = max(1, self.config.batch_of(self.totals.rows) // ranks.world)  # a step is a batch of every rank
        config = self.config.model_copy(update={"rows_per_batch": rows})
        for first in range(start, len(drawn), ranks.world):
            own, after = (drawn[at + ranks.rank : at + ranks.rank + 1] for at in (first, first + ranks.world))
            then = after[0].buckets if after else next(iter(self._validated[ranks.rank :: ranks.world]), None)
            seed, covers = drawn[first].seed if not own else own[0].seed, min(ranks.world, len(drawn) - first)
            window = RankWindow(self._learner(own[0], then, config) if own else None, seed, covers)
            yield window
            window.inner = None  # its rows go before others come

    def _split(self, opened: Opened) -> tuple[Tensor, Split | None]:
        """The rows to train on, and those that are held out."""
        data = opened.data
        if self.held is None or (not self._plan.single and self.held.buckets.isdisjoint(opened.buckets)):
            return torch.ones(len(data), dtype=torch.bool), None
        split = held_out(data, self.model.tasks[0], self.held, opened.bucket)
        return split.train, split

    def _learner(self, window: Window, then: tuple[int, ...] | None, config: TrainConfig) -> MetaLearner:
        opened = self.reader.open(window.buckets, then)
        train, split = self._split(opened)
        learner = MetaLearner(
            self.model, opened.data, train, config, split, self.totals, most_tasks=window.tasks, quiet=self._warned
        )
        self._warned = True
        return learner

    def validate(self, ranks: Ranks = ALONE) -> float | None:
        if self.held is None:
            return None
        total, weight = 0.0, 0.0
        together = self._plan.single  # then the ranks share the rows of the one window
        own = self._validated if together else self._validated[ranks.rank :: ranks.world]
        for number, buckets in enumerate(own):
            found = self._loss_in(buckets, own[number + 1 : number + 2], ranks if together else ALONE)
            total, weight = total + found[0], weight + found[1]
        if not together:
            total, weight = ranks.sum(total, weight)
        return total / max(weight, 1e-12)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """As `MetaLearner.finish`, on the rows of the first window."""
        if not self.model.adaptation.seeks_half_life:
            return
        opened = self.reader.open(self._plan.ascending()[0])
        train, _ = self._split(opened)
        MetaLearner(self.model, opened.data, train, self.config, None, self.totals, quiet=True).finish(ranks)

    def _loss_in(self, buckets: tuple[int, ...], then: list[tuple[int, ...]], ranks: Ranks) -> tuple[float, float]:
        """The summed loss of a window's held-out rows, and their weight."""
        opened = self.reader.open(buckets, then[0] if then else None)
        split = self._split(opened)[1]
        return (0.0, 0.0) if split is None else summed_loss(self.model, opened.data, split, ranks)
