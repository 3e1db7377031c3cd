"""The method `fine_tuned`: the whole base model, embedding tables included, trained on by each member alone.

A few full-batch SGD steps on the member's support from the base's weights, every member with its own copy, which is
dropped once its rows are scored. The loss is the mean over the rows and `adapt.prior_count` rows more that say nothing, so
that one row moves the network less than fifty do. Rate and number of steps (0 among them) are chosen on held-out rows. With
several task types it is the first one's members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from limaml.config import Config
from limaml.evaluate.baselines import PlainLearner
from limaml.evaluate.problem import Fitted, Problem
from limaml.evaluate.rivals.padding import alike, padded
from limaml.evaluate.rivals.personal import Personal, mean_loss_of
from limaml.meta.blocks import CONSTANT
from limaml.meta.losses import Losses
from limaml.meta.outer import Progress
from limaml.meta.scorer import take
from limaml.tasks import Split, TaskRows
from limaml.types import Features, Interactions

__all__ = ["FineTuned", "fine_tuned", "paths"]

RATES = (0.03, 0.1, 0.3, 1.0)
NUMBERS = 2**24
"""Weights and features that are worked on at once."""


def _gathered(data: Interactions, rows: Tensor) -> Features:
    """Features of the rows `[…]`, `[…, …]`."""
    flat = rows.flatten()
    features: Features = {CONSTANT: torch.ones(len(flat), 1)}
    for side, table in data.sides.items():
        features |= take(table, data.index[side][flat])
    return {name: values.view(*rows.shape, *values.shape[1:]) for name, values in features.items()}


@torch.no_grad()
def paths(
    block: nn.Module,
    losses: Losses,
    data: Interactions,
    task: str,
    split: Split,
    rate: float,
    steps: int,
    prior_count: float,
    max_support: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk after chunk of tasks: places in the list of test rows `[n]`, and their logits after 0, 1, … `steps` steps,
    `[steps + 1, n, heads]`."""
    test = split.test.nonzero().flatten()
    grouped = TaskRows.of(data.index[task], data.count(task), split.support)
    judged = TaskRows.of(data.index[task][test], data.count(task))
    weights = {name: p.detach() for name, p in block.named_parameters()}
    width = sum(p.numel() for p in weights.values())
    per_row = 64 + sum(values[0].numel() for values in _gathered(data, torch.zeros(1, dtype=torch.int64)).values())
    support = grouped.size if max_support is None else grouped.size.clamp(max=max_support)
    tasks = (judged.size > 0).nonzero().flatten()

    def logits(own: Mapping[str, Tensor], features: Features) -> Tensor:
        found: Tensor = functional_call(block, dict(own), (features,))
        return found

    def loss(own: Mapping[str, Tensor], features: Features, shift: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        known = labels.isfinite().any(1)
        return losses.loss(logits(own, features) + shift, labels, weight).sum() / ((weight * known).sum() + prior_count)

    slope, score = vmap(grad(loss)), vmap(logits)
    for chunk in alike((support + judged.size)[tasks], max(1, NUMBERS // per_row), width // per_row):
        part = tasks[chunk]
        before, own_test = grouped.of_tasks(part, max_support), judged.of_tasks(part)
        place, there = padded(before, len(part))
        rows = before.rows[place] if len(before) else place
        asked, counted = padded(own_test, len(part))
        where = own_test.rows[asked]
        features, wanted = _gathered(data, rows), _gathered(data, test[where])
        shift = torch.zeros(*rows.shape, 1) if data.offset is None else data.offset[rows][..., None]
        labels, weight = data.labels[rows], data.weights[rows] * there
        own = {name: p.expand(len(part), *p.shape) for name, p in weights.items()}
        found = [score(own, wanted)[counted]]
        for _ in range(steps):
            slopes = slope(own, features, shift, labels, weight)
            own = {name: p - rate * slopes[name] for name, p in own.items()}
            found.append(score(own, wanted)[counted])
        yield where[counted], torch.stack(found)


class FineTuned(Personal[tuple[float, int]]):
    """The setting is (rate, steps)."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.problem, self.config = problem, config

    def _logits(self, base: PlainLearner, split: Split, rate: float, steps: int) -> Tensor:
        """Logits of the test rows after each step, `[steps + 1, test rows, heads]`."""
        block, losses = base.model.global_block, base.model.losses
        block.eval()
        data, settings = self.problem.data, self.config.adapt
        whole = torch.zeros(steps + 1, int(split.test.sum()), losses.heads)
        for where, found in paths(
            block, losses, data, self.problem.tasks[0], split, rate, steps, settings.prior_count, settings.max_support
        ):
            whole[:, where] = found
        return whole

    def choose(self, base: PlainLearner, split: Split) -> tuple[tuple[float, int], float]:
        rows, losses = split.test.nonzero().flatten(), base.model.losses
        best, setting = float("inf"), (RATES[0], 0)
        for rate in RATES:
            for step, logits in enumerate(self._logits(base, split, rate, self.config.rival.steps)):
                loss = mean_loss_of(losses, self.problem.data, rows, logits)
                if loss < best:  # not for one that is not a number
                    best, setting = loss, (rate, step)
        return setting, best

    def apply(self, base: PlainLearner, split: Split, setting: tuple[float, int]) -> Tensor:
        return self._logits(base, split, *setting)[-1]

    def told(self, setting: tuple[float, int]) -> Mapping[str, float]:
        return {"rate": setting[0], "steps": setting[1]}


def fine_tuned(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    return FineTuned(problem, config).fitted(problem, config, progress)
