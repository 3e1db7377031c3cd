"""How sure the model is of a logit: the posterior of a task's meta embedding, carried through the global block.

Newton's H is the precision of the posterior z ~ N(mean, H⁻¹) (Laplace's approximation). With J = ∂logit/∂z of a row,

    sd² = J H⁻¹ Jᵀ        summed over the task types that the row has

H knows of the task's support and of nothing else, so sd is right up to a factor: `calibrate` finds it on tasks that the
model was not trained on. What it is for: explore by `mean + c · scale · sd`, or by scoring with `Posterior.sample`
(Thompson sampling). The probability of a label stays σ(mean): that is what the outer loop trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from limaml.errors import DataError
from limaml.meta.scorer import Held, RowScorer
from limaml.meta.support import Support
from limaml.tasks import Split, TaskRows
from limaml.types import Interactions, Rows

if TYPE_CHECKING:
    from limaml.meta.model import MetaModel

__all__ = ["Posterior", "calibrate", "logit_sd"]

NUMBERS_PER_CHUNK = 2**24
"""Entries of gathered factors at a time, `rows · dim²`."""

MODE_STEPS, HALVINGS = 4, 4
FARTHEST = 12
"""Steps of √2 that a scale may lie away from 1."""


class Posterior(NamedTuple):
    """What is known of the meta embeddings of some tasks: normal, with covariance (L Lᵀ)⁻¹."""

    mean: Tensor  # (tasks, dim): the meta embeddings themselves
    factor: Tensor  # (tasks, dim, dim): L, lower triangular

    def sample(self, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A draw of every task's meta embedding, `[tasks, dim]`, its standard deviation multiplied by `scale`.

        To score with it in place of the mean is Thompson sampling: a task's rows are then uncertain together.
        """
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        spread = torch.linalg.solve_triangular(self.factor.mT, noise.unsqueeze(-1), upper=True)
        drawn: Tensor = self.mean + scale * spread.squeeze(-1)
        return drawn


@torch.no_grad()
def logit_sd(model: MetaModel, data: Interactions, rows: Tensor, posteriors: Mapping[str, Posterior]) -> Tensor:
    """Standard deviation of the logits of the rows `[n]`, `[n, heads]`, in the unit of `MetaModel.logits`.

    `posteriors` holds every entry of each task type, as `MetaModel.embed(..., uncertainty=True)` gives them. A task
    without support has the prior's sd. Multiply by the scale that `calibrate` finds; for a squared head also by
    `model.losses.scale`, to have the label's unit. The noise of the label itself is not in it.
    """
    means = {task: posterior.mean for task, posterior in posteriors.items()}
    model.refuse_missing(means)
    found = [torch.zeros(0, model.losses.heads, dtype=model.dtype, device=model.device)]
    widest = max(mean.shape[1] for mean in means.values())
    for part in torch.split(rows, max(1, NUMBERS_PER_CHUNK // widest**2)) if len(rows) else ():
        variance = torch.zeros(len(part), model.losses.heads, dtype=model.dtype, device=model.device)
        for task, posterior in posteriors.items():
            entry = data.index[task][part]
            distinct, owner = torch.unique(entry, return_inverse=True)
            held: Held = {other: mean.__getitem__ for other, mean in means.items() if other != task}
            scorer = RowScorer(model.global_block, data, task, distinct, Rows(part, owner), held)
            _, jacobians = _logits_and_jacobians(scorer, posterior.mean[entry])
            for head, jacobian in enumerate(jacobians):
                half = torch.linalg.solve_triangular(posterior.factor[entry], jacobian.unsqueeze(-1), upper=False)
                variance[:, head] += half.squeeze(-1).square().sum(1)
        found.append(variance.sqrt())
    return torch.cat(found)


def calibrate(model: MetaModel, data: Interactions, split: Split) -> float:
    """The factor of the sd, up to 64, under which the test rows of `split` are most likely; 1 is what the model believes.

    Each task of type `split.task` is adapted on its support, and its test rows are judged *together*: the likelihood is
    that of all their labels under one z ~ N(mean, scale² H⁻¹), integrated over z (by Laplace's
    method). Row by row the labels would say nothing, since σ(mean) is already what training made
    the likeliest; that a task's rows err together is what shows how far off its embedding is.

    The tasks with test rows must not have been trained on (`split_by_new_tasks`): the global block has learned the rows
    of its training tasks by heart, which looks as if their embeddings explained more than they do. Raises `DataError` where no test row has a label.
    """
    task, rows = split.task, split.test.nonzero().flatten()
    index, entries = data.index[task], data.count(task)
    judged = TaskRows.of(index, entries, split.test)
    tasks = (judged.size > 0).nonzero().flatten()
    if not data.labelled_weight(rows) > 0:
        raise DataError(f"Split '{split.protocol}' has no labelled test rows of task '{task}' to find a scale on.")
    others = {
        other: model.embed(data, other, TaskRows.of(data.index[other], data.count(other), split.support))
        for other in model.tasks
        if other != task
    }
    held: Held = {other: table.__getitem__ for other, table in others.items()}
    among = TaskRows.of(index, entries, split.support)
    parts = []
    for part in torch.split(tasks, 1024):
        query = Support(model.global_block, model.losses, data, task, part, judged.of_tasks(part), held)
        posterior = model.embed(data, task, among, part, uncertainty=True)
        parts.append(_Judged(query, posterior, posterior.mean))
    return _least(lambda scale: sum(part.loss(scale) for part in parts))


@dataclass
class _Judged:
    """Held-out rows of some tasks, the posterior they are judged by, and where the two together were least so far."""

    query: Support
    posterior: Posterior
    mode: Tensor  # (tasks, dim)

    @torch.no_grad()
    def loss(self, scale: float) -> float:
        """−log of the likelihood of all labels of each task together, integrated over z by Laplace's method, summed over
        tasks, up to a constant. Scales must be asked for in small steps: each starts from the mode of the one before."""
        mean, factor = self.posterior
        precision = factor @ factor.mT / scale**2

        def objective(z: Tensor) -> Tensor:
            off = (factor.mT @ (z - mean).unsqueeze(-1)).squeeze(-1) / scale
            return self.query.loss(z).double() + off.double().square().sum(1) / 2

        least = objective(self.mode)
        for _ in range(MODE_STEPS):
            slope, information = _system(self.query, self.mode)
            slope = slope + (precision @ (self.mode - mean).unsqueeze(-1)).squeeze(-1)
            step = torch.linalg.solve(precision + information, slope)
            for _ in range(1 + HALVINGS):
                after = objective(self.mode - step)
                better = (after <= least)[:, None]
                if bool(better.all()):
                    break
                step = torch.where(better, step, step / 2)
            self.mode = torch.where(better, self.mode - step, self.mode)  # a task that no step helps stays
            least = torch.minimum(after, least)
        _, information = _system(self.query, self.mode)
        volume = torch.logdet((precision + information).double()) - torch.logdet(precision.double())
        return float((least + volume / 2).sum())


@torch.no_grad()
def _system(query: Support, z: Tensor) -> tuple[Tensor, Tensor]:
    """Slope `[tasks, dim]` and Gauss-Newton matrix `[tasks, dim, dim]` of the rows' loss by the meta embeddings."""
    logits, jacobians = _logits_and_jacobians(query.scorer, z.index_select(0, query.segments.owner))
    slopes, curvatures = query.losses.slope_and_curvature(query.shifted(logits), query.labels, query.weights)
    slope, information = torch.zeros_like(z), z.new_zeros(*z.shape, z.shape[1])
    for head, jacobian in enumerate(jacobians):
        slope = slope + query.segments.sum(slopes[:, head, None] * jacobian)
        information = information + query.segments.gram(curvatures[:, head, None] * jacobian, jacobian)
    return slope, information


def _logits_and_jacobians(scorer: RowScorer, z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits `[n, heads]`, and head by head ∂logit/∂z of each row `[n, dim]`; 0 for a head that does not read z."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        logits = scorer.per_row(leaf)
        jacobians = [
            torch.autograd.grad(
                logits[:, head].sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            for head in range(logits.shape[1])
        ]
    return logits.detach(), jacobians


def _least(loss: Callable[[float], float]) -> float:
    """The scale between 1/64 and 64 at which `loss` is least: a walk from 1 in steps of √2, and a parabola at its end."""
    found = {place: loss(2 ** (place / 2)) for place in (0, 1)}
    way = 1 if found[1] < found[0] else -1
    place = max(0, way)
    while abs(place) < FARTHEST:
        found[place + way] = loss(2 ** ((place + way) / 2))
        if found[place + way] >= found[place]:
            break
        place += way
    else:
        return 2 ** (place / 2)
    below, here, above = found[place - 1], found[place], found[place + 1]
    bend = below - 2 * here + above
    return 2 ** ((place + (0.5 * (below - above) / bend if bend > 0 else 0.0)) / 2)
