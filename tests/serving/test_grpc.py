"""gRPC as its clients see it: unchanged tritonclient, plain channels, and bytes that nobody should send.

The service behind it is a small one that adds numbers up; what scores are is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from limaml.errors import ConfigError
from limaml.serving import grpc_messages
from limaml.serving.grpc import GrpcServer
from limaml.serving.grpc_messages import decode_infer, message
from limaml.serving.metrics import Metrics
from limaml.serving.service import Service
from limaml.serving.tensors import (
    InferRequest,
    InferResponse,
    InferTensor,
    ModelMetadata,
    Refused,
    TensorMetadata,
)

TOKEN = "sesame"
MAX_BODY = 2**20


class Sums(Service):
    """Sends back what it is given, and the sum of all numbers. An input `refuse` names a status, `sleep` seconds."""

    def __init__(self) -> None:
        self.is_ready, self.metrics = True, Metrics()

    def ready(self, name: str | None = None, version: str | None = None) -> bool:
        return self.is_ready and name in (None, "sums") and version in (None, "v1")

    async def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        if name != "sums":
            raise Refused(404, f"There is no model {name!r} here; ask for 'sums'.")
        tensor = TensorMetadata("x", "FP32", (-1, 2))
        return ModelMetadata("sums", ("v1",), "limaml", (tensor,), (TensorMetadata("sum", "FP64", (1,)),))

    async def infer(self, request: InferRequest) -> InferResponse:
        await self.model_metadata(request.model)
        if "refuse" in request.inputs:
            raise Refused(int(request.inputs["refuse"].data[0]), "No – not now.", retry_after=1.5)
        if "sleep" in request.inputs:
            await asyncio.sleep(float(request.inputs["sleep"].data[0]))
        if "fail" in request.inputs:
            raise RuntimeError("a bug")
        numbers = [t.data.astype(np.float64).sum() for t in request.inputs.values() if t.datatype != "BYTES"]
        total = InferTensor.of("sum", np.array([sum(numbers)]))
        outputs = (total, *request.inputs.values())
        return InferResponse("sums", "v1", request.id, outputs, {**request.parameters, "ways": 2, "exact": True})


class Running:
    """A server on a loop of its own, in a thread."""

    def __init__(self, token: str | None = None, tls: tuple[Path, Path] | None = None) -> None:
        self.service = Sums()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = self.do(self._make(token))
        self.port = self.do(self.server.start("127.0.0.1:0", tls))
        self.address = f"127.0.0.1:{self.port}"

    async def _make(self, token: str | None) -> GrpcServer:
        return GrpcServer(self.service, max_body=MAX_BODY, token=token)

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def stop(self, grace: float = 0.0) -> None:
        self.do(self.server.stop(grace))

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(running.address) as found:
        yield found


@pytest.fixture(scope="module")
def channel(running: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.address) as found:
        yield found


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, data: np.ndarray, datatype: str) -> triton.InferInput:
    found = triton.InferInput(name, list(data.shape), datatype)
    found.set_data_from_numpy(data)
    return found


def status_of(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refusal:
        call()
    return refusal.value.code(), refusal.value.details()


def test_the_messages_are_the_protocols() -> None:
    """Field by field as in tritonclient's copy, and the compiled file is that of the .proto files."""

    def compare(ours, theirs, seen: set[str]) -> None:
        if ours.full_name in seen:
            return
        seen.add(ours.full_name)
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
            if field.message_type is not None:
                compare(field.message_type, other.message_type, seen)

    seen: set[str] = set()
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"):
        for end in ("Request", "Response"):
            theirs = service_pb2.DESCRIPTOR.message_types_by_name[name + end]
            compare(message(f"inference.{name}{end}").DESCRIPTOR, theirs, seen)
    assert len(seen) >= 12 + 5
    status = message("grpc.health.v1.HealthCheckResponse").DESCRIPTOR.enum_types_by_name["ServingStatus"]
    assert {value.name: value.number for value in status.values} == dict(
        health_pb2.HealthCheckResponse.ServingStatus.items()
    )


def test_the_compiled_messages_are_up_to_date(tmp_path: Path) -> None:
    folder = Path(str(files("limaml.serving"))) / "protocol"
    out = tmp_path / "messages.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={out}"]
    subprocess.run([*command, "open_inference.proto", "health.proto"], cwd=folder, check=True)
    assert out.read_bytes() == (folder / "messages.binpb").read_bytes(), "type: make proto"


def test_live_ready_and_metadata(client: triton.InferenceServerClient, running: Running) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("sums") and client.is_model_ready("sums", "v1")
    assert not client.is_model_ready("sums", "v2") and not client.is_model_ready("other")
    assert client.get_server_metadata().name == "limaml"
    described = client.get_model_metadata("sums", "v1")
    assert (described.name, list(described.versions), described.platform) == ("sums", ["v1"], "limaml")
    assert [(t.name, t.datatype, list(t.shape)) for t in described.inputs] == [("x", "FP32", [-1, 2])]
    running.service.is_ready = False
    try:
        assert client.is_server_live() and not client.is_server_ready()
    finally:
        running.service.is_ready = True
    with pytest.raises(InferenceServerException, match="There is no model 'other' here"):
        client.get_model_metadata("other")


def test_every_datatype_goes_there_and_back_raw(client: triton.InferenceServerClient) -> None:
    sent = {
        "BOOL": np.array([True, False]),
        "BYTES": np.array([b"", b"\xff\0a"], dtype=np.object_),
        "FP16": np.array([1.5, -2], np.float16),
        "FP32": np.array([[0.25, 3.0]], np.float32),
        "FP64": np.array([1e300]),
        "INT8": np.array([-128, 127], np.int8),
        "INT16": np.array([-3], np.int16),
        "INT32": np.array([2**31 - 1], np.int32),
        "INT64": np.array([-(2**63)], np.int64),
        "UINT8": np.array([255], np.uint8),
        "UINT16": np.array([65535], np.uint16),
        "UINT32": np.array([2**32 - 1], np.uint32),
        "UINT64": np.array([2**64 - 1], np.uint64),
    }
    inputs = [tensor(name, data, name) for name, data in sent.items()]
    answer = client.infer(
        "sums", inputs, request_id="r7", parameters={"mood": "good", "share": 0.5, "n": 3, "on": False}
    )
    for name, data in sent.items():
        np.testing.assert_array_equal(answer.as_numpy(name), data)
        assert answer.get_output(name).datatype == name
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("sums", "v1", "r7")
    given = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()}
    assert given == {"mood": "good", "share": 0.5, "n": 3, "on": False, "ways": 2, "exact": True}


def test_numbers_may_come_one_by_one(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    """Typed contents, as KServe's clients send them; the answer has them too."""
    sent = {
        "BOOL": ("bool_contents", [True, False]),
        "BYTES": ("bytes_contents", [b"", b"\xff"]),
        "FP32": ("fp32_contents", [0.25]),
        "FP64": ("fp64_contents", [1e300, 2.0]),
        "INT8": ("int_contents", [-128, 127]),
        "INT16": ("int_contents", [-3]),
        "INT32": ("int_contents", [2**31 - 1]),
        "INT64": ("int64_contents", [-(2**63)]),
        "UINT8": ("uint_contents", [255]),
        "UINT16": ("uint_contents", [65535]),
        "UINT32": ("uint_contents", [2**32 - 1]),
        "UINT64": ("uint64_contents", [2**64 - 1]),
    }
    request = service_pb2.ModelInferRequest(model_name="sums", model_version="v1")
    for datatype, (field, values) in sent.items():
        contents = service_pb2.InferTensorContents(**{field: values})
        request.inputs.add(name=datatype, datatype=datatype, shape=[len(values)], contents=contents)
    answer = stub.ModelInfer(request)
    assert not answer.raw_output_contents
    found = {output.name: output for output in answer.outputs}
    for datatype, (field, values) in sent.items():
        assert list(getattr(found[datatype].contents, field)) == values
        assert list(found[datatype].shape) == [len(values)]


def infer_request(*inputs: tuple[str, str, list[int], dict], **fields) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="sums", **fields)
    for name, datatype, shape, contents in inputs:
        request.inputs.add(
            name=name, datatype=datatype, shape=shape, contents=service_pb2.InferTensorContents(**contents)
        )
    return request


X = ("x", "FP32", [1], {"fp32_contents": [1]})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (infer_request(("x", "FP32", [2], {"fp32_contents": [1]})), r"Input 'x' has 1 values in fp32_contents; shape \[2\]"),
        (infer_request(("x", "FP32", [1], {"fp64_contents": [1]})), "is FP32 but has fp64_contents"),
        (infer_request(("x", "INT8", [1], {"int_contents": [128]})), "the value 128, which INT8 has no place for"),
        (infer_request(("x", "FP16", [1], {})), "Send it in raw_input_contents"),
        (infer_request(("x", "FLOAT", [0], {})), "datatype 'FLOAT'; use one of"),
        (infer_request(("x", "FP32", [-1], {})), "at least 0"),
        (infer_request(X, X), "Input 'x' is there twice"),
        (infer_request(X, raw_input_contents=[b"1234"]), "has contents, and raw_input_contents as well"),
        (infer_request(X, raw_input_contents=[b"", b""]), "1 inputs but 2 raw_input_contents"),
        (infer_request(X, parameters={"seed": {}}), "Parameter 'seed' has no value"),
        (
            infer_request(X, outputs=[{"name": "sum", "parameters": {"classification": {"int64_param": 3}}}]),
            "asks for 'classification'",
        ),
        (
            infer_request(X, outputs=[{"name": "sum", "parameters": {"shared_memory_region": {"string_param": "a"}}}]),
            "Output 'sum' is in shared memory",
        ),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, request_: service_pb2.ModelInferRequest, message: str
) -> None:
    code, details = status_of(lambda: stub.ModelInfer(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.endswith(".") and re.search(message, details), details


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, grpc.StatusCode.INVALID_ARGUMENT),
        (422, grpc.StatusCode.INVALID_ARGUMENT),
        (401, grpc.StatusCode.UNAUTHENTICATED),
        (404, grpc.StatusCode.NOT_FOUND),
        (413, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (503, grpc.StatusCode.UNAVAILABLE),
        (504, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_the_services_refusals_have_grpcs_words(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, status: int, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        stub.ModelInfer(infer_request(("refuse", "INT32", [1], {"int_contents": [status]})))
    assert (refusal.value.code(), refusal.value.details()) == (code, "No – not now.")
    assert dict(refusal.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"


def test_a_bug_is_internal_and_says_where_to_look(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    request = infer_request(("fail", "FP32", [0], {}))
    code, details = status_of(lambda: stub.ModelInfer(request, metadata=[("x-request-id", "abc-1")]))
    assert code is grpc.StatusCode.INTERNAL and "abc-1" in details
    assert "a bug" not in details and "RuntimeError: a bug" in caplog.text
    assert "abc-1" in {getattr(record, "request_id", None) for record in caplog.records}


def test_request_ids_are_taken_or_made(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    def answered(**options) -> str:
        _, call = stub.ModelInfer.with_call(infer_request(X), **options)
        return dict(call.trailing_metadata())["x-request-id"]

    assert answered(metadata=[("x-request-id", "mine:7")]) == "mine:7"
    assert len(answered()) == 32 != answered()
    assert answered(metadata=[("x-request-id", "two words")]) != "two words"  # it goes into a log


def test_a_deadline_ends_the_request(client: triton.InferenceServerClient, running: Running) -> None:
    begun = time.monotonic()
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("sums", [tensor("sleep", np.array([60.0]), "FP64")], client_timeout=0.2)
    assert time.monotonic() - begun < 30
    assert client.is_server_live()


def test_large_messages_are_refused_also_when_they_are_small_on_the_wire(client: triton.InferenceServerClient) -> None:
    big = tensor("x", np.zeros(MAX_BODY // 4 + 100, np.float32), "FP32")
    for compression in (None, "gzip", "deflate"):
        with pytest.raises(InferenceServerException) as refusal:
            client.infer("sums", [big], compression_algorithm=compression)
        assert refusal.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    fits = tensor("x", np.ones(1000, np.float32), "FP32")
    assert client.infer("sums", [fits], compression_algorithm="gzip").as_numpy("sum") == [1000]


def test_requests_are_counted_beside_https(stub: service_pb2_grpc.GRPCInferenceServiceStub, running: Running) -> None:
    value = running.service.metrics.registry.get_sample_value

    def counted(endpoint: str, status: str) -> float:
        return value("limaml_requests_total", {"endpoint": endpoint, "status": status}) or 0

    before = counted("grpc_infer", "200"), counted("grpc_infer", "400"), counted("grpc_infer", "499")
    stub.ModelInfer(infer_request(X))
    status_of(lambda: stub.ModelInfer(infer_request(X, X)))
    status_of(lambda: stub.ModelInfer(infer_request(("sleep", "FP64", [1], {"fp64_contents": [60]})), timeout=0.1))
    until = time.monotonic() + 30
    while counted("grpc_infer", "499") == before[2] and time.monotonic() < until:
        time.sleep(0.01)  # the server learns a moment later that nobody waits any more
    after = counted("grpc_infer", "200"), counted("grpc_infer", "400"), counted("grpc_infer", "499")
    assert after == tuple(number + 1 for number in before)
    assert value("limaml_request_seconds_count", {"endpoint": "grpc_infer"}) >= 3


METHODS = ["ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"]
PATHS = [f"/inference.GRPCInferenceService/{name}" for name in METHODS] + ["/grpc.health.v1.Health/Check"]
names = st.sampled_from(["x", "sum", ""]) | st.text(max_size=3)
contents = st.fixed_dictionaries(
    {},
    optional={
        "bool_contents": st.lists(st.booleans(), max_size=2),
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=2),
        "int64_contents": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2),
        "uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=2),
        "uint64_contents": st.lists(st.integers(0, 2**64 - 1), max_size=2),
        "fp32_contents": st.lists(st.floats(width=32), max_size=2),
        "fp64_contents": st.lists(st.floats(), max_size=2),
        "bytes_contents": st.lists(st.binary(max_size=3), max_size=2),
    },
)
inputs = st.fixed_dictionaries(
    {
        "name": names,
        "datatype": st.sampled_from(["FP32", "INT8", "INT64", "UINT16", "BOOL", "BYTES", "FP16"]) | st.text(max_size=4),
        "shape": st.lists(st.integers(0, 2) | st.integers(-(2**63), 2**63 - 1), max_size=3),
    },
    optional={"contents": contents},
)
structured = st.fixed_dictionaries(
    {"model_name": st.sampled_from(["sums", "sums", ""]) | st.text(max_size=4)},
    optional={
        "inputs": st.lists(inputs, max_size=3),
        "raw_input_contents": st.lists(st.binary(max_size=9), max_size=3),
        "outputs": st.lists(st.fixed_dictionaries({"name": names}), max_size=2),
        "id": st.text(max_size=4),
    },
).map(lambda fields: service_pb2.ModelInferRequest(**fields).SerializeToString())


@settings(max_examples=300)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60) | structured)
def test_random_requests_are_answered_or_refused(channel: grpc.Channel, path: str, body: bytes) -> None:
    try:
        channel.unary_unary(path)(body, timeout=30)
    except grpc.RpcError as error:
        found = error
    else:
        return
    assert found.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (
        found.code(),
        found.details(),
    )
    assert found.details().endswith(".")


def test_health_is_checked_and_watched(running: Running) -> None:
    serving, resting = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with grpc.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
        code, details = status_of(lambda: health.Check(health_pb2.HealthCheckRequest(service="mine")))
        assert code is grpc.StatusCode.NOT_FOUND and "inference.GRPCInferenceService" in details
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == serving
        running.service.is_ready = False
        try:
            assert next(watch).status == resting
        finally:
            running.service.is_ready = True
        assert next(watch).status == serving
        watch.cancel()


def test_a_token_is_asked_for_but_for_health() -> None:
    guarded = Running(token=TOKEN)
    try:
        with grpc.insecure_channel(guarded.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for metadata in ([], [("authorization", "Bearer wrong")], [("authorization", TOKEN)]):
                code, details = status_of(lambda given=metadata: stub.ModelInfer(infer_request(X), metadata=given))
                assert code is grpc.StatusCode.UNAUTHENTICATED and "authorization: Bearer" in details
            right = [("authorization", f"Bearer {TOKEN}")]
            assert stub.ModelInfer(infer_request(X), metadata=right).model_version == "v1"
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    finally:
        guarded.close()


def test_stopping_finishes_what_is_in_flight() -> None:
    leaving = Running()
    with triton.InferenceServerClient(leaving.address) as client:
        assert client.is_server_ready()
        answers: list[object] = []
        sleep = tensor("sleep", np.array([0.5]), "FP64")
        client.async_infer("sums", [sleep], lambda result, error: answers.append(error or result.as_numpy("sum")[0]))
        time.sleep(0.2)
        leaving.stop(grace=30)
        until = time.monotonic() + 30
        while not answers and time.monotonic() < until:
            time.sleep(0.02)
    assert answers == [0.5]
    leaving.close()


def test_a_port_in_use_is_said(running: Running) -> None:
    async def second() -> None:
        await GrpcServer(running.service).start(running.address)

    with pytest.raises(ConfigError, match=f"cannot listen on {running.address}"):
        running.do(second())


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["INT64", "FP32", "BYTES", "BOOL"]), st.integers(0, 40)), min_size=1, max_size=4
    ),
    st.data(),
)
def test_a_message_seen_before_is_read_the_same(tensors: list[tuple[str, int]], data: st.DataObject) -> None:
    request = message("inference.ModelInferRequest")

    def one() -> bytes:
        found = request(model_name="m", model_version=version)
        for place, (kind, rows) in enumerate(tensors):
            found.inputs.add(name=f"x{place}", datatype=kind, shape=[rows])
            size = {"INT64": 8, "FP32": 4, "BYTES": 5, "BOOL": 1}[kind]
            raw = data.draw(st.binary(min_size=size * rows, max_size=size * rows))
            if kind == "BYTES":
                raw = b"".join(b"\x01\0\0\0" + raw[5 * row : 5 * row + 1] for row in range(rows))
            found.raw_input_contents.append(raw if kind != "BOOL" else bytes(byte & 1 for byte in raw))
        found.outputs.add(name="score")
        found.parameters["nan_is_missing"].bool_param = True
        return bytes(found.SerializeToString())

    version = data.draw(st.sampled_from(["", "7"]))
    for raw in (one(), one()):
        grpc_messages._layouts.clear()
        wanted, _ = decode_infer(raw)
        grpc_messages._layouts.clear()
        decode_infer(one())
        assert len(grpc_messages._layouts) == 1
        found, as_raw = decode_infer(raw)
        assert len(grpc_messages._layouts) == 1 and as_raw
        assert (found.model, found.version, found.outputs, dict(found.parameters)) == (
            wanted.model, wanted.version, wanted.outputs, dict(wanted.parameters)
        )  # fmt: skip
        assert list(found.inputs) == list(wanted.inputs)
        for name, tensor in wanted.inputs.items():
            assert (found.inputs[name].datatype, found.inputs[name].shape) == (tensor.datatype, tensor.shape)
            assert found.inputs[name].data.tobytes() == tensor.data.tobytes() or tensor.datatype == "BYTES"
            assert tensor.datatype != "BYTES" or found.inputs[name].data.tolist() == tensor.data.tolist()


def test_a_message_that_hides_its_contents_is_parsed_each_time() -> None:
    """Contents first, and behind them an unknown field that holds a copy of them."""
    found = message("inference.ModelInferRequest")(model_name="m", raw_input_contents=[b"\x01\0\0\0"])
    found.inputs.add(name="x", datatype="INT32", shape=[1])
    tail = b"\x3a\x04\x01\0\0\0"
    whole = found.SerializeToString() + b"\xfa\x01" + bytes([len(tail)]) + tail
    grpc_messages._layouts.clear()
    for last in (b"\x01\0\0\0", b"\x02\0\0\0"):
        request, _ = decode_infer(whole[:-4] + last)
        assert request.inputs["x"].data.tolist() == [1] and not grpc_messages._layouts


@given(st.integers(0, 2**63 - 1))
def test_lengths_are_written_as_protobuf_writes_them(number: int) -> None:
    found = message("inference.InferParameter")(uint64_param=number).SerializeToString()
    assert found[-len(grpc_messages._varint(number)) :] == grpc_messages._varint(number)
