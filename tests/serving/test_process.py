"""`limaml serve` as a process: unchanged tritonclient, signals, and a store that goes away. Flips are in tests/faults."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import tritonclient.grpc as grpc_triton
import tritonclient.http as triton
from process import Server, serving
from published import small
from tritonclient.utils import InferenceServerException

import limaml
from limaml.cli import main

sys.path.append(str(Path(__file__).parents[1] / "store"))
from servers import valkey

FRAME = small().frame.select("user_id", "item_id", "category", "quality").head(40)
LATE = ["--timeout", 30, "--poll", 0.02]


def publish_two(folder: Path, address: str) -> tuple[str, str]:
    """Versions of two models; the second is current."""
    with limaml.open_store(address) as store:
        for seed in (1, 2):
            trained = small(seed=seed).training.save(folder / f"model{seed}")
            limaml.publish(store, "model", trained, folder / f"model{seed}", small(seed=seed).training.data)
        first, second = (version.id for version in store.versions("model"))
    return first, second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("process")
    publish_two(folder, str(folder / "store"))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving("--store", folder / "store", "--port", 0, *LATE) as server:
        yield server


def expected(address: str) -> dict[str, Any]:
    """Version → logits of `FRAME`."""
    found = {}
    with limaml.open_store(address) as store:
        for version in store.versions("model"):
            with limaml.Predictor(store, "model", version=version.id) as predictor:
                found[version.id] = predictor.score(FRAME).logits[:, 0]
    return found


def inputs(frame: pl.DataFrame, binary: bool) -> list[triton.InferInput]:
    found = []
    for name in frame.columns:
        if frame[name].dtype == pl.String:
            data, datatype = np.array([value.encode() for value in frame[name]], object), "BYTES"
        elif frame[name].dtype.is_integer():
            data, datatype = frame[name].cast(pl.Int64).to_numpy(), "INT64"
        else:
            data, datatype = frame[name].to_numpy(), "FP64"
        found.append(triton.InferInput(name, list(data.shape), datatype))
        found[-1].set_data_from_numpy(data, binary_data=binary)
    return found


@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_works_unchanged(folder: Path, server: Server, binary: bool, packing: str | None) -> None:
    wanted = expected(str(folder / "store"))
    client = triton.InferenceServerClient(server.address)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    first, second = client.get_model_metadata("model")["versions"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logit", "known", "version")]
    for version in ("", first):
        assert client.is_model_ready("model", version)
        answer = client.infer(
            "model", inputs(FRAME, binary), version, outputs, request_id="9", request_compression_algorithm=packing
        )
        named = version or second
        response = answer.get_response()
        assert (response["id"], response["model_version"]) == ("9", named)
        assert answer.as_numpy("known").dtype == bool
        np.testing.assert_allclose(answer.as_numpy("logit"), wanted[named], atol=1e-5)
    assert client.infer("model", inputs(FRAME, binary)).as_numpy("version")[0] in (second, second.encode())
    with pytest.raises(InferenceServerException, match="Did you mean 'user_id'"):
        client.infer("model", inputs(FRAME.rename({"user_id": "usr_id"}), binary))
    client.close()


def test_a_server_whose_store_goes_away_answers_cold_and_recovers(tmp_path: Path) -> None:
    with valkey() as store:
        address = f"redis://127.0.0.1:{store.port}/0?cache={tmp_path / 'cache'}&lease=5&timeout=2"
        publish_two(tmp_path, address)
        with serving("--store", address, "--port", 0, *LATE) as server, httpx.Client(base_url=server.url) as client:
            rows = {"rows": FRAME.to_dicts()}
            before = recovered(client, rows)
            store.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]  # neither answers nor refuses
            asked = [client.post("/v1/score", json=rows, timeout=30).json() for _ in range(3)]
            assert all(answer["store"] == "down" and not any(answer["known"]) for answer in asked)
            assert client.get("/v2/health/ready").status_code == 200
            store.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
            assert recovered(client, rows) == before
            store.kill()
            assert client.post("/v1/score", json=rows, timeout=30).json()["store"] == "down"
            store.start()
            assert recovered(client, rows) == before
            assert server.end() == 0, "".join(server.log)


def test_a_server_that_starts_before_its_store_waits_for_it_and_for_a_version(tmp_path: Path) -> None:
    with valkey() as store:
        address = f"redis://127.0.0.1:{store.port}/0?cache={tmp_path / 'cache'}&timeout=2"
        store.kill()
        with serving("--store", address, "--port", 0, "--grpc-port", 0, *LATE) as server:
            with (
                httpx.Client(base_url=server.url, timeout=30) as client,
                grpc_triton.InferenceServerClient(server.grpc) as rpc,
            ):
                assert client.get("/v2/health/live").status_code == 200 and rpc.is_server_live()
                unready = client.get("/v2/health/ready")
                assert unready.status_code == 503 and not rpc.is_server_ready()
                assert (
                    f"127.0.0.1:{store.port}" in unready.json()["reason"]
                    and "does not answer" in unready.json()["reason"]
                )
                refused = client.post("/v1/score", json={"rows": FRAME.to_dicts()})
                assert refused.status_code == 503 and "does not answer" in refused.json()["error"]
                assert int(refused.headers["retry-after"]) >= 1
                assert "limaml_ready 0.0" in client.get("/metrics").text
                store.start()
                _until(lambda: "There is no store" in client.get("/v2/health/ready").json().get("reason", ""))
                versions = publish_two(tmp_path, address)
                _until(lambda: client.get("/v2/health/ready").status_code == 200)
                answer = client.post("/v1/score", json={"rows": FRAME.to_dicts()}).json()
                assert answer["version"] in versions and all(answer["known"]) and "store" not in answer
                assert "limaml_store_up 1.0" in client.get("/metrics").text and rpc.is_server_ready()
            assert server.end() == 0, "".join(server.log)


def _until(done: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("address", ["redis://127.0.0.1:1/x", "redis://127.0.0.1:1/0?tiemout=3", "mysql://127.0.0.1:1"])
def test_an_address_that_cannot_be_right_ends_the_server_at_once(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--store", address, "--port", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err


def recovered(client: httpx.Client, rows: Any, seconds: float = 60) -> Any:
    """The first answer that was made with the store."""
    until = time.monotonic() + seconds
    while True:
        answer = client.post("/v1/score", json=rows, timeout=30).json()
        if "store" not in answer:
            assert all(answer["known"])
            return answer
        assert time.monotonic() < until, answer
        time.sleep(0.02)


def test_a_killed_server_leaves_nothing_that_holds_up_the_next_one(folder: Path) -> None:
    command = ["--store", folder / "store", "--port", 0, *LATE]
    with serving(*command) as first:
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    with serving(*command) as second:
        assert httpx.post(f"{second.url}/v1/score", json={"rows": FRAME.to_dicts()}).status_code == 200


def test_a_server_that_is_told_to_end_answers_what_it_has(folder: Path) -> None:
    with serving("--store", folder / "store", "--port", 0, *LATE, "--log-requests", "all") as server:
        rows = {"rows": FRAME.to_dicts()}
        results: list[int] = []

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while True:
                    try:
                        answer = client.post("/v1/score", json=rows, headers={"x-request-id": "mine"})
                    except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
                        return  # between two requests
                    results.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(results) < 20:
            time.sleep(0.01)
        assert server.end() == 0, "".join(server.log)
        for thread in threads:
            thread.join()
        assert set(results) <= {200, 503} and results.count(200) >= 20
        lines = [json.loads(line) for line in server.log]
        assert any(line.get("request_id") == "mine" and line.get("endpoint") == "score" for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "Add --token-file FILE, or say with --open"),
        (["--token-file", "nowhere"], "There is no token file 'nowhere'"),
        (["--tls-cert", "cert.pem"], "TLS needs both --tls-cert and --tls-key"),
        (["--max-batch", 0], "--max-batch is 0; it must be above 0"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(
    folder: Path, arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--store", str(folder / "store"), "--port", "0", *map(str, arguments)])
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(folder: Path, server: Server) -> None:
    port = server.address.rpartition(":")[2]
    command = ["from limaml.cli import main; main()", "serve", "--store", str(folder / "store"), "--port", port]
    found = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "Choose another --port" in " ".join(found.stderr.split())
