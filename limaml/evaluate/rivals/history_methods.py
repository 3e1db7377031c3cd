"""The methods `history_mean` and `history_attention`: a global block that reads the rows before, trained as `base` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from limaml.config import Config
from limaml.evaluate.baselines import PlainLearner, PlainModel
from limaml.evaluate.problem import Fitted, Problem, Run
from limaml.evaluate.rivals.encoding import RowEncoder
from limaml.evaluate.rivals.history import Attention, HistoryBlock, Mean, history_block, with_history
from limaml.evaluate.rivals.lookback import Lookback
from limaml.meta.build import build_global_block
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.losses import Losses
from limaml.meta.outer import Progress, fit
from limaml.types import Interactions, embedding_name

__all__ = ["HistoryLearner", "Reading", "block_with_history", "history_method", "trained_entries"]

Reading = Literal["mean", "attention"]


def trained_entries(data: Interactions, tasks: tuple[str, ...], train: Tensor) -> dict[str, Tensor]:
    """Task type → mask of its entries that have training rows, `[entries]`."""
    known = {}
    for task in tasks:
        known[task] = torch.zeros(data.count(task), dtype=torch.bool)
        known[task][data.index[task][train]] = True
    return known


def block_with_history(
    problem: Problem, config: Config, reading: Reading, losses: Losses, dims: dict[str, int]
) -> tuple[HistoryBlock, list[Lookback]]:
    """A global block that reads the history of each task type, beside the embeddings `dims` (task type → size)."""
    split, heads = problem.judged, len(problem.losses)
    known = trained_entries(problem.data, problem.tasks, split.train)
    pasts, reads = [], []
    for task in problem.tasks:
        past = Lookback(problem.data, task, split, config.rival.history, crossed=config.rival.look_back == "cross_fit")
        others = {other: known[other] for other in problem.tasks if other != task}
        encoder = RowEncoder(problem.specs, task, config.model.embedding_dim, others)
        dim, dropout = config.model.dim, config.model.dropout
        reads.append(
            (
                embedding_name(f"{task} history"),
                Mean(encoder, losses, past, dim, dropout)
                if reading == "mean"
                else Attention(encoder, losses, past, dim, config.rival.hidden, dropout),
            )
        )
        pasts.append(past)
    inner = build_global_block(
        problem.specs, config.model, {**dims, **{f"{task} history": config.model.dim for task in problem.tasks}}, heads
    )
    return history_block(inner, reads), pasts


class HistoryLearner(PlainLearner):
    """Learns rows in random order, as for `base`; coins, if histories are drawn by them, fall anew in each epoch."""

    pasts: list[Lookback]

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[Tensor]:
        for past in self.pasts:
            past.redraw(generator)
        return super().batches(generator, ranks)


def history_method(reading: Reading) -> Run:
    """The method `history_mean` or `history_attention`."""

    def run(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
        data, split = with_history(problem.data), problem.judged
        losses = Losses(problem.losses)
        dims = dict.fromkeys(problem.tasks, config.model.dim) if config.rival.ids else {}
        block, pasts = block_with_history(problem, config, reading, losses, dims)
        model = PlainModel(block, losses, {task: (data.count(task), dim) for task, dim in dims.items()})
        learner = HistoryLearner(model.to(config.train.device), data, split.train, config.train, problem.validation)
        learner.pasts = pasts
        history = fit(learner, config.train, progress=progress)
        rows = split.test.nonzero().flatten()
        outputs = losses.outputs(learner.predict(rows, 8192).to(learner.model.device)).cpu()
        return Fitted(outputs, rows, history)

    return run
