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
from limaml.errors import ModelError, StoreError
from limaml.meta import Posterior
from limaml.serving.thompson import draw, posterior_of
from limaml.tasks import TaskRows


def everybody() -> TaskRows:
    data = small().training.data
    return TaskRows.of(data.index["user_id"], data.count("user_id"))


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
    with limaml.open_store(tmp_path / "store") as store, store.read("model") as reader:
        found, known = posterior_of(reader, "user_id", [*keys, "nobody"])
    assert known.tolist() == [True] * len(keys) + [False]
    torch.testing.assert_close(found.mean[:-1], wanted.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.factor[:-1], wanted.factor, rtol=1e-5, atol=1e-6)
    prior = trained.model.newton("user_id").prior_factor(found.mean[-1:])
    torch.testing.assert_close(found.factor[-1:], prior, rtol=1e-6, atol=0)
    assert not torch.allclose(wanted.factor, prior.expand_as(wanted.factor), rtol=0.05)  # the support taught something


def test_draws_are_distributed_as_the_posterior(tmp_path: Path) -> None:
    publish_small(tmp_path, uncertainty=True)
    keys = small().training.data.ids["user_id"][:2]
    with limaml.open_store(tmp_path / "store") as store, store.read("model") as reader:
        posterior, _ = posterior_of(reader, "user_id", keys)
    number, scale = 4000, 1.5
    drawn = torch.stack([torch.from_numpy(draw(posterior, "user_id", keys, seed, scale)) for seed in range(number)])
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


def test_a_draw_depends_on_the_seed_and_the_task_alone() -> None:
    posterior = Posterior(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    whole = draw(posterior, "user_id", ["a", "b", "c"], seed=7)
    part = Posterior(posterior.mean[:1], posterior.factor[:1])
    np.testing.assert_array_equal(draw(part, "user_id", ["b"], seed=7)[0], whole[1])
    assert not np.allclose(draw(part, "item_id", ["b"], seed=7)[0], whole[1])
    assert not np.allclose(draw(part, "user_id", ["b"], seed=8)[0], whole[1])
    assert not np.allclose(draw(part, "user_id", ["b"]), draw(part, "user_id", ["b"]))
    np.testing.assert_array_equal(draw(part, "user_id", ["b"], seed=7, scale=0.0), [[0, 0]])


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
            found, _ = posterior_of(reader, "user_id", touched)
    whole = past.encoder.encode(frame)
    entries = torch.tensor([whole.ids["user_id"].index(key) for key in touched])
    among = TaskRows.of(whole.index["user_id"], whole.count("user_id"))
    wanted = past.model.embed(whole, "user_id", among, entries, uncertainty=True)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.factor, wanted.factor, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_sampled_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapt\.solver=newton"):
        publish_small(tmp_path / "gradient", solver="gradient", uncertainty=True)
    publish_small(tmp_path / "plain")
    with limaml.open_store(tmp_path / "plain" / "store") as store, store.read("model") as reader:
        assert factor_type("user_id") not in reader.dims
        with pytest.raises(StoreError, match="limaml embed RUN --uncertainty"):
            posterior_of(reader, "user_id", ["1"])
