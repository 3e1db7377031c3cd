"""Whether old rows deserve less weight is found out when training ends, and what is found is a part of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import limaml
from limaml.config import parse_config
from limaml.interactions.buckets import OneBucket
from limaml.meta import Training, load_model
from limaml.meta.age_search import find_half_life
from limaml.tasks import TaskRows

MEMBERS, ROWS = 80, 30
SMALL = {
    "model": {"embedding_dim": 4, "hidden": [16], "dim": 4, "factors": 4},
    "train": {"epochs": 12, "lr": 0.02, "table_decay": 1.0, "decay": 1.0},
}


def clicks(turns: bool, times: bool = True, members: int = MEMBERS) -> pl.DataFrame:
    """Members who like one of two kinds of items, and with `turns` the other one from some moment on."""
    rng = np.random.default_rng(5)
    member, place = np.repeat(np.arange(members), ROWS), np.tile(np.arange(ROWS), members)
    kind = rng.integers(0, 2, len(member))
    liked = (member % 2) ^ (turns & (member % 3 == 0) & (place >= rng.integers(2, ROWS - 2, members)[member]))
    click = rng.random(len(member)) < np.where(kind == liked, 0.85, 0.15)
    frame = pl.DataFrame(
        {"user_id": member, "kind": np.where(kind, "b", "a"), "timestamp": 1000 * place, "click": click}
    )
    return frame.with_columns(pl.from_epoch("timestamp", "s")) if times else frame.drop("timestamp")


def trained(frame: pl.DataFrame, **adapt: object) -> Training:
    time = "timestamp" if "timestamp" in frame.columns else None
    schema = limaml.infer_schema(frame, task="user_id", time=time, label="click").schema
    return limaml.train(frame, schema, parse_config({**SMALL, "adapt": adapt}), validation_share=0)


@pytest.fixture(scope="module")
def turned() -> Training:
    return trained(clicks(turns=True))


def test_rows_of_members_who_change_weigh_by_age(turned: Training) -> None:
    (value,) = turned.model.half_life_values().values()
    assert 1 < value * 86_400 / 1000 < ROWS  # in days; a row comes every thousand seconds


def test_rows_of_members_who_stay_weigh_alike() -> None:
    assert trained(clicks(turns=False)).model.half_life_values() == {}


def test_the_order_of_a_shuffle_tells_nothing() -> None:
    assert trained(clicks(turns=True, times=False)).model.half_life_values() == {}


@pytest.mark.parametrize("adapt", [{"find_half_life": False}, {"steps": 0}])
def test_nobody_is_asked(adapt: dict[str, object]) -> None:
    assert trained(clicks(turns=True), **adapt).model.half_life_values() == {}


def test_a_half_life_that_was_given_is_learned_and_not_looked_for() -> None:
    (value,) = trained(clicks(turns=True), half_life=100.0).model.half_life_values().values()
    assert 50 < value < 200


@pytest.mark.parametrize("turns", [False, True])
def test_members_who_change_make_no_items_that_do(turns: bool) -> None:
    rows = clicks(turns)
    item = np.random.default_rng(6).integers(0, 20, len(rows))
    frame = rows.with_columns(item_id=pl.Series(2 * item + (rows["kind"] == "b").to_numpy()))
    schema = limaml.infer_schema(frame, task=["user_id", "item_id"], time="timestamp", label="click").schema
    found = limaml.train(frame, schema, parse_config(SMALL), validation_share=0).model.half_life_values()
    assert list(found) == ["user_id"] * turns


def test_it_is_saved_with_the_model(turned: Training, tmp_path: Path) -> None:
    loaded = turned.save(tmp_path / "model")
    again = load_model(tmp_path / "model", lambda _encoder, _config: fresh(turned))  # blocks of one's own
    for model in (loaded.model, again.model):
        assert model.half_life_values() == turned.model.half_life_values()
        data = turned.data
        assert torch.equal(embedded(model, data), embedded(turned.model, data))
    plain = fresh(turned)
    plain.load_state_dict(turned.model.state_dict())
    plain.load_state_dict({k: v for k, v in turned.model.state_dict().items() if not k.startswith("half_lives")})
    assert plain.half_life_values() == {}
    assert not torch.allclose(embedded(plain, turned.data), embedded(turned.model, turned.data))


def fresh(training: Training) -> limaml.MetaModel:
    from limaml.meta.build import build_meta_model

    losses = [label.loss for label in training.encoder.schema.labels]
    return build_meta_model(
        training.encoder.specs, training.model.tasks, losses, training.config.model, training.config.adapt
    )


def embedded(model: limaml.MetaModel, data: limaml.Interactions) -> torch.Tensor:
    model.eval()
    return model.embed(data, "user_id", TaskRows.of(data.index["user_id"], data.count("user_id")))


def test_members_whom_nothing_was_fitted_on_say_the_same(turned: Training) -> None:
    others = clicks(turns=True, members=2 * MEMBERS).filter(pl.col("user_id") >= MEMBERS)
    data, model = turned.encoder.encode(others), fresh(turned)
    model.load_state_dict(turned.model.state_dict())
    grouped = TaskRows.of(data.index["user_id"], data.count("user_id"))
    (known,) = model.half_life_values().values()
    found = find_half_life(model.eval(), data, "user_id", grouped, [({}, None)], seed=3)
    assert found is not None
    assert known / 5 < found < 5 * known
    assert model.half_life_values() == {}


def test_buckets_and_items_beside_members() -> None:
    """A log in windows is asked by its first one; with two task types each has its own answer."""
    rng = np.random.default_rng(2)
    frame = clicks(turns=True).with_columns(item_id=pl.Series(rng.integers(0, 25, MEMBERS * ROWS)))
    schema = limaml.infer_schema(
        frame, task=["user_id", "item_id"], row="item_id", time="timestamp", label="click"
    ).schema
    done = limaml.train(OneBucket(frame), schema, parse_config(SMALL), validation_share=0)
    assert set(done.model.half_life_values()) == {"user_id"}
