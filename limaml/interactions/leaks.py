"""Features that give the label away: each is tried alone, on a sample, against each label.

A number is tried as it is (its AUC, either way up) and, like an id, by the mean label of the rows that share its value.
That mean is taken out of fold and shrunk to the overall mean, so that an id with few rows shows nothing of its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import DataError
from limaml.interactions.columns import Codes, factorise, is_number
from limaml.interactions.index import label_values, shuffled
from limaml.interactions.schema import Feature, Schema
from limaml.types import FeatureKind, LossKind

__all__ = ["SUSPICIOUS", "leak_remarks"]

SUSPICIOUS = 0.98
"""From this on a feature's AUC alone (for a number predicted by squared error: its correlation) is named."""

FOLDS = 5
PRIOR = 5.0  # rows' worth of the overall mean
Values = NDArray[np.float64]


def leak_remarks(
    frame: pl.DataFrame, schema: Schema, features: Sequence[Feature], sample: int
) -> list[tuple[str, str]]:
    """`(column, sentence)` for each of `features` that predicts a label suspiciously well on `sample` rows."""
    rows = shuffled(frame.height, schema.seed)[:sample]
    remarks: list[tuple[str, str]] = []
    for label in schema.labels:
        if label.column not in frame.columns:
            continue
        try:
            target: Values = label_values(frame.select(label.column)[rows], label).fill_null(float("nan")).to_numpy()
        except DataError:
            continue  # reported as a problem of the label
        usable = np.isfinite(target)
        kept, y = rows[usable], target[usable]
        binary = label.loss is LossKind.BINARY
        if len(y) < 50 or len(np.unique(y)) < 2 or (binary and not np.isin(y, (0.0, 1.0)).all()):
            continue
        for feature in features:
            score = _power(feature, frame[feature.column][kept], y, binary)
            if score >= SUSPICIOUS:
                measure = "an AUC" if binary else "a correlation"
                text = (
                    f"Column '{feature.column}' alone predicts label '{label.name}' with {measure} of {score:.3f}: it may "
                    "be made from the label, or known only afterwards. Remove the feature unless it is known before."
                )
                remarks.append((feature.column, text))
    return remarks


def _power(feature: Feature, values: pl.Series, y: Values, binary: bool) -> float:
    """How well one column alone predicts `y`: the best of its readings, from 0.5 (binary) or 0 up to 1."""
    measure = _auc if binary else _correlation
    codes, first = factorise(values)
    scores = [measure(_target_mean(codes, len(first), y), y)]
    if feature.kind is FeatureKind.NUMERIC and is_number(values.dtype):
        numbers = values.cast(pl.Float64).fill_nan(None)
        filled: Values = numbers.fill_null(numbers.median() or 0.0).to_numpy()
        auc = measure(filled, y)
        scores += [auc, 1 - auc] if binary else [abs(auc)]
    return max(scores)


def _target_mean(codes: Codes, distinct: int, y: Values) -> Values:
    """For each row the shrunken mean of `y` over the rows of other folds that have its value."""
    fold = shuffled(len(y), 1) % FOLDS
    total, count = np.bincount(codes, y, distinct), np.bincount(codes, minlength=distinct)
    prediction = np.empty(len(y))
    for k in range(FOLDS):
        own = fold == k
        other_total = total - np.bincount(codes[own], y[own], distinct)
        other_count = count - np.bincount(codes[own], minlength=distinct)
        # one overall mean for all folds: each its own would rank the folds against their labels
        mean = (other_total + PRIOR * y.mean()) / (other_count + PRIOR)
        prediction[own] = mean[codes[own]]
    return prediction


def _auc(score: Values, y: Values) -> float:
    """Probability that a row with label 1 scores above one with label 0, ties counting half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = y == 1
    p, n = int(positives.sum()), int((~positives).sum())
    return float((rank[positives].sum() - p * (p + 1) / 2) / (p * n))


def _correlation(score: Values, y: Values) -> float:
    deviation = score.std() * y.std()
    return float(((score - score.mean()) * (y - y.mean())).mean() / deviation) if deviation > 0 else 0.0
