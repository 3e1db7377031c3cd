"""The main job on synthetic interactions with a known answer: train, publish, score out of the store, refresh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import limaml
from limaml.config import parse_config
from limaml.interactions import Synthetic
from limaml.meta import MetaMLP, Training
from limaml.tasks import TaskRows

SMALL = {
    "train": {"epochs": 8, "rows_per_batch": 512, "average": 1.0},  # of eight epochs in all: three would lag behind
    "model": {"embedding_dim": 8, "hidden": [16], "dim": 8, "factors": 8},
}


@pytest.fixture(scope="module")
def made() -> Synthetic:
    return limaml.make_interactions(tasks=120, items=60, mean_rows=25, seed=1)


@pytest.fixture(scope="module")
def joined(made: Synthetic) -> limaml.interactions.Joined:
    return limaml.join_tables(made.interactions, {"user_id": made.users, "item_id": made.items})


def schema_of(joined: limaml.interactions.Joined) -> limaml.Schema:
    return limaml.infer_schema(
        joined.frame,
        task="user_id",
        row="item_id",
        time="timestamp",
        label="click",
        task_columns=joined.columns["user_id"],
        row_columns=joined.columns["item_id"],
    ).schema


@pytest.fixture(scope="module", params=["newton", "gradient", "newton, rows weighed by age"])
def training(request: pytest.FixtureRequest, joined: limaml.interactions.Joined) -> Training:
    solver, _, ageing = request.param.partition(", ")
    config = parse_config({**SMALL, "adapt": {"solver": solver, "half_life": 400_000.0 if ageing else None}})
    return limaml.train(joined.frame, schema_of(joined), config)


def in_training(training: Training) -> np.ndarray:
    """Logits of all rows as training code computes them, in the order of the table."""
    data, model = training.data, training.model
    tables = {t: model.embed(data, t, TaskRows.of(data.index[t], data.count(t))) for t in model.tasks}
    with torch.no_grad():
        logits = model.logits(data, torch.arange(len(data)), tables)
    assert data.source_row is not None
    back = torch.empty_like(logits)
    back[data.source_row] = logits
    return back.numpy()


def test_scores_from_the_store_equal_those_of_training(
    training: Training, joined: limaml.interactions.Joined, made: Synthetic, tmp_path: Path
) -> None:
    trained = training.save(tmp_path / "model")
    with limaml.open_store(tmp_path / "store") as store:
        published = limaml.publish(store, "demo", trained, tmp_path / "model", training.data)
        assert published.counts["user_id"] == training.data.count("user_id")
        with limaml.Predictor(store, "demo") as predictor:
            scores = predictor.score(joined.frame)
            assert scores.known.all()
            np.testing.assert_allclose(scores.logits, in_training(training), atol=1e-5)
            np.testing.assert_allclose(scores.predictions, 1 / (1 + np.exp(-scores.logits)), atol=1e-6)
            # Task features may be left out: the store has them.
            without = joined.frame.drop(joined.columns["user_id"])
            np.testing.assert_allclose(predictor.score(without).logits, scores.logits, atol=1e-6)
            # Unknown tasks are served the cold embedding, and said to be unknown.
            strangers = joined.frame.with_columns(user_id=pl.col("user_id") + 10_000_000)
            unknown = predictor.score(strangers)
            assert not unknown.known.any()
            cold = predictor.score(joined.frame, personal=False)
            np.testing.assert_allclose(unknown.logits, cold.logits, atol=1e-6)
            assert np.abs(cold.logits - scores.logits).max() > 0.1  # adaptation did something
            top = predictor.recommend(training.data.ids["user_id"][0], made.items, top=5)
            assert top["rank"].to_list() == [1, 2, 3, 4, 5]
            assert sorted(top["score"].to_list(), reverse=True) == top["score"].to_list()


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-2), ("int8", 0.3)])
def test_smaller_embeddings_keep_features_exact(
    training: Training, joined: limaml.interactions.Joined, tmp_path: Path, dtype: str, error: float
) -> None:
    trained = training.save(tmp_path / "model")
    with limaml.open_store(tmp_path / "store") as store:
        limaml.publish(store, "small", trained, tmp_path / "model", training.data, dtype=dtype)
        with limaml.Predictor(store, "small") as predictor:
            without = predictor.score(joined.frame.drop(joined.columns["user_id"]))
            np.testing.assert_array_equal(without.logits, predictor.score(joined.frame).logits)
            np.testing.assert_allclose(without.logits, in_training(training), atol=error)


def test_refresh_equals_full_regeneration(
    training: Training, joined: limaml.interactions.Joined, tmp_path: Path
) -> None:
    trained = training.save(tmp_path / "model")
    frame = joined.frame.sort("timestamp")
    cut = frame["timestamp"][int(0.9 * len(frame))]
    past, new = frame.filter(pl.col("timestamp") < cut), frame.filter(pl.col("timestamp") >= cut)
    touched = {"user_id": new["user_id"].unique().cast(pl.String).to_list()}
    history = frame.filter(pl.col("user_id").is_in(new["user_id"].unique().implode()))
    with limaml.open_store(tmp_path / "store") as store:
        limaml.publish(store, "live", trained, tmp_path / "model", trained.encoder.encode(past))
        done = limaml.refresh(store, "live", trained, history, touched)
        assert done.applied["user_id"] == len(touched["user_id"])
        again = limaml.refresh(store, "live", trained, history, touched)
        assert (again.applied["user_id"], again.stale["user_id"]) == (0, len(touched["user_id"]))
        limaml.publish(store, "whole", trained, tmp_path / "model", trained.encoder.encode(frame))
        with store.read("live") as live, store.read("whole") as whole:
            ids = sorted(whole.ids("user_id"))
            assert ids == sorted(live.ids("user_id"))
            one, other = live.get("user_id", ids), whole.get("user_id", ids)
            np.testing.assert_array_equal(one.count, other.count)
            np.testing.assert_array_equal(one.event_time, other.event_time)
            np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)
        with pytest.raises(limaml.DataError, match="no row of the touched task user_id:nobody"):
            limaml.refresh(store, "live", trained, history, {"user_id": ["nobody"]})


def test_a_model_of_ones_own_is_personalised_by_one_more_feature(
    joined: limaml.interactions.Joined, tmp_path: Path
) -> None:
    schema = schema_of(joined)

    class Mine(torch.nn.Module):
        """An existing model `m(features) -> logits`, reading one more feature."""

        def __init__(self, items: int) -> None:
            super().__init__()
            self.item = torch.nn.Embedding(items, 8)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(8 + 4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

        def forward(self, features: limaml.Features) -> torch.Tensor:
            item, z = self.item(features["item_id"]), features["user_id_embedding"]
            logits: torch.Tensor = self.mlp(torch.cat([item, z], 1)) + (item[:, :4] * z).sum(1, keepdim=True)
            return logits

    def build(encoder: limaml.Encoder, config: limaml.Config) -> limaml.MetaModel:
        specs = {spec.name: spec for spec in encoder.specs}
        own = [spec for spec in encoder.specs if spec.side == "user_id"]
        return limaml.MetaModel(Mine(specs["item_id"].size), {"user_id": MetaMLP(own, 4)}, adaptation=config.adapt)

    training = limaml.train(joined.frame, schema, parse_config(SMALL), build=build)
    training.save(tmp_path / "model")
    with limaml.open_store(tmp_path / "store") as store:
        trained = limaml.load_model(tmp_path / "model", build)
        limaml.publish(store, "mine", trained, tmp_path / "model", training.data)
        with limaml.Predictor(store, "mine", build=build) as predictor:
            np.testing.assert_allclose(predictor.score(joined.frame).logits, in_training(training), atol=1e-5)
    with pytest.raises(limaml.ArtifactError, match="pass build="):
        limaml.load_model(tmp_path / "model")


def test_member_and_item_are_adapted_together(joined: limaml.interactions.Joined, tmp_path: Path) -> None:
    schema = limaml.infer_schema(
        joined.frame, task=["user_id", "item_id"], row="item_id", time="timestamp", label="click"
    ).schema
    training = limaml.train(joined.frame, schema, parse_config(SMALL))
    trained = training.save(tmp_path / "model")
    with limaml.open_store(tmp_path / "store") as store:
        published = limaml.publish(store, "both", trained, tmp_path / "model", training.data)
        assert published.counts["item_id"] == training.data.count("item_id")
        with limaml.Predictor(store, "both") as predictor:
            np.testing.assert_allclose(predictor.score(joined.frame).logits, in_training(training), atol=1e-5)


def test_adaptation_finds_what_features_cannot_tell(made: Synthetic, training: Training) -> None:
    """With the task vectors known by construction, adapted scores come nearer to the truth than cold ones."""
    truth = made.truth.expected[:, 0]
    logits = in_training(training)[:, 0]
    data, model = training.data, training.model
    everyone = torch.arange(data.count("user_id"))
    with torch.no_grad():
        cold = model.logits(data, torch.arange(len(data)), {"user_id": model.cold(data, "user_id", everyone)})
    assert data.source_row is not None
    cold_logits = np.empty(len(data))
    cold_logits[data.source_row.numpy()] = cold[:, 0].numpy()

    def error(x: np.ndarray) -> float:
        return float(np.abs(1 / (1 + np.exp(-x)) - truth).mean())

    assert error(logits) < 0.95 * error(cold_logits)
