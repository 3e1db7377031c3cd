"""Tasks adapted again, into a version that is there: what every refresh ends in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from limaml.embeddings.factors import factor_type, pack_factors
from limaml.embeddings.features import feature_width, features_type, pack_features
from limaml.embeddings.generate import generate
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Store, Upserted, Version
from limaml.tasks import TaskRows
from limaml.types import Interactions

__all__ = ["upsert_adapted"]


def upsert_adapted(
    store: Store,
    version: Version,
    trained: TrainedModel,
    data: Interactions,
    task: str,
    keys: Sequence[str],
    *,
    revision: tuple[NDArray[np.int64], NDArray[np.int64]],
    watermark: int | None = None,
) -> Upserted:
    """Adapt the tasks `keys` on all their rows in `data`, and upsert embeddings, features and factors into `version`.

    `revision` is the number of interactions and the time of the newest `[keys]`. The version is given what it was published
    with: factors only if it has them. Whoever sees the new embedding sees the new features as well, as they come first.
    """
    entry = {key: i for i, key in enumerate(data.ids[task])}
    tasks = torch.tensor([entry[key] for key in keys], dtype=torch.int64)
    among = TaskRows.of(data.index[task], data.count(task))
    generated = generate(trained.model, data, task, among, tasks, uncertainty=factor_type(task) in version.dims)
    beside = {}
    if generated.factors is not None:
        beside[factor_type(task)] = pack_factors(generated.factors)
    if feature_width(trained.encoder.specs, task):
        features = {name: values[tasks] for name, values in data.sides[task].items()}
        beside[features_type(task)] = pack_features(features, trained.encoder.specs, task)
    for kind, packed in beside.items():
        store.upsert(version.model, version.id, kind, keys, packed, *revision)
    vectors = generated.vectors.float().numpy()
    return store.upsert(version.model, version.id, task, keys, vectors, *revision, watermark=watermark)
