"""The service with what stands beside the scores: draws and deviations, records, a split, a shadow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from prometheus_client import CollectorRegistry
from published import publish_small, small

import limaml
from limaml.meta import logit_sd
from limaml.serving.agreement import check_served
from limaml.serving.metrics import Metrics
from limaml.serving.record import Recorder, read_served, recording
from limaml.serving.service import Options, Service
from limaml.serving.tensors import InferRequest, InferTensor, Refused
from limaml.serving.traffic import Shadow, TrafficMetrics, parse_split, routed
from limaml.serving.versions import Versions
from limaml.store.contract import Store
from limaml.tasks import TaskRows

FRAME = small().frame.select("user_id", "item_id", "category", "quality").head(60)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Version 1 without posteriors, version 2 of another model with them; 1 is current."""
    folder = tmp_path_factory.mktemp("explore")
    publish_small(folder)
    other = small(seed=2).training.save(folder / "other")
    with limaml.open_store(folder / "store") as opened:
        data = small(seed=2).training.data
        done = limaml.publish(opened, "model", other, folder / "other", data, uncertainty=True)
        opened.rollback("model")
        assert opened.current("model") != done.version
        yield opened


def versions_of(store: Store) -> tuple[str, str]:
    first, second = (version.id for version in store.versions("model"))
    return first, second


def request(frame: pl.DataFrame, version: str | None = None, **more: Any) -> InferRequest:
    inputs = {}
    for name in frame.columns:
        values = frame[name].to_list()
        texts = frame[name].dtype == pl.String
        inputs[name] = InferTensor.of(
            name, np.array([v.encode() for v in values], object) if texts else np.array(values)
        )
    return InferRequest("model", version, more.pop("id", None), inputs, **more)


def run(store: Store, work: Callable[[Service], Awaitable[Any]], **more: Any) -> Any:
    async def main() -> Any:
        service = Service(Versions(store, "model"), Options(timeout=60), **more)
        await service.start()
        try:
            return await work(service)
        finally:
            await service.drain()

    return asyncio.run(main())


def outputs(response: Any) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in response.outputs}


def test_a_request_may_ask_for_a_draw_and_for_deviations(store: Store) -> None:
    second = versions_of(store)[1]
    asks: list[dict[str, Any]] = [
        {},
        {"parameters": {"sample": True, "seed": 7}},
        {"parameters": {"sample": True, "seed": 7, "scale": 0}},
        {"parameters": {"sample": True}},
        {"outputs": ("logit", "logit_sd")},
        {"parameters": {"logit_sd": True, "scale": 2.0}},
    ]

    async def work(service: Service) -> list[Any]:
        described = await service.model_metadata("model", second)
        assert "logit_sd" in [output.name for output in described.outputs]
        assert "logit_sd" not in [output.name for output in (await service.model_metadata("model")).outputs]
        together = await asyncio.gather(*(service.infer(request(FRAME, second, **ask)) for ask in asks))
        alone = await service.infer(request(FRAME.tail(20), second, parameters={"sample": True, "seed": 7}))
        return [*together, alone]

    plain, drawn, still, another, sd, doubled, alone = run(store, work)
    logits = {name: outputs(one)["logit"] for name, one in locals().items() if name in ("plain", "drawn", "still")}
    assert np.abs(logits["plain"] - logits["drawn"]).max() > 0.01
    np.testing.assert_allclose(logits["still"], logits["plain"], atol=1e-6)
    np.testing.assert_allclose(outputs(drawn)["score"], 1 / (1 + np.exp(-logits["drawn"])), atol=1e-6)
    assert drawn.parameters == {"sampled": True} and plain.parameters == {}
    np.testing.assert_allclose(outputs(alone)["logit"], logits["drawn"][-20:], atol=1e-6)  # by seed and member alone
    assert np.abs(outputs(another)["logit"] - logits["drawn"]).max() > 1e-3
    assert set(outputs(plain)) == {"score", "logit", "known", "version"} and set(outputs(sd)) == {"logit", "logit_sd"}
    np.testing.assert_allclose(outputs(sd)["logit"], logits["plain"], atol=1e-6)
    np.testing.assert_allclose(outputs(doubled)["logit_sd"], 2 * outputs(sd)["logit_sd"], rtol=1e-5)
    # As training computes them, of everybody that the model knows.
    training = small(seed=2).training
    among = TaskRows.of(training.data.index["user_id"], training.data.count("user_id"))
    posterior = training.model.embed(training.data, "user_id", among, uncertainty=True)
    rows = torch.arange(len(training.data))[:30]
    assert training.data.source_row is not None
    frame = small(seed=2).frame[training.data.source_row[rows].tolist()].select(FRAME.columns)
    response = run(store, lambda service: service.infer(request(frame, second, outputs=("logit_sd",))))
    wanted = logit_sd(training.model, training.data, rows, {"user_id": posterior})[:, 0].numpy()
    np.testing.assert_allclose(outputs(response)["logit_sd"], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"parameters": {"sample": True}}, "limaml embed RUN --uncertainty"),
        ({"outputs": ("logit_sd",)}, "There is no output 'logit_sd'.*limaml embed --uncertainty"),
        ({"parameters": {"sample": "yes"}}, "must be true or false"),
    ],
)
def test_one_request_that_cannot_be_sampled_leaves_the_others_alone(
    store: Store, ask: dict[str, Any], message: str
) -> None:
    async def work(service: Service) -> list[Any]:
        asked = [service.infer(request(FRAME)), service.infer(request(FRAME, **ask)), service.infer(request(FRAME))]
        return await asyncio.gather(*asked, return_exceptions=True)

    before, refused, after = run(store, work)
    assert isinstance(refused, Refused) and refused.status == 400
    with pytest.raises(Refused, match=message):
        raise refused
    np.testing.assert_array_equal(outputs(before)["logit"], outputs(after)["logit"])


def test_what_was_served_is_recorded_and_agrees(store: Store, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "served", share=1)
    first, second = versions_of(store)
    one_member = FRAME.filter(pl.col("user_id") == FRAME["user_id"][0])

    async def work(service: Service) -> None:
        asked = [service.infer(request(FRAME, version, id=f"r{i}")) for i, version in enumerate((None, second, first))]
        await asyncio.gather(*asked)
        broadcast = request(one_member, second)
        broadcast.inputs["user_id"] = InferTensor.of("user_id", np.array([int(one_member["user_id"][0])]))  # type: ignore[index]
        await service.infer(broadcast)
        stranger = FRAME.with_columns(user_id=pl.lit(10**9))
        await service.infer(request(stranger))
        await service.infer(
            request(FRAME, second, parameters={"sample": True})
        )  # not recorded: nothing to compare with

    run(store, work, observers=[recording(recorder, "model")])
    recorder.close()
    served = list(read_served(tmp_path / "served"))
    assert sorted(one.version for one in served) == [first] * 3 + [second] * 2
    assert {one.id for one in served} >= {"r0", "r1", "r2"}
    found = check_served(tmp_path / "served", store)
    assert (found.requests, found.compared) == (5, 4 * 60 + one_member.height)
    assert (found.refreshed, found.gone) == (0, 0) and found.worst <= 1e-5


def test_a_member_sees_one_version_of_a_split(store: Store) -> None:
    first, second = versions_of(store)
    registry = CollectorRegistry()
    counted = TrafficMetrics(registry)
    split = parse_split([f"{second}=0.5"])
    members = FRAME["user_id"].unique().to_list()

    async def work(service: Service) -> dict[int, set[str]]:
        seen: dict[int, set[str]] = {}
        for _ in range(2):
            for member in members:
                answer = await service.infer(request(FRAME.filter(pl.col("user_id") == member)))
                seen.setdefault(member, set()).add(answer.version)
                pinned = await service.infer(request(FRAME.filter(pl.col("user_id") == member), first))
                assert pinned.version == first
        assert (await service.infer(request(FRAME))).version == first  # members of both sides
        return seen

    seen = run(store, work, route=routed(split), observers=[counted.answered])
    assert seen == {member: {split.of([str(member)]) or first} for member in members}
    assert {version for versions in seen.values() for version in versions} == {first, second}
    expected = 2 * sum(versions == {second} for versions in seen.values())
    assert registry.get_sample_value("limaml_version_answers_total", {"version": second}) == expected


def test_a_split_to_a_version_that_is_gone_is_answered_by_the_current_one(store: Store) -> None:
    async def work(service: Service) -> Any:
        return await service.infer(request(FRAME))

    assert run(store, work, route=routed(parse_split(["v999=1"]))).version == versions_of(store)[0]


def test_a_shadow_is_scored_and_measured_and_never_returned(store: Store, tmp_path: Path) -> None:
    first, second = versions_of(store)
    metrics = Metrics()
    counted = TrafficMetrics(metrics.registry)
    recorder = Recorder(tmp_path / "served", share=1)

    async def work(service: Service) -> tuple[Any, Any]:
        shadow = Shadow(second, service.answer, counted.shadowed(second), busy=lambda: service.busy)
        service.observers += [counted.answered, shadow.after]
        answer = await service.infer(request(FRAME, id="seen"))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if metrics.registry.get_sample_value("limaml_shadow_total", {"version": second, "outcome": "scored"}):
                break
        await shadow.close()
        return answer, await service.infer(request(FRAME, second))

    answer, other = run(store, work, metrics=metrics, observers=[recording(recorder, "model")])
    recorder.close()
    assert answer.version == first
    value = metrics.registry.get_sample_value
    assert value("limaml_version_answers_total", {"version": first}) == 1
    assert value("limaml_shadow_total", {"version": second, "outcome": "scored"}) == 1
    off = np.abs(outputs(answer)["logit"] - outputs(other)["logit"]).astype(float)
    assert value("limaml_shadow_logit_difference_count", {"version": second}) == len(off)
    assert value("limaml_shadow_logit_difference_sum", {"version": second}) == pytest.approx(off.sum(), rel=1e-4)
    assert [one.version for one in read_served(tmp_path / "served")] == [first, second]  # the shadow is not recorded
