"""How the personalised model learns: adapt tasks on support rows, judge them on query rows, for every task type in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limaml.config import TrainConfig
from limaml.meta.age import HalfLife, warn_if_short
from limaml.meta.age_search import Side, find_half_life
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.model import MetaModel
from limaml.meta.scorer import Held
from limaml.meta.survey import Totals
from limaml.tasks import Split, TaskBatch, TaskRows, cross_fit, task_batches, time_cut
from limaml.types import Interactions

__all__ = ["MetaBatch", "MetaLearner"]


@dataclass(frozen=True)
class MetaBatch:
    """A batch of tasks of one type. `side` is the coin's side that is support."""

    task: str
    batch: TaskBatch
    side: bool | None


class MetaLearner:
    """Meta-learns `model` on the training rows of `split`; `validation` splits those again, or is None.

    With cross-fit, a fair coin per row and epoch deals all rows into two parts. Every task is adapted on one part and
    judged on the other, both ways round. With several task types the query is scored with the other types' embeddings
    adapted on the same part as the support, as of the start of the epoch, so that no embedding has seen its query.
    A share of the gradient is that of the query scored with one embedding for all tasks (`train.anybody`), so that the global
    block ranks for those of whom nothing is known as well; the losses that are told are those of adapted tasks alone.
    With `totals`, those of all windows, `data` is one window of more rows than are in memory: then the labels' scale is
    already the model's, and of the first type's tasks `most_tasks` are drawn for each epoch. `quiet`: no warnings.
    Where rows weigh by age, ages count back from the newest row of the support's part, though the query lies before and
    behind it: what is learned is how fast rows lose their say about their task's newest moment, which is what serving
    asks, with a half-life that is rather too long than too short.
    """

    covers = 1  # of the windows of an epoch: all its rows are in memory
    steady = True
    _most: int | None = None

    def __init__(
        self,
        model: MetaModel,
        data: Interactions,
        train: Tensor,
        config: TrainConfig,
        validation: Split | None = None,
        totals: Totals | None = None,
        *,
        most_tasks: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.module: nn.Module = model
        self.model, self.data, self.config, self.validation = model, data, config, validation
        self.train = train
        self.grouped = {task: TaskRows.of(data.index[task], data.count(task), train) for task in model.tasks}
        if model.adaptation.half_life is not None and not quiet:
            for task, grouped in self.grouped.items():
                warn_if_short(model.adaptation.half_life, data, task, grouped)
        if totals is None:
            totals = Totals.of(data, train)
            model.losses.take_scale(totals.labels)
        self.weight, self._rows, self._most = totals.weight, totals.rows, most_tasks
        self._others: dict[tuple[str, bool | None], Tensor] = {}
        self.steady = len(model.tasks) == 1

    def fast_parameters(self) -> list[nn.Parameter]:
        return fast_parameters(self.model)

    def windows_per_epoch(self) -> int:
        return 1

    def windows(self, generator: torch.Generator, ranks: Ranks = ALONE, start: int = 0) -> Iterator[MetaLearner]:
        yield self

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[MetaBatch]:
        cap = self.model.adaptation.max_support
        coin = torch.rand(len(self.data), generator=generator) < 0.5
        crossed = self.config.query == "cross_fit"
        made: list[MetaBatch] = []
        for task, grouped in self.grouped.items():
            present = (grouped.size > 0).nonzero().flatten()
            if self._most is not None and task == self.model.tasks[0] and len(present) > self._most:
                present = present[torch.randperm(len(present), generator=generator)[: self._most]]
            for tasks in task_batches(present, grouped.size, self.config.batch_of(self._rows), generator):
                if crossed:
                    made += [
                        MetaBatch(task, cross_fit(grouped, tasks, coin, side, cap), side) for side in (True, False)
                    ]
                else:
                    made.append(MetaBatch(task, time_cut(grouped, tasks, generator, cap), None))
        if len(self.model.tasks) > 1:
            self._adapt_others(coin if crossed else None, ranks)
        made = [batch for batch in made if len(batch.batch.query)]  # all rows on the support's side: nothing to judge
        return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]

    def share(self, batch: MetaBatch, ranks: Ranks) -> MetaBatch | None:
        """This rank's tasks of a batch, None if there are none with a query; shares are about equal by their rows."""
        whole = batch.batch
        rows = (torch.bincount(r.owner, minlength=len(whole.tasks)) for r in (whole.support, whole.query))
        part = whole.of(ranks.share(sum(rows, torch.zeros(len(whole.tasks)))))
        return MetaBatch(batch.task, part, batch.side) if len(part.query) else None

    def _adapt_others(self, coin: Tensor | None, ranks: Ranks) -> None:
        """Embeddings of every task on each part of the rows, as of now: what the other types' queries are scored with."""
        for task, grouped in self.grouped.items():
            parts: dict[bool | None, TaskRows] = {None: grouped}
            if coin is not None:
                index, entries = self.data.index[task], self.data.count(task)
                parts = {side: TaskRows.of(index, entries, self.train & (coin == side)) for side in (True, False)}
            for side, part in parts.items():
                every = torch.arange(self.data.count(task))
                self._others[task, side] = shared_embeddings(self.model, self.data, task, part, every, ranks)

    def loss(self, batch: MetaBatch) -> tuple[Tensor, float]:
        return self._row_losses(batch).sum(), self.data.labelled_weight(batch.batch.query.rows)

    def _row_losses(self, batch: MetaBatch) -> Tensor:
        return self._judged(batch, self.model.adapt(self.data, batch.task, batch.batch.tasks, batch.batch.support))

    def _judged(self, batch: MetaBatch, z: Tensor) -> Tensor:
        """Losses `[n]` of the query rows, their tasks adapted to `z` `[tasks, dim]`."""
        task, tasks = batch.task, batch.batch.tasks
        query = self.model.scored(self.data, task, tasks, batch.batch.query, self._held(task, batch.side))
        adapted = self.model.losses.loss(query.logits(z), query.labels, query.weights)
        if not self.config.anybody or not self.model.adaptation.steps:
            return adapted
        logits = query.logits(self.model.anybody_of(self.data, task, tasks))
        anybody = self.model.losses.loss(logits, query.labels, query.weights)
        return adapted + self.config.anybody * (anybody - anybody.detach())  # the slope of both, the value of one

    def _held(self, task: str, side: bool | None) -> Held:
        """The other task types' embeddings, adapted on one side of the rows."""
        return {other: self._others[other, side].__getitem__ for other in self.model.tasks if other != task}

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Find out whether old rows deserve less weight (`adapt.find_half_life`). With several task types each half of the
        rows is judged beside embeddings of the others that were adapted on the other half."""
        if not self.model.adaptation.seeks_half_life:
            return
        for task in self.model.tasks:
            self.model.weigh_by_age(task, None)
        coin = None
        if len(self.model.tasks) > 1:
            coin = torch.rand(len(self.data), generator=torch.Generator().manual_seed(self.config.seed)) < 0.5
            self._adapt_others(coin, ranks)
        found = {}
        for task, grouped in self.grouped.items():
            sides: list[Side] = [({}, None)]
            if coin is not None:
                sides = [(self._held(task, side), coin != side) for side in (True, False)]
            found[task] = find_half_life(self.model, self.data, task, grouped, sides, self.config.seed)
        for task, half_life in found.items():
            (agreed,) = ranks.sum(half_life or 0.0 if ranks.leads else 0.0)
            self.model.weigh_by_age(task, HalfLife(agreed) if agreed else None)

    def tasks_in(self, batch: MetaBatch) -> int:
        return len(batch.batch.tasks)

    @torch.no_grad()
    def blame(self, batch: MetaBatch) -> str:
        bad = (~self._row_losses(batch).isfinite()).nonzero().flatten().cpu()
        if not len(bad):
            return "The loss of no single row is to blame."
        owner = int(batch.batch.query.owner[bad[0]])
        key = self.data.ids[batch.task][int(batch.batch.tasks[owner])]
        row = int(batch.batch.query.rows[bad[0]])
        return f"Task {batch.task}:{key} is the first to blame, at row {row}; {len(bad)} query rows are affected."

    @torch.no_grad()
    def validate(self, ranks: Ranks = ALONE) -> float | None:
        if self.validation is None:
            return None
        return mean_loss(self.model, self.data, self.validation, ranks)


def shared_embeddings(
    model: MetaModel, data: Interactions, task: str, among: TaskRows, wanted: Tensor, ranks: Ranks
) -> Tensor:
    """Meta embeddings of the tasks `wanted` `[n]` in a table of all tasks, `[entries, dim]`; zeros for the others. Each
    rank adapts its share of them."""
    mine = wanted if ranks.world == 1 else wanted[ranks.share(among.size[wanted])]
    found = model.embed(data, task, among, mine)
    table = found.new_zeros(data.count(task), found.shape[1])
    table[mine.to(table.device)] = found
    return ranks.joint(table)


def fast_parameters(model: MetaModel) -> list[nn.Parameter]:
    """What takes the solvers' learning rate."""
    return [p for part in (model.solvers, model.half_lives, model.losses) for p in part.parameters()]


def mean_loss(model: MetaModel, data: Interactions, split: Split, ranks: Ranks = ALONE) -> float:
    """Mean loss of the split's test rows, every task adapted on its support. All `ranks` share the work and the result."""
    total, weight = summed_loss(model, data, split, ranks)
    return total / max(weight, 1e-12)


@torch.no_grad()
def summed_loss(model: MetaModel, data: Interactions, split: Split, ranks: Ranks = ALONE) -> tuple[float, float]:
    """The sum of those losses, and of the weights."""
    tables = {}
    rows = split.test.nonzero().flatten()
    for task in model.tasks:
        grouped = TaskRows.of(data.index[task], data.count(task), split.support)
        wanted = torch.unique(data.index[task][rows])
        tables[task] = shared_embeddings(model, data, task, grouped, wanted, ranks)
    rows = rows[ranks.share(torch.ones(len(rows)))]
    losses = model.losses.of_rows(data, rows, model.predict(data, rows, tables))
    total, weight = ranks.sum(float(losses.sum()), data.labelled_weight(rows))
    return total, weight
