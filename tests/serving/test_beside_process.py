"""`limaml serve` as a process with gRPC, ONNX, records, a split and a shadow, asked by unchanged clients."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import polars as pl
import pytest
import tritonclient.grpc as triton
from hypothesis import event, given, settings
from hypothesis import strategies as st
from process import serving
from published import publish_small, small
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

import limaml
from limaml.cli import main
from limaml.serving.agreement import check_served
from limaml.serving.traffic import parse_split

FRAME = small().frame.select("user_id", "item_id", "category", "quality").head(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 without posteriors is current; version 2, of another model, has them."""
    folder = tmp_path_factory.mktemp("beside")
    publish_small(folder)
    other = small(seed=2).training.save(folder / "other")
    with limaml.open_store(folder / "store") as store:
        data = small(seed=2).training.data
        limaml.publish(store, "model", other, folder / "other", data, uncertainty=True)
        store.rollback("model")
    return folder


def versions_of(folder: Path) -> tuple[str, str]:
    with limaml.open_store(folder / "store") as store:
        first, second = (version.id for version in store.versions("model"))
    return first, second


def inputs(frame: pl.DataFrame) -> list[triton.InferInput]:
    found = []
    for name in frame.columns:
        if frame[name].dtype == pl.String:
            data, datatype = np.array([value.encode() for value in frame[name]], object), "BYTES"
        elif frame[name].dtype.is_integer():
            data, datatype = frame[name].cast(pl.Int64).to_numpy(), "INT64"
        else:
            data, datatype = frame[name].cast(pl.Float32).to_numpy(), "FP32"
        found.append(triton.InferInput(name, list(data.shape), datatype))
        found[-1].set_data_from_numpy(data)
    return found


def wanted_logits(folder: Path, version: str) -> np.ndarray:
    with limaml.open_store(folder / "store") as store, limaml.Predictor(store, "model", version=version) as predictor:
        return predictor.score(FRAME).logits[:, 0]


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_tritonclient_is_answered_as_the_predictor_would(folder: Path, runtime: str) -> None:
    first, second = versions_of(folder)
    command = ["--store", folder / "store", "--port", 0, "--grpc-port", 0, "--runtime", runtime, "--timeout", 30]
    with serving(*command) as server, triton.InferenceServerClient(server.grpc) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
        described = client.get_model_metadata("model")
        assert set(described.versions) == {first, second}
        assert {"score", "logit"} <= {output.name for output in described.outputs}
        for version in ("", second):
            answer = client.infer("model", inputs(FRAME), model_version=version)
            assert answer.get_response().model_version == (version or first)
            np.testing.assert_allclose(
                answer.as_numpy("logit"), wanted_logits(folder, version or first), rtol=1e-5, atol=2e-5
            )
        drawn = client.infer("model", inputs(FRAME), model_version=second, parameters={"sample": True, "seed": 7})
        again = client.infer("model", inputs(FRAME), model_version=second, parameters={"sample": True, "seed": 7})
        np.testing.assert_array_equal(drawn.as_numpy("logit"), again.as_numpy("logit"))
        assert np.abs(drawn.as_numpy("logit") - wanted_logits(folder, second)).max() > 0.01
        sd = [triton.InferRequestedOutput("logit_sd")]
        if runtime == "torch":
            spread = client.infer("model", inputs(FRAME), model_version=second, outputs=sd).as_numpy("logit_sd")
            assert spread.shape == (60,) and (spread > 0).all()
        else:
            with pytest.raises(InferenceServerException, match="--runtime torch"):
                client.infer("model", inputs(FRAME), model_version=second, outputs=sd)
        with pytest.raises(InferenceServerException, match=r"Input 'usr_id' .* Did you mean 'user_id'") as refusal:
            client.infer("model", inputs(FRAME.rename({"user_id": "usr_id"})))
        assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(InferenceServerException) as refusal:
            client.infer("model", inputs(FRAME), model_version="v9")
        assert refusal.value.status() == "StatusCode.NOT_FOUND"
        text = httpx.get(f"{server.url}/metrics").text
        assert 'limaml_requests_total{endpoint="grpc_infer",status="200"}' in text
        assert server.end() == 0, "".join(server.log)


numbers = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda values: ("INT64", "int64_contents", values)),
    st.lists(st.floats(), max_size=3).map(lambda values: ("FP64", "fp64_contents", values)),
    st.lists(st.floats(width=32), max_size=3).map(lambda values: ("FP32", "fp32_contents", values)),
    st.lists(st.binary(max_size=4), max_size=3).map(lambda values: ("BYTES", "bytes_contents", values)),
    st.lists(st.booleans(), max_size=3).map(lambda values: ("BOOL", "bool_contents", values)),
)
choices = st.one_of(
    st.booleans().map(lambda value: {"bool_param": value}),
    st.integers(-3, 2**63 - 1).map(lambda value: {"int64_param": value}),
    st.floats().map(lambda value: {"double_param": value}),
    st.text(max_size=3).map(lambda value: {"string_param": value}),
)


@st.composite
def infer_requests(draw: st.DrawFn) -> service_pb2.ModelInferRequest:
    """Requests that are nearly right: the model's columns, and now and then a wrong type, length, shape or value."""
    request = service_pb2.ModelInferRequest(model_name="model", id=draw(st.text(max_size=2)))
    good = {"user_id": ("INT64", "int64_contents", [1, 2]), "item_id": ("INT64", "int64_contents", [3, 4])}
    good |= {"category": ("BYTES", "bytes_contents", [b"a", b"b"]), "quality": ("FP32", "fp32_contents", [0.5, 1.0])}
    rarely = st.sampled_from([False] * 12 + [True])
    for name in [*good, *(draw(st.lists(st.text(max_size=3), max_size=2)) if draw(rarely) else ())]:
        if draw(rarely):
            continue
        datatype, field, values = good[name] if name in good and not draw(rarely) else draw(numbers)
        shape = draw(st.lists(st.integers(-1, 3), max_size=3)) if draw(rarely) else [len(values)]
        contents = service_pb2.InferTensorContents(**{field: values})
        request.inputs.add(name=name, datatype=datatype, shape=shape, contents=contents)
    for name in draw(
        st.lists(st.sampled_from(["sample", "seed", "scale", "logit_sd", "nan_is_missing", "?"]), max_size=2)
    ):
        request.parameters[name].CopyFrom(service_pb2.InferParameter(**draw(choices)))
    for name in draw(st.lists(st.sampled_from(["score", "logit", "logit_sd", "known", "version", "?"]), max_size=2)):
        request.outputs.add(name=name)
    return request


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[tuple[service_pb2_grpc.GRPCInferenceServiceStub, str]]:
    _, second = versions_of(folder)
    options = ["--port", 0, "--grpc-port", 0, "--timeout", 30, "--log-requests", "none"]
    with serving("--store", folder / "store", *options) as server, grpc.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel), second
        assert server.end() == 0
        assert "Traceback" not in "".join(server.log) and "exception" not in "".join(server.log)


@settings(max_examples=int(os.environ.get("LIMAML_FUZZ", "250")))
@given(request_=infer_requests(), pinned=st.booleans())
def test_a_real_server_answers_or_refuses_what_is_nearly_right(
    running: tuple[service_pb2_grpc.GRPCInferenceServiceStub, str],
    request_: service_pb2.ModelInferRequest,
    pinned: bool,
) -> None:
    stub, second = running
    request_.model_version = second if pinned else ""
    try:
        answer = stub.ModelInfer(request_, timeout=30)
    except grpc.RpcError as error:
        refused = error
    else:
        event("answered")
        assert answer.model_version and answer.outputs
        return
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.details()
    assert refused.details().endswith("."), refused.details()


def test_records_split_and_shadow_of_a_running_server(folder: Path, tmp_path: Path) -> None:
    first, second = versions_of(folder)
    command = ["--store", folder / "store", "--port", 0, "--grpc-port", 0, "--timeout", 30]
    beside = ["--record", tmp_path / "served", "--record-share", 1, "--split", f"{second}=0.5", "--shadow", second]
    split = parse_split([f"{second}=0.5"])
    members = FRAME["user_id"].unique().to_list()
    with serving(*command, *beside) as server, triton.InferenceServerClient(server.grpc) as client:
        for member in members:
            rows = FRAME.filter(pl.col("user_id") == member)
            expected = split.of([str(member)]) or first
            assert client.infer("model", inputs(rows)).get_response().model_version == expected
            task, candidates = {"user_id": member}, rows.drop("user_id").to_dicts()
            answer = httpx.post(f"{server.url}/v1/score", json={"task": task, "candidates": candidates}).json()
            assert answer["version"] == expected
        asked = {"task": {"user_id": members[0]}, "candidates": candidates, "version": second}
        drawn = httpx.post(f"{server.url}/v1/score", json={**asked, "parameters": {"sample": True, "logit_sd": True}})
        assert drawn.json()["sampled"] is True and len(drawn.json()["logit_sd"]["click"]) == len(candidates)
        text = httpx.get(f"{server.url}/metrics").text
        assert f'limaml_version_answers_total{{version="{second}"}}' in text
        assert server.end() == 0, "".join(server.log)
    with limaml.open_store(folder / "store") as store:
        found = check_served(tmp_path / "served", store)
    assert found.requests == 2 * len(members) and set(found.versions) == {first, second}
    assert found.compared == 2 * len(FRAME) and found.worst <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "v9=0.1"], "--split names the version v9, which the store does not have; it has v0"),
        (["--shadow", "v9"], "--shadow names the version v9"),
        (["--split", "v9"], "Write --split VERSION=0.1"),
        (["--record", "served", "--record-share", 2], "at most 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    folder: Path, options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--store", str(folder / "store"), "--port", "0", *map(str, options)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_tls_and_a_token_reach_grpc(folder: Path, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open-sesame-0123456789")
    cert, key = certificate
    options = ["--tls-cert", cert, "--tls-key", key, "--token-file", tmp_path / "token", "--host", "127.0.0.1"]
    with serving("--store", folder / "store", "--port", 0, "--grpc-port", 0, *options) as server:
        right = {"authorization": "Bearer open-sesame-0123456789"}
        port = server.grpc.rpartition(":")[2]
        with triton.InferenceServerClient(f"localhost:{port}", ssl=True, root_certificates=str(cert)) as client:
            assert client.is_server_ready(headers=right)
            with pytest.raises(InferenceServerException) as refusal:
                client.is_server_ready()
            assert refusal.value.status() == "StatusCode.UNAUTHENTICATED"
        with grpc.insecure_channel(server.grpc) as plain, pytest.raises(grpc.RpcError):
            plain.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)
