"""Scoring out of a store gives what training code gives on the same rows, however they come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import Small, publish_small, small

import limaml
from limaml.errors import DataError
from limaml.interactions import Encoder, Feature, task_keys
from limaml.interactions.fitting import fit_of
from limaml.meta.saved import TrainedModel
from limaml.serving.columns import Column, Lookup, columns_of, keys_of
from limaml.serving.packed_batch import FEW
from limaml.serving.row_cache import RowCache
from limaml.serving.scoring import Scorer
from limaml.store.contract import Reader
from limaml.types import ROW, FeatureKind, Features, Parts


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrainedModel, Reader, Small]]:
    folder = tmp_path_factory.mktemp("scoring")
    trained = publish_small(folder)
    with limaml.open_store(folder / "store") as store, store.read("model") as reader:
        yield trained, reader, small()


def oracle(trained: TrainedModel, reader: Reader, frame: pl.DataFrame) -> Any:
    """The training side's path: the encoder on a frame, `MetaModel.predict` on embeddings out of the store."""
    task = trained.encoder.schema.tasks[0]
    keys, codes = task_keys(frame, task)
    first = [int(np.argmax(codes == code)) for code in range(len(keys))]
    data = limaml.types.Interactions(
        {
            ROW: trained.encoder.encode_features(frame, ROW),
            task.name: trained.encoder.encode_features(frame[first], task.name),
        },
        {ROW: torch.arange(frame.height), task.name: torch.from_numpy(codes)},
        {task.name: keys},
        torch.zeros(frame.height, 1),
        torch.ones(frame.height),
        torch.zeros(frame.height, dtype=torch.int64),
    )
    looked = reader.get(task.name, keys)
    cold = trained.model.cold(data, task.name, torch.arange(len(keys)))
    z = torch.where(torch.from_numpy(looked.found)[:, None], torch.from_numpy(np.array(looked.vectors)), cold)
    return trained.model.predict(data, torch.arange(frame.height), {task.name: z}).detach().numpy()


def logits(scorer: Scorer, reader: Reader, *frames: pl.DataFrame) -> Any:
    asked = [scorer.ask(columns_of(frame, scorer.columns), frame.height) for frame in frames]
    return scorer.logits(asked, scorer.look_up(reader, asked)).numpy()


def test_scores_are_those_of_the_training_side(served: tuple[TrainedModel, Reader, Small]) -> None:
    trained, reader, made = served
    scorer = Scorer(trained)
    frame = made.frame.head(300)
    wanted = oracle(trained, reader, frame)
    for _ in range(2):  # encoded anew, then out of the cache
        np.testing.assert_allclose(logits(scorer, reader, frame), wanted, atol=1e-6)
    assert scorer.cache.hits >= 300 > scorer.cache.misses > 0


def test_autocast_does_not_reach_scores(served: tuple[TrainedModel, Reader, Small]) -> None:
    trained, reader, made = served
    scorer = Scorer(trained)
    asked = [scorer.ask(columns_of(made.frame.head(30), scorer.columns), 30)]
    entries = scorer.look_up(reader, asked)
    plain = Scorer(trained).logits(asked, entries).numpy()
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(scorer.logits(asked, entries).numpy(), plain)


def test_a_block_of_ones_own_scores_as_the_one_that_ships(served: tuple[TrainedModel, Reader, Small]) -> None:
    """The path of every other block, whole and cut, against the packed one."""
    trained, reader, made = served
    frames = made.frame.slice(0, 20), made.frame.slice(50, 30)
    wanted = logits(Scorer(trained), reader, *frames)
    cut = Scorer(trained, packed=False)
    np.testing.assert_allclose(logits(cut, reader, *frames), wanted, atol=1e-6)
    asked = [cut.ask(columns_of(frame, cut.columns), frame.height) for frame in frames]
    with torch.no_grad():
        whole = cut.differentiable(asked, cut.look_up(reader, asked))
    np.testing.assert_allclose(whole.numpy(), wanted, atol=1e-6)
    assert made.frame["user_id"].n_unique() > FEW  # of more tasks the shares are gathered, and not added by the product
    wanted = logits(Scorer(trained), reader, *frames, made.frame)
    np.testing.assert_allclose(logits(cut, reader, *frames, made.frame), wanted, atol=1e-6)


def test_a_batch_of_requests_scores_as_each_alone(served: tuple[TrainedModel, Reader, Small]) -> None:
    trained, reader, made = served
    scorer, frame = Scorer(trained), made.frame
    bare = frame.slice(20, 9).drop("segment", "signal_0", "signal_1", "signal_2", "signal_3")
    pieces = [frame.slice(0, 7), bare, frame.slice(40, 1), frame.slice(90, 0), frame.slice(100, 30)]
    alone = [logits(Scorer(trained), reader, piece) for piece in pieces]
    np.testing.assert_allclose(logits(scorer, reader, *pieces), np.concatenate(alone), atol=1e-6)


def test_one_value_stands_for_all_rows(served: tuple[TrainedModel, Reader, Small]) -> None:
    trained, reader, made = served
    scorer = Scorer(trained)
    long = made.frame.head(1).select("user_id").join(made.items, how="cross")
    columns = columns_of(long, scorer.columns)
    short = {
        **columns,
        "user_id": columns["user_id"].first([0]),
        "category": Column.of_series(pl.Series(["category 3"])),
    }
    asked = scorer.ask(short, long.height)
    found = scorer.logits([asked], scorer.look_up(reader, [asked])).numpy()
    same = long.with_columns(category=pl.lit("category 3"))
    np.testing.assert_allclose(found, logits(Scorer(trained), reader, same), atol=1e-6)


def test_without_a_store_every_task_is_cold(served: tuple[TrainedModel, Reader, Small]) -> None:
    trained, reader, made = served
    scorer = Scorer(trained)
    frame = made.frame.head(20)
    asked = [scorer.ask(columns_of(frame, scorer.columns), frame.height)]
    entries = scorer.look_up(None, asked)
    assert not entries["user_id"].found.any()
    stranger = frame.with_columns(user_id=pl.lit(10**9))
    per_row = [logits(scorer, reader, stranger[row]) for row in range(20)]  # each with the features of its own row
    np.testing.assert_allclose(scorer.logits(asked, entries).numpy(), np.concatenate(per_row), atol=1e-6)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "integer": st.integers(-(2**53), 2**53) | st.integers(0, 9),
    "float": st.floats(-1e100, 1e100) | st.just(float("nan")) | st.integers(0, 9).map(float),
    "text": st.text(max_size=5) | st.integers(0, 9).map(str),
    "boolean": st.booleans(),
}
TYPES = {"integer": pl.Int64(), "float": pl.Float64(), "text": pl.String(), "boolean": pl.Boolean()}


@st.composite
def series(draw: st.DrawFn, nulls: bool = True) -> pl.Series:
    kind = draw(st.sampled_from(sorted(VALUES)))
    each = VALUES[kind] | st.none() if nulls else VALUES[kind]
    return pl.Series("value", draw(st.lists(each, min_size=1, max_size=8)), dtype=TYPES[kind])


@settings(max_examples=40)
@given(st.lists(series(), min_size=1, max_size=3), series(), st.booleans())
def test_look_ups_encode_as_the_encoder_does(asked: list[pl.Series], fitted: pl.Series, hashed: bool) -> None:
    for kind in (FeatureKind.CATEGORICAL, FeatureKind.TOKENS, FeatureKind.NUMERIC):
        options: dict[str, Any] = {"buckets": 7} if hashed and kind is not FeatureKind.NUMERIC else {}
        feature = Feature(name="value", kind=kind, length=3, **options)
        try:
            fit, distinct = fit_of(feature), fitted.unique(maintain_order=True)
            fit.add(distinct, np.ones(len(distinct), np.int64))
            codec = fit.codec()
        except DataError:
            continue
        encoder = Encoder(limaml.Schema(tasks=("t",), labels=("y",), features=(feature,)), {"value": codec})
        lookup = Lookup(feature, codec)
        for values in asked + asked:
            try:
                wanted = encoder.encode_features(values.to_frame(), ROW)["value"]
            except DataError:
                with pytest.raises(DataError):
                    lookup.check(Column.of_series(values))
                continue
            lookup.check(Column.of_series(values))
            torch.testing.assert_close(lookup.encode(Column.of_series(values)), wanted, rtol=0, atol=0)


@settings(max_examples=40)
@given(series(nulls=False), series(nulls=False))
def test_keys_are_those_of_training(first: pl.Series, second: pl.Series) -> None:
    rows = min(len(first), len(second))
    frame = pl.DataFrame({"a": first.head(rows), "b": second.head(rows)})
    for columns in (("a",), ("a", "b")):
        task = limaml.interactions.Task(name="t", columns=columns)
        try:
            wanted, codes = task_keys(frame, task)
        except DataError:  # a NaN names no task
            with pytest.raises(DataError, match="names no 't'"):
                keys_of(columns_of(frame, {"a", "b"}), task)
            continue
        keys, found, place = keys_of(columns_of(frame, {"a", "b"}), task)
        assert (keys, found.tolist()) == (wanted, codes.tolist())
        assert found[place].tolist() == list(range(len(keys)))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(0, 12))
def test_a_full_cache_begins_anew_and_never_answers_wrongly(requests: list[list[int]], room: int) -> None:
    seen = 0

    def encode(columns: Features) -> Parts:
        nonlocal seen
        values = torch.tensor(columns["id"].values, dtype=torch.float32)
        seen += len(values)
        return values[:, None] * 2, None, values

    cache = RowCache(["id"], encode, limit=room * (256 + 8))  # type: ignore[arg-type]
    for ids in requests:
        first, none, last = cache.parts([({"id": Column.of_array(np.array(part))}, len(part)) for part in (ids, ids)])
        assert none is None and first is not None and last is not None
        assert first[:, 0].tolist() == [2.0 * value for value in ids * 2]
        assert last.tolist() == [float(value) for value in ids * 2]


@settings(max_examples=60)
@given(st.data())
def test_rows_are_found_whether_or_not_their_first_id_says_which_they_are(data: st.DataObject) -> None:
    """Ids beyond the table of small values, negative ones, items that changed their category, and numbers beside texts."""

    def encode(columns: Features) -> Parts:
        return (
            torch.tensor([[int(a), int(b)] for a, b in zip(columns["a"].values, columns["b"].values, strict=True)]),
        )

    cache = RowCache(["a", "b"], encode, limit=data.draw(st.sampled_from([4000, 2**30])))  # type: ignore[arg-type]
    number = st.sampled_from([0, 1, 2, 4095, 4096, 2**20 - 1, 2**20, -1, -(2**63), 2**63 - 1])
    for _ in range(data.draw(st.integers(1, 6))):
        rows = data.draw(st.lists(st.tuples(number, st.integers(-1, 1)), min_size=1, max_size=8))
        columns = {
            name: Column.of_array(np.array(values)) for name, values in zip("ab", zip(*rows, strict=True), strict=True)
        }
        if data.draw(st.booleans()):
            texts = pl.Series([str(value) for value, _ in rows])
            columns["a"] = Column.of_series(texts)
        found = cache.rows([(columns, len(rows))] * 2)
        assert found.tolist() == [list(row) for row in rows] * 2


def test_rows_of_several_integers_are_told_apart_however_many_there_are() -> None:
    def encode(columns: Features) -> Parts:
        return (torch.tensor([columns["a"].values, columns["b"].values]).T,)

    cache, rng = RowCache(["a", "b"], encode, limit=2**30), np.random.default_rng(0)  # type: ignore[arg-type]
    for size in (150_000, 1000, 150_000):  # the table of integers grows meanwhile
        given = rng.integers(-300, 300, (2, size))
        given[:, :2] = -(2**63), 2**63 - 1
        columns = {"a": Column.of_array(given[0]), "b": Column.of_array(given[1])}
        fixed = {"a": Column.of_array(np.array([7], np.int8)), "b": columns["b"]}
        (found,) = cache.parts([(columns, size), (fixed, size)])
        assert found is not None
        np.testing.assert_array_equal(found[:size].numpy(), given.T)
        np.testing.assert_array_equal(found[size:].numpy(), np.stack([np.full(size, 7), given[1]], 1))
    assert cache.hits + cache.misses > cache.hits > 0 and cache.hits == 2 * 301_000
