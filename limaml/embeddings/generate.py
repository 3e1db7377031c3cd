"""Meta embeddings of all tasks, or of some: the inner loop without an outer one, in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limaml.meta.model import MetaModel
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["Generated", "generate"]


@dataclass(frozen=True)
class Generated:
    """Meta embeddings and the revision of what each was computed from."""

    task: str
    tasks: Tensor  # [tasks] int64: entries of the task type's table
    vectors: Tensor  # [tasks, dim]
    count: Tensor  # [tasks] int64: support rows before `max_support` was applied
    newest: Tensor  # [tasks] int64: time of the newest support row; the smallest int64 for a cold task
    factors: Tensor | None = None  # [tasks, dim, dim]: of the posterior's precision, where it was asked for


def generate(
    model: MetaModel,
    data: Interactions,
    task: str,
    among: TaskRows,
    tasks: Tensor | None = None,
    *,
    rows_per_chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    uncertainty: bool = False,
) -> Generated:
    """`MetaModel.embed`, with the revision of each task's support: how many rows `among` has of it, and the newest.

    With `uncertainty` (solver newton) the factors of the posterior as well."""
    tasks = torch.arange(data.count(task)) if tasks is None else tasks
    factors: Tensor | None = None
    if uncertainty:
        vectors, factors = model.embed(
            data, task, among, tasks, rows_per_chunk=rows_per_chunk, progress=progress, uncertainty=True
        )
    else:
        vectors = model.embed(data, task, among, tasks, rows_per_chunk=rows_per_chunk, progress=progress)
    count = among.size[tasks]
    newest = torch.full((len(tasks),), torch.iinfo(torch.int64).min)
    has = count > 0
    newest[has] = data.time[among.rows[(among.offset[1:] - 1)[tasks[has]]]]
    return Generated(task, tasks, vectors, count, newest, factors)
