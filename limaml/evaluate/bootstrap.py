"""95 % intervals by resampling tasks.

Rows of one task are alike, so rows are not independent, and intervals from resampled rows are too narrow. Here each
replicate draws as many tasks as there are, with replacement: a task drawn twice counts twice, with all its rows. One
replicate uses the same draw for every method, so intervals of *differences* are paired, and for every seed, so that a
task which stands in several seeds' tests counts equally in each. A metric is computed per seed, then averaged.

A draw is an integer weight per task. Per replicate a metric that is a ratio of sums over tasks (GAUC, log loss, errors)
costs one product with the tasks' sums; AUC costs one pass over rows that were sorted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from limaml.errors import ConfigError, DataError
from limaml.evaluate.metrics import entropy, row_log_loss, task_auc
from limaml.evaluate.predictions import QUARTILES, Floats, Ints, Predictions, check_comparable, quartiles
from limaml.types import LossKind

__all__ = ["ALL", "METRICS", "MIN_TASKS", "Interval", "Replicates", "bootstrap", "task_weights"]

METRICS: dict[LossKind, tuple[str, ...]] = {
    LossKind.BINARY: ("auc", "gauc", "gauc_coverage", "log_loss", "ne", "calibration"),
    LossKind.SQUARED: ("rmse", "mae", "r2", "calibration"),
}

ALL = "all"
"""The bucket that holds every task."""

MIN_TASKS = 6
"""No interval is given for fewer tasks: under 6, all differences having one sign is no rarer than 1 in 20 by chance."""

_MIN_DEFINED = 0.9  # share of the replicates in which a metric must be defined for its interval to mean anything
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Interval:
    """A value and its percentile interval; all in the unit of the metric. Unknown bounds are NaN."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Replicates:
    """Every metric of every method, on the sample itself and on each resample of its tasks.

    `values` is `[seeds, methods, buckets, metrics, 1 + replicates]`; entry 0 of the last axis is the sample itself.
    NaN where a metric is undefined, or where a method has no predictions for a seed. `tasks` `[buckets, metrics]` is
    the number of distinct tasks, over all seeds, that the metric draws on.
    """

    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    buckets: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats
    tasks: Ints
    level: float = 0.95

    def of_seed(self, seed: int, method: str, bucket: str, metric: str) -> float:
        """The metric of one seed's sample."""
        m, b, k = self._position(method, bucket, metric)
        return float(self.values[self.seeds.index(seed), m, b, k, 0])

    def interval(self, method: str, bucket: str, metric: str) -> Interval:
        """The metric's mean over the seeds where it is defined, and its interval."""
        m, b, k = self._position(method, bucket, metric)
        return self._summarise(self.values[:, m, b, k], b, k)

    def difference(self, method: str, baseline: str, bucket: str, metric: str) -> Interval:
        """`method` − `baseline`, paired by seed and by replicate, averaged over the seeds that both have."""
        m, b, k = self._position(method, bucket, metric)
        other = self.methods.index(baseline)
        return self._summarise(self.values[:, m, b, k] - self.values[:, other, b, k], b, k)

    def p_value(self, method: str, baseline: str, bucket: str, metric: str) -> float:
        """Two-sided p-value of no difference, from where zero lies among the replicates of `difference`; NaN without an interval.

        Twice the share of the replicates on the rarer side of zero, the sample itself counted on it, at most 1. It is never
        below 2 / (replicates + 1), so that a correction for many comparisons needs many replicates.
        """
        m, b, k = self._position(method, bucket, metric)
        per_seed = self.values[:, m, b, k] - self.values[:, self.methods.index(baseline), b, k]
        found = self._summarise(per_seed, b, k)
        if np.isnan(found.low):
            return float("nan")
        mean = per_seed[~np.isnan(per_seed[:, 0])].mean(axis=0)[1:]
        draws = mean[~np.isnan(mean)]
        rarer = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        return min(1.0, 2 * (rarer + 1) / (len(draws) + 1))

    def _position(self, method: str, bucket: str, metric: str) -> tuple[int, int, int]:
        return self.methods.index(method), self.buckets.index(bucket), self.metrics.index(metric)

    def _summarise(self, per_seed: Floats, bucket: int, metric: int) -> Interval:
        """`per_seed` `[seeds, 1 + replicates]` → the mean over seeds and its interval."""
        defined = ~np.isnan(per_seed)
        # a seed counts in all replicates or in none: a mean over changing seeds would not be an interval of one number
        used = defined[:, 0]
        if not used.any():
            return Interval(float("nan"), float("nan"), float("nan"))
        mean = per_seed[used].mean(axis=0)
        draws = mean[1:][~np.isnan(mean[1:])]
        if self.tasks[bucket, metric] < MIN_TASKS or len(draws) < max(1, _MIN_DEFINED * (len(mean) - 1)):
            return Interval(float(mean[0]), float("nan"), float("nan"))
        tail = (1 - self.level) / 2
        low, high = np.quantile(draws, (tail, 1 - tail))
        return Interval(float(mean[0]), float(low), float(high))


def task_weights(tasks: int, replicates: range, seed: int) -> Floats:
    """How often each task is drawn, `[len(replicates), tasks]`; each row sums to `tasks`.

    Replicate `r` has its own random stream, so the draws do not depend on how replicates are grouped for speed.
    """
    weights = np.empty((len(replicates), tasks))
    for position, replicate in enumerate(replicates):
        draw = np.random.default_rng((seed, replicate)).integers(0, max(tasks, 1), tasks)
        weights[position] = np.bincount(draw, minlength=tasks)
    return weights


def bootstrap(
    predictions: Sequence[Predictions],
    *,
    replicates: int = 500,
    seed: int = 0,
    buckets: Sequence[str] = QUARTILES,
    assign: Callable[[Ints], Ints] = quartiles,
    metrics: Sequence[str] | None = None,
    level: float = 0.95,
) -> Replicates:
    """Resample the tasks of one (dataset, protocol): all its methods and seeds, together.

    `assign` maps the number of support rows of a seed's tasks `[tasks]` to positions in `buckets`; the bucket `all` is
    always added in front; no `buckets` means no other. `metrics` defaults to all of the loss. Raises `DataError` where methods were not judged on the
    same rows, `ConfigError` on settings that make no sense.
    """
    if replicates < 0 or not 0 < level < 1 or seed < 0:
        raise ConfigError(
            f"A bootstrap needs replicates ≥ 0, seed ≥ 0 and a level between 0 and 1, not replicates={replicates}, "
            f"seed={seed}, level={level}."
        )
    if not predictions:
        raise DataError("There are no predictions to resample.")
    groups = {(p.dataset, p.protocol) for p in predictions}
    if len(groups) > 1:
        raise DataError(
            f"Only predictions of one dataset and protocol can be resampled together, not {sorted(groups)}."
        )
    check_comparable(predictions)
    known = METRICS[predictions[0].loss]
    metrics = known if metrics is None else tuple(metrics)
    if unknown := [m for m in metrics if m not in known]:
        raise ConfigError(f"Unknown metrics {unknown} for the {predictions[0].loss} loss; known are {list(known)}.")

    seeds = tuple(sorted({p.seed for p in predictions}))
    methods = tuple(dict.fromkeys(p.method for p in predictions))
    names = (ALL, *buckets)
    of_seeds = [np.unique(p.task) for p in {p.seed: p for p in predictions}.values() if len(p)]
    universe = np.unique(np.concatenate(of_seeds or [np.empty(0, np.int64)]))
    draws_on: list[list[list[Ints]]] = [[[] for _ in metrics] for _ in names]
    values = np.full((len(seeds), len(methods), len(names), len(metrics), 1 + replicates), np.nan)
    block = max(1, min(64, _BLOCK_BYTES // (8 * max(len(universe), 1))))
    tables: dict[int, _TaskTable] = {}
    # one method's rows at a time: drawing the same weights again is cheap, holding all sorted rows at once is not
    for item in predictions:
        if item.seed not in tables:
            tables[item.seed] = _TaskTable.of(item, universe, assign, len(buckets))
        table = tables[item.seed]
        here = values[seeds.index(item.seed), methods.index(item.method)]
        cells = [_Cell.of(item, table, bucket, metrics) for bucket in range(-1, len(buckets))]
        for b, cell in enumerate(cells):
            here[b, :, :1] = cell.measure(np.ones((1, len(universe))), metrics)
            for k, metric in enumerate(metrics):
                draws_on[b][k].append(cell.tasks_of(metric))
        for first in range(0, replicates, block):
            span = range(first, min(first + block, replicates))
            weights = task_weights(len(universe), span, seed)
            for b, cell in enumerate(cells):
                here[b, :, 1 + span.start : 1 + span.stop] = cell.measure(weights, metrics)
    tasks = np.array([[len(np.unique(np.concatenate(found))) for found in row] for row in draws_on], dtype=np.int64)
    return Replicates(seeds, methods, names, tuple(metrics), values, tasks.reshape(len(names), len(metrics)), level)


@dataclass(frozen=True, eq=False)
class _TaskTable:
    """The tasks of one seed: shared by its methods."""

    universe: Ints  # [tasks] position of each task among the tasks of all seeds
    bucket: Ints  # [tasks]
    row: Ints  # [n] position of each row's task

    @staticmethod
    def of(
        item: Predictions, universe: NDArray[np.generic], assign: Callable[[Ints], Ints], buckets: int
    ) -> _TaskTable:
        if not len(item):
            none = np.empty(0, np.int64)
            return _TaskTable(none, none, none)
        position = np.searchsorted(universe, item.task)
        present, row = np.unique(position, return_inverse=True)
        support = np.zeros(len(present), np.int64)
        support[row] = item.support
        bucket = np.asarray(assign(support), dtype=np.int64) if buckets else np.zeros_like(support)
        if bucket.shape != support.shape or not 0 <= bucket.min() <= bucket.max() < max(buckets, 1):
            raise ConfigError(f"'assign' must give each task a bucket from 0 to {buckets - 1}.")
        return _TaskTable(present.astype(np.int64), bucket, row.astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Cell:
    """One (seed, method, bucket): the sums of its tasks, and its rows sorted for AUC."""

    universe: Ints  # [tasks] where the weights of its tasks stand
    sums: dict[str, Floats]  # name → [tasks]
    pairs: _Pairs | None

    @staticmethod
    def of(item: Predictions, table: _TaskTable, bucket: int, metrics: Sequence[str]) -> _Cell:
        """`bucket` is a position in the buckets, or −1 for all tasks."""
        inside = np.ones(len(table.universe), np.bool_) if bucket < 0 else table.bucket == bucket
        rows = np.flatnonzero(inside[table.row])
        local = np.cumsum(inside) - 1
        task = local[table.row[rows]]
        count = int(inside.sum())
        y, x, w = item.label[rows], item.logit[rows], item.row_weight[rows]
        columns = {"w": w, "wy": w * y, "wp": w * item.predicted[rows]}
        if item.loss is LossKind.BINARY:
            columns["loss"] = w * row_log_loss(y, x)
        else:
            # centred labels: R² takes the difference of two sums that would be huge for labels far from zero
            centre = float(item.label.mean()) if len(item) else 0.0
            columns |= {"square": w * (y - x) ** 2, "absolute": w * np.abs(y - x)}
            columns |= {"wc": w * (y - centre), "wcc": w * (y - centre) ** 2}
        sums: dict[str, Floats] = {
            name: np.bincount(task, value, count).astype(np.float64) for name, value in columns.items()
        }
        if "gauc" in metrics or "gauc_coverage" in metrics:
            moments = 1 if item.moment is None else int(item.moment.max(initial=0)) + 1
            each = task_auc(task if item.moment is None else task * moments + item.moment[rows], y, x, w)
            of_task = each.task.astype(np.int64) // moments
            judged = np.where(each.judged, each.impressions, 0.0)
            sums["judged"] = np.bincount(of_task, judged, count).astype(np.float64)
            sums["judged_auc"] = np.bincount(of_task, judged * np.nan_to_num(each.auc), count).astype(np.float64)
        pairs = _Pairs.of(task, y, x, None if item.weight is None else w) if "auc" in metrics else None
        return _Cell(table.universe[inside], sums, pairs)

    def tasks_of(self, metric: str) -> Ints:
        """Positions, among the tasks of all seeds, of the tasks that have a say in `metric`."""
        weight = self.sums["judged" if metric == "gauc" else "w"]
        return self.universe[weight > 0]

    def measure(self, weights: Floats, metrics: Sequence[str]) -> Floats:
        """`weights` `[draws, all tasks]` → `[metrics, draws]`."""
        here = weights[:, self.universe]
        total = {name: here @ value for name, value in self.sums.items()}
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([self._metric(name, here, total) for name in metrics])

    def _metric(self, name: str, here: Floats, total: dict[str, Floats]) -> Floats:
        if name == "auc":
            assert self.pairs is not None
            return self.pairs.auc(here)
        if name == "gauc":
            return _divide(total["judged_auc"], total["judged"])
        if name == "gauc_coverage":
            return _divide(total["judged"], total["w"])
        if name == "log_loss":
            return _divide(total["loss"], total["w"])
        if name == "ne":
            # a rate can leave 0 … 1 by rounding when all labels agree
            rate = np.clip(_divide(total["wy"], total["w"]), 0.0, 1.0)
            return _divide(_divide(total["loss"], total["w"]), entropy(rate))
        if name == "calibration":
            return _divide(total["wp"], total["wy"])
        if name == "rmse":
            return np.sqrt(_divide(total["square"], total["w"]))
        if name == "mae":
            return _divide(total["absolute"], total["w"])
        spread = total["wcc"] - _divide(total["wc"] ** 2, total["w"])
        spread[spread <= 1e-12 * total["wcc"]] = 0.0  # labels that do not vary leave only rounding
        return 1 - _divide(total["square"], spread)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Rows sorted by score, so that AUC under any task weights takes one pass."""

    positive: Ints  # [positives] task of each positive row, by score
    negative: Ints  # [negatives] task of each negative row, by score
    below: Ints  # [positives] number of negatives that score lower
    tied: NDArray[np.intp]  # positives that tie with negatives
    upto: Ints  # [tied] number of negatives that score lower or the same
    positive_weight: Floats | None
    negative_weight: Floats | None

    @staticmethod
    def of(task: Ints, label: Floats, score: Floats, weight: Floats | None) -> _Pairs:
        order = np.argsort(score, kind="stable")
        one = label[order] == 1
        up, down = order[one], order[~one]
        below = np.searchsorted(score[down], score[up], side="left")
        upto = np.searchsorted(score[down], score[up], side="right")
        tied = np.flatnonzero(upto > below)
        return _Pairs(
            positive=task[up],
            negative=task[down],
            below=below.astype(np.int64),
            tied=tied,
            upto=upto[tied].astype(np.int64),
            positive_weight=None if weight is None else weight[up],
            negative_weight=None if weight is None else weight[down],
        )

    def auc(self, weights: Floats) -> Floats:
        """`weights` `[draws, tasks]` → AUC `[draws]`."""
        result = np.full(len(weights), np.nan)
        negatives = np.zeros(len(self.negative) + 1)
        # one draw at a time: its arrays then stay in the cache, which is twice as fast as larger blocks
        for draw, weight in enumerate(weights):
            positives = weight[self.positive]
            row = weight[self.negative]
            if self.positive_weight is not None and self.negative_weight is not None:
                positives = positives * self.positive_weight
                row = row * self.negative_weight
            np.cumsum(row, out=negatives[1:])
            possible = positives.sum() * negatives[-1]
            if possible > 0:
                wins = positives @ negatives[self.below]
                if len(self.tied):
                    wins += positives[self.tied] @ (negatives[self.upto] - negatives[self.below[self.tied]]) / 2
                result[draw] = min(wins / possible, 1.0)
        return result


def _divide(top: Floats, bottom: Floats) -> Floats:
    return np.where(bottom == 0, np.nan, top / np.where(bottom == 0, 1.0, bottom))
