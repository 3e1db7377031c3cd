"""How a metric depends on how much is known of a task: one point per range of support rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from limaml.errors import ConfigError
from limaml.evaluate.bootstrap import Interval, bootstrap
from limaml.evaluate.predictions import Ints, Predictions, task_supports
from limaml.types import LossKind

__all__ = ["ActivityCurve", "activity_curve", "activity_edges"]


@dataclass(frozen=True)
class ActivityCurve:
    """One metric by number of support rows, for every method of a (dataset, protocol); averaged over seeds."""

    dataset: str
    protocol: str
    metric: str
    low: tuple[int, ...]  # [bins] fewest support rows of the bin's tasks
    high: tuple[int, ...]  # [bins] most
    mean: tuple[float, ...]  # [bins] mean over the bin's tasks
    tasks: tuple[int, ...]  # [bins] tasks, summed over seeds
    values: dict[str, tuple[Interval, ...]]  # method → [bins]


def activity_edges(support: Ints, bins: int) -> Ints:
    """Upper edges `[≤ bins − 1]` that cut tasks into bins of about equal size; equal supports are never parted."""
    if not len(support):
        return np.empty(0, np.int64)
    cuts = np.quantile(support, np.arange(1, bins) / bins, method="inverted_cdf")
    edges: Ints = np.unique(cuts).astype(np.int64)
    inner: Ints = edges[edges < support.max()]
    return inner


def activity_curve(
    predictions: Sequence[Predictions],
    *,
    metric: str | None = None,
    bins: int = 8,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> ActivityCurve:
    """The curve of one (dataset, protocol). `metric` defaults to AUC, or RMSE for the squared loss."""
    if bins < 1:
        raise ConfigError(f"The curve over activity needs at least 1 bin, not {bins}.")
    metric = metric or ("auc" if predictions[0].loss is LossKind.BINARY else "rmse")
    one_per_seed = {p.seed: p for p in predictions}.values()
    support = np.concatenate([task_supports(p)[1] for p in one_per_seed])
    edges = activity_edges(support, bins)
    names = [str(b) for b in range(len(edges) + 1)] if len(support) else []

    def assign(of_tasks: Ints) -> Ints:
        position: Ints = np.searchsorted(edges, of_tasks, side="left").astype(np.int64)
        return position

    draws = bootstrap(
        predictions, replicates=replicates, seed=seed, buckets=names, assign=assign, metrics=(metric,), level=level
    )
    inside = [support[assign(support) == b] for b in range(len(names))]
    return ActivityCurve(
        dataset=predictions[0].dataset,
        protocol=predictions[0].protocol,
        metric=metric,
        low=tuple(int(s.min()) for s in inside),
        high=tuple(int(s.max()) for s in inside),
        mean=tuple(float(s.mean()) for s in inside),
        tasks=tuple(len(s) for s in inside),
        values={m: tuple(draws.interval(m, name, metric) for name in names) for m in draws.methods},
    )
