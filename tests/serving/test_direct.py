"""infer on the connection itself: whatever is sent in whatever pieces is answered as by the long way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import publish_small, small
from test_open_inference import body

import limaml
from limaml.serving.direct import direct_protocol
from limaml.serving.http import HttpApp
from limaml.serving.service import Options, Service
from limaml.serving.versions import Versions

FRAME = small().frame.select("user_id", "item_id", "quality")
CATEGORIES = small().frame["category"].to_list()
INFER = "/v2/models/model/infer"


def wire(
    rows: int = 2,
    first: int = 0,
    quality: float | None = None,
    *,
    path: str = INFER,
    more: str = "",
    json: bool = False,
) -> bytes:
    """A request for some rows of the table, with binary tensors."""
    frame = FRAME.slice(first, rows)
    numbers = frame["quality"].to_numpy().astype("f4")
    if quality is not None:
        numbers = np.full(rows, quality, "f4")
    texts = np.array([str(value).encode() for value in CATEGORIES[first : first + rows]], object)
    content, length = body(
        {
            "user_id": ("INT64", frame["user_id"].to_numpy()),
            "item_id": ("INT64", frame["item_id"].to_numpy()),
            "category": ("BYTES", texts),
            "quality": ("FP32", numbers),
        },
        outputs=[{"name": "score", "parameters": {"binary_data": not json}}],
    )
    head = f"POST {path} HTTP/1.1\r\nhost: here\r\n{more}inference-header-content-length: {length}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


@contextlib.asynccontextmanager
async def listening(app: HttpApp, *, direct: bool = True, drain: int = 10) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    asgi: Any = app
    config = uvicorn.Config(
        asgi,
        http=direct_protocol(app) if direct else "httptools",
        port=0,
        lifespan="off",
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=drain,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        await running


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def exchange(port: int, pieces: list[bytes], answers: int) -> list[tuple[int, dict[str, str], bytes]]:
    """Send pieces over one connection, and read so many answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:

        async def send() -> None:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

        sending = asyncio.create_task(send())
        async with asyncio.timeout(30):
            found = [await answer(reader) for _ in range(answers)]
            await sending
        return found
    finally:
        await closed(writer)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


class World:
    """A service, and a count of the requests that were answered directly."""

    def __init__(self, service: Service, runner: asyncio.Runner) -> None:
        self.service, self.runner, self.direct = service, runner, 0
        self.ports: list[int] = []  # of a server that answers the long way, and of one that does not
        begin = service.begin

        def counted(*arguments: Any) -> Any:
            self.direct += 1
            return begin(*arguments)

        service.begin = counted  # type: ignore[method-assign]

    def counted(self, status: int) -> float:
        return float(self.service.metrics.requests.labels("infer", str(status))._value.get())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("direct")
    publish_small(folder)
    with limaml.open_store(folder / "store") as store, asyncio.Runner() as runner:

        async def start() -> Service:
            service = Service(Versions(store, "model"), Options(timeout=60, max_batch=500))
            await service.start()
            return service

        service = runner.run(start())
        world, stack = World(service, runner), contextlib.AsyncExitStack()
        for direct in (False, True):
            entered = stack.enter_async_context(listening(HttpApp(service), direct=direct))
            world.ports.append(runner.run(entered)[0])
        yield world
        runner.run(stack.aclose())
        runner.run(service.drain())


def plain(found: tuple[int, dict[str, str], bytes]) -> tuple[Any, ...]:
    status, headers, content = found
    return status, {name: value for name, value in headers.items() if name != "x-request-id"}, content


def test_a_head_that_was_seen_is_answered_directly_and_equally(world: World) -> None:
    async def work() -> tuple[Any, ...]:
        requests = [wire(2, first) for first in (0, 2, 4, 0)]
        long, direct = world.ports
        wanted = await exchange(long, requests, 4)
        assert world.direct == 0
        before = world.counted(200)
        found = [(await exchange(direct, [request], 1))[0] for request in requests]  # each on a connection of its own
        found += await exchange(direct, requests, 4)
        return wanted * 2, found, world.counted(200) - before

    wanted, found, counted = world.runner.run(work())
    assert list(map(plain, found)) == list(map(plain, wanted)) and counted == 8
    assert world.direct >= 3 and len({headers["x-request-id"] for _, headers, _ in found}) == 8


requests = st.one_of(
    st.builds(wire, st.integers(1, 3), st.integers(0, 20)),
    st.builds(wire, quality=st.sampled_from([np.nan, np.inf, 1.5])),
    st.builds(wire, more=st.sampled_from(["x-request-id: mine\r\n", "connection: keep-alive\r\n", "x-other: 1\r\n"])),
    st.builds(
        wire, path=st.sampled_from(["/v2/models/other/infer", f"{INFER}?x=1", "/v2/models/model/versions/7/infer"])
    ),
    st.builds(wire, json=st.just(True)),
    st.just(b"GET /v2/health/live HTTP/1.1\r\nhost: here\r\n\r\n"),
    st.just(f"POST {INFER} HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n\r\n{{}}".encode()),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(requests, min_size=1, max_size=6), st.data())
def test_whatever_is_sent_in_whatever_pieces(world: World, sent: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(sent)
    places = {place for place in np.cumsum([len(one) for one in sent]).tolist() if data.draw(st.booleans())}
    places |= data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=3))
    cuts = sorted({0, len(whole), *places})
    pieces = [whole[low:high] for low, high in zip(cuts, cuts[1:], strict=False)]

    async def work() -> tuple[Any, Any]:
        long, direct = world.ports
        wanted = [(await exchange(long, [one], 1))[0] for one in sent]
        for one in sent:
            await exchange(direct, [one], 1)  # now the heads are known
        return wanted, await exchange(direct, pieces, len(sent))

    wanted, found = world.runner.run(work())
    assert list(map(plain, found)) == list(map(plain, wanted))


def test_a_token_is_part_of_the_head(world: World) -> None:
    async def work() -> list[int]:
        async with listening(HttpApp(world.service, token="sesame")) as (port, _):
            right, wrong = (wire(more=f"authorization: Bearer {word}\r\n") for word in ("sesame", "please"))
            return [found[0] for found in await exchange(port, [right, right, wrong, wrong, wire(), right], 6)]

    before = world.direct
    assert world.runner.run(work()) == [200, 200, 401, 401, 401, 200]
    assert world.direct >= before


def test_a_failure_is_told_as_such_and_the_connection_goes_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    score = world.service._batches.score

    def broken(batch: Any) -> Any:
        raise RuntimeError("a bug")

    async def work() -> list[int]:
        async with listening(HttpApp(world.service)) as (port, _):
            await exchange(port, [wire()], 1)
            world.service._batches.score = broken  # type: ignore[method-assign]
            try:
                (failed,) = await exchange(port, [wire()], 1)
            finally:
                world.service._batches.score = score  # type: ignore[method-assign]
            return [failed[0], *(found[0] for found in await exchange(port, [wire(), wire()], 2))]

    assert world.runner.run(work()) == [500, 200, 200]


def test_who_hangs_up_is_not_scored_and_the_end_of_the_server_is_told(tmp_path: Path) -> None:
    """The store holds a batch up. Behind it one gives up, and one is still waiting when the time to drain is over."""
    held, hold, batches = threading.Event(), threading.Event(), list[int]()

    async def work(store: Any) -> tuple[int, dict[str, str], bytes]:
        service = Service(Versions(store, "model"), Options(timeout=60, inline=False))
        await service.start()
        world = World(service, None)  # type: ignore[arg-type]
        app = HttpApp(service)
        async with listening(app, drain=1) as (port, server):
            for _ in range(2):
                await exchange(port, [wire()], 1)
            assert world.direct
            score = service._batches.score

            def slow(batch: Any) -> Any:
                batches.append(len(batch))
                held.set()
                assert hold.wait(30)
                return score(batch)

            service._batches.score = slow  # type: ignore[method-assign]
            connections = []
            for number in range(3):
                connections.append(await asyncio.open_connection("127.0.0.1", port))
                connections[-1][1].write(wire())
                while not (held.is_set() and service._in_flight == number + 1):
                    await asyncio.sleep(0.001)
            await closed(connections[1][1])
            while world.counted(499) < 1:
                await asyncio.sleep(0.001)
            assert service._in_flight == 2
            server.should_exit = True
            told = await answer(connections[2][0])
            assert (await answer(connections[0][0]))[0] == 503
            hold.set()
            for place in (0, 2):
                await closed(connections[place][1])
        await service.drain()
        assert world.counted(499) == 1 and batches == [1]
        return told

    publish_small(tmp_path)
    with limaml.open_store(tmp_path / "store") as store, asyncio.Runner() as runner:
        status, headers, content = runner.run(work(store))
    assert status == 503 and headers["connection"] == "close" and b"ending" in content
