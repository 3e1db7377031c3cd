"""The service by itself: one version per answer, batches, timeouts, a store that fails, versions that come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from published import publish_small, small

import limaml
from limaml.errors import DataError, StoreDown, StoreError
from limaml.serving.service import Options, Service
from limaml.serving.tensors import InferRequest, InferTensor, Refused
from limaml.serving.versions import Versions
from limaml.store.contract import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    publish_small(folder)
    return folder


def tensors(frame: pl.DataFrame) -> dict[str, InferTensor]:
    found = {}
    for name in frame.columns:
        values = frame[name].to_list()
        data = (
            np.array([value.encode() for value in values], object)
            if frame[name].dtype == pl.String
            else np.array(values)
        )
        found[name] = InferTensor.of(name, data)
    return found


def request(frame: pl.DataFrame, **options: Any) -> InferRequest:
    return InferRequest("model", options.pop("version", None), None, tensors(frame), **options)


FRAME = small().frame.select("user_id", "item_id", "category", "quality")


def run(store: Store, work: Callable[[Service], Awaitable[Any]], options: Options | None = None, **more: Any) -> Any:
    """`work` on a service that was started, and drained afterwards."""

    async def main() -> Any:
        service = Service(Versions(store, "model"), options or Options(), **more)
        await service.start()
        try:
            return await work(service)
        finally:
            await service.drain()

    return asyncio.run(main())


def outputs(response: Any) -> dict[str, Any]:
    return {tensor.name: tensor.data for tensor in response.outputs}


@pytest.mark.parametrize("inline", [True, False])
def test_many_at_once_are_batched_and_each_gets_its_own(folder: Path, inline: bool) -> None:
    frames = [FRAME.slice(start, 1 + start % 7) for start in range(0, 120, 3)]
    batches = []

    async def work(service: Service) -> Sequence[Any]:
        score = service._batches.score
        service._batches.score = lambda batch: (batches.append(len(batch)), score(batch))[1]  # type: ignore[method-assign]
        return await asyncio.gather(*(service.infer(request(frame)) for frame in frames))

    with limaml.open_store(folder / "store") as store, limaml.Predictor(store, "model") as predictor:
        answers = run(store, work, Options(inline=inline, max_batch=50, timeout=60))
        for frame, answer in zip(frames, answers, strict=True):
            found, wanted = outputs(answer), predictor.score(frame)
            np.testing.assert_allclose(found["score"], wanted.predictions[:, 0], atol=1e-6)
            np.testing.assert_allclose(found["logit"], wanted.logits[:, 0], atol=1e-6)
            assert found["known"].tolist() == wanted.known.tolist()
            assert answer.version == found["version"][0].decode() == wanted.version
    assert sum(batches) == len(frames) and max(batches) > 1


def test_requests_that_come_a_round_of_the_loop_apart_are_one_batch(folder: Path) -> None:
    batches = []

    async def late(service: Service, rounds: int) -> Any:
        for _ in range(rounds):
            await asyncio.sleep(0)
        return await service.infer(request(FRAME.slice(rounds, 2)))

    async def work(service: Service) -> Sequence[Any]:
        score = service._batches.score
        service._batches.score = lambda batch: (batches.append(len(batch)), score(batch))[1]  # type: ignore[method-assign]
        answers = await asyncio.gather(*(late(service, 3 * place) for place in range(4)))
        await late(service, 1)
        return answers

    with limaml.open_store(folder / "store") as store, limaml.Predictor(store, "model") as predictor:
        answers = run(store, work, Options(timeout=60))
        for place, answer in enumerate(answers):
            wanted = predictor.score(FRAME.slice(3 * place, 2))
            np.testing.assert_allclose(outputs(answer)["score"], wanted.predictions[:, 0], atol=1e-6)
    assert batches[0] > 1 and sum(batches) == 5 and batches[-1] == 1  # nobody waits for what does not come


def test_a_full_queue_and_a_late_answer_say_so(folder: Path) -> None:
    async def work(service: Service) -> list[Any]:
        asked = [service.infer(request(FRAME.head(1))) for _ in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    async def slow(service: Service) -> Any:
        score = service._batches.score
        service._batches.score = lambda batch: (time.sleep(0.2), score(batch))[1]  # type: ignore[method-assign]
        with pytest.raises(Refused) as caught:
            await service.infer(request(FRAME.head(1)))
        return caught.value

    with limaml.open_store(folder / "store") as store:
        found = run(store, work, Options(queue=2, timeout=60))
        refused = [one for one in found if isinstance(one, Refused)]
        assert len(refused) == 3 and {one.status for one in refused} == {503} and refused[0].retry_after
        late = run(store, slow, Options(timeout=0.01, inline=False))
        assert late.status == 504 and "within 0.01 s" in late.message


def test_a_service_waits_for_a_store_that_is_down_and_for_what_it_has(folder: Path) -> None:
    """Down, then with versions that cannot be loaded, then there; and drained while it waits."""
    tries: list[Exception | None] = [
        StoreDown("It is down."),
        StoreDown("It is down."),
        DataError("It has no model."),
        None,
    ]

    async def main(store: Store, stop_early: bool) -> None:
        left = list(tries)

        def opened() -> Store:
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            return store

        service = Service(Versions(opened, "model"), Options(poll=0.01, retry=0.01))
        await service.start()
        assert service.live and not service.ready() and service.waits_for == "It is down."
        with pytest.raises(Refused, match=r"not ready yet\. It is down") as caught:
            await service.infer(request(FRAME.head(1)))
        assert caught.value.status == 503 and caught.value.retry_after
        reasons = set()
        while not stop_early and not service.ready():
            reasons.add(service.waits_for)
            await asyncio.sleep(0)
        if not stop_early:
            assert reasons >= {"It is down.", "It has no model."} and service.waits_for is None
            assert outputs(await service.infer(request(FRAME.head(3))))["known"].all()
        await service.drain()
        assert not service.ready()

    with limaml.open_store(folder / "store") as store:
        asyncio.run(main(store, stop_early=False))
        asyncio.run(main(store, stop_early=True))


def test_a_store_that_answers_and_cannot_be_served_is_told_at_once(folder: Path) -> None:
    with limaml.open_store(folder / "store") as store, pytest.raises(StoreError, match="other"):
        asyncio.run(Service(Versions(store, "other")).start())


class Failing:
    """A store whose look-ups fail while `down` is set."""

    def __init__(self, store: Store) -> None:
        self._store, self.down, self.asked = store, False, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def current(self, model: str) -> str | None:
        if self.down:
            raise StoreError("The store does not answer: it is down.")
        return self._store.current(model)

    def read(self, model: str, version: str | None = None) -> Any:
        reader, outer = self._store.read(model, version), self

        class Reader:
            def __getattr__(self, name: str) -> Any:
                return getattr(reader, name)

            def get(self, *arguments: Any, **options: Any) -> Any:
                outer.asked += 1
                if outer.down:
                    raise StoreError("The store does not answer: it is down.")
                return reader.get(*arguments, **options)

        return Reader()


@pytest.mark.parametrize("inline", [True, False])
def test_a_store_that_is_down_costs_the_embeddings_and_comes_back(folder: Path, inline: bool) -> None:
    frame = FRAME.head(5)

    async def work(service: Service) -> None:
        store.down = True
        asked = store.asked
        for _ in range(3):
            cold = await service.infer(request(frame))
            assert cold.parameters == {"store": "down"} and not outputs(cold)["known"].any()
        assert store.asked == asked + 1, "a store that is down is not asked by every request"
        store.down = False
        for _ in range(400):
            answer = await service.infer(request(frame))
            if not answer.parameters:
                break
            await asyncio.sleep(0.01)
        assert outputs(answer)["known"].all()

    async def fail(service: Service) -> None:
        store.down = True
        for _ in range(2):
            with pytest.raises(Refused, match="does not answer") as caught:
                await service.infer(request(frame))
            assert caught.value.status == 503 and caught.value.retry_after
        store.down = False

    with limaml.open_store(folder / "store") as opened:
        store: Any = Failing(opened)
        run(store, work, Options(inline=inline, poll=0.05, retry=0.02, timeout=60))
        run(store, fail, Options(inline=inline, on_store_error="fail", timeout=60))


def test_a_version_can_be_asked_for_by_name_and_goes_when_it_is_no_longer_used(tmp_path: Path) -> None:
    publish_small(tmp_path)
    publish_small(tmp_path, solver="gradient")
    frame = FRAME.head(9)

    async def work(service: Service) -> None:
        old, new = await service._ready_versions()
        assert service.ready() and service.ready("model", new) and not service.ready("model", old)
        first, second = await asyncio.gather(service.infer(request(frame, version=old)), service.infer(request(frame)))
        assert (first.version, second.version) == (old, new)
        assert not np.allclose(outputs(first)["score"], outputs(second)["score"])
        assert service.ready("model", old)
        metadata = await service.model_metadata("model", old)
        assert list(metadata.versions) == [old, new]
        assert {tensor.name: tensor.datatype for tensor in metadata.inputs} == {
            "user_id": "BYTES", "item_id": "INT64", "category": "BYTES", "quality": "FP32", "segment": "BYTES",
            "signal_0": "FP32", "signal_1": "FP32", "signal_2": "FP32", "signal_3": "FP32",
        }  # fmt: skip
        for name, version in (("other", None), ("model", "v000099-00000000")):
            with pytest.raises(Refused) as caught:
                await service.infer(InferRequest(name, version, None, tensors(frame)))
            assert caught.value.status == 404
        store.activate("model", old)
        while service.ready("model", old) and service._current and service._current.version != old:
            await asyncio.sleep(0.01)
        assert (await service.infer(request(frame))).version == old

    with limaml.open_store(tmp_path / "store") as store:
        run(store, work, Options(poll=0.01, timeout=60))
        store.activate("model", store.versions("model")[-1].id)
        assert store.expire("model", keep=1).removed, "nobody holds the version that is not served"


def test_what_only_encoding_finds_is_told_to_who_sent_it(folder: Path) -> None:
    async def work(service: Service) -> list[Any]:
        look_up = service._batches._look_up

        def refusing(loaded: Any, asked: Sequence[Any]) -> Any:
            if any(one.rows == 3 for one in asked):
                raise DataError("Not all entries of the vector are numbers.")
            return look_up(loaded, asked)

        service._batches._look_up = refusing  # type: ignore[method-assign]
        asked = [service.infer(request(FRAME.head(rows))) for rows in (1, 2, 3, 4)]
        return await asyncio.gather(*asked, return_exceptions=True)

    with limaml.open_store(folder / "store") as store:
        *good, bad = sorted(run(store, work, Options(timeout=60)), key=lambda one: isinstance(one, Refused))
    assert [len(outputs(one)["score"]) for one in good] == [1, 2, 4]
    assert bad.status == 400 and "not all entries" in bad.message.lower()


NAN = np.array([float("nan")])
BAD: list[tuple[dict[str, Any], str]] = [
    ({"item": np.array([1])}, "'item' is none that this model reads. Did you mean 'item_id'"),
    ({"quality": NAN}, "'quality' is nan in element 0"),
    ({"quality": np.array([np.inf])}, "'quality' is inf"),
    ({"user_id": np.array([-1])}, "'user_id' is -1 in element 0"),
    ({"item_id": np.array([-1])}, "'item_id' is -1 in element 0"),
    ({"user_id": np.array([1.0])}, "send BYTES or INT64"),
    ({"user_id": np.array([b"\xff\xfe"], object)}, "no UTF-8 text in element 0"),
    ({"user_id": np.array([[1, 2]])}, "shape"),
    ({"quality": np.array([b"dear"], object)}, "'quality' as numeric"),
    (
        {"item_id": np.arange(3), "category": np.array([b"a", b"b"], object)},
        "'category' has 2 rows and 'item_id' has 3",
    ),
    ({"item_id": np.arange(99)}, "at most 50"),
    ({"user_id": None}, "There is no column 'user_id'"),
    ({"quality": None}, "There is no column 'quality'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_cannot_be_scored_is_refused_with_a_sentence(folder: Path, change: Any, message: str) -> None:
    given = tensors(FRAME.head(1))
    for name, data in change.items():
        given = {key: value for key, value in given.items() if key != name}
        if data is not None:
            given[name] = InferTensor.of(name, data)

    async def work(service: Service) -> str:
        with pytest.raises(Refused) as caught:
            await service.infer(InferRequest("model", None, None, given))
        assert caught.value.status == 400
        return caught.value.message

    with limaml.open_store(folder / "store") as store:
        assert message in run(store, work, Options(max_batch=50))


def test_nan_may_be_declared_to_mean_missing(folder: Path) -> None:
    given = tensors(FRAME.head(1)) | {"quality": InferTensor.of("quality", NAN)}

    async def work(service: Service) -> Any:
        return await service.infer(InferRequest("model", None, None, given, parameters={"nan_is_missing": True}))

    with limaml.open_store(folder / "store") as store, limaml.Predictor(store, "model") as predictor:
        wanted = predictor.score(FRAME.head(1).with_columns(quality=pl.lit(None, dtype=pl.Float64)))
        found = run(store, work, Options(timeout=60))
        np.testing.assert_allclose(outputs(found)["score"], wanted.predictions[:, 0], atol=1e-6)
