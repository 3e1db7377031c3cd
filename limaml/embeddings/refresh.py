"""New interactions reach the store: the touched tasks are adapted again, all others keep what they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
import torch

from limaml.embeddings.factors import factor_type, pack_factors
from limaml.embeddings.features import feature_width, features_type, pack_features
from limaml.embeddings.generate import generate
from limaml.embeddings.publish import revisions
from limaml.errors import DataError, StoreError
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Store
from limaml.tasks import TaskRows

__all__ = ["Refreshed", "refresh"]


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did, per task type: `applied` embeddings are new in the store, `stale` ones it had already."""

    version: str
    applied: Mapping[str, int] = field(default_factory=dict)
    stale: Mapping[str, int] = field(default_factory=dict)
    watermark: int | None = None


def refresh(
    store: Store,
    name: str,
    trained: TrainedModel,
    history: pl.DataFrame,
    touched: Mapping[str, Sequence[str]],
    *,
    version: str | None = None,
) -> Refreshed:
    """Adapt the `touched` tasks (task type → keys) again on `history`, and upsert them into the served version.

    `history` holds *all* interactions of each touched task, old and new, with all feature columns. The store takes a
    vector only if its support is newer than what the stored one was made from, so a replay changes nothing. Raises
    `StoreError` if the version was made by another model, `DataError` if the times cannot be compared between tables.
    """
    served = store.describe(name, version)
    if served.artifact != trained.digest:
        raise StoreError(
            f"Version {served.id} of '{name}' was made by the model {served.artifact}, not by {trained.digest}: "
            "refresh with the model that made it, or publish a new version (limaml embed)."
        )
    data = trained.encoder.encode(history)
    if data.time_unit == "order":
        raise DataError(
            f"The time column '{trained.encoder.schema.time}' only gives an order within one table, so new rows cannot be "
            "placed behind old ones. Use numbers or dates as the time, or publish all tasks anew (limaml embed)."
        )
    specs = trained.encoder.specs
    watermark = int(data.time[-1]) if len(data) else None
    applied, stale = {}, {}
    for task in trained.model.tasks:
        entry = {key: i for i, key in enumerate(data.ids[task])}
        missing = [key for key in touched.get(task, ()) if key not in entry]
        if missing:
            raise DataError(f"The history has no row of the touched task {task}:{missing[0]} ({len(missing)} in all).")
        tasks = torch.tensor(sorted(entry[key] for key in touched.get(task, ())), dtype=torch.int64)
        if not len(tasks):
            continue
        rows = TaskRows.of(data.index[task], data.count(task))
        uncertainty = factor_type(task) in served.dims  # as the version was published
        generated = generate(trained.model, data, task, rows, tasks, uncertainty=uncertainty)
        ids = [data.ids[task][i] for i in tasks.tolist()]
        count, newest = revisions(generated)
        if generated.factors is not None:
            packed = pack_factors(generated.factors)
            store.upsert(name, served.id, factor_type(task), ids, packed, count, newest)
        # The features first: whoever sees the new embedding then sees the new features as well.
        if feature_width(specs, task):
            features = {key: values[tasks] for key, values in data.sides[task].items()}
            packed = pack_features(features, specs, task)
            store.upsert(name, served.id, features_type(task), ids, packed, count, newest)
        done = store.upsert(
            name, served.id, task, ids, generated.vectors.float().numpy(), count, newest, watermark=watermark
        )
        applied[task], stale[task] = done.applied, done.stale
    return Refreshed(served.id, applied, stale, watermark)
