"""A task's own features as one vector, so that a store can hold them beside its meta embedding.

The global block reads them too (a member's age, say), and a request that names a member need not repeat them. They are
kept under the task type `<task>.features`, always as float32: ids below 2²⁴ come back exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.embeddings.factors import FACTOR_SUFFIX
from limaml.errors import ModelError
from limaml.types import FeatureKind, Features, FeatureSpec

__all__ = ["feature_width", "features_type", "pack_features", "task_of", "unpack_features"]

EXACT = 2**24
_SUFFIX = ".features"


def features_type(task: str) -> str:
    """The task type under which the features of `task` are stored."""
    return task + _SUFFIX


def task_of(name: str) -> str:
    """The task that a stored task type belongs to: the inverse of `features_type` and `factor_type`, or the task itself."""
    return name.removesuffix(_SUFFIX).removesuffix(FACTOR_SUFFIX)


def _width(spec: FeatureSpec) -> int:
    if spec.kind is FeatureKind.CATEGORICAL:
        return 1
    return spec.length if spec.is_id else spec.size


def feature_width(specs: Sequence[FeatureSpec], task: str) -> int:
    """Length of the vector for the features on the side of `task`; 0 if it has none."""
    return sum(_width(spec) for spec in specs if spec.side == task)


def pack_features(features: Features, specs: Sequence[FeatureSpec], task: str) -> NDArray[np.float32]:
    """Encoded features `[n, …]` of a task type → `[n, width]`."""
    columns = []
    for spec in specs:
        if spec.side == task:
            if spec.is_id and spec.size > EXACT:
                raise ModelError(
                    f"Feature '{spec.name}' has {spec.size} ids; a store keeps task features as float32, exact up to "
                    f"{EXACT}. Hash it to fewer buckets, or leave it out."
                )
            columns.append(features[spec.name].reshape(-1, _width(spec)).to(torch.float32))
    return torch.cat(columns, 1).numpy()


def unpack_features(packed: NDArray[np.float32], specs: Sequence[FeatureSpec], task: str) -> Features:
    """The inverse of `pack_features`."""
    features: Features = {}
    place = 0
    for spec in specs:
        if spec.side == task:
            width = _width(spec)
            values: Tensor = torch.from_numpy(packed[:, place : place + width].copy())
            if spec.is_id:
                values = values.to(torch.int64)
            features[spec.name] = values.squeeze(1) if spec.kind is FeatureKind.CATEGORICAL else values
            place += width
    return features
