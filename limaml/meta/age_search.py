"""Do old rows deserve less weight? Asked of a model that was trained, on the rows that it was trained on.

Cross-fit cannot say: its support lies before and behind the query. So each task is cut at moments of its own in the second half
of its rows, adapted on what is older and judged on what follows, with all rows weighing alike and with shorter and shorter
half-lives. The shared weights have seen all of these rows, whatever the half-life; the embeddings have not seen those that they
are judged on.

A half-life is taken only where it surely helps: ages cost something (`limaml.embeddings.update` knows none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limaml.meta.age import HalfLife, ages
from limaml.meta.model import MetaModel
from limaml.meta.scorer import Held
from limaml.tasks import TaskBatch, TaskRows, task_batches, time_cut
from limaml.types import Interactions

__all__ = ["Side", "find_half_life"]

ROWS = 200_000  # of the tasks that are asked, at most
TASKS = 20  # fewer tell nothing
CUTS = 4  # moments of each task
EARLIEST = 0.5  # of its rows lie before them: its support is then about as long as the one that is served
BATCH_ROWS = 16_384
LONGEST = 2.0  # half-lives begin here, in what nine ages of ten lie below, and are halved
HALVINGS = 8
SURE = 2.0  # standard errors, over tasks
WORTH = 0.0003  # of the loss

Side = tuple[Held, Tensor | None]
"""Embeddings of the other task types, and the rows `[rows]` bool that they have not seen; None: no others, all rows."""


@torch.no_grad()
def find_half_life(
    model: MetaModel,
    data: Interactions,
    task: str,
    grouped: TaskRows,
    sides: Sequence[Side],
    seed: int,
) -> float | None:
    """The half-life of `task`'s rows in the unit of `ages`, or None: all weigh alike.

    `grouped` are the rows that may be asked; each of `sides` judges some of them, beside embeddings of the other task types that
    have not seen these. Of the half-lives whose gain in mean
    loss is `WORTH` of it, two standard errors taken off, the one is taken whose gain less one is largest. The model weighs
    all rows alike until it is told otherwise (`weigh_by_age`).
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = (grouped.size > 1).nonzero().flatten()
    tasks = tasks[torch.randperm(len(tasks), generator=generator)]
    tasks = tasks[torch.cumsum(grouped.size[tasks], 0) <= max(ROWS, int(grouped.size[tasks[:1]].sum()))]
    if len(tasks) < TASKS:
        return None
    usual = float(torch.quantile(ages(data, task, grouped.of_tasks(tasks), len(tasks)), 0.9))
    if usual <= 0:
        return None
    cap = model.adaptation.max_support
    cuts = [
        (cut.judging(judged), held)
        for _ in range(CUTS)
        for some in task_batches(tasks, grouped.size, BATCH_ROWS, generator)
        for cut in [time_cut(grouped, some, generator, cap, earliest=EARLIEST)]
        for held, judged in sides
    ]
    alike, weight = _losses(model, data, task, cuts, None)
    best, gain, least = None, 0.0, WORTH * abs(float(alike.sum())) / weight
    before, worse = -math.inf, 0
    for halving in range(HALVINGS):
        half_life = usual * LONGEST * 0.5**halving
        less = (alike - _losses(model, data, task, cuts, HalfLife(half_life))[0])[tasks]
        mean, error = float(less.sum()) / weight, float(less.std()) * math.sqrt(len(less)) / weight
        if mean - SURE * error >= least and mean - error > gain:
            best, gain = half_life, mean - error
        before, worse = mean - error, worse + 1 if mean - error <= before else 0
        if worse == 2:  # shorter ones are no better
            break
    model.weigh_by_age(task, None)
    return best


def _losses(
    model: MetaModel, data: Interactions, task: str, cuts: list[tuple[TaskBatch, Held]], half_life: HalfLife | None
) -> tuple[Tensor, float]:
    """Each task's loss on what follows its moments `[entries]` float64, summed over its rows; and the weight of all rows."""
    model.weigh_by_age(task, half_life)
    lost, weight = torch.zeros(data.count(task), dtype=torch.float64), 0.0
    for cut, held in cuts:
        if not len(cut.query):
            continue
        z = model.adapt(data, task, cut.tasks, cut.support)
        query = model.scored(data, task, cut.tasks, cut.query, held)
        each = model.losses.loss(query.logits(z), query.labels, query.weights).double().cpu()
        lost.index_add_(0, cut.tasks[cut.query.owner], each)
        weight += data.labelled_weight(cut.query.rows)
    return lost, max(weight, 1e-12)
