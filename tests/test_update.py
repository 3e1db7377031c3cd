"""Embeddings updated from their posteriors in the store, without the interactions of the past."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

import limaml
from limaml.config import parse_config
from limaml.embeddings import update
from limaml.embeddings.factors import factor_type
from limaml.meta import TrainedModel, Training
from limaml.store import Store

SMALL = {"train": {"epochs": 4, "rows_per_batch": 512}, "model": {"embedding_dim": 8, "hidden": [16], "dim": 6}}


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    made = limaml.make_interactions(tasks=80, items=60, mean_rows=20, seed=2)
    return limaml.join_tables(made.interactions, {"user_id": made.users, "item_id": made.items}).frame.sort("timestamp")


def train(frame: pl.DataFrame, solver: str = "newton") -> Training:
    schema = limaml.infer_schema(
        frame, task="user_id", row="item_id", time="timestamp", label="click", task_columns=["segment"]
    ).schema
    return limaml.train(frame, schema, parse_config({**SMALL, "adapt": {"solver": solver, "half_life": None}}))


@pytest.fixture(scope="module")
def saved(frame: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedModel, Path]:
    folder = tmp_path_factory.mktemp("trained") / "model"
    return train(frame).save(folder), folder


def publish(store: Store, name: str, saved: tuple[TrainedModel, Path], frame: pl.DataFrame, **options: bool) -> None:
    trained, folder = saved
    limaml.publish(store, name, trained, folder, trained.encoder.encode(frame), **options)


def found(store: Store, name: str, kind: str, ids: list[str]) -> limaml.store.contract.Lookup:
    with store.read(name) as reader:
        return reader.get(kind, ids)


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).mean())


def test_in_parts_it_comes_close_to_adapting_on_everything(
    frame: pl.DataFrame, saved: tuple[TrainedModel, Path], tmp_path: Path
) -> None:
    trained, _ = saved
    third = len(frame) // 3
    past, middle, last = frame[:third], frame[third : 2 * third], frame[2 * third :]
    with limaml.open_store(tmp_path / "store") as store:
        publish(store, "parts", saved, past, uncertainty=True)
        publish(store, "whole", saved, frame, uncertainty=True)
        ids = sorted(frame["user_id"].unique().cast(pl.String).to_list())
        stale = found(store, "parts", "user_id", ids)
        for part in (middle, last):
            done = update(store, "parts", trained, part)
            assert done.applied["user_id"] == part["user_id"].n_unique()
            assert done.watermark == part["timestamp"].max()
        now, whole = found(store, "parts", "user_id", ids), found(store, "whole", "user_id", ids)
        np.testing.assert_array_equal(now.count, whole.count)
        np.testing.assert_array_equal(now.event_time, whole.event_time)
        assert now.found.all()
        assert distance(now.vectors, whole.vectors) < 0.1 * distance(stale.vectors, whole.vectors)
        one, other = (found(store, name, factor_type("user_id"), ids).vectors for name in ("parts", "whole"))
        assert distance(one, other) < 0.1 * float(np.abs(other).mean())


def test_from_the_prior_it_is_what_a_publication_gives(
    frame: pl.DataFrame, saved: tuple[TrainedModel, Path], tmp_path: Path
) -> None:
    """Members that the store does not know, and one that it knows without an interaction's trace."""
    trained, _ = saved
    first = frame["user_id"][0]
    with limaml.open_store(tmp_path / "store") as store:
        publish(store, "begun", saved, frame.filter(pl.col("user_id") == first), uncertainty=True)
        publish(store, "whole", saved, frame, uncertainty=True)
        new = frame.filter(pl.col("user_id") != first)
        update(store, "begun", trained, new)
        ids = new["user_id"].unique().cast(pl.String).to_list()
        for kind in ("user_id", factor_type("user_id"), "user_id.features"):
            one, other = found(store, "begun", kind, ids), found(store, "whole", kind, ids)
            np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
            np.testing.assert_array_equal(one.count, other.count)


def test_an_interrupted_update_is_noticed(
    frame: pl.DataFrame, saved: tuple[TrainedModel, Path], tmp_path: Path
) -> None:
    trained, _ = saved
    half = len(frame) // 2
    with limaml.open_store(tmp_path / "store") as store:
        publish(store, "m", saved, frame[:half], uncertainty=True)
        key = str(frame["user_id"][half])
        known = found(store, "m", factor_type("user_id"), [key])
        version = store.current("m")
        assert version is not None
        store.upsert("m", version, factor_type("user_id"), [key], known.vectors, known.count + 1, known.event_time)
        before = found(store, "m", "user_id", [key])
        with pytest.raises(limaml.StoreError, match=f"embedding of user_id:{key} .* interrupted between the two"):
            update(store, "m", trained, frame[half:])
        np.testing.assert_array_equal(found(store, "m", "user_id", [key]).vectors, before.vectors)


def test_what_cannot_be_updated_is_refused(
    frame: pl.DataFrame, saved: tuple[TrainedModel, Path], tmp_path: Path
) -> None:
    trained, _ = saved
    other = train(frame, "gradient").save(tmp_path / "other")
    with limaml.open_store(tmp_path / "store") as store:
        publish(store, "m", saved, frame)
        with pytest.raises(limaml.StoreError, match=r"holds no posteriors of 'user_id'.*--uncertainty"):
            update(store, "m", trained, frame[:10])
        with pytest.raises(limaml.StoreError, match=r"was made by the model .*, not by"):
            update(store, "m", other, frame[:10])
