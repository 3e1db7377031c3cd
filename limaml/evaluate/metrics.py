"""How good predictions are: ranking, log loss and calibration for binary labels, errors for numbers.

All functions are pure, take flat arrays with one entry per row, and accept row weights. A metric that its rows cannot
answer (AUC of a single class, anything of no rows) is NaN, never an error and never a made-up number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from limaml.errors import ConfigError, DataError
from limaml.evaluate.predictions import Floats, Ints

__all__ = [
    "Gauc",
    "Reliability",
    "TaskAuc",
    "auc",
    "calibration",
    "entropy",
    "gauc",
    "log_loss",
    "mae",
    "normalised_entropy",
    "r2",
    "reliability",
    "rmse",
    "row_log_loss",
    "task_auc",
]


@dataclass(frozen=True)
class TaskAuc:
    """AUC within each task. Arrays `[tasks]`, in ascending order of `task`."""

    task: NDArray[np.generic]
    auc: Floats  # NaN where a task has rows of one class only
    impressions: Floats  # summed row weights: what GAUC weighs the task with

    @property
    def judged(self) -> NDArray[np.bool_]:
        """`[tasks]`: which tasks have both classes, so that something can be ranked above something else."""
        return ~np.isnan(self.auc)


@dataclass(frozen=True)
class Gauc:
    """Group AUC: the mean of the tasks' own AUCs, weighted by impressions, over the tasks with both classes."""

    value: float
    coverage: float  # share of all impressions that belong to those tasks, 0 … 1
    tasks: int  # number of those tasks


@dataclass(frozen=True)
class Reliability:
    """Mean prediction against mean label in bins of equal weight, ascending. Arrays `[bins that hold rows]`."""

    predicted: Floats
    label: Floats
    share: Floats  # of the total weight; sums to 1
    ece: float  # expected calibration error: the mean of |predicted − label|, weighted by share


def auc(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """The chance that a random positive row scores above a random negative one; a tie counts one half.

    `label` `[n]` of 0 and 1, `score` `[n]` (any monotone transform of a logit), `weight` `[n]`. NaN unless both classes
    have weight.
    """
    y, s, w = _rows(label, score, weight)
    order, start = _tie_groups(np.zeros(len(y), np.int64), s)
    if not len(order):
        return float("nan")
    positive = np.add.reduceat((w * y)[order], start)
    negative = np.add.reduceat((w * (1 - y))[order], start)
    below = np.cumsum(negative) - negative
    return _ratio(float(positive @ (below + negative / 2)), float(positive.sum() * negative.sum()))


def task_auc(task: ArrayLike, label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> TaskAuc:
    """`auc` within each task, all tasks at once by one sort of the rows by (task, score)."""
    y, s, w = _rows(label, score, weight)
    names, code = np.unique(np.asarray(task), return_inverse=True)
    if len(code) != len(y):
        raise DataError(f"'task' has {len(code):,} entries and 'label' has {len(y):,}: give one task per row.")
    if not len(y):
        return TaskAuc(names, np.empty(0), np.empty(0))
    order, start = _tie_groups(code, s)
    owner = code[order[start]]
    positive = np.add.reduceat((w * y)[order], start)
    negative = np.add.reduceat((w * (1 - y))[order], start)
    negatives = _sums(owner, negative, len(names))
    before_task = np.cumsum(negatives) - negatives
    below = np.cumsum(negative) - negative - before_task[owner]
    wins = _sums(owner, positive * (below + negative / 2), len(names))
    positives = _sums(owner, positive, len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where((positives > 0) & (negatives > 0), wins / (positives * negatives), np.nan)
    return TaskAuc(names, np.clip(value, 0.0, 1.0), positives + negatives)


def gauc(task: ArrayLike, label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Gauc:
    """Ranking quality *within* tasks: what a member sees. Blind to a task's overall level, which `auc` rewards."""
    each = task_auc(task, label, score, weight)
    judged = each.judged
    impressions = each.impressions[judged]
    return Gauc(
        value=_ratio(float(impressions @ each.auc[judged]), float(impressions.sum())),
        coverage=_ratio(float(impressions.sum()), float(each.impressions.sum())),
        tasks=int(judged.sum()),
    )


def row_log_loss(label: ArrayLike, logit: ArrayLike) -> Floats:
    """−log of the probability that the logit gave to the label, in nats, per row `[n]`; exact at any finite logit."""
    y, x, _ = _rows(label, logit, None)
    return y * np.logaddexp(0.0, -x) + (1 - y) * np.logaddexp(0.0, x)


def log_loss(label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of `row_log_loss`; lower is better."""
    _, _, w = _rows(label, logit, weight)
    return _ratio(float(w @ row_log_loss(label, logit)), float(w.sum()))


def entropy(rate: ArrayLike) -> Floats:
    """−p log p − (1−p) log(1−p) in nats: the log loss of always predicting the base rate p."""
    p = np.asarray(rate, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = -(np.where(p > 0, p * np.log(p), 0.0) + np.where(p < 1, (1 - p) * np.log1p(-p), 0.0))
    return np.where(np.isnan(p), np.nan, parts)


def normalised_entropy(label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Log loss ÷ the entropy of the base rate of the same rows (He et al. 2014): below 1 beats a constant.

    NaN where all rows have one label.
    """
    y, _, w = _rows(label, logit, weight)
    base = _ratio(float(w @ y), float(w.sum()))
    return _ratio(log_loss(label, logit, weight), float(entropy(base)))


def calibration(label: ArrayLike, predicted: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean prediction ÷ mean label: 1 is right, 1.1 promises 10 % too much. Takes probabilities, not logits."""
    y, p, w = _rows(label, predicted, weight)
    return _ratio(float(w @ p), float(w @ y))


def reliability(
    label: ArrayLike, predicted: ArrayLike, weight: ArrayLike | None = None, *, bins: int = 15
) -> Reliability:
    """Mean prediction against mean label in `bins` bins of equal weight. Takes probabilities (or values), not logits.

    Rows with the same prediction share a bin, so that the curve does not hang on the order of the rows; with few
    distinct predictions there are fewer bins.
    """
    if bins < 1:
        raise ConfigError(f"A reliability curve needs at least 1 bin, not {bins}.")
    y, p, w = _rows(label, predicted, weight)
    total = float(w.sum())
    if total <= 0:
        return Reliability(np.empty(0), np.empty(0), np.empty(0), float("nan"))
    order, start = _tie_groups(np.zeros(len(p), np.int64), p)
    group_weight = np.add.reduceat(w[order], start)
    middle = (np.cumsum(group_weight) - group_weight / 2) / total
    group_bin = np.clip(np.floor(middle * bins).astype(np.int64), 0, bins - 1)
    row_bin = np.empty(len(p), np.int64)
    row_bin[order] = np.repeat(group_bin, np.diff(np.append(start, len(p))))
    share = _sums(row_bin, w, bins)
    held = share > 0
    mean_p = _sums(row_bin, w * p, bins)[held] / share[held]
    mean_y = _sums(row_bin, w * y, bins)[held] / share[held]
    share = share[held] / total
    return Reliability(mean_p, mean_y, share, float(share @ np.abs(mean_p - mean_y)))


def rmse(label: ArrayLike, predicted: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Root of the mean squared error, in the label's unit."""
    y, p, w = _rows(label, predicted, weight)
    return float(np.sqrt(_ratio(float(w @ (y - p) ** 2), float(w.sum()))))


def mae(label: ArrayLike, predicted: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean absolute error, in the label's unit."""
    y, p, w = _rows(label, predicted, weight)
    return _ratio(float(w @ np.abs(y - p)), float(w.sum()))


def r2(label: ArrayLike, predicted: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Share of the labels' variance that is explained: 1 is perfect, 0 is the mean's. NaN where labels do not vary."""
    y, p, w = _rows(label, predicted, weight)
    total = float(w.sum())
    if total <= 0 or np.ptp(y[w > 0]) == 0:
        return float("nan")
    spread = float(w @ (y - (w @ y) / total) ** 2)
    return 1.0 - float(w @ (y - p) ** 2) / spread if spread > 0 else float("nan")


def _rows(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    y = np.asarray(label, dtype=np.float64)
    s = np.asarray(score, dtype=np.float64)
    w = np.ones(y.shape) if weight is None else np.asarray(weight, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape or y.shape != w.shape:
        raise DataError(
            f"Labels {list(y.shape)}, predictions {list(s.shape)} and weights {list(w.shape)} must be flat arrays of "
            "one length."
        )
    return y, s, w


def _tie_groups(code: Ints, score: Floats) -> tuple[Ints, Ints]:
    """The order of the rows by (code, score), and where in it each group of equal (code, score) starts."""
    order = np.lexsort((score, code))
    if not len(order):
        return order, order
    c, s = code[order], score[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (c[1:] != c[:-1]) | (s[1:] != s[:-1])
    return order, np.flatnonzero(new)


def _sums(code: Ints, value: Floats, groups: int) -> Floats:
    return np.bincount(code, value, groups).astype(np.float64)


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 or bottom < 0 else float("nan")
