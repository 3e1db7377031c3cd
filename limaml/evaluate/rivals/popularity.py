"""Two methods without features or network: how much everybody likes a thing, and how much one member likes anything.

`popularity`: the mean, and a random effect of what the row is about. `member_mean`: beside it a random effect of the
member, found on the member's support; the Rasch model of tests (Rasch 1960), and the "user and item bias" of Koren, Bell and
Volinsky, IEEE Computer 2009, in log-odds. Shrinkage is learned from the training rows (`effects`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from limaml.config import Config
from limaml.evaluate.problem import Fitted, Problem, Run
from limaml.evaluate.rivals.effects import Effects, fit_effects
from limaml.meta.losses import Losses
from limaml.meta.outer import Epoch, History, Progress
from limaml.types import ROW, Interactions

__all__ = ["entity_of", "popularity"]

ROUNDS = 4
"""Of effects of things and of members, one after the other: each is found beside what the other is now."""


def entity_of(data: Interactions, tasks: tuple[str, ...]) -> tuple[Tensor, int]:
    """What each row is about `[rows]`, and how many such things there are.

    The second task type where there is one, else the distinct combinations of row features; without them all rows are
    about the same.
    """
    if len(tasks) > 1:
        return data.index[tasks[1]], data.count(tasks[1])
    return data.index[ROW], max(1, data.count(ROW))


def popularity(member: bool) -> Run:
    """The method `popularity`, or with effects of members `member_mean`."""

    @torch.no_grad()
    def run(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
        started = time.perf_counter()
        data, split, task = problem.data, problem.judged, problem.tasks[0]
        losses = Losses(problem.losses)
        losses.standardise(data.labels[split.train], data.weights[split.train])
        thing, things = entity_of(data, problem.tasks)
        owner, members = data.index[task], data.count(task)

        def fit(rows: Tensor, given: Tensor, index: Tensor, entries: int, precision: Tensor | None = None) -> Effects:
            return fit_effects(losses, data.labels[rows], data.weights[rows], given, index[rows], entries, precision)

        train, support, test = (part.nonzero().flatten() for part in (split.train, split.support, split.test))
        shift = torch.zeros(len(data), 1, dtype=torch.float64)
        if data.offset is not None:
            shift = data.offset[:, None].double()
        flat = torch.zeros(len(data), dtype=torch.int64)
        nearly_free = torch.full((losses.heads,), 1e-3)
        mean = fit(train, shift[train].expand(-1, losses.heads), flat, 1, nearly_free).values
        of_things = fit(train, mean + shift[train], thing, things)
        of_members = None
        for _ in range(ROUNDS if member else 0):
            given = mean + shift[train] + of_things.values[thing[train]]
            of_members = fit(train, given, owner, members)
            given = mean + shift[train] + of_members.values[owner[train]]
            of_things = fit(train, given, thing, things)
        logits = mean + of_things.values[thing]
        if of_members is not None:  # again, from the support, which is more than the training rows for new members
            of_members = fit(support, (logits + shift)[support], owner, members, of_members.precision)
            logits = logits + of_members.values[owner]
        chosen = {f"precision of things, head {i}": float(v) for i, v in enumerate(of_things.precision)}
        if of_members is not None:
            chosen |= {f"precision of members, head {i}": float(v) for i, v in enumerate(of_members.precision)}

        def loss(rows: Tensor) -> float:
            total = losses.loss((logits + shift)[rows], data.labels[rows], data.weights[rows]).sum()
            return float(total) / max(data.labelled_weight(rows), 1e-12)

        valid = None if problem.validation is None else loss(test)
        epoch = Epoch(1, loss(train), valid, time.perf_counter() - started)
        outputs = losses.outputs(logits[test]).float()
        return Fitted(outputs.detach(), test, History((epoch,), 1), chosen=chosen)

    return run
