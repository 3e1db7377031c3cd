"""HTTP in one process: the codec, /v1/score, what is refused and how. No request whatever makes a 5xx."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import shlex
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from published import publish_small, small

import limaml
from limaml.errors import StoreDown
from limaml.serving.http import HttpApp
from limaml.serving.open_inference import decode_request, encode_response
from limaml.serving.service import Options, Service
from limaml.serving.tensors import DATATYPES, InferResponse, InferTensor, Refused
from limaml.serving.versions import Versions
from limaml.store.contract import Store

INFER = "/v2/models/model/infer"
FRAME = small().frame.select("user_id", "item_id", "category", "quality")
LIMIT = 200_000


class Client:
    """Requests to an application, in an event loop that lives as long."""

    def __init__(self, app: HttpApp, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://here"
        )

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        return self._runner.run(self._client.request(method, path, **options))

    def close(self) -> None:
        self._runner.run(self._client.aclose())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, HttpApp, limaml.Predictor]]:
    folder = tmp_path_factory.mktemp("http")
    publish_small(folder)
    with limaml.open_store(folder / "store") as store, asyncio.Runner() as runner:

        async def start() -> Service:
            service = Service(Versions(store, "model"), Options(timeout=60, max_batch=500))
            await service.start()
            return service

        service = runner.run(start())
        app = HttpApp(service, max_body=LIMIT)
        client = Client(app, runner)
        with limaml.Predictor(store, "model") as predictor:
            yield client, app, predictor
        client.close()
        runner.run(service.drain())


@pytest.fixture(scope="module")
def ask(served: tuple[Client, HttpApp, limaml.Predictor]) -> Client:
    return served[0]


def body_of(rows: int = 3) -> dict[str, Any]:
    frame = FRAME.head(rows)
    kinds = {"user_id": "INT64", "item_id": "INT64", "category": "BYTES", "quality": "FP64"}
    return {
        "inputs": [
            {"name": name, "shape": [rows], "datatype": kind, "data": frame[name].to_list()}
            for name, kind in kinds.items()
        ]
    }


def test_infer_in_json_is_what_the_predictor_says(served: tuple[Client, HttpApp, limaml.Predictor]) -> None:
    ask, _, predictor = served
    wanted = predictor.score(FRAME.head(3))
    found = ask("POST", INFER, json={**body_of(), "id": "seven"}, headers={"x-request-id": "abc"})
    assert found.status_code == 200 and found.headers["x-request-id"] == "abc"
    answer = found.json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("model", wanted.version, "seven")
    outputs = {output["name"]: output for output in answer["outputs"]}
    np.testing.assert_allclose(outputs["score"]["data"], wanted.predictions[:, 0], atol=1e-6)
    assert outputs["version"]["data"] == [wanted.version] and outputs["known"]["data"] == wanted.known.tolist()
    few = ask("POST", INFER, json={**body_of(), "outputs": [{"name": "logit"}]}).json()["outputs"]
    assert [output["name"] for output in few] == ["logit"]
    assert ask("POST", f"/v2/models/model/versions/{wanted.version}/infer", json=body_of()).json() == {
        key: value for key, value in answer.items() if key != "id"
    }


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
def test_packed_bodies_are_read_up_to_the_limit(ask: Client, pack: Any) -> None:
    encoding = {"content-encoding": "gzip" if pack is gzip.compress else "deflate"}
    plain = json.dumps(body_of()).encode()
    assert ask("POST", INFER, content=pack(plain), headers=encoding).status_code == 200
    for body, status in (
        (pack(b" " * 50 * LIMIT), 413),
        (pack(plain)[:-5], 400),
        (pack(plain) + b"more", 400),
        (b"x", 400),
    ):
        found = ask("POST", INFER, content=body, headers=encoding)
        assert (found.status_code, "error" in found.json()) == (status, True)
    assert ask("POST", INFER, content=plain, headers={"content-encoding": "br"}).status_code == 415


def test_score_answers_curl(served: tuple[Client, HttpApp, limaml.Predictor]) -> None:
    ask, _, predictor = served
    frame = FRAME.head(4)
    wanted = predictor.score(frame)
    found = ask("POST", "/v1/score", json={"rows": frame.to_dicts()})
    assert found.status_code == 200, found.text
    answer = found.json()
    assert answer["version"] == wanted.version and answer["known"] == wanted.known.tolist()
    np.testing.assert_allclose(answer["scores"]["click"], wanted.predictions[:, 0], atol=1e-6)
    member = frame["user_id"][0]
    asked = {"task": {"user_id": member}, "candidates": frame.drop("user_id").to_dicts()}
    answer = ask("POST", "/v1/score", json=asked).json()
    wanted = predictor.score(frame.with_columns(user_id=member))
    np.testing.assert_allclose(answer["logits"]["click"], wanted.logits[:, 0], atol=1e-6)
    stranger = ask("POST", "/v1/score", json={**asked, "task": {"user_id": "nobody"}}).json()
    assert not any(stranger["known"])
    missing = [{**row, "quality": None} for row in frame.to_dicts()]
    assert ask("POST", "/v1/score", json={"rows": missing}).status_code == 200


ROW = {"user_id": 1, "item_id": 2, "category": "category 1", "quality": 0.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Send either rows, or a task and its candidates"),
        ({"rows": [ROW], "candidates": []}, "Send either"),
        ({"rows": []}, "There are no rows"),
        ({"rows": [{}]}, "say nothing"),
        ({"rows": [{**ROW, "colour": 1}]}, "'colour' in rows is none that this model reads"),
        ({"rows": [{**ROW, "user_id": -1}]}, "-1"),
        ({"rows": [{**ROW, "user_id": None}]}, "names no 'user_id' in row 0"),
        ({"rows": [{**ROW, "user_id": 2**70}]}, "more than 64 bits"),
        ({"rows": [{**ROW, "quality": "high"}]}, "'quality' as numeric"),
        ({"rows": [{**ROW, "quality": [1.0]}]}, "is a list"),
        ({"rows": [ROW, {**ROW, "quality": "high"}]}, "holds float, str"),
        ({"rows": [{"user_id": 1, "item_id": 2}]}, "There is no column 'category'"),
        ({"rows": [{**ROW, "segment": "a"}]}, "'signal_0'"),
        ({"task": {"user_id": 1}, "candidates": [ROW]}, "say it once"),
        ({"rows": [ROW], "versoin": 1}, "versoin"),
        ({"rows": [ROW] * 501}, "at most 500"),
        ("text", "dictionary"),
    ],
)
def test_score_refuses_with_a_sentence(ask: Client, body: Any, message: str) -> None:
    found = ask("POST", "/v1/score", json=body)
    assert found.status_code == 400 and message in found.json()["error"], found.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", {}, 400, "no JSON"),
        (b"[1]", {}, 400, "must be a JSON object"),
        (b'{"inputs": NaN}', {}, 400, "no JSON"),
        (b'{"inputs": [' + b"[" * 100_000, {}, 400, "no JSON"),
        (b'{"inputs": []}', {}, 400, "no inputs"),
        (b'{"a": 1}', {}, 400, "has a field 'a'"),
        (b'{"id": 7, "inputs": []}', {}, 400, "id must be a text"),
        (b"\xff\xfe", {}, 400, "no JSON"),
        (b"{}", {"inference-header-content-length": "900"}, 400, "the body has 2 bytes"),
        (b"{}", {"inference-header-content-length": "-1"}, 400, "number of bytes"),
        (b'{"inputs": []}++', {"inference-header-content-length": "14"}, 400, "2 bytes behind"),
        (b"x" * (LIMIT + 1), {}, 413, "longer than"),
    ],
)
def test_infer_refuses_a_broken_body(ask: Client, content: bytes, headers: Any, status: int, message: str) -> None:
    found = ask("POST", INFER, content=content, headers=headers)
    assert found.status_code == status and message in found.json()["error"], found.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [4]}, "has 3 values; shape [4] takes 4"),
        ({"shape": [-3]}, "every dimension must be at least 0"),
        ({"shape": [2**40, 2**40]}, "more than"),
        ({"shape": [3, 1, 1]}, "must be [rows]"),
        ({"shape": "3"}, "must have a shape"),
        ({"datatype": "INT63"}, "datatype 'INT63'"),
        ({"datatype": "INT8", "data": [1, 2, 300]}, "300, which is no INT8"),
        ({"datatype": "BOOL"}, "not all its data are Booleans"),
        ({"data": [1, 2, "3"]}, "not all its data are integers"),
        ({"data": [1, [2], 3]}, "not all its data are integers"),
        ({"data": [[1], 2, [3]]}, "lists among its data"),
        ({"data": [True, 2, 3]}, "not all its data are integers"),
        ({"data": [1, None, 3]}, "not all its data are integers"),
        ({"data": [1, 2, 10**30]}, "not all its data are integers"),
        ({"data": None}, "has no data"),
        ({"name": ""}, "has no name"),
        ({"parameters": {"binary_data_size": 24}}, "send one of them"),
        ({"parameters": []}, "must be an object"),
        ({"data": [-1, 2, 3]}, "-1 in element 0"),
        ({"name": "category"}, "given twice"),
    ],
)
def test_infer_refuses_a_broken_tensor(ask: Client, change: dict[str, Any], message: str) -> None:
    body = body_of()
    body["inputs"][0] |= change
    found = ask("POST", INFER, json=body)
    assert found.status_code == 400 and message in found.json()["error"], found.text


def test_other_paths_and_methods(ask: Client) -> None:
    assert ask("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
    assert ask("GET", "/v2/health/live").status_code == ask("GET", "/v2/health/ready").status_code == 200
    metadata = ask("GET", "/v2/models/model").json()
    (version,) = metadata["versions"]
    assert ask("GET", f"/v2/models/model/versions/{version}").json() == metadata
    assert ask("GET", f"/v2/models/model/versions/{version}/ready").json() == {"name": "model", "ready": True}
    for path in ("/v2/models/other", "/v2/models/other/ready", "/v2/models/model/versions/none", "/nowhere"):
        found = ask("GET", path)
        assert found.status_code == 404 and found.json()["error"], path
    assert ask("POST", "/v2/models/other/infer", json=body_of()).status_code == 404
    assert ask("GET", INFER).status_code == ask("GET", "/v1/score").status_code == 405
    assert "/v1/score" in ask("GET", "/openapi.json").json()["paths"]


class Page(HTMLParser):
    """What a page says and shows, and all that its tags point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pointers: list[str] = []
        self.commands: list[str] = []
        self.text, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.pointers += [value or "" for name, value in attributes if name not in ("id", "class", "name", "content")]
        self._open = tag
        if tag == "pre":
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open == "pre":
            self.commands[-1] += data


def asked_by(command: str) -> tuple[str, str, dict[str, str], str | None]:
    """Method, address, headers and body of a curl command."""
    curl, url, *options = shlex.split(command.replace("\\\n", " "))
    assert curl == "curl" and set(options[::2]) <= {"-H", "-d"}
    pairs = list(zip(options[::2], options[1::2], strict=True))
    headers = dict(value.split(": ", 1) for option, value in pairs if option == "-H")
    body = next((value for option, value in pairs if option == "-d"), None)
    return "GET" if body is None else "POST", url, headers, body


@pytest.mark.parametrize("token", [None, "correct horse"])
def test_the_docs_load_nothing_and_their_commands_are_answered(
    served: tuple[Client, HttpApp, limaml.Predictor], token: str | None
) -> None:
    client, app, _ = served
    ask = Client(HttpApp(app.service, token=token), client._runner)
    admitted = {} if token is None else {"authorization": f"Bearer {token}"}
    found = ask("GET", "/docs", headers=admitted)
    assert found.status_code == 200 and found.headers["content-type"].startswith("text/html")
    page = Page(found.text)
    assert all(to.startswith(("#", "data:,")) or to == "openapi.json" for to in page.pointers if ":" in to or "/" in to)
    assert set(re.findall(r"https?://[^/\s<]*", found.text)) == {"http://here"}
    assert "//" not in found.text.replace("http://", "") and "url(" not in found.text and "@import" not in found.text
    paths = ask("GET", "/openapi.json", headers=admitted).json()["paths"]
    assert {"/v1/score", "/v2/models/{model}/infer", "/metrics"} < set(paths)
    assert all(f"{method.upper()} {path}\n" in page.text for path in paths for method in paths[path])
    assert len(page.commands) == sum(map(len, paths.values()))
    assert all("422" not in one["responses"] and one["description"] for path in paths.values() for one in path.values())
    for command in page.commands:
        method, url, headers, body = asked_by(command)
        assert ("authorization" in headers) == (token is not None and "/v2/health/" not in url), command
        if "authorization" in headers:
            assert str(token) not in command
            headers["authorization"] = headers["authorization"].replace("$TOKEN", str(token))
        answer = ask(method, url, headers=headers, content=body)
        assert answer.status_code == 200, (command, answer.text)
    ask.close()


@pytest.mark.parametrize("host", ["a.b-c:80", "[::1]:8000", "x'; rm -rf y", "<b>", "a:b", "", "é", "[", "evil/path"])
def test_the_docs_do_not_repeat_what_is_no_host(ask: Client, host: str) -> None:
    found = ask("GET", "/docs", headers={"host": host.encode()})
    good = host in ("a.b-c:80", "[::1]:8000")
    assert found.status_code == 200
    assert {asked_by(command)[1].split("/v")[0].split("/m")[0] for command in Page(found.text).commands} == {
        f"http://{host if good else 'here'}"
    }


def test_the_docs_of_a_server_that_has_no_version_yet() -> None:
    def down() -> Any:
        raise StoreDown("It is down.")

    service = Service(Versions(down, "a model"))
    with asyncio.Runner() as runner:
        ask = Client(HttpApp(service), runner)
        page = Page(ask("GET", "/docs").text)
        assert any("/v2/models/a%20model/infer" in command for command in page.commands)
        bodies = [body for command in page.commands if (body := asked_by(command)[3]) is not None]
        assert len(bodies) == 3 and all(json.loads(body) for body in bodies)
        ask.close()


def test_metrics_and_request_ids(ask: Client) -> None:
    found = ask("POST", INFER, json=body_of(), headers={"x-request-id": "bad id\t"})
    assert len(found.headers["x-request-id"]) == 16
    text = ask("GET", "/metrics").text
    for name in (
        'limaml_request_seconds_bucket{endpoint="infer"', 'limaml_stage_seconds_count{stage="forward"}', "limaml_batch_rows",
        'limaml_requests_total{endpoint="infer",status="200"}', 'limaml_tasks_total{result="known",task="user_id"}',
        'limaml_version_info{model="model"', "limaml_version_flips_total", "limaml_store_up 1.0", "limaml_ready 1.0",
        "limaml_embedding_age_seconds_bucket", "limaml_row_cache_hits_total", "limaml_in_flight",
    ):  # fmt: skip
        assert name in text, name


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic abcdefgh", b"Bearer \xff"])
def test_without_the_token_nothing_is_answered_but_health(
    served: tuple[Client, HttpApp, limaml.Predictor], header: Any
) -> None:
    client, app, _ = served
    guarded = Client(HttpApp(app.service, token="correct horse battery"), client._runner)
    headers = {} if header is None else {"authorization": header}
    for method, path in (("POST", INFER), ("GET", "/metrics"), ("GET", "/v2"), ("GET", "/docs"), ("GET", "/nowhere")):
        found = guarded(method, path, headers=headers)
        assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
    assert guarded("GET", "/v2/health/ready", headers=headers).status_code == 200
    good = {"authorization": "Bearer correct horse battery"}
    assert guarded("POST", INFER, json=body_of(), headers=good).status_code == 200
    guarded.close()


@contextlib.asynccontextmanager
async def listening(app: HttpApp) -> AsyncIterator[int]:
    """The application on a port of its own, which is given."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


def wire(method: str, path: str, body: bytes, length: int | None = None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def count_of(service: Service, endpoint: str, status: int) -> float:
    counter = service.metrics.requests.labels(endpoint, str(status))
    return float(counter._value.get())


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(("path", "endpoint"), [(INFER, "infer"), ("/v1/score", "score")])
def test_who_hangs_up_within_the_body_is_499(
    served: tuple[Client, HttpApp, limaml.Predictor], path: str, endpoint: str
) -> None:
    client, app, _ = served

    async def hang_up() -> None:
        before = count_of(app.service, endpoint, 499)
        async with listening(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(wire("POST", path, b'{"inputs"', 500))
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.close()
            await until(lambda: count_of(app.service, endpoint, 499) == before + 1)

    client._runner.run(hang_up())


@pytest.mark.parametrize("path", [INFER, "/v1/score"])
def test_who_hangs_up_while_waiting_is_499_and_is_not_scored(
    served: tuple[Client, HttpApp, limaml.Predictor], path: str, tmp_path: Path
) -> None:
    """The store holds one batch up, as a slow server would. Of two requests behind it one is given up: the other alone is
    scored next."""
    held, hold = threading.Event(), threading.Event()
    batches: list[int] = []
    asked = body_of() if path == INFER else {"rows": FRAME.head(3).to_dicts()}
    sent = wire("POST", path, json.dumps(asked).encode())

    async def hang_up(store: Store) -> None:
        service = Service(Versions(store, "model"), Options(timeout=60, inline=False))
        await service.start()
        score = service._batches.score

        def slow(batch: Any) -> Any:
            batches.append(len(batch))
            held.set()
            assert hold.wait(30)
            return score(batch)

        service._batches.score = slow  # type: ignore[method-assign]
        endpoint = "infer" if path == INFER else "score"
        async with listening(HttpApp(service)) as port:
            connections = []
            for number in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                connections.append((reader, writer))
                writer.write(sent)
                await until(lambda number=number: held.is_set() and service._in_flight == number + 1)  # type: ignore[misc]
            connections[0][1].close()
            connections[1][1].close()
            await until(lambda: count_of(service, endpoint, 499) == 2)
            assert service._in_flight == 1
            hold.set()
            reader, writer = connections[2]
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            assert batches == [1, 1]
            writer.write(sent)  # the connection goes on, however long its first request was watched
            await until(lambda: count_of(service, endpoint, 200) == 2)
            writer.close()
        assert count_of(service, endpoint, 499) == 2
        await service.drain()

    publish_small(tmp_path)
    with limaml.open_store(tmp_path / "store") as store, asyncio.Runner() as runner:
        runner.run(hang_up(store))


def test_an_answer_that_meets_a_closed_connection_is_499(served: tuple[Client, HttpApp, limaml.Predictor]) -> None:
    """uvloop says so by an error, where the connection was lost within the same turn of the loop."""
    client, app, _ = served
    body = json.dumps(body_of()).encode()

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed")

    scope = {"type": "http", "method": "POST", "path": INFER, "headers": []}
    before = count_of(app.service, "infer", 499)
    client._runner.run(app(scope, receive, send))
    assert count_of(app.service, "infer", 499) == before + 1


@pytest.mark.parametrize("sent", [b"", b"{"], ids=["nothing", "a beginning"])
def test_a_body_that_does_not_come_is_408(served: tuple[Client, HttpApp, limaml.Predictor], sent: bytes) -> None:
    client, app, _ = served
    assert app.body_seconds == 30

    async def wait() -> bytes:
        async with listening(HttpApp(app.service, body_seconds=0.05)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(wire("POST", INFER, sent, 500))
            head = await reader.readuntil(b"\r\n\r\n")
            found = head + await reader.readuntil(b"}")
            writer.close()
            return found

    head, _, body = client._runner.run(wait()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body) == {"error": "The request's body did not arrive within 0.05 s."}


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> InferTensor:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    dtype, shape = DATATYPES[datatype], draw(SHAPES)
    size = int(np.prod(shape))
    if dtype.hasobject:
        data = np.empty(size, dtype=object)
        data[:] = draw(st.lists(st.text(max_size=5).map(str.encode), min_size=size, max_size=size))
    else:
        raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
        data = np.frombuffer(raw, np.uint8).astype(bool) if dtype.kind == "b" else np.frombuffer(raw, dtype)
        if dtype.kind == "f":
            data = np.nan_to_num(data)
    return InferTensor(draw(st.text(min_size=1, max_size=5)), datatype, shape, data.reshape(shape))


@settings(max_examples=60)
@given(st.lists(tensors(), max_size=4, unique_by=lambda tensor: tensor.name), st.sets(st.integers(0, 3)))
def test_tensors_come_back_as_they_were_sent(sent: list[InferTensor], raw: set[int]) -> None:
    """An answer has the form of a request, so that it can be read as one."""
    names = frozenset(tensor.name for place, tensor in enumerate(sent) if place in raw)
    body, length = encode_response(InferResponse("m", "v", "i", tuple(sent)), names)
    end = len(body) if length is None else length
    document = json.loads(body[:end])
    document["inputs"] = document.pop("outputs")
    del document["model_name"], document["model_version"]
    head = json.dumps(document).encode()
    found, _ = decode_request("m", None, head + body[end:], str(len(head)))
    assert found.id == "i" and list(found.inputs) == [tensor.name for tensor in sent]
    for tensor in sent:
        again = found.inputs[tensor.name]
        assert (again.datatype, again.shape, again.data.dtype) == (tensor.datatype, tensor.shape, tensor.data.dtype)
        np.testing.assert_array_equal(again.data, tensor.data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["user_id", "item_id", "category", "quality", "segment", "signal_0", "x"])
INPUT = st.fixed_dictionaries(
    {
        "name": NAMES | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
        "datatype": st.sampled_from([*DATATYPES, "BF16"]) | JSON,
        "data": st.lists(st.integers() | st.floats() | st.text(max_size=3) | JSON, max_size=4) | JSON,
    },
    optional={
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | JSON}) | JSON
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(INPUT | JSON, max_size=5) | JSON},
    optional={"id": JSON, "parameters": JSON, "outputs": st.lists(JSON, max_size=3) | JSON},
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=REQUEST | JSON, tail=st.binary(max_size=60), cut=st.integers(-3, 3), good=st.sets(st.integers(0, 3)))
@example(
    body={"inputs": [{"name": "user_id", "shape": [1], "datatype": "FP16", "data": [1e300]}]},
    tail=b"",
    cut=0,
    good=set(),
)
def test_no_request_makes_a_5xx(ask: Client, body: Any, tail: bytes, cut: int, good: set[int]) -> None:
    """Random requests, and good ones of which some inputs were replaced."""
    if good and isinstance(body, dict) and isinstance(body.get("inputs"), list):
        whole = body_of()["inputs"]
        body["inputs"] = [whole[place] for place in sorted(good)] + body["inputs"]
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    headers = {"inference-header-content-length": str(len(content) + cut)} if tail or cut else {}
    found = ask("POST", INFER, content=content + tail, headers=headers)
    assert found.status_code < 500 and ("error" in found.json()) == (found.status_code >= 400), found.text
    assert ask("POST", "/v1/score", content=content).status_code < 500


def test_the_codec_refuses_and_never_breaks_on_random_bytes() -> None:
    @settings(max_examples=200)
    @given(st.binary(max_size=80), st.none() | st.integers(-1, 90).map(str) | st.text(max_size=4))
    def check(body: bytes, length: str | None) -> None:
        with contextlib.suppress(Refused):
            decode_request("model", None, body, length)

    check()


def test_the_api_does_what_its_description_says(served: tuple[Client, HttpApp, limaml.Predictor]) -> None:
    """schemathesis: requests made from /openapi.json, good and bad; answers must be among those described."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed: pip install 'limaml[dev]'"
    )
    ask, app, _ = served
    document = app._api.openapi()
    schema = schemathesis.openapi.from_dict(document)
    for operation in schema.get_all_operations():
        case_of = operation.ok().as_strategy() | operation.ok().as_strategy(
            generation_mode=schemathesis.GenerationMode.NEGATIVE
        )

        @settings(max_examples=12, suppress_health_check=list(HealthCheck))
        @given(case_of)
        def check(case: Any) -> None:
            sent = case.as_transport_kwargs(base_url="http://here")
            found = ask(
                sent["method"], sent["url"], params=sent.get("params"), json=sent.get("json"),
                content=sent.get("data") if isinstance(sent.get("data"), str | bytes) else None,
                headers={key: value for key, value in (sent.get("headers") or {}).items() if value.isascii()},
            )  # fmt: skip
            described = document["paths"].get(case.path, {}).get(case.method.lower(), {}).get("responses", {})
            assert str(found.status_code) in {*described, "404", "405"} and found.status_code != 500

        check()
