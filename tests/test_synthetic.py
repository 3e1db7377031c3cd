"""Synthetic interactions: the truth is the truth, and there is something to gain by adapting."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from limaml.errors import ConfigError
from limaml.interactions.synthetic import make_interactions


def test_labels_follow_the_known_probabilities() -> None:
    data = make_interactions(tasks=400, mean_rows=80, seed=1)
    p, y = data.truth.expected[:, 0], data.interactions["click"].to_numpy()
    assert np.allclose(p, 1 / (1 + np.exp(-data.truth.logits[:, 0])))
    for low in np.linspace(0, 0.9, 10):  # calibrated in every tenth, to five standard errors
        rows = (p >= low) & (p < low + 0.1)
        assert abs(y[rows].mean() - p[rows].mean()) < 5 * np.sqrt((p * (1 - p))[rows].sum()) / rows.sum()


def test_the_logit_is_the_formula_of_the_docstring() -> None:
    data = make_interactions(tasks={"user_id": 50, "site_id": 7}, dim=3, strength=1.5, seed=2)
    truth, rows = data.truth, data.interactions
    item = rows["item_id"].to_numpy()
    logit = -0.5 + truth.item_biases[item]
    for name in ("user_id", "site_id"):
        of = rows[name].to_numpy()
        dots = (truth.task_vectors[name][of] * truth.item_vectors[item]).sum(axis=1)
        logit += truth.task_biases[name][of] + 1.5 / np.sqrt(3) * dots
    assert np.allclose(truth.logits[:, 0], logit)
    assert set(data.task_features) == {"user_id", "site_id"}
    assert data.task_features["site_id"].height == 7


def test_scores_are_those_of_the_rows() -> None:
    data = make_interactions(seed=3)
    y, truth = data.interactions["click"].to_numpy(), data.truth
    for which, p in (("best", truth.expected[:, 0]), ("from_features", truth.from_features[:, 0])):
        assert truth.scores[f"click/{which}/auc"] == pytest.approx(roc_auc_score(y, p))
        assert truth.scores[f"click/{which}/log_loss"] == pytest.approx(log_loss(y, p))


def test_adapting_has_a_gain_that_predictability_takes_away() -> None:
    gains = []
    for predictable in (0.0, 0.5, 1.0):
        scores = make_interactions(tasks=300, predictable=predictable, task_bias=0.0, seed=4).truth.scores
        gains.append(scores["click/best/auc"] - scores["click/from_features/auc"])
    assert gains[0] > gains[1] > 0.03
    assert abs(gains[2]) < 1e-6  # features tell all, nothing is left to adapt


def test_from_features_is_what_the_features_tell() -> None:
    """Calibrated, and the mean over many tasks with the same known part: an independent Monte Carlo."""
    data = make_interactions(tasks=1, items=40, mean_rows=30, predictable=0.4, drift=0.5, label="click_apply", seed=5)
    truth = data.truth
    generator = np.random.default_rng(0)
    item = data.interactions["item_id"].to_numpy()
    time = data.interactions["timestamp"].to_numpy()
    angle = 0.5 * np.pi / 2 * (time - 1_700_000_000) / (time.max() - 1_700_000_000)
    own, fresh = generator.normal(size=(2, 200_000, 4))
    bias = 0.7 * generator.normal(size=200_000)
    features = data.users.row(0, named=True)
    assert features["segment"].startswith("segment ")
    # the known part of the logit, recovered from the truth: everything but the unknown draws
    always = make_interactions(
        tasks=1, items=40, mean_rows=30, predictable=1.0, task_bias=0.0, label="click_apply", seed=5
    ).truth.task_vectors["user_id"][0]
    n = len(item) // 2
    click, apply = (2.0 / 2.0 * np.roll(truth.item_vectors, h, axis=1)[item[n]] for h in (0, 1))
    vectors = np.cos(angle[n]) * (np.sqrt(0.4) * always + np.sqrt(0.6) * own) + np.sin(angle[n]) * fresh
    base = -0.5 + truth.item_biases[item[n]] + bias
    p = 1 / (1 + np.exp(-(base + vectors @ click)))
    both = p / (1 + np.exp(-(base + vectors @ apply)))
    assert np.allclose(truth.from_features[n], [p.mean(), both.mean()], atol=0.004)


def test_task_vectors_are_partly_linear_in_their_features() -> None:
    data = make_interactions(tasks=3000, mean_rows=1.0, predictable=0.4, dim=4, seed=6)
    vectors = data.truth.task_vectors["user_id"]
    assert np.allclose(vectors.std(axis=0), 1.0, atol=0.06)
    design = data.users.drop("user_id").to_dummies("segment").to_numpy().astype(float)
    explained = LinearRegression().fit(design, vectors).score(design, vectors)
    assert explained == pytest.approx(0.4, abs=0.04)


def test_a_model_with_the_true_vectors_recovers_the_strength() -> None:
    data = make_interactions(tasks=300, mean_rows=100, strength=2.0, dim=4, seed=7)
    rows, truth = data.interactions, data.truth
    of, item = rows["user_id"].to_numpy(), rows["item_id"].to_numpy()
    x = np.column_stack(
        [
            (truth.task_vectors["user_id"][of] * truth.item_vectors[item]).sum(axis=1),
            truth.task_biases["user_id"][of],
            truth.item_biases[item],
        ]
    )
    fit = LogisticRegression(C=1e6).fit(x, rows["click"].to_numpy())
    assert np.allclose(fit.coef_[0], [1.0, 1.0, 1.0], atol=0.06)  # strength / √dim, 1, 1
    assert fit.intercept_[0] == pytest.approx(-0.5, abs=0.06)


def test_rows_per_task_are_heavy_tailed_and_some_tasks_have_one() -> None:
    data = make_interactions(tasks=2000, mean_rows=30, spread=1.2, seed=8)
    counts = data.interactions["user_id"].value_counts()["count"].to_numpy()
    assert len(counts) == 2000
    assert (counts == 1).sum() >= 40
    assert counts.mean() == pytest.approx(30, rel=0.15)
    assert counts.max() > 10 * np.median(counts)
    assert np.log(counts[counts > 1]).std() == pytest.approx(1.1, abs=0.2)


def test_interactions_are_in_order_of_distinct_times() -> None:
    time = make_interactions(seed=9).interactions["timestamp"]
    assert time.is_sorted()
    assert time.is_unique().all()


def test_drift_makes_the_past_say_less_about_the_future() -> None:
    def last_rows_loss(drift: float) -> float:
        data = make_interactions(tasks=300, drift=drift, task_bias=0.0, seed=10)
        truth, rows = data.truth, data.interactions
        of, item = rows["user_id"].to_numpy(), rows["item_id"].to_numpy()
        at_the_start = (
            -0.5 + truth.item_biases[item] + (truth.task_vectors["user_id"][of] * truth.item_vectors[item]).sum(axis=1)
        )
        late = np.arange(len(of)) > 0.8 * len(of)
        return float(log_loss(rows["click"].to_numpy()[late], 1 / (1 + np.exp(-at_the_start[late]))))

    assert last_rows_loss(0.0) < 0.55
    assert last_rows_loss(1.0) > last_rows_loss(0.5) > last_rows_loss(0.0) + 0.02


def test_ratings_have_the_noise_that_was_asked_for() -> None:
    data = make_interactions(tasks=400, label="rating", noise=0.5, seed=11)
    assert data.labels == ("rating",)
    residual = data.interactions["rating"].to_numpy() - data.truth.expected[:, 0]
    assert residual.std() == pytest.approx(0.5, rel=0.03)
    assert residual.mean() == pytest.approx(0.0, abs=0.02)
    assert data.truth.scores["rating/best/rmse"] == pytest.approx(residual.std(), rel=1e-3)
    assert data.truth.scores["rating/from_features/rmse"] > 1.0


def test_an_apply_needs_a_click() -> None:
    data = make_interactions(tasks=500, mean_rows=60, label="click_apply", seed=12)
    click, apply = (data.interactions[name].to_numpy() for name in data.labels)
    assert not (apply & (1 - click)).any()
    expected = data.truth.expected
    assert (expected[:, 1] < expected[:, 0]).all()
    assert apply.mean() == pytest.approx(expected[:, 1].mean(), abs=0.01)
    assert np.corrcoef(data.truth.logits.T)[0, 1] < 0.8  # two tastes, not one


@settings(max_examples=20)
@given(
    tasks=st.integers(1, 30),
    items=st.integers(1, 20),
    dim=st.integers(1, 5),
    mean_rows=st.floats(1, 10),
    spread=st.floats(0, 2),
    predictable=st.floats(0, 1),
    drift=st.floats(0, 1),
    strength=st.floats(0, 4),
    label=st.sampled_from(["click", "rating", "click_apply"]),
    seed=st.integers(0, 9),
)
def test_any_sizes_work_and_a_seed_is_a_data_set(**arguments: object) -> None:
    first, second = (make_interactions(**arguments) for _ in range(2))  # type: ignore[arg-type]
    assert first.interactions.equals(second.interactions)
    assert first.users.equals(second.users)
    assert first.items.equals(second.items)
    assert first.interactions["user_id"].n_unique() == first.users.height == arguments["tasks"]
    assert first.items.height == arguments["items"]
    assert np.isfinite(first.truth.expected).all()
    assert first.interactions.null_count().sum_horizontal().sum() == 0
    assert first.truth.expected.shape == first.truth.from_features.shape == (
        first.interactions.height, len(first.labels))  # fmt: skip


def test_another_seed_is_another_data_set() -> None:
    assert not make_interactions(seed=0).interactions.equals(make_interactions(seed=1).interactions)


def test_arguments_out_of_range_are_said_all_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        make_interactions(tasks={"item_id": 0}, predictable=1.5, drift=-1, label="stars", spread=float("nan"))  # type: ignore[arg-type]
    message = str(raised.value)
    for part in (
        "`tasks['item_id']` is 0",
        "'item_id' has the name",
        "`predictable` is 1.5",
        "`drift` is -1",
        "'stars'",
    ):
        assert part in message
    assert "`spread` is nan" in message
    with pytest.raises(ConfigError, match="names no task type"):
        make_interactions(tasks={})


def test_tables_are_such_as_a_user_would_bring() -> None:
    data = make_interactions(tasks=20, dim=2, seed=0)
    assert data.interactions.columns == ["user_id", "item_id", "timestamp", "click"]
    assert data.users.columns == ["user_id", "segment", "signal_0", "signal_1"]
    assert data.items.columns == ["item_id", "category", "quality"]
    assert data.users.schema["segment"] == data.items.schema["category"] == pl.String
