"""All meta embeddings of a model into a store, as one version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.embeddings.factors import factor_dims, factor_type, pack_factors, prior_factor
from limaml.embeddings.features import feature_width, features_type, pack_features, task_of
from limaml.embeddings.generate import Generated, generate
from limaml.errors import DataError
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Publication, Published, Store
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["dims_of", "publish", "revisions", "watermark_of"]

NUMBERS_PER_PUT = 2**24
"""Entries of factors, `tasks · dim²`, that are held at a time."""


def dims_of(trained: TrainedModel, uncertainty: bool = False) -> dict[str, int]:
    """Task type → length of its vectors in the store, the types that hold task features and factors included."""
    dims: dict[str, int] = dict(factor_dims(trained.model)) if uncertainty else {}
    for task in trained.model.tasks:
        dims[task] = trained.model.dims[task] or 0
        width = feature_width(trained.encoder.specs, task)
        if width:
            dims[features_type(task)] = width
    return dims


def revisions(generated: Generated) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count and newest event time of each task's support, as a store orders them; (0, 0) for a cold task."""
    newest = torch.where(generated.count > 0, generated.newest, 0)
    return generated.count.numpy(), newest.numpy()


def watermark_of(data: Interactions, among: Mapping[str, TaskRows]) -> int | None:
    """Time of the newest interaction that any task is adapted on."""
    times = [int(data.time[rows.rows].max()) for rows in among.values() if len(rows.rows)]
    return max(times, default=None)


def publish(
    store: Store,
    name: str,
    trained: TrainedModel,
    folder: Path | str,
    data: Interactions,
    among: Mapping[str, TaskRows] | None = None,
    *,
    dtype: str = "float32",
    note: str = "",
    uncertainty: bool = False,
    extra: Mapping[str, object] | None = None,
    resume: bool = False,
    activate: bool = True,
    tasks_per_put: int = 65536,
    progress: Callable[[str, int, int], None] | None = None,
) -> Published:
    """Adapt every task on its most recent rows in `among` (default: all rows) and publish the result as a new version.

    The version holds the meta embeddings, the tasks' own features, a cold embedding for unknown ids, and a copy of the
    model `folder`: all that scoring needs. With `uncertainty` (solver newton) also the factor of each task's posterior,
    all that Thompson sampling needs. Readers see the old version until all is written and verified.
    With `resume`, what a publisher of the same model that was killed left is gone on with; without `activate` the version is
    ready and not served. Whoever keeps the version fresh meanwhile may add tasks to it.
    `extra` is kept with the version; `log_position` says there which part of a log it holds. `progress` is called with (task
    type, tasks done, tasks in all).
    """
    model, specs = trained.model, trained.encoder.specs
    if among is None:
        among = {task: TaskRows.of(data.index[task], data.count(task)) for task in model.tasks}
    digest = store.put_model(folder)
    if trained.digest and digest != trained.digest:
        raise DataError(f"The model folder {folder} is not the one that was loaded; its content has changed since.")
    expected = {}
    dims = dims_of(trained, uncertainty)
    if uncertainty:
        tasks_per_put = max(1, min(tasks_per_put, NUMBERS_PER_PUT // max(dims[task] for task in model.tasks) ** 2))
    with store.publish(
        name,
        dims=dims,
        dtype=dict.fromkeys(model.tasks, dtype),  # task features stay float32: their ids must come back exactly
        artifact=digest,
        watermark=watermark_of(data, among),
        note=note,
        extra={"time_unit": data.time_unit, **(extra or {})},
        resume=resume,
    ) as publication:
        for task in model.tasks:
            total = data.count(task)
            for part in torch.split(
                _to_do(publication, data, task, dims) if resume else torch.arange(total), tasks_per_put
            ):
                start = int(part[0]) if len(part) else 0  # about, where some are left out

                def tell(done: int, _of: int, task: str = task, start: int = start, total: int = total) -> None:
                    if progress is not None:
                        progress(task, start + done, total)

                generated = generate(model, data, task, among[task], part, progress=tell, uncertainty=uncertainty)
                ids = [data.ids[task][entry] for entry in part.tolist()]
                count, newest = revisions(generated)
                if generated.factors is not None:
                    publication.put(factor_type(task), ids, pack_factors(generated.factors), count, newest)
                publication.put(task, ids, generated.vectors.float().numpy(), count, newest)
                if feature_width(specs, task):
                    features = {key: values[part] for key, values in data.sides[task].items()}
                    publication.put(features_type(task), ids, pack_features(features, specs, task), count, newest)
            publication.put_cold(task, cold_vector(trained, task))
            expected[task] = total
            if uncertainty:
                publication.put_cold(factor_type(task), prior_factor(model, task))
                expected[factor_type(task)] = total
            if feature_width(specs, task):
                unknown = pack_features(trained.encoder.unknown_features(task), specs, task)
                publication.put_cold(features_type(task), unknown[0])
                expected[features_type(task)] = total
        return publication.commit(expected=expected, activate=activate)


def _to_do(publication: Publication, data: Interactions, task: str, dims: Mapping[str, int]) -> Tensor:
    """The tasks that lack something which an earlier publisher did not come to."""
    has = [publication.written(name, data.ids[task]) for name in dims if task_of(name) == task]
    return torch.from_numpy(np.flatnonzero(~np.all(has, axis=0)))


@torch.no_grad()
def cold_vector(trained: TrainedModel, task: str) -> NDArray[np.float32]:
    """The cold embedding `[dim]` of a task of which nothing is known."""
    z = trained.model.cold_of(task, trained.encoder.unknown_features(task), torch.arange(1))
    vector: NDArray[np.float32] = z[0].float().numpy()
    return vector
