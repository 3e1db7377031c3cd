"""Metrics equal scikit-learn's, naive formulas, and values known by construction."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from limaml.errors import ConfigError, DataError
from limaml.evaluate.metrics import (
    auc,
    calibration,
    entropy,
    gauc,
    log_loss,
    mae,
    normalised_entropy,
    r2,
    reliability,
    rmse,
    task_auc,
)
from limaml.evaluate.predictions import Predictions, check_comparable, quartiles, sigmoid


@st.composite
def rows(draw: st.DrawFn, size: int = 40) -> dict[str, np.ndarray]:
    """Few distinct scores (ties), few tasks (of one class, often), weights with zeros; possibly no row at all."""
    n = draw(st.integers(0, size))
    column = lambda values: np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=float)  # noqa: E731
    return {
        "task": column(st.integers(0, 5)).astype(np.int64),
        "label": column(st.integers(0, 1)),
        "score": column(st.sampled_from([-3.0, -0.5, 0.0, 0.1, 0.5, 2.0])),
        "weight": column(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    }


def naive_auc(label: np.ndarray, score: np.ndarray, weight: np.ndarray) -> float:
    wins = total = 0.0
    for i in np.flatnonzero(label == 1):
        for j in np.flatnonzero(label == 0):
            pair = weight[i] * weight[j]
            total += pair
            wins += pair * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
    return wins / total if total else math.nan


def same(mine: float, expected: float) -> bool:
    return (math.isnan(mine) and math.isnan(expected)) or mine == pytest.approx(expected, abs=1e-10)


@settings(max_examples=150)
@given(rows())
def test_auc_counts_every_pair(data: dict[str, np.ndarray]) -> None:
    expected = naive_auc(data["label"], data["score"], data["weight"])
    assert same(auc(data["label"], data["score"], data["weight"]), expected)


@settings(max_examples=100)
@given(rows())
def test_gauc_is_the_weighted_mean_of_each_tasks_auc(data: dict[str, np.ndarray]) -> None:
    top = bottom = total = 0.0
    judged = 0
    for task in np.unique(data["task"]):
        inside = data["task"] == task
        impressions = data["weight"][inside].sum()
        value = naive_auc(data["label"][inside], data["score"][inside], data["weight"][inside])
        total += impressions
        if not math.isnan(value):
            top, bottom, judged = top + impressions * value, bottom + impressions, judged + 1
    found = gauc(data["task"], data["label"], data["score"], data["weight"])
    assert same(found.value, top / bottom if bottom else math.nan)
    assert same(found.coverage, bottom / total if total else math.nan)
    assert found.tasks == judged


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 500
    label = rng.integers(0, 2, n)
    logit = np.round(rng.normal(size=n) + label, 1)
    weight = rng.random(n)
    probability = sigmoid(logit)
    assert auc(label, logit) == pytest.approx(reference.roc_auc_score(label, logit))
    assert auc(label, logit, weight) == pytest.approx(reference.roc_auc_score(label, logit, sample_weight=weight))
    assert log_loss(label, logit, weight) == pytest.approx(reference.log_loss(label, probability, sample_weight=weight))
    value = rng.normal(size=n) * 3 + 100
    guess = value + rng.normal(size=n)
    for mine, theirs in ((mae, reference.mean_absolute_error), (r2, reference.r2_score)):
        assert mine(value, guess, weight) == pytest.approx(theirs(value, guess, sample_weight=weight))
    expected = reference.root_mean_squared_error(value, guess, sample_weight=weight)
    assert rmse(value, guess, weight) == pytest.approx(expected)


@settings(max_examples=50)
@given(rows(), st.integers(0, 2**31))
def test_the_order_of_the_rows_does_not_matter(data: dict[str, np.ndarray], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(data["label"]))
    mixed = {name: value[order] for name, value in data.items()}
    curves = [reliability(d["label"], sigmoid(d["score"]), d["weight"], bins=4) for d in (data, mixed)]
    assert same(curves[0].ece, curves[1].ece)
    np.testing.assert_allclose(curves[0].predicted, curves[1].predicted)
    assert same(*(gauc(d["task"], d["label"], d["score"], d["weight"]).value for d in (data, mixed)))


@settings(max_examples=50)
@given(rows())
def test_an_integer_weight_is_a_repeated_row(data: dict[str, np.ndarray]) -> None:
    count = (2 * data["weight"]).astype(int)
    task, label, score = (np.repeat(data[name], count) for name in ("task", "label", "score"))
    weighted = data["label"], data["score"], count
    for metric in (auc, log_loss, normalised_entropy, rmse, mae, r2, calibration):
        assert same(metric(*weighted), metric(label, score)), metric.__name__
    assert same(gauc(data["task"], *weighted).value, gauc(task, label, score).value)


def test_log_loss_is_exact_at_extreme_logits() -> None:
    assert log_loss([1.0, 0.0], [-1e4, 1e4]) == 1e4
    assert log_loss([1.0, 0.0], [1e4, -1e4]) == 0.0
    # log1p(e^-40) = e^-40 to double precision; 1 - sigmoid(40) would have lost every digit
    assert log_loss([1.0], [40.0]) == pytest.approx(math.exp(-40), rel=1e-12, abs=0)


def test_normalised_entropy_of_the_base_rate_is_one() -> None:
    label = np.repeat([1.0, 0.0], [3, 9])
    constant = np.full(12, math.log(0.25 / 0.75))
    assert normalised_entropy(label, constant) == pytest.approx(1.0)
    assert entropy(0.5) == pytest.approx(math.log(2))
    np.testing.assert_array_equal(entropy([0.0, 1.0]), 0.0)


def test_calibration_of_known_rates() -> None:
    predicted = np.repeat([0.2, 0.6], 100)
    label = np.concatenate([np.arange(100) < 10, np.arange(100) < 90]).astype(float)
    assert calibration(label, predicted) == pytest.approx(0.4 / 0.5)
    curve = reliability(label, predicted, bins=10)
    np.testing.assert_allclose(curve.predicted, [0.2, 0.6])
    np.testing.assert_allclose(curve.label, [0.1, 0.9])
    np.testing.assert_allclose(curve.share, [0.5, 0.5])
    assert curve.ece == pytest.approx(0.2)


def test_reliability_bins_hold_equal_weight() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.random(2000)
    curve = reliability((rng.random(2000) < predicted).astype(float), predicted, bins=10)
    np.testing.assert_allclose(curve.share, 0.1, atol=1e-3)
    assert np.all(np.diff(curve.predicted) > 0)
    assert curve.ece < 0.04  # ten bins of 200 rows: the standard error of a bin is at most 0.035
    with pytest.raises(ConfigError, match="at least 1 bin"):
        reliability([1.0], [0.5], bins=0)


def test_what_cannot_be_answered_is_nan() -> None:
    empty = np.empty(0)
    for metric in (auc, log_loss, normalised_entropy, calibration, rmse, mae, r2):
        assert math.isnan(metric(empty, empty)), metric.__name__
    assert math.isnan(auc([1.0, 1.0], [0.0, 1.0]))
    assert math.isnan(normalised_entropy([1.0, 1.0], [0.0, 1.0]))
    assert math.isnan(r2([2.0, 2.0], [0.0, 1.0]))
    found = gauc([1, 1, 2], [1.0, 1.0, 0.0], [0.0, 1.0, 2.0])
    assert math.isnan(found.value)
    assert found.coverage == 0.0
    assert len(reliability(empty, empty).share) == 0
    assert not len(task_auc(empty, empty, empty).auc)
    with pytest.raises(DataError, match="one length"):
        auc([1.0, 0.0], [0.5])


def test_string_tasks_and_speed() -> None:
    rng = np.random.default_rng(0)
    n, tasks = 200_000, 6_000
    task, label, score = rng.integers(0, tasks, n), rng.integers(0, 2, n), rng.normal(size=n)
    start = time.perf_counter()
    found = gauc(task, label, score)
    assert time.perf_counter() - start < 1.0  # takes 0.1 s; a loop over tasks takes several
    assert gauc(task.astype(str)[:5000], label[:5000], score[:5000]).value == pytest.approx(
        gauc(task[:5000], label[:5000], score[:5000]).value
    )
    assert found.value == pytest.approx(0.5, abs=0.01)


def test_quartiles_keep_equal_supports_together() -> None:
    np.testing.assert_array_equal(quartiles(np.arange(8)), [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(quartiles(np.array([5, 1, 9, 7])), [1, 0, 3, 2])
    assert len(set(quartiles(np.full(9, 3)))) == 1
    capped = quartiles(np.array([1, 2, 3, 4, 50, 50, 50, 50]))
    assert len(set(capped[4:])) == 1
    assert capped[0] == 0
    assert not len(quartiles(np.empty(0, np.int64)))


def predictions(**changes: Any) -> Predictions:
    values: dict[str, Any] = {
        "dataset": "d",
        "protocol": "warm",
        "seed": 0,
        "method": "m",
        "task": [1, 1, 2],
        "support": [4, 4, 0],
        "label": [0, 1, 1],
        "logit": [0.0, 0.5, -1.0],
    }
    return Predictions(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit": [0.0, math.nan, 1.0]}, r"'logit' \(the first in row 1: nan\) is not finite.*diverged"),
        ({"label": [0, 2, 3]}, r"2 of 3 values of 'label' \(the first in row 1: 2\) are neither 0 nor 1"),
        ({"label": [0, math.nan, 1]}, "Leave rows without a label out"),
        ({"support": [4, 5, 0]}, "Task 1 has different numbers of support rows"),
        ({"support": [-1, -1, 0]}, "no count of rows"),
        ({"weight": [1.0, -2.0, 1.0]}, "Weights must be ≥ 0"),
        ({"logit": [0.0, 1.0]}, r"shapes: task \[3\], support \[3\], label \[3\], logit \[2\]"),
        ({"task": [1.5, 1.5, 2.0]}, "integers or by strings"),
        ({"label": ["a", "b", "c"]}, "'label' is not an array of numbers"),
    ],
)
def test_bad_predictions_are_refused_with_the_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        predictions(**changes)
    assert "method 'm' (dataset 'd', protocol 'warm', seed 0)" in str(raised.value)


def test_predictions_name_every_problem_at_once() -> None:
    with pytest.raises(DataError) as raised:
        predictions(label=[0, 7, 1], weight=[1.0, 1.0, -1.0])
    assert "neither 0 nor 1" in str(raised.value)
    assert "Weights must be" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "m"}, "two sets of predictions"),
        ({"label": [1, 1, 1]}, r"disagree on 'label' in row 0 \(1.0 and 0.0\)"),
        ({"weight": [1.0, 1.0, 2.0]}, "disagree on 'weight' in row 2"),
        ({"task": [1, 2], "support": [4, 0], "label": [0, 1], "logit": [0, 0]}, "has 2 rows and .* has 3"),
        ({"task": ["1", "1", "2"]}, "by strings and .* by integers"),
        ({"loss": "squared"}, "the squared loss and .* the binary loss"),
    ],
)
def test_only_the_same_rows_are_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_comparable([predictions(), predictions(**{"method": "other", **changes})])
