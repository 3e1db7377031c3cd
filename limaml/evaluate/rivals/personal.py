"""What the methods share that train a base model first and then give each member something of its own.

How much is a setting that must not come from test rows. Where epochs are searched it is chosen on the validation rows. Where
all training rows are used, a part of them is held out as the protocol does, the base is trained without it, the setting is
chosen on it, and the base is trained again on everything. So such a method costs two trainings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from limaml.config import Config
from limaml.evaluate.baselines import ConstantBlock, PlainLearner, PlainModel
from limaml.evaluate.problem import Fitted, Problem
from limaml.meta.build import build_global_block
from limaml.meta.losses import Losses
from limaml.meta.outer import Epoch, Progress, fit
from limaml.tasks import Split, split_by_new_tasks, split_by_task_order
from limaml.types import Interactions

__all__ = ["Personal", "hold_out", "mean_loss_of", "train_base"]

Setting = TypeVar("Setting")

SHARE = 0.15


def hold_out(data: Interactions, split: Split, seed: int) -> Split:
    """The protocol of `split` once more, inside its training rows."""
    if split.protocol == "new_tasks":
        return split_by_new_tasks(data, split.task, seed=seed + 20_000, share=SHARE, among=split.train)
    return split_by_task_order(data, split.task, share=SHARE, among=split.train)


def train_base(
    problem: Problem, config: Config, train: Tensor, progress: Callable[[Progress], None] | None = None
) -> tuple[PlainLearner, Fitted]:
    """The method `base` on the rows `train`, and how training went."""
    heads = len(problem.losses)
    block = build_global_block(problem.specs, config.model, {}, heads) if problem.specs else ConstantBlock(heads)
    model = PlainModel(block, Losses(problem.losses)).to(config.train.device)
    learner = PlainLearner(model, problem.data, train, config.train, problem.validation)
    history = fit(learner, config.train, progress=progress)
    learner.model.cpu().requires_grad_(False)
    none = torch.zeros(0, dtype=torch.int64)
    return learner, Fitted(torch.zeros(0, heads), none, history)


def mean_loss_of(losses: Losses, data: Interactions, rows: Tensor, logits: Tensor) -> float:
    """Mean weighted loss of the rows `[n]` with these logits `[n, heads]`."""
    total = losses.of_rows(data, rows, logits).sum()
    return float(total.detach()) / max(data.labelled_weight(rows), 1e-12)


class Personal(ABC, Generic[Setting]):
    """A method that is a base model and something per member. `choose` finds a setting and its loss on a split's test
    rows; `apply` gives logits of a split's test rows `[n, heads]`; both may adapt on its support rows alone."""

    @abstractmethod
    def choose(self, base: PlainLearner, split: Split) -> tuple[Setting, float]: ...

    @abstractmethod
    def apply(self, base: PlainLearner, split: Split, setting: Setting) -> Tensor: ...

    @abstractmethod
    def told(self, setting: Setting) -> Mapping[str, float]: ...

    def fitted(
        self,
        problem: Problem,
        config: Config,
        progress: Callable[[Progress], None] | None,
        setting: Setting | None = None,
    ) -> Fitted:
        """Train, choose (unless there is a `setting`) and score."""
        split = problem.judged
        loss = None
        if problem.validation is None:
            if setting is None:
                inner = hold_out(problem.data, split, config.train.seed)
                setting, _ = self.choose(train_base(problem, config, inner.train, progress)[0], inner)
            base, trained = train_base(problem, config, split.train, progress)
        else:
            base, trained = train_base(problem, config, split.train, progress)
            if setting is None:
                setting, loss = self.choose(base, split)
        rows = split.test.nonzero().flatten()
        logits = self.apply(base, split, setting)
        if problem.validation is not None and loss is None:
            loss = mean_loss_of(base.model.losses, problem.data, rows, logits)
        history = trained.history
        if loss is not None:  # the base's losses found the epoch; this is what the method makes of it

            def as_judged(epoch: Epoch) -> Epoch:
                return replace(epoch, valid_loss=loss) if epoch.epoch == history.best else epoch

            history = replace(history, epochs=tuple(map(as_judged, history.epochs)))
        return Fitted(base.model.losses.outputs(logits).detach(), rows, history, chosen=self.told(setting))
