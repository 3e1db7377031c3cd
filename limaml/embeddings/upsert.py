"""Tasks adapted again, into a version that is there: what every refresh ends in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.embeddings.factors import factor_type, pack_factors
from limaml.embeddings.features import feature_width, features_type, pack_features
from limaml.embeddings.generate import generate
from limaml.embeddings.piece import revisions
from limaml.errors import StoreError
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Store, Upserted, Version
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["check_made_by", "upsert_adapted", "upsert_found"]


def upsert_adapted(
    store: Store,
    version: Version,
    trained: TrainedModel,
    data: Interactions,
    task: str,
    keys: Sequence[str],
    *,
    revision: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    watermark: int | None = None,
) -> Upserted:
    """Adapt the tasks `keys` on all their rows in `data`, and upsert embeddings, features and factors into `version`.

    `revision` is the number of interactions and the time of the newest `[keys]`, by default those in `data`. The version is
    given what it was published with: factors only if it has them. Whoever sees the new embedding sees the new features as
    well, as they come first.
    """
    entry = {key: i for i, key in enumerate(data.ids[task])}
    tasks = torch.tensor([entry[key] for key in keys], dtype=torch.int64)
    among = TaskRows.of(data.index[task], data.count(task))
    generated = generate(trained.model, data, task, among, tasks, uncertainty=factor_type(task) in version.dims)
    found = generated.vectors, generated.factors
    revision = revisions(generated) if revision is None else revision
    return upsert_found(store, version, trained, data, task, tasks, *found, revision=revision, watermark=watermark)


def upsert_found(
    store: Store,
    version: Version,
    trained: TrainedModel,
    data: Interactions,
    task: str,
    tasks: Tensor,
    vectors: Tensor,
    factors: Tensor | None,
    *,
    revision: tuple[NDArray[np.int64], NDArray[np.int64]],
    watermark: int | None = None,
) -> Upserted:
    """Upsert what was found for the entries `tasks` `[n]`: `vectors` `[n, dim]`, their posteriors' `factors` `[n, dim, dim]` where
    there are any, and the tasks' own features, with one `revision`."""
    keys = [data.ids[task][entry] for entry in tasks.tolist()]
    beside = {}
    if factors is not None:
        beside[factor_type(task)] = pack_factors(factors)
    if feature_width(trained.encoder.specs, task):
        features = {name: values[tasks] for name, values in data.sides[task].items()}
        beside[features_type(task)] = pack_features(features, trained.encoder.specs, task)
    for kind, packed in beside.items():
        store.upsert(version.model, version.id, kind, keys, packed, *revision)
    found = vectors.float().numpy()
    return store.upsert(version.model, version.id, task, keys, found, *revision, watermark=watermark)


def check_made_by(version: Version, trained: TrainedModel, what_to_do: str) -> None:
    """`StoreError` unless `trained` is the model of the version."""
    if version.artifact != trained.digest:
        raise StoreError(
            f"Version {version.id} of '{version.model}' was made by the model {version.artifact}, not by {trained.digest}: "
            f"{what_to_do} with the model that made it, or publish a new version (limaml embed)."
        )
