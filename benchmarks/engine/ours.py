"""limaml, through its public interface: `MetaModel.embed` generates, `MetaLearner.loss` and a backward pass train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.engine.blocks import PRIOR, RATE, Blocks
from benchmarks.engine.contender import Kind, Outcome, gradients_of, zeroed
from benchmarks.engine.workload import Problem
from limaml.config import Adaptation, TrainConfig
from limaml.meta import ConcatMLP, MetaLearner, MetaModel
from limaml.meta.learn import MetaBatch
from limaml.tasks import TaskBatch, TaskRows
from limaml.types import Features, Interactions, Rows, embedding_name

__all__ = ["Limaml", "interactions_of", "model_of"]

TASK = "member"


class _MetaBlock(nn.Module):
    def __init__(self, layers: nn.Sequential, dim: int) -> None:
        super().__init__()
        self.layers, self.dim = layers, dim

    def forward(self, features: Features) -> Tensor:
        z: Tensor = self.layers(features["x"])
        return z


def model_of(blocks: Blocks, steps: int) -> MetaModel:
    """A `MetaModel` of the blocks, with the inner loop that all contenders run."""
    size = blocks.size
    shared = ConcatMLP({embedding_name(TASK): size.dim, "vector": size.row_width}, blocks.shared)
    adaptation = Adaptation(
        solver="gradient",
        steps=steps,
        order=2,
        rate=RATE,
        learn_rate="fixed",
        prior_count=PRIOR,
        max_support=None,
        engine="lowrank",
    )
    return MetaModel(shared, {TASK: _MetaBlock(blocks.meta, size.dim)}, adaptation=adaptation)


def interactions_of(problem: Problem, distinct: bool) -> Interactions:
    """The problem as encoded interactions; without `distinct`, each row is given its own copy of its item's vector."""
    rows = torch.cat([problem.support.rows, problem.query.rows])
    owner = torch.cat([problem.support.owner, problem.query.owner])
    item, n = problem.item[rows], len(rows)
    side: dict[str, Features] = {"item": {"vector": problem.vectors}}
    index = {"item": item}
    if not distinct:
        side, index = {"row": {"vector": problem.vectors[item]}}, {"row": torch.arange(n)}
    return Interactions(
        sides={TASK: {"x": problem.features}, **side},
        index={TASK: owner, **index},
        ids={TASK: [str(task) for task in range(problem.tasks)]},
        labels=problem.label[rows, None],
        weights=torch.ones(n),
        time=torch.arange(n),
    )


class Limaml:
    """The low-rank engine, with or without encoding each distinct row once."""

    kind: Kind = "limaml"

    def __init__(self, distinct: bool = True, make: Callable[[Blocks, int], MetaModel] = model_of) -> None:
        self.distinct, self._make = distinct, make
        self.name = "limaml" if distinct else "limaml, rows not shared"

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        model, data = self._make(blocks, steps), interactions_of(problem, self.distinct)
        count = len(problem.support)
        support = Rows(torch.arange(count), problem.support.owner)
        if problem.work == "generate":
            among = TaskRows.of(data.index[TASK], problem.tasks)
            return lambda: {"z": model.embed(data, TASK, among)}, problem.tasks
        query = Rows(torch.arange(count, len(data)), problem.query.owner)
        learner = MetaLearner(model, data, torch.ones(len(data), dtype=torch.bool), TrainConfig(anybody=0))
        batch = MetaBatch(TASK, TaskBatch(torch.arange(problem.tasks), support, query), None)

        def train() -> Outcome:
            model.train()
            zeroed(blocks)
            loss, _ = learner.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return gradients_of(blocks)

        return train, problem.tasks
