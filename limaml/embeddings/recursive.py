"""Refreshing without the past: a task's posterior in the store is the prior of its new interactions (solver newton).

No interaction is kept and none is read twice, so each must be given exactly once: what an interaction did to an embedding
cannot be recognised or taken back. Where interactions may be kept, `Refresher` does without that condition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from limaml.embeddings.factors import factor_type, unpack_factors
from limaml.embeddings.refresh import Refreshed
from limaml.embeddings.upsert import check_made_by, upsert_found
from limaml.errors import StoreError
from limaml.meta.saved import TrainedModel
from limaml.meta.uncertainty import Posterior
from limaml.store.contract import Lookup, Reader, Store
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["update"]


def update(
    store: Store, name: str, trained: TrainedModel, new: pl.DataFrame, *, version: str | None = None
) -> Refreshed:
    """Adapt the tasks of the `new` interactions further, from what the store holds of them, and upsert the result.

    `new` holds interactions that the version has not been given yet, with all feature columns. The version must hold
    posteriors (`publish(..., uncertainty=True)`, `limaml embed --uncertainty`); an unknown task starts from the prior. What
    this costs in quality is measured in docs/recursive.md. Raises `StoreError` if the version is of another model, holds no
    posteriors, or has a task whose embedding and posterior are not of the same interactions, as after an update that was
    killed between the two; nothing of that task type is then changed. With a half-life, new rows weigh by age among
    themselves and what was known before loses nothing: where members change, adapt them anew (`Refresher`).
    """
    with store.read(name, version) as reader:
        described = store.describe(name, reader.version)
        check_made_by(described, trained, "update it")
        for task in trained.model.tasks:
            if factor_type(task) not in described.dims:
                raise StoreError(
                    f"Version {described.id} of '{name}' holds no posteriors of '{task}', which are what an update starts "
                    "from. Publish with them: limaml embed --uncertainty."
                )
        data = trained.encoder.encode(new)
        watermark = int(data.time[-1]) if len(data) else None
        applied, stale = {}, {}
        for task in trained.model.tasks:
            keys = data.ids[task]
            if not keys:
                continue
            before, held = _before(reader, trained, data, task, keys)
            rows = TaskRows.of(data.index[task], len(keys))
            after = trained.model.embed(data, task, rows, uncertainty=True, before=before)
            newest = data.time[rows.rows[rows.offset[1:] - 1]].numpy()
            count = held.count + rows.size.numpy()
            revision = count, np.where(held.count > 0, np.maximum(newest, held.event_time), newest)
            done = upsert_found(
                store,
                described,
                trained,
                data,
                task,
                torch.arange(len(keys)),
                *after,
                revision=revision,
                watermark=watermark,
            )
            applied[task], stale[task] = done.applied, done.stale
    return Refreshed(described.id, applied, stale, watermark)


@torch.no_grad()
def _before(
    reader: Reader, trained: TrainedModel, data: Interactions, task: str, keys: Sequence[str]
) -> tuple[Posterior, Lookup]:
    """What is known of the tasks so far: the prior, where the store knows none; and the look-up of their embeddings."""
    held, factors = reader.get(task, keys), reader.get(factor_type(task), keys)
    torn = (held.count != factors.count) | (held.event_time != factors.event_time)
    if torn.any():
        key, count, other = (each[int(torn.argmax())] for each in (keys, held.count, factors.count))
        raise StoreError(
            f"The embedding of {task}:{key} in version {reader.version} is of {count} interactions, and its posterior of "
            f"{other}: an update was interrupted between the two. Adapt it anew from its interactions (limaml refresh), or "
            "publish a new version (limaml embed --uncertainty)."
        )
    model = trained.model
    cold = model.cold(data, task, torch.arange(len(keys)))
    known = torch.from_numpy(np.asarray(held.found & (held.count > 0)))
    mean = torch.where(known[:, None], torch.from_numpy(np.array(held.vectors)).to(cold), cold)
    prior = model.newton(task).prior_factor(cold)
    factor = torch.where(known[:, None, None], unpack_factors(factors.vectors, cold.shape[1]).to(cold), prior)
    return Posterior(mean, factor), held
