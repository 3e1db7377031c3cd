"""All meta embeddings of a model into a store, as one version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from limaml.embeddings.factors import factor_dims, factor_type, prior_factor
from limaml.embeddings.features import feature_width, features_type, pack_features, task_of
from limaml.embeddings.generate import generate
from limaml.embeddings.piece import Piece, adapted_piece
from limaml.errors import DataError
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Published, Store
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["dims_of", "publish", "publish_pieces", "watermark_of"]

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
    tasks_per_put: int = 65536,
    progress: Callable[[str, int, int], None] | None = None,
) -> Published:
    """Adapt every task on its most recent rows in `among` (default: all rows) and publish the result as a new version.

    For tables in memory; `generation` makes the same of a log that is larger. The version holds the meta embeddings, the
    tasks' own features, a cold embedding for unknown ids, and a copy of the model `folder`: all that scoring needs. With
    `uncertainty` (solver newton) also the factor of each task's posterior, all that Thompson sampling needs. Readers see the
    old version until all is written and verified. `extra` is kept with the version; `log_position` says there which part of a
    log it holds. `progress` is called with (task type, tasks done, tasks in all).
    """
    model = trained.model
    if among is None:
        among = {task: TaskRows.of(data.index[task], data.count(task)) for task in model.tasks}
    if uncertainty:
        widest = max(model.dims[task] or 1 for task in model.tasks)
        tasks_per_put = max(1, min(tasks_per_put, NUMBERS_PER_PUT // widest**2))

    def pieces() -> Iterator[Piece]:
        for task in model.tasks:
            total = data.count(task)
            for part in torch.split(torch.arange(total), tasks_per_put):
                start = int(part[0]) if len(part) else 0

                def tell(done: int, _of: int, task: str = task, start: int = start, total: int = total) -> None:
                    if progress is not None:
                        progress(task, start + done, total)

                generated = generate(model, data, task, among[task], part, progress=tell, uncertainty=uncertainty)
                yield adapted_piece(trained, data, generated)

    return publish_pieces(
        store,
        name,
        trained,
        folder,
        pieces(),
        tasks={task: data.count(task) for task in model.tasks},
        watermark=watermark_of(data, among),
        time_unit=data.time_unit,
        dtype=dtype,
        note=note,
        uncertainty=uncertainty,
        extra=extra,
    )


def publish_pieces(
    store: Store,
    name: str,
    trained: TrainedModel,
    folder: Path | str,
    pieces: Iterable[Piece],
    *,
    tasks: Mapping[str, int],
    watermark: int | None,
    time_unit: str,
    dtype: str = "float32",
    note: str = "",
    uncertainty: bool = False,
    extra: Mapping[str, object] | None = None,
    resume: bool = False,
    activate: bool = True,
) -> Published:
    """Publish what was adapted as a new version: `pieces`, of as many `tasks` (task type → number) in all, one in memory at
    a time. `publish` says what the version holds.

    With `resume`, what a publisher of the same model that was killed left is gone on with; without `activate` the version is
    ready and not served. Whoever keeps the version fresh meanwhile may add tasks to it.
    """
    model, specs = trained.model, trained.encoder.specs
    digest = store.put_model(folder)
    if trained.digest and digest != trained.digest:
        raise DataError(f"The model folder {folder} is not the one that was loaded; its content has changed since.")
    dims = dims_of(trained, uncertainty)
    with store.publish(
        name,
        dims=dims,
        dtype=dict.fromkeys(model.tasks, dtype),  # task features stay float32: their ids must come back exactly
        artifact=digest,
        watermark=watermark,
        note=note,
        extra={"time_unit": time_unit, **(extra or {})},
        resume=resume,
    ) as publication:
        for piece in pieces:
            piece.put(publication, resumed=resume)
        for task in model.tasks:
            publication.put_cold(task, cold_vector(trained, task))
            if uncertainty:
                publication.put_cold(factor_type(task), prior_factor(model, task))
            if feature_width(specs, task):
                unknown = pack_features(trained.encoder.unknown_features(task), specs, task)
                publication.put_cold(features_type(task), unknown[0])
        expected = {stored: tasks[task_of(stored)] for stored in dims}
        return publication.commit(expected=expected, activate=activate)


@torch.no_grad()
def cold_vector(trained: TrainedModel, task: str) -> NDArray[np.float32]:
    """The cold embedding `[dim]` of a task of which nothing is known."""
    z = trained.model.cold_of(task, trained.encoder.unknown_features(task), torch.arange(1))
    vector: NDArray[np.float32] = z[0].float().cpu().numpy()
    return vector
