"""A flat map of meta embeddings: the two directions in which they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from limaml.errors import DataError
from limaml.evaluate.predictions import Floats, Ints

__all__ = ["EmbeddingMap", "MapPoints", "project"]


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Meta embeddings to draw: `vectors` `[tasks, dim]`; ids, support rows and mean labels `[tasks]`.

    `mean_label` is NaN for a task without labels.
    """

    protocol: str
    method: str
    vectors: Floats
    ids: Sequence[str]
    support: Ints
    mean_label: Floats

    def __post_init__(self) -> None:
        for name, dtype in (("vectors", np.float64), ("support", np.int64), ("mean_label", np.float64)):
            object.__setattr__(self, name, _array(getattr(self, name), dtype))
        sizes = {
            "vectors": len(self.vectors),
            "ids": len(self.ids),
            "support": len(self.support),
            "mean_label": len(self.mean_label),
        }
        if self.vectors.ndim != 2 or len(set(sizes.values())) > 1:
            raise DataError(
                f"A map of embeddings needs vectors [tasks, dim] and one id, support count and mean label per task, but "
                f"vectors has the shape {list(self.vectors.shape)} and the numbers of tasks are {sizes}."
            )
        bad: NDArray[np.bool_] = ~np.all(np.isfinite(self.vectors), axis=1)
        if bad.any():
            raise DataError(
                f"{int(bad.sum()):,} of {len(bad):,} meta embeddings of '{self.method}' are not finite, the first of "
                f"task {self.ids[int(np.flatnonzero(bad)[0])]!r}. The adaptation has diverged."
            )


@dataclass(frozen=True, eq=False)
class MapPoints:
    """Where each shown task lies. Arrays `[shown]`."""

    source: EmbeddingMap
    rows: Ints  # positions in `source`, ascending
    x: Floats
    y: Floats
    explained: tuple[float, float]  # share of the variance that each axis shows, 0 … 1


def project(source: EmbeddingMap, *, limit: int = 5000, seed: int = 0) -> MapPoints:
    """The first two principal components of at most `limit` embeddings, a random sample where there are more.

    Signs are fixed (the largest loading is positive), so the same embeddings give the same map.
    """
    rows = np.arange(len(source.vectors))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False))
    vectors = source.vectors[rows]
    centred = vectors - vectors.mean(axis=0) if len(rows) else vectors
    axes = np.zeros((2, len(rows)))
    shares = [0.0, 0.0]
    if centred.size:
        _, size, directions = np.linalg.svd(centred, full_matrices=False)
        total = float((size**2).sum())
        for k in range(min(2, len(size))):
            direction = directions[k]
            sign = np.sign(direction[np.argmax(np.abs(direction))]) or 1.0
            axes[k] = centred @ direction * sign
            shares[k] = float(size[k] ** 2 / total) if total > 0 else 0.0
    return MapPoints(source, rows, axes[0], axes[1], (shares[0], shares[1]))


def _array(value: ArrayLike, dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.asarray(value, dtype=dtype)
