"""The method `random_effects`: a ridge regression per member on what the base model's last hidden layer says of a row.

Zhang et al., "GLMix: Generalized Linear Mixed Models For Large-Scale Response Prediction", KDD 2016, and its trainer GDMix
(LinkedIn). The base model's logit is frozen and given; a member's coefficients and intercept are found on its support by
Newton steps, with a ridge penalty each; with several task types, one after the other, each beside those found before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from limaml.config import Adaptation, Config
from limaml.evaluate.baselines import PlainLearner
from limaml.evaluate.problem import Fitted, Problem
from limaml.evaluate.rivals.cavia import Context
from limaml.evaluate.rivals.personal import Personal, mean_loss_of
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel
from limaml.meta.newton import NewtonSolver
from limaml.meta.outer import Progress
from limaml.tasks import Split, TaskRows
from limaml.types import ROW, Features, Interactions, embedding_name

__all__ = ["RandomEffects", "linear_effects", "random_effects"]

INTERCEPTS, COEFFICIENTS = (0.3, 1.0, 3.0, 10.0, 30.0), (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
NONE = 1e7
STEPS = 8

Penalties = tuple[float, float]
"""Of a member's intercept, and of each of its coefficients (on inputs of standard deviation 1)."""


class _Linear(nn.Module):
    """Logits that are given, plus a member's linear function of the inputs."""

    def __init__(self, task: str, heads: int) -> None:
        super().__init__()
        self.name, self.heads = embedding_name(task), heads

    def forward(self, features: Features) -> Tensor:
        own = features[self.name].view(-1, self.heads, features["inputs"].shape[1])
        return features["given"] + (own * features["inputs"][:, None]).sum(-1)


@torch.no_grad()
def linear_effects(
    losses: Losses, data: Interactions, task: str, support: Tensor, inputs: Tensor, given: Tensor, precision: Tensor
) -> Tensor:
    """Given logits and effects of all rows, `[rows, heads]`: each task's coefficients of `inputs` `[rows, width]` beside
    the logits `given` `[rows, heads]`, with ridge penalties `precision` `[width]`, found on its `support` rows."""
    heads, every = losses.heads, torch.arange(len(data))
    sides: dict[str, Features] = {task: {}, ROW: {"inputs": inputs, "given": given}}
    rows = replace(data, sides=sides, index={task: data.index[task], ROW: every}, ids={task: data.ids[task]})
    settings = Adaptation(solver="newton", steps=STEPS, max_support=None)
    context = Context(heads * inputs.shape[1])
    model = MetaModel(_Linear(task, heads), {task: context}, losses=losses.kinds, adaptation=settings).to(inputs.dtype)
    model.losses.load_state_dict(losses.state_dict())
    cast(NewtonSolver, model.solvers[task]).log_precision.copy_(precision.log().repeat(heads))
    z = model.embed(rows, task, TaskRows.of(data.index[task], data.count(task), support))
    own = z.view(-1, heads, inputs.shape[1])[data.index[task]]
    return given + (own * inputs[:, None]).sum(-1)


@contextmanager
def _inputs_of(layer: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """What `layer` is given, call by call."""
    hook = layer.register_forward_pre_hook(lambda _, given: into.append(given[0].detach()))
    try:
        yield
    finally:
        hook.remove()


class RandomEffects(Personal[Penalties]):
    """`problem` says which task types have effects, and on which rows."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def _inputs(self, base: PlainLearner, split: Split) -> tuple[Interactions, Split, Tensor, Tensor]:
        """The support and test rows alone, their split, `[rows, 1 + hidden]` of the base model, and its logits."""
        data, wanted = self.problem.data, split.support | split.test
        rows = wanted.nonzero().flatten()
        hidden: list[Tensor] = []
        mlp = getattr(base.model.global_block, "mlp", None)
        if mlp is None:
            given = base.predict(rows)
        else:
            with _inputs_of(mlp[-1], hidden):
                given = base.predict(rows)
        inputs = torch.ones(len(rows), 1)
        if hidden:
            h = torch.cat(hidden).cpu()
            known = h[split.support[rows]] if bool(split.support.any()) else h
            deviation, mean = torch.std_mean(known, 0, correction=0)
            inputs = torch.cat([inputs, torch.where(deviation > 1e-6, (h - mean) / deviation.clamp(min=1e-6), 0.0)], 1)
        few = replace(
            data,
            index={side: index[rows] for side, index in data.index.items()},
            labels=data.labels[rows],
            weights=data.weights[rows],
            time=data.time[rows],
            offset=None if data.offset is None else data.offset[rows],
        )
        train, support, test = (mask[rows] for mask in (split.train, split.support, split.test))
        return few, Split(split.protocol, split.task, train, support, test), inputs, given

    def _logits(
        self, base: PlainLearner, few: Interactions, split: Split, inputs: Tensor, given: Tensor, penalties: Penalties
    ) -> Tensor:
        intercept, coefficient = penalties
        precision = torch.full((inputs.shape[1],), coefficient, dtype=inputs.dtype)
        precision[0] = intercept
        for task in self.problem.tasks:
            given = linear_effects(base.model.losses, few, task, split.support, inputs, given, precision)
        return given[split.test]

    def choose(self, base: PlainLearner, split: Split) -> tuple[Penalties, float]:
        few, own, inputs, given = self._inputs(base, split)
        rows = own.test.nonzero().flatten()

        def best(grid: list[Penalties]) -> tuple[Penalties, float]:
            tried = []
            for penalties in grid:
                logits = self._logits(base, few, own, inputs, given, penalties)
                tried.append((mean_loss_of(base.model.losses, few, rows, logits), penalties))
            loss, penalties = min(tried)
            return penalties, loss

        none = mean_loss_of(base.model.losses, few, rows, given[own.test])
        (intercept, _), alone = best([(penalty, NONE) for penalty in INTERCEPTS])
        found, loss = best([(intercept, penalty) for penalty in COEFFICIENTS])
        return min([((NONE, NONE), none), ((intercept, NONE), alone), (found, loss)], key=lambda pair: pair[1])

    def apply(self, base: PlainLearner, split: Split, setting: Penalties) -> Tensor:
        few, own, inputs, given = self._inputs(base, split)
        return self._logits(base, few, own, inputs, given, setting)

    def told(self, setting: Penalties) -> Mapping[str, float]:
        return {"penalty of intercepts": setting[0], "penalty of coefficients": setting[1]}


def random_effects(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    penalty = config.rival.penalty
    fixed = None if penalty is None else (penalty, penalty)
    return RandomEffects(problem).fitted(problem, config, progress, fixed)
