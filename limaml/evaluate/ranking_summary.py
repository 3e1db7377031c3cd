"""From ranking metrics per member to what is reported: the same bootstrap over members, buckets, tables and pictures.

A metric of one (method, seed) is the mean over the members for whom it is defined. Replicates draw members with
replacement, the same for every method and seed (`bootstrap.task_weights`), so differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from limaml.errors import DataError
from limaml.evaluate.bootstrap import ALL, Replicates, task_weights
from limaml.evaluate.predictions import QUARTILES, Floats, quartiles
from limaml.evaluate.ranking import RANKING_METRICS, Ranked
from limaml.evaluate.summary import (
    BASELINES,
    BucketSize,
    Delta,
    MetricInterval,
    Run,
    Summary,
    deltas_of,
    intervals_of,
)

__all__ = ["RankedRun", "rank_bootstrap", "summarise_ranked"]

_BLOCK = 64  # replicates whose weights are held at once


@dataclass(frozen=True)
class RankedRun(Run):
    """One method on one seed; `n` counts the positives that were to be found, `tasks` the members who are judged."""

    ndcg_10: float = float("nan")
    recall_10: float = float("nan")
    mrr: float = float("nan")
    ndcg_20: float = float("nan")
    recall_20: float = float("nan")
    ndcg_50: float = float("nan")
    recall_50: float = float("nan")


def summarise_ranked(
    ranked: Sequence[Ranked],
    *,
    baselines: Sequence[str] | None = None,
    replicates: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Summary:
    """Compare methods that ranked the same candidates for the same members.

    Where `popularity` was compared it is the first baseline, before those of `BASELINES`. Raises `DataError` where methods
    were judged on different members or positives.
    """
    if not ranked:
        raise DataError("There are no rankings to compare.")
    methods = list(dict.fromkeys(item.method for item in ranked))
    if baselines is None:
        baselines = [name for name in ("popularity", *BASELINES) if name in methods]
    runs: list[Run] = []
    deltas: list[Delta] = []
    intervals: list[MetricInterval] = []
    sizes: list[BucketSize] = []
    for dataset, protocol in dict.fromkeys((item.dataset, item.protocol) for item in ranked):
        items = [item for item in ranked if (item.dataset, item.protocol) == (dataset, protocol)]
        draws = rank_bootstrap(items, replicates=replicates, seed=seed, level=level)
        for item in items:
            runs += _runs(item, draws)
        intervals += intervals_of(draws, dataset, protocol)
        deltas += deltas_of(draws, dataset, protocol, baselines, draws.metrics)
        sizes += _sizes(items)
    return Summary(
        runs=tuple(runs),
        deltas=tuple(deltas),
        intervals=tuple(intervals),
        calibration=(),
        buckets=tuple(sizes),
        baselines=tuple(baselines),
        losses=dict.fromkeys((item.dataset for item in ranked), "ranking"),
        replicates=replicates,
        seed=seed,
        level=level,
    )


def rank_bootstrap(
    ranked: Sequence[Ranked], *, replicates: int = 500, seed: int = 0, level: float = 0.95
) -> Replicates:
    """Resample the members of one (dataset, protocol): all its methods and seeds, together."""
    _check_same(ranked)
    seeds = tuple(sorted({item.seed for item in ranked}))
    methods = tuple(dict.fromkeys(item.method for item in ranked))
    names = (ALL, *QUARTILES)
    universe = np.unique(np.concatenate([item.task for item in ranked]))
    values = np.full((len(seeds), len(methods), len(names), len(RANKING_METRICS), 1 + replicates), np.nan)
    drawn_on = np.zeros((len(names), len(RANKING_METRICS), len(universe)), np.bool_)
    cells: list[tuple[Floats, Floats, Floats]] = []  # per item: defined and value [buckets, metrics, members], target
    for item in ranked:
        place = np.searchsorted(universe, item.task)
        bucket = quartiles(item.support)
        inside = np.stack([np.ones(len(bucket), np.bool_), *(bucket == b for b in range(len(QUARTILES)))])
        table = np.stack([item.values[metric] for metric in RANKING_METRICS])
        defined = np.zeros((len(names), len(RANKING_METRICS), len(universe)))
        defined[:, :, place] = inside[:, None] & ~np.isnan(table)[None]
        value = np.zeros(defined.shape)
        value[:, :, place] = np.where(defined[:, :, place] > 0, np.nan_to_num(table)[None], 0.0)
        drawn_on |= defined > 0
        cells.append((defined, value, values[seeds.index(item.seed), methods.index(item.method)]))
    spans = [range(first, min(first + _BLOCK, replicates)) for first in range(0, replicates, _BLOCK)]
    for span in [None, *spans]:  # first the sample itself
        drawn = np.ones((1, len(universe))) if span is None else task_weights(len(universe), span, seed)
        start = 0 if span is None else 1 + span.start
        for defined, value, here in cells:
            total = defined @ drawn.T
            with np.errstate(invalid="ignore", divide="ignore"):
                here[:, :, start : start + len(drawn)] = np.where(total > 0, value @ drawn.T / total, np.nan)
    return Replicates(seeds, methods, names, RANKING_METRICS, values, drawn_on.sum(2).astype(np.int64), level)


def _check_same(ranked: Sequence[Ranked]) -> None:
    first: dict[int, Ranked] = {}
    for item in ranked:
        other = first.setdefault(item.seed, item)
        for name in ("task", "support", "positives"):
            if not np.array_equal(getattr(item, name), getattr(other, name)):
                raise DataError(
                    f"Methods '{item.method}' and '{other.method}' (dataset '{item.dataset}', protocol '{item.protocol}', seed "
                    f"{item.seed}) disagree on '{name}'. Methods can only be compared on the same members and positives."
                )


def _runs(item: Ranked, draws: Replicates) -> list[Run]:
    bucket = quartiles(item.support)
    found: list[Run] = []
    for position, name in enumerate(draws.buckets):
        inside = np.ones(len(bucket), np.bool_) if name == ALL else bucket == position - 1
        metrics = {metric: draws.of_seed(item.seed, item.method, name, metric) for metric in draws.metrics}
        n, tasks = int(item.positives[inside].sum()), int(inside.sum())
        found.append(RankedRun(item.dataset, item.protocol, item.seed, item.method, name, n=n, tasks=tasks, **metrics))
    return found


def _sizes(items: Sequence[Ranked]) -> list[BucketSize]:
    one_per_seed = list({item.seed: item for item in items}.values())
    found = []
    for position, name in enumerate((ALL, *QUARTILES), start=-1):
        inside = [
            np.ones(len(i.task), np.bool_) if position < 0 else quartiles(i.support) == position for i in one_per_seed
        ]
        supports = np.concatenate([i.support[mask] for i, mask in zip(one_per_seed, inside, strict=True)])
        found.append(
            BucketSize(
                items[0].dataset,
                items[0].protocol,
                name,
                tasks=len(supports) / len(one_per_seed),
                rows=sum(int(i.positives[m].sum()) for i, m in zip(one_per_seed, inside, strict=True))
                / len(one_per_seed),
                support_low=int(supports.min()) if len(supports) else None,
                support_high=int(supports.max()) if len(supports) else None,
            )
        )
    return found
