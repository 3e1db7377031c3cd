"""What a replayed model does when a period is over: nothing, refresh, fine-tune, train again.

A policy is trained on the past, then it serves a period with what it knows and takes the period's interactions in, over and
over. All begin with the same first training of their *family*, so that they differ in nothing else.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from limaml.config import Config
from limaml.evaluate.baselines import ConstantBlock, PlainLearner, PlainModel
from limaml.evaluate.replay_past import Timeline, View
from limaml.evaluate.replay_periods import Period
from limaml.meta.build import build_global_block, build_meta_model
from limaml.meta.learn import MetaLearner
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel
from limaml.meta.outer import History, Progress, fit
from limaml.meta.uncertainty import Posterior
from limaml.tasks import Split, TaskRows
from limaml.types import Interactions

__all__ = ["FAMILIES", "POLICIES", "Personalised", "Plain", "Policy", "Trained", "make_policy"]

Then = Literal["stale", "finetune", "refresh", "stream", "retrain"]
Tell = Callable[[Progress], None]

POLICIES: Mapping[str, tuple[str, Then]] = {
    "base_stale": ("base", "stale"),
    "base_retrained": ("base", "retrain"),
    "wide_and_deep_stale": ("wide_and_deep", "stale"),
    "wide_and_deep_finetuned": ("wide_and_deep", "finetune"),
    "wide_and_deep_retrained": ("wide_and_deep", "retrain"),
    "limaml_never": ("limaml", "stale"),
    "limaml_refreshed": ("limaml", "refresh"),
    "limaml_streamed": ("limaml", "stream"),
    "limaml_retrained": ("limaml", "retrain"),
    "limaml_items_never": ("limaml_items", "stale"),
    "limaml_items_refreshed": ("limaml_items", "refresh"),
    "limaml_items_streamed": ("limaml_items", "stream"),
}
"""Name → (the family whose first training it begins with, what it does after each period)."""

FAMILIES = tuple(dict.fromkeys(family for family, _ in POLICIES.values()))

GROWTH = 1.25
"""Where rows are read again, a task of a further task type is adapted when its rows are so many times those it was adapted on:
one more row does not move an item that has a hundred, and what refreshing items costs does not hang on how often it is done."""

PASSES = (1, 2, 4)
"""Passes over a period's rows that fine-tuning chooses from, on the last training rows."""


@dataclass
class Stopwatch:
    """Processor seconds of this process between entering and leaving, summed."""

    seconds: float = 0.0
    _began: float = field(default=0.0, repr=False)

    def __enter__(self) -> Stopwatch:
        self._began = time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.process_time() - self._began

    def read(self) -> float:
        """The seconds so far; counting begins anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass(frozen=True)
class Trained:
    """What a family's policies begin with: the first model, and what was found on the last training rows."""

    state: Mapping[str, Tensor]
    epochs: int  # found on the last training rows, kept for every later training
    passes: int = 0  # of fine-tuning, likewise; 0 for families that do not fine-tune


class Policy(ABC):
    """A model that walks through time. `watch` counts the processor time of training and adapting, never of encoding the
    table or of scoring, which every policy has alike."""

    def __init__(self, timeline: Timeline, config: Config, then: Then, tell: Tell | None = None) -> None:
        self.timeline, self.config, self.then, self.tell = timeline, config, then, tell
        self.losses = tuple(label.loss for label in timeline.schema.labels)
        self.watch = Stopwatch()

    @abstractmethod
    def build(self, view: View, rows: int) -> nn.Module:
        """A fresh model for what is known after `rows` rows."""

    @abstractmethod
    def learn(self, data: Interactions, split: Split | None, epochs: int | None) -> History:
        """Train the model that was built on all rows of `data`, or on those of `split.train`, judged by `split`."""

    @abstractmethod
    def serve(self, period: Period) -> Tensor:
        """Outputs `[rows, heads]` for the rows of a period: log-odds of binary heads, values of squared heads."""

    def begin(self, rows: int, trained: Trained) -> None:
        """Take up the family's first model, trained on the first `rows` rows."""
        self.epochs, self.passes = trained.epochs, trained.passes
        self.view = self.timeline.view(rows)
        self.module = self.build(self.view, rows)
        self.module.load_state_dict(dict(trained.state))
        self.module.eval()
        self.settle(rows)

    def train(self, rows: int, *, split: Split | None = None, epochs: int | None = None) -> History:
        """Train a fresh model on the first `rows` rows, with an encoder fitted on them."""
        self.view = self.timeline.view(rows)
        data = self.view.before(rows)
        with self.watch:
            torch.manual_seed(self.config.train.seed)
            self.module = self.build(self.view, rows)
            history = self.learn(data, split, epochs)
            self.module.cpu().eval()
        self.settle(rows)
        return history

    @abstractmethod
    def settle(self, rows: int) -> None:
        """What follows a training on the first `rows` rows."""

    def absorb(self, period: Period) -> None:
        """Take in the rows of a period that is over."""
        if self.then == "retrain":
            self.train(period.last, epochs=self.epochs)
        elif self.then == "finetune":
            self.finetune(period)
        elif self.then in ("refresh", "stream"):
            self.refresh(period)

    def finetune(self, period: Period) -> None:
        raise NotImplementedError(f"{type(self).__name__} is not fine-tuned.")

    def refresh(self, period: Period) -> None:
        raise NotImplementedError(f"{type(self).__name__} has nothing to refresh.")

    def settings(self, epochs: int | None) -> Config:
        """The config, for exactly `epochs` where given."""
        if epochs is None:
            return self.config
        exactly = {"epochs": epochs, "patience": epochs}
        return self.config.model_copy(update={"train": self.config.train.model_copy(update=exactly)})


class Plain(Policy):
    """A model without adaptation: `base`, or with learned embeddings of ids, `wide_and_deep`."""

    module: PlainModel

    def __init__(
        self, timeline: Timeline, config: Config, then: Then, tell: Tell | None = None, *, with_ids: bool
    ) -> None:
        super().__init__(timeline, config, then, tell)
        self.with_ids = with_ids

    def build(self, view: View, rows: int) -> PlainModel:
        tasks = [task.name for task in self.timeline.schema.tasks] if self.with_ids else []
        dims, specs, heads = dict.fromkeys(tasks, self.config.model.dim), view.encoder.specs, len(self.losses)
        empty = not specs and not dims
        block = ConstantBlock(heads) if empty else build_global_block(specs, self.config.model, dims, heads)
        ids = {task: (self.timeline.tasks_before(task, rows), dim) for task, dim in dims.items()}
        return PlainModel(block, Losses(self.losses), ids)

    def learn(self, data: Interactions, split: Split | None, epochs: int | None) -> History:
        config = self.settings(epochs).train
        rows = torch.ones(len(data), dtype=torch.bool) if split is None else split.train
        self.module.to(config.device)
        learner = PlainLearner(self.module, data, rows, config, split)
        self.known = learner.known
        return fit(learner, config, progress=self.tell)

    def settle(self, rows: int) -> None:
        if not hasattr(self, "known"):  # taken up, not trained here: every task of its rows has an id
            self.known = {
                task: torch.ones(table.num_embeddings - 1, dtype=torch.bool) for task, table in self._tables()
            }

    def _tables(self) -> list[tuple[str, nn.Embedding]]:
        return [(task, table) for task, table in self.module.deep.items() if isinstance(table, nn.Embedding)]

    @torch.no_grad()
    def serve(self, period: Period) -> Tensor:
        data = self.view.serving(period.first, period.last)
        known = {task: _padded(mask, data.count(task)) for task, mask in self.known.items()}
        rows = torch.arange(period.first, period.last)
        parts = [self.module.logits(data, part, known) for part in torch.split(rows, 65536)]
        return self.module.losses.outputs(torch.cat(parts))

    def finetune(self, period: Period) -> None:
        """A few passes over the new rows alone. A new id begins as what stands for ids that were not trained on."""
        data = self.view.before(period.last)
        rows = torch.arange(len(data)) >= period.first
        config = self.settings(self.passes).train
        with self.watch:
            for tables in (self.module.deep, self.module.wide):
                for task, table in tables.items():
                    assert isinstance(table, nn.Embedding)
                    tables[task] = _grown(table, _padded(self.known[task], data.count(task)))
            scale = {name: value.clone() for name, value in self.module.losses.named_buffers()}
            learner = PlainLearner(self.module, data, rows, config)
            for name, value in self.module.losses.named_buffers():
                value.copy_(scale[name])  # labels keep the unit that the weights were trained in
            learner.weight = float(data.weights.sum())  # the prior was paid for by all rows, not by these alone
            self.known = {task: torch.ones(data.count(task), dtype=torch.bool) for task in self.known}
            learner.known = self.known
            fit(learner, config, progress=self.tell)
            self.module.eval()


class Personalised(Policy):
    """A meta model, and what stands for the store: the table of meta embeddings, and with Newton's solver their posteriors.

    Newton takes new rows in without the old ones, as `limaml.embeddings.update` does: the posterior of a task's rows so far is the
    prior of those that come, one step at a time. A solver that has no posterior, and one whose rows lose their weight with
    age, adapts a task again on its last rows.
    """

    module: MetaModel

    def recursive(self, task: str) -> bool:
        settings = self.config.adapt
        return settings.solver == "newton" and settings.steps > 0 and task not in self.module.half_lives

    def build(self, view: View, rows: int) -> MetaModel:
        tasks = [task.name for task in self.timeline.schema.tasks]
        return build_meta_model(view.encoder.specs, tasks, self.losses, self.config.model, self.config.adapt)

    def learn(self, data: Interactions, split: Split | None, epochs: int | None) -> History:
        config = self.settings(epochs).train
        rows = torch.ones(len(data), dtype=torch.bool) if split is None else split.train
        return fit(MetaLearner(self.module.to(config.device), data, rows, config, split), config, progress=self.tell)

    @torch.no_grad()
    def settle(self, rows: int) -> None:
        """Embed every task that has appeared."""
        data = self.view.before(rows)
        with self.watch:
            self.tables, self.factors, self.adapted_on = {}, {}, {}
            for task in self.module.tasks:
                among = TaskRows.of(data.index[task], data.count(task))
                if self.recursive(task) and self.then in ("refresh", "stream"):
                    self.tables[task], known = self.module.embed(data, task, among, uncertainty=True)
                    # with room for those that will appear, so that they are written in place
                    ever = known.new_zeros(self.timeline.plain.count(task), known.shape[1])
                    self.factors[task] = self.module.newton(task).prior_factor(ever)
                    self.factors[task][: len(known)] = known
                else:
                    self.tables[task], self.adapted_on[task] = self.module.embed(data, task, among), among.size

    def refresh(self, period: Period) -> None:
        """Take the new rows in; the blocks stay as they are."""
        data = self.view.before(period.last)
        with self.watch:
            tables = self.extended(self.tables, data)
            for task in self.module.tasks:
                if task in self.factors:
                    again, vectors = self._updated(data, task, tables[task], period)
                else:
                    again, vectors = self._adapted_again(data, task, period)
                tables[task] = tables[task].index_copy(0, again, vectors)
            self.tables = tables

    @torch.no_grad()
    def _updated(self, data: Interactions, task: str, table: Tensor, period: Period) -> tuple[Tensor, Tensor]:
        """The tasks of the new rows `[n]`, and their embeddings `[n, dim]` by what was known of them and these rows alone."""
        factors, index = self.factors[task], data.index[task]
        new = torch.arange(len(index)) >= period.first
        again, among = torch.unique(index[new]), TaskRows.of(index, data.count(task), new)
        before = Posterior(table[again], factors[again])
        after = self.module.embed(data, task, among, again, uncertainty=True, before=before, steps=1)
        factors[again] = after.factor
        return again, after.mean

    def _adapted_again(self, data: Interactions, task: str, period: Period) -> tuple[Tensor, Tensor]:
        """Tasks `[n]` and their embeddings `[n, dim]` by their last rows, old and new: tasks of the first type whenever they have a
        new row, those of others when their rows have grown by `GROWTH`."""
        index, entries = data.index[task], data.count(task)
        size = torch.bincount(index, minlength=entries)
        touched = torch.zeros(entries, dtype=torch.bool)
        touched[index[period.first :]] = True
        before = torch.cat([self.adapted_on[task], size.new_zeros(entries - len(self.adapted_on[task]))])
        if task != self.module.tasks[0]:
            touched &= size >= GROWTH * before
        self.adapted_on[task] = torch.where(touched, size, before)
        again = touched.nonzero().flatten()
        return again, self.module.embed(data, task, TaskRows.of(index, entries, touched[index]), again)

    @torch.no_grad()
    def extended(self, tables: Mapping[str, Tensor], data: Interactions) -> dict[str, Tensor]:
        """The tables with the cold embeddings of tasks that they do not hold."""
        whole = {}
        for task, table in tables.items():
            new = torch.arange(len(table), data.count(task))
            whole[task] = torch.cat([table, self.module.cold(data, task, new)]) if len(new) else table
        return whole

    def serve(self, period: Period) -> Tensor:
        return self.serve_with(self.tables, period)

    def serve_with(self, tables: Mapping[str, Tensor], period: Period) -> Tensor:
        """`serve` with other embeddings than the latest."""
        data = self.view.serving(period.first, period.last)
        rows = torch.arange(period.first, period.last)
        return self.module.losses.outputs(self.module.predict(data, rows, self.extended(tables, data)))


def make_policy(timeline: Timeline, config: Config, family: str, then: Then, tell: Tell | None = None) -> Policy:
    """A policy of a family. `timeline` and `config` are those of the family."""
    if family.startswith("limaml"):
        return Personalised(timeline, config, then, tell)
    return Plain(timeline, config, then, tell, with_ids=family == "wide_and_deep")


def _padded(mask: Tensor, size: int) -> Tensor:
    """The mask for the first `size` entries; those behind its end are not known."""
    return torch.cat([mask[:size], torch.zeros(max(0, size - len(mask)), dtype=torch.bool)])


def _grown(table: nn.Embedding, known: Tensor) -> nn.Embedding:
    """The table with a row for each entry of `known` `[entries]`; those not known are copies of row 0."""
    rows = table.weight[:1].detach().repeat(len(known) + 1, 1)
    old = torch.cat([torch.ones(1, dtype=torch.bool), known[: table.num_embeddings - 1]]).nonzero().flatten()
    rows[old] = table.weight.detach()[old]
    return nn.Embedding(len(rows), table.embedding_dim, _weight=rows)
