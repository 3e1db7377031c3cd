"""What is drawn out of a store is distributed as the posterior says, and follows the refreshes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published import publish_small, small

import limaml
from limaml.embeddings.factors import factor_type, factor_width, pack_factors, unpack_factors
from limaml.errors import ModelError
from limaml.meta import Posterior, logit_sd
from limaml.serving.columns import columns_of
from limaml.serving.onnx import OnnxBlock
from limaml.serving.scoring import Asked, Entries, Scorer
from limaml.serving.tensors import Refused
from limaml.serving.thompson import Sampling, deviations, draw, posteriors_of, sampled, sampling_of
from limaml.store import Reader
from limaml.tasks import TaskRows


def everybody() -> TaskRows:
    data = small().training.data
    return TaskRows.of(data.index["user_id"], data.count("user_id"))


def ask(scorer: Scorer, reader: Reader, frame: pl.DataFrame) -> tuple[Asked, dict[str, Entries]]:
    asked = scorer.ask(columns_of(frame, scorer.columns), frame.height)
    return asked, scorer.look_up(reader, [asked])


def rows_of(keys: list[str]) -> pl.DataFrame:
    """One row for each member: any of those in the data, under the member's name."""
    frame = small().frame.drop([name for name in small().members.columns if name != "user_id"])
    return frame.head(len(keys)).with_columns(user_id=pl.Series(keys))


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_packed_factors_come_back(dim: int, tasks: int, seed: int) -> None:
    factors = torch.randn(tasks, dim, dim, generator=torch.Generator().manual_seed(seed)).tril()
    packed = pack_factors(factors)
    assert packed.shape == (tasks, factor_width(dim))
    assert torch.equal(unpack_factors(packed, dim), factors)


def test_the_store_has_the_posterior_of_every_task(tmp_path: Path) -> None:
    trained, data = publish_small(tmp_path, uncertainty=True), small().training.data
    wanted = trained.model.embed(data, "user_id", everybody(), uncertainty=True)
    keys = data.ids["user_id"]
    scorer = Scorer(trained)
    with limaml.open_store(tmp_path / "store") as store, store.read("model") as reader:
        _, entries = ask(scorer, reader, rows_of([*keys, "nobody"]))
        found = posteriors_of(reader, entries)["user_id"]
    known = entries["user_id"].found
    assert known.tolist() == [True] * len(keys) + [False]
    torch.testing.assert_close(found.mean[:-1], wanted.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.factor[:-1], wanted.factor, rtol=1e-5, atol=1e-6)
    prior = trained.model.newton("user_id").prior_factor(found.mean[-1:])
    torch.testing.assert_close(found.factor[-1:], prior, rtol=1e-6, atol=0)
    assert torch.equal(found.mean, entries["user_id"].z)  # cold, for who is not known
    assert not torch.allclose(wanted.factor, prior.expand_as(wanted.factor), rtol=0.05)  # the support taught something


def test_draws_are_distributed_as_the_posterior(tmp_path: Path) -> None:
    trained = publish_small(tmp_path, uncertainty=True)
    keys = small().training.data.ids["user_id"][:2]
    with limaml.open_store(tmp_path / "store") as store, store.read("model") as reader:
        _, entries = ask(Scorer(trained), reader, rows_of(keys))
        posterior = posteriors_of(reader, entries)["user_id"]
    number, scale = 4000, 1.5
    drawn = torch.stack([draw(posterior, "user_id", keys, Sampling(True, seed, scale)) for seed in range(number)])
    covariance = torch.linalg.inv(posterior.factor @ posterior.factor.mT) * scale**2
    sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
    off = (drawn.mean(0) - posterior.mean) / (sd / number**0.5)
    assert float(off.abs().max()) < 5  # standard errors
    centred = drawn - drawn.mean(0)
    found = torch.einsum("sni,snj->nij", centred, centred) / (number - 1)
    # An entry of a sample covariance has the variance (Cᵢⱼ² + Cᵢᵢ Cⱼⱼ) / number.
    error = ((covariance**2 + torch.einsum("ni,nj->nij", sd**2, sd**2)) / number).sqrt()
    assert float(((found - covariance) / error).abs().max()) < 5
    apart = torch.einsum("si,sj->ij", centred[:, 0] / sd[0], centred[:, 1] / sd[1]) / number
    assert float(apart.abs().max()) < 5 / number**0.5  # tasks are drawn independently


def test_sampled_scores_are_those_of_the_draws_and_spread_as_logit_sd_says(tmp_path: Path) -> None:
    trained, data = publish_small(tmp_path, uncertainty=True), small().training.data
    frame, scorer = small().frame.head(40), Scorer(trained)
    with limaml.open_store(tmp_path / "store") as store, store.read("model") as reader:
        asked, entries = ask(scorer, reader, frame)
        posteriors = posteriors_of(reader, entries)
    whole = trained.model.embed(data, "user_id", everybody(), uncertainty=True)
    assert data.source_row is not None
    place = torch.argsort(data.source_row)[:40]
    wanted = logit_sd(trained.model, data, place, {"user_id": whole}).numpy()
    found = deviations(scorer, posteriors, asked, entries)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(deviations(scorer, posteriors, asked, entries, 2.0), 2 * found, rtol=1e-6)
    # As training would score the same draws.
    one = Sampling(True, seed=3)
    drawn = draw(posteriors["user_id"], "user_id", entries["user_id"].keys, one)
    table = whole.mean.clone()
    table[[data.ids["user_id"].index(key) for key in entries["user_id"].keys]] = drawn
    expected = trained.model.predict(data, place, {"user_id": table})
    torch.testing.assert_close(sampled(scorer, posteriors, asked, entries, one), expected, rtol=1e-5, atol=1e-5)
    # Where the block is close to linear, scores spread as much as the deviation says.
    little = [sampled(scorer, posteriors, asked, entries, Sampling(True, seed, 0.01)) for seed in range(1000)]
    ratio = torch.stack(little).std(0).numpy() / (0.01 * found)
    assert ratio.min() > 0.85 and ratio.max() < 1.15


def test_a_draw_depends_on_the_seed_and_the_task_alone() -> None:
    posterior = Posterior(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    one, seven = Posterior(posterior.mean[:1], posterior.factor[:1]), Sampling(True, 7)
    whole = draw(posterior, "user_id", ["a", "b", "c"], seven)
    assert torch.equal(draw(one, "user_id", ["b"], seven)[0], whole[1])
    assert not torch.allclose(draw(one, "item_id", ["b"], seven)[0], whole[1])
    assert not torch.allclose(draw(one, "user_id", ["b"], Sampling(True, 8))[0], whole[1])
    assert not torch.allclose(draw(one, "user_id", ["b"], Sampling(True)), draw(one, "user_id", ["b"], Sampling(True)))
    assert torch.equal(draw(one, "user_id", ["b"], Sampling(True, 7, 0.0)), torch.zeros(1, 2))


def test_a_refresh_moves_mean_and_factor_together(tmp_path: Path) -> None:
    made = small()
    frame = made.frame.sort("timestamp")
    cut = frame["timestamp"][int(0.8 * len(frame))]
    past = made.training.save(tmp_path / "model")
    data = past.encoder.encode(frame.filter(pl.col("timestamp") < cut))
    with limaml.open_store(tmp_path / "store") as store:
        limaml.publish(store, "model", past, tmp_path / "model", data, uncertainty=True)
        touched = frame.filter(pl.col("timestamp") >= cut)["user_id"].unique().cast(pl.String).to_list()
        limaml.refresh(
            store,
            "model",
            past,
            frame.filter(pl.col("user_id").is_in([int(key) for key in touched])),
            {"user_id": touched},
        )
        with store.read("model") as reader:
            _, entries = ask(Scorer(past), reader, rows_of(touched))
            found = posteriors_of(reader, entries)["user_id"]
    whole = past.encoder.encode(frame)
    entries = torch.tensor([whole.ids["user_id"].index(key) for key in touched])
    among = TaskRows.of(whole.index["user_id"], whole.count("user_id"))
    wanted = past.model.embed(whole, "user_id", among, entries, uncertainty=True)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.factor, wanted.factor, rtol=1e-5, atol=1e-5)


def test_a_refresh_between_mean_and_factor_is_noticed(tmp_path: Path) -> None:
    """The mean of a batch was read before a refresh, its factors after it: both are then read anew."""
    made = small()
    frame = made.frame.sort("timestamp")
    trained = made.training.save(tmp_path / "model")
    cut = frame["timestamp"][int(0.8 * len(frame))]
    touched = frame.filter(pl.col("timestamp") >= cut)["user_id"].unique()
    history = frame.filter(pl.col("user_id").is_in(touched.implode()))
    keys = touched.cast(pl.String).to_list()
    with limaml.open_store(tmp_path / "store") as store:
        data = trained.encoder.encode(frame.filter(pl.col("timestamp") < cut))
        limaml.publish(store, "model", trained, tmp_path / "model", data, uncertainty=True)
        with store.read("model") as reader:
            _, entries = ask(Scorer(trained), reader, rows_of(keys))
            limaml.refresh(store, "model", trained, history, {"user_id": keys})
            found = posteriors_of(reader, entries)["user_id"]
            _, after = ask(Scorer(trained), reader, rows_of(keys))
    assert not torch.equal(entries["user_id"].z, after["user_id"].z)
    assert torch.equal(found.mean, after["user_id"].z)


def test_a_forgotten_task_leaves_no_posterior(tmp_path: Path) -> None:
    trained = publish_small(tmp_path, uncertainty=True)
    keys = small().training.data.ids["user_id"][:2]
    with limaml.open_store(tmp_path / "store") as store:
        store.forget("user_id", keys[:1])
        with store.read("model") as reader:
            assert reader.get(factor_type("user_id"), keys).found.tolist() == [False, True]
            _, entries = ask(Scorer(trained), reader, rows_of(keys))
            found = posteriors_of(reader, entries)["user_id"]
    assert torch.equal(found.factor[:1], trained.model.newton("user_id").prior_factor(found.mean[:1]))


def test_what_cannot_be_sampled_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapt\.solver=newton"):
        publish_small(tmp_path / "gradient", solver="gradient", uncertainty=True)
    trained = publish_small(tmp_path / "plain")
    with limaml.open_store(tmp_path / "plain" / "store") as store, store.read("model") as reader:
        assert factor_type("user_id") not in reader.dims
        asked, entries = ask(Scorer(trained), reader, small().frame.head(2))
        with pytest.raises(Refused, match="limaml embed RUN --uncertainty"):
            posteriors_of(reader, entries)
    prior = {"user_id": Posterior(entries["user_id"].z, torch.eye(4).expand(len(entries["user_id"].z), 4, 4))}
    scorer = Scorer(trained)
    scorer.model.global_block.differentiable = OnnxBlock.differentiable  # as if it were one
    try:
        with pytest.raises(Refused, match="--runtime torch"):
            deviations(scorer, prior, asked, entries)
    finally:
        del scorer.model.global_block.differentiable  # the model is shared by the tests


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sample": 1}, "'sample' is 1; it must be true or false"),
        ({"sample": "yes"}, "'sample' is 'yes'"),
        ({"seed": 1.5}, "'seed' is 1.5; it must be an integer"),
        ({"seed": True}, "'seed' is True"),
        ({"scale": -1}, "'scale' is -1; it must be a number of at least 0"),
        ({"scale": float("nan")}, "'scale' is nan"),
        ({"scale": float("inf")}, "'scale' is inf"),
        ({"scale": "big"}, "'scale' is 'big'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message):
        sampling_of(parameters)


def test_parameters_are_read() -> None:
    assert sampling_of({}) == Sampling(False, None, 1.0)
    assert sampling_of({"sample": True, "seed": 7, "scale": 2, "other": "x"}) == Sampling(True, 7, 2.0)
