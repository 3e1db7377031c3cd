"""The method `melu`: the decision layers of the network are adapted to each member, its embeddings are not.

Lee et al., "MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation", KDD 2019 (arXiv 1908.00413). Inner
gradient steps on the support move every weight and bias of the MLP, from its first layer to its output; the feature
embeddings, and the linear and pairwise terms of the global block, are shared. First order, as MeLU's public code: the inner
slopes are constants to the outer loop. The rates, one per step, are learned all the same, as is the prior count that
steps are divided by. Trained with cross-fit as LiMAML is. With several task types it is the first one's members that adapt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from limaml.config import Adaptation, Config
from limaml.evaluate.problem import Fitted, Problem
from limaml.evaluate.rivals.padding import alike, padded
from limaml.meta.blocks import CrossNetwork, InteractionMLP, add_parts
from limaml.meta.build import build_global_block
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.learn import MetaBatch, MetaLearner
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel
from limaml.meta.outer import Progress, fit
from limaml.meta.scorer import gather_parts, take
from limaml.tasks import Split, TaskRows
from limaml.types import Interactions, Parts, Rows

__all__ = ["Melu", "MeluLearner", "melu"]

NUMBERS = 2**23
"""Adapted weights and inputs that are worked on at once."""

Weights = Mapping[str, Tensor]


class Melu(nn.Module):
    """A global block without embeddings of tasks, and inner steps on its decision layers."""

    def __init__(self, block: InteractionMLP | CrossNetwork, losses: Losses, task: str, adaptation: Adaptation) -> None:
        super().__init__()
        self.block, self.losses, self.adaptation, self.tasks = block, losses, adaptation, (task,)
        self.log_rate = nn.Parameter(torch.full((max(1, adaptation.steps),), math.log(adaptation.rate)))
        self.log_prior_count = nn.Parameter(torch.tensor(math.log(adaptation.prior_count)))

    @property
    def device(self) -> torch.device:
        return self.log_rate.device

    def decision(self) -> dict[str, Tensor]:
        """The weights that are adapted: `first` and `first_bias` of the first layer, `bias` `[heads]`, the MLP's others."""
        block = self.block
        own: dict[str, Tensor] = {"bias": block.bias}
        own.update({f"mlp.{name}": p for name, p in block.mlp.named_parameters()})
        if isinstance(block, InteractionMLP):
            first = [cast(nn.Linear, layer).weight for layer in block.deep]
            own.update(
                {
                    "first": torch.cat([block.first_bias.new_zeros(len(block.first_bias), 0), *first], 1),
                    "first_bias": block.first_bias,
                }
            )
        return own

    def inputs(self, data: Interactions, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the decision layers read of the rows `[n]`, `[n, width]`, and what is added to their logits `[n, heads]`."""
        x: list[Tensor] = []
        parts: Parts | None = None
        for side, table in data.sides.items():
            if table:
                distinct, place = torch.unique(data.index[side][rows], return_inverse=True)
                features, place = take(table, distinct, device=self.device), place.to(self.device)
                encoded = gather_parts(self.block.encode(features), place)
                parts = encoded if parts is None else add_parts(parts, encoded)
        block = self.block
        if parts is None:  # no features: there are biases to adapt, and the layers between them
            return torch.zeros(len(rows), 0, device=self.device), torch.zeros(
                len(rows), self.losses.heads, device=self.device
            )
        if isinstance(block, CrossNetwork):
            linear, x0, crossed = parts
            assert x0 is not None and linear is not None
            vector = x0
            for layer, cross in enumerate(block.cross):
                product = crossed if layer == 0 and crossed is not None else cross(vector)
                vector = x0 * (product + block.cross_bias[layer]) + vector
            return vector, linear
        for name, embed in zip(block.names, block.embed, strict=True):
            side = next(side for side, table in data.sides.items() if name in table)
            x.append(embed(take({name: data.sides[side][name]}, data.index[side][rows], device=self.device)[name]))
        return torch.cat(x, 1), block.rest(parts) - block.bias

    def score(self, own: Weights, x: Tensor, rest: Tensor) -> Tensor:
        """Logits `[n, heads]` of the inputs `[n, width]` with one task's weights."""
        mlp = {name.removeprefix("mlp."): p for name, p in own.items() if name.startswith("mlp.")}
        if "first" in own:
            x = nn.functional.linear(x, own["first"], own["first_bias"])
        logits: Tensor = functional_call(self.block.mlp, mlp, (x,))
        return logits + rest + own["bias"]

    def logits(self, data: Interactions, tasks: int, support: Rows, query: Rows) -> Tensor:
        """Logits `[n, heads]` of the `query` rows, whose `tasks` tasks are adapted on their `support`."""
        own = self.decision()
        width = sum(p.numel() for p in own.values())
        size = sum(
            (torch.bincount(rows.owner, minlength=tasks) for rows in (support, query)), torch.zeros(tasks).long()
        )
        x, rest = self.inputs(data, query.rows)
        x_s, rest_s = self.inputs(data, support.rows) if len(support) else (x[:0], rest[:0])
        x_s, rest_s = x_s.detach(), rest_s.detach()
        each = max(1, x.shape[1] + 64)
        places, found = [], []
        for chunk in alike(size, max(1, NUMBERS // each), width // each):
            at = torch.full((tasks,), -1)
            at[chunk] = torch.arange(len(chunk))
            for_support, support_place = _of(support, at, len(chunk))
            for_query, query_place = _of(query, at, len(chunk))
            if not len(query_place):
                continue
            adapted = self._adapted(
                own,
                data,
                len(chunk),
                support.rows[support_place],
                for_support,
                x_s[support_place],
                rest_s[support_place],
            )
            place, there = padded(for_query, len(chunk))
            mine, others = x[query_place], rest[query_place]
            found.append(self._each(self.score)(adapted, mine[place], others[place])[there])
            places.append(query_place)
        logits = torch.cat(found)
        return torch.zeros_like(logits).index_copy(0, torch.cat(places).to(logits.device), logits)

    @staticmethod
    def _each(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        mapped: Callable[..., Tensor] = vmap(function, randomness="different")
        return mapped

    def _adapted(
        self, own: Weights, data: Interactions, tasks: int, rows: Tensor, owner: Rows, x: Tensor, rest: Tensor
    ) -> dict[str, Tensor]:
        """Weights of each task, `[tasks, …]`, after the inner steps on the support rows `rows` `[n]`."""
        adapted = {name: p.expand(tasks, *p.shape) for name, p in own.items()}
        if not len(rows):
            return adapted
        place, there = padded(owner, tasks)
        labels, weights = data.labels[rows].to(self.device)[place], data.weights[rows].to(self.device)[place] * there
        shift = torch.zeros(*place.shape, 1, device=self.device)
        if data.offset is not None:
            shift = data.offset[rows].to(self.device)[place][..., None]
        given, inputs = rest[place] + shift, x[place]

        def loss(own: Weights, x: Tensor, rest: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return self.losses.loss(self.score(own, x, rest), labels, weight).sum()

        slope = vmap(grad(loss), randomness="different")
        known = (weights * labels.isfinite().any(2)).sum(1)
        for step in range(self.adaptation.steps):
            at = {name: p.detach() for name, p in adapted.items()}
            with torch.no_grad():
                slopes = slope(at, inputs, given, labels, weights)
            rate = torch.exp(self.log_rate[step]) / (known + torch.exp(self.log_prior_count))
            adapted = {name: p - rate.view(-1, *[1] * (p.dim() - 1)) * slopes[name] for name, p in adapted.items()}
        return adapted

    @torch.no_grad()
    def predict(self, data: Interactions, split: Split) -> tuple[Tensor, Tensor]:
        """The test rows `[n]`, and their logits `[n, heads]`, every member adapted on its support."""
        self.eval()
        task = self.tasks[0]
        index, entries = data.index[task], data.count(task)
        support, test = TaskRows.of(index, entries, split.support), TaskRows.of(index, entries, split.test)
        tasks = (test.size > 0).nonzero().flatten()
        rows, logits = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, self.losses.heads)]
        chunk = torch.div(torch.cumsum((support.size + test.size)[tasks], 0) - 1, 65536, rounding_mode="floor")
        for part in torch.split(tasks, torch.unique_consecutive(chunk, return_counts=True)[1].tolist()):
            query = test.of_tasks(part)
            rows.append(query.rows)
            found = self.logits(data, len(part), support.of_tasks(part, self.adaptation.max_support), query)
            logits.append(found.cpu())
        order = torch.argsort(torch.cat(rows))
        return torch.cat(rows)[order], torch.cat(logits)[order]


def _of(rows: Rows, at: Tensor, tasks: int) -> tuple[Rows, Tensor]:
    """The rows of the tasks that `at` gives a place in the chunk, and where they are in `rows`; owners ascend."""
    owner = at[rows.owner]
    order = torch.sort(torch.where(owner < 0, tasks, owner), stable=True).indices[: int((owner >= 0).sum())]
    return Rows(order, owner[order]), order


class MeluLearner(MetaLearner):
    """Cross-fit batches as for the personalised model, scored with adapted decision layers."""

    def __init__(self, melu: Melu, problem: Problem, config: Config) -> None:
        self.module, self.melu, self.data, self.config = melu, melu, problem.data, config.train
        self.validation, self.train, self.task = problem.validation, problem.judged.train, melu.tasks[0]
        self.grouped = {self.task: TaskRows.of(self.data.index[self.task], self.data.count(self.task), self.train)}
        self.weight, self._rows = float(self.data.weights[self.train].sum()), int(self.train.sum())
        self.model = cast(MetaModel, melu)  # what is read of it in batches is `tasks` and `adaptation`
        melu.losses.standardise(self.data.labels[self.train], self.data.weights[self.train])

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.melu.log_rate, self.melu.log_prior_count, *self.melu.losses.parameters()]

    def _row_losses(self, batch: MetaBatch) -> Tensor:
        data, query = self.data, batch.batch.query
        logits = self.melu.logits(data, len(batch.batch.tasks), batch.batch.support, query)
        return self.melu.losses.of_rows(data, query.rows, logits)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Nothing is left to do: its support rows weigh alike."""

    @torch.no_grad()
    def validate(self, ranks: Ranks = ALONE) -> float | None:
        if self.validation is None:
            return None
        rows, logits = self.melu.predict(self.data, self.validation)
        losses = self.melu.losses.of_rows(self.data, rows, logits.to(self.melu.device))
        return float(losses.sum()) / max(self.data.labelled_weight(rows), 1e-12)


def melu(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    block = build_global_block(problem.specs, config.model, {}, len(problem.losses))
    assert isinstance(block, InteractionMLP | CrossNetwork)
    model = Melu(block, Losses(problem.losses), problem.tasks[0], config.adapt).to(config.train.device)
    history = fit(MeluLearner(model, problem, config), config.train, progress=progress)
    rows, logits = model.cpu().predict(problem.data, problem.judged)
    return Fitted(model.losses.outputs(logits), rows, history)
