"""The method `limaml_history`: a meta block beside DIN's attention over the history. Does the one add to the other?

The global block reads the meta embedding and the row's history vector; the solver is Newton. Whatever an embedding has been
adapted on must not know the labels it is judged by. So in an epoch a coin deals a task's rows into two parts; a support row
looks back on older rows of its own part, a query row on all of the other part, which is its support. No query label is in
the history of any support row. When it is judged, a support row looks back on older support rows, a test row on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from limaml.config import Config
from limaml.evaluate.meta_method import fit_learner
from limaml.evaluate.problem import Fitted, Problem
from limaml.evaluate.rivals.history import HistoryBlock, Mean, with_history
from limaml.evaluate.rivals.history_methods import block_with_history
from limaml.evaluate.rivals.lookback import Lookback
from limaml.meta.blocks import MetaMLP
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.learn import MetaBatch, MetaLearner
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel
from limaml.meta.outer import Progress

__all__ = ["HistoryMetaLearner", "limaml_history"]


class HistoryMetaLearner(MetaLearner):
    """A `MetaLearner` that says, before rows are scored, in which role they look back."""

    def looking_back(self, block: HistoryBlock, judged: list[Lookback]) -> HistoryMetaLearner:
        """This learner, of a model whose global block is `block` and looks back as `judged` says when it is judged."""
        self.block, self.judged = block, judged
        self.own, self.across = [copied(past) for past in judged], [copied(past) for past in judged]
        return self

    def role(self, pasts: list[Lookback]) -> None:
        """From now on rows look back as `pasts` say, one for each of the block's readers."""
        for read, past in zip(self.block.reads, pasts, strict=True):
            cast(Mean, read).past = past

    def deal(self, coin: Tensor) -> None:
        """Histories of support and query rows, for a coin `[rows]` bool."""
        for own, across in zip(self.own, self.across, strict=True):
            own.cross(coin, own_side=True)
            across.cross(coin)

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[MetaBatch]:
        made = super().batches(generator, ranks)
        coin = torch.zeros(len(self.data), dtype=torch.bool)
        crossed = [batch for batch in made if batch.side is not None]
        for batch in crossed:  # every training row is a query once, when the other side is the support
            coin[batch.batch.query.rows] = not batch.side
        if crossed:
            self.deal(coin)
        return made

    def _adapt_others(self, coin: Tensor | None, ranks: Ranks) -> None:
        if coin is not None:
            self.deal(coin)
        self.role(self.own)
        super()._adapt_others(coin, ranks)
        self.role(self.judged)

    def _row_losses(self, batch: MetaBatch) -> Tensor:
        try:
            self.role(self.own)
            z = self.model.adapt(self.data, batch.task, batch.batch.tasks, batch.batch.support)
            self.role(self.across)
            return self._judged(batch, z)
        finally:
            self.role(self.judged)


def copied(past: Lookback) -> Lookback:
    """A `Lookback` whose coins can be thrown without the other's."""
    other = copy(past)
    other.rows, other.start, other.length = past.rows.clone(), past.start.clone(), past.length.clone()
    return other


def limaml_history(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    data, split, dim = with_history(problem.data), problem.judged, config.model.dim
    losses = Losses(problem.losses)
    block, pasts = block_with_history(problem, config, "attention", losses, dict.fromkeys(problem.tasks, dim))
    blocks: dict[str, nn.Module] = {
        task: MetaMLP(
            [spec for spec in problem.specs if spec.side == task],
            dim,
            embedding_dim=config.model.meta_embedding_dim,
            hidden=config.model.meta_hidden,
        )
        for task in problem.tasks
    }
    model = MetaModel(block, blocks, losses=problem.losses, adaptation=config.adapt)
    model.losses = losses  # the history's labels are in the same units
    model = model.to(config.train.device)
    learner = HistoryMetaLearner(model, data, split.train, config.train, problem.validation).looking_back(block, pasts)
    return replace(fit_learner(learner, problem, config, progress), model=None)
