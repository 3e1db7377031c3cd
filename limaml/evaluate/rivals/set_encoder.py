"""The method `set_encoder`: a feed-forward network in the place of the inner loop.

`z = cold + ρ(Σ w h(row, label) / (Σ w + c), log(1 + rows))`: a mean over the support of what a network makes of each row and its
label, then another network. Garnelo et al., "Conditional Neural Processes", ICML 2018 (arXiv 1807.01613); Feng et al.,
"CMML: Contextual Modulation Meta Learning for Cold-Start Recommendation", CIKM 2021 (arXiv 2108.10511). Everything else is as
for the personalised model: the global block, cross-fit, which task's rows are whose; a task without rows is cold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from limaml.config import Config
from limaml.evaluate.meta_method import fit_learner
from limaml.evaluate.problem import Fitted, Problem
from limaml.evaluate.rivals.encoding import RowEncoder, outcomes
from limaml.evaluate.rivals.history_methods import trained_entries
from limaml.meta.blocks import MetaMLP
from limaml.meta.build import build_global_block
from limaml.meta.learn import MetaLearner
from limaml.meta.model import MetaModel
from limaml.meta.outer import Progress
from limaml.meta.segments import Segments
from limaml.meta.uncertainty import Posterior
from limaml.types import Interactions, Rows

__all__ = ["SetEncoder", "SetEncoderModel", "set_encoder"]


class SetEncoder(nn.Module):
    """Supports → what they add to the cold embeddings, `[tasks, dim]`. `heads` labels, `hidden` units in each layer."""

    def __init__(self, rows: RowEncoder, heads: int, dim: int, hidden: int, prior_count: float, dropout: float) -> None:
        super().__init__()
        self.rows = rows
        self.of_row = nn.Linear(rows.width, hidden)
        self.of_labelled = nn.ModuleList(
            nn.Linear(rows.width, hidden) for _ in range(heads)
        )  # its bias: the label's own
        self.log_count = nn.Parameter(torch.tensor(math.log(prior_count)))
        self.second = nn.Linear(hidden, hidden)
        self.decode = nn.Sequential(
            nn.Linear(hidden + 1, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, data: Interactions, support: Rows, y: Tensor, weight: Tensor, tasks: int) -> Tensor:
        """`y` `[n, heads]` is how the support rows went, `weight` `[n]` what they weigh."""
        first = self.of_row.bias.expand(len(support), -1)
        for i, labelled in enumerate(self.of_labelled):
            first = first + y[:, i, None] * cast(nn.Linear, labelled).bias
        for vectors, place in self.rows.distinct(data, support.rows):
            first = first + (vectors @ self.of_row.weight.t())[place]
            for i, labelled in enumerate(self.of_labelled):
                first = first + y[:, i, None] * (vectors @ cast(nn.Linear, labelled).weight.t())[place]
        each = nn.functional.silu(self.second(nn.functional.silu(first)))
        segments = Segments(support.owner.to(y.device), tasks)
        total = segments.sum(weight)[:, None]
        pooled = segments.sum(each * weight[:, None]) / (total + torch.exp(self.log_count))
        vectors = self.decode(torch.cat([pooled, torch.log1p(total) / 4], 1))
        return torch.where(total > 0, vectors, 0.0)


class SetEncoderModel(MetaModel):
    """A `MetaModel` that reads supports with set encoders, and adapts nothing."""

    def with_encoders(self, encoders: Mapping[str, SetEncoder]) -> SetEncoderModel:
        """This model, with an encoder for each task type."""
        self.encoders = nn.ModuleDict(encoders)
        return self

    def _solver(self, task: str) -> nn.Module:
        return nn.Identity()

    def _adapted(
        self,
        data: Interactions,
        task: str,
        tasks: Tensor,
        support: Rows,
        before: Posterior | None = None,
        steps: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        cold = self.cold(data, task, tasks)
        if not len(support):
            return cold, None
        labels, weights = data.labels[support.rows].to(self.device), data.weights[support.rows].to(self.device)
        y = outcomes(self.losses, labels, torch.ones_like(weights))
        weight = weights * labels.isfinite().any(1)
        encoder = cast(SetEncoder, self.encoders[task])
        return cold + encoder(data, support, y, weight, len(tasks)), None


def set_encoder(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    data, split, heads, dim = problem.data, problem.judged, len(problem.losses), config.model.dim
    known = trained_entries(data, problem.tasks, split.train)
    blocks, encoders = {}, {}
    for task in problem.tasks:
        own = [spec for spec in problem.specs if spec.side == task]
        blocks[task] = MetaMLP(own, dim, embedding_dim=config.model.meta_embedding_dim, hidden=config.model.meta_hidden)
        others = {other: mask for other, mask in known.items() if other != task}
        rows = RowEncoder(problem.specs, task, config.model.embedding_dim, others)
        encoders[task] = SetEncoder(
            rows, heads, dim, config.rival.hidden, config.adapt.prior_count, config.model.dropout
        )
    block = build_global_block(problem.specs, config.model, dict.fromkeys(problem.tasks, dim), heads)
    model = SetEncoderModel(block, blocks, losses=problem.losses, adaptation=config.adapt).with_encoders(encoders)
    return fit_meta(model.to(config.train.device), problem, config, progress)


def fit_meta(model: MetaModel, problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    """Meta-train `model` and score with it, as for LiMAML. It is not kept: it is not a model that serving knows."""
    data, split = problem.data, problem.judged
    learner = MetaLearner(model, data, split.train, config.train, problem.validation)
    return replace(fit_learner(learner, problem, config, progress), model=None)
