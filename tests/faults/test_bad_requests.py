"""Bad requests in crowds: a server refuses each in a sentence, goes on answering the good ones, and keeps nothing of them."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import numpy as np
import polars as pl
import pytest
from serving.process import Server, serving
from serving.published import publish_small
from tritonclient.grpc import service_pb2

import limaml

from . import bad
from .conftest import FULL

REQUESTS = 100_000 if FULL else 600
THREADS = 8
KEPT = 64 * 2**20
"""Bytes by which the server may have grown after the first third."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
NEVER = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
_METHOD = "/inference.GRPCInferenceService/"


@dataclass
class Answers:
    """What the bad requests were answered with, by kind and status."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    good: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, status: str) -> None:
        with self._lock:
            self.counts[kind, status] += 1

    def note_good(self) -> None:
        with self._lock:
            self.good += 1


class Sender:
    """One of those who send: bad requests of all kinds, and a good one now and then."""

    def __init__(self, server: Server, expected: np.ndarray, answers: Answers, seed: int) -> None:
        self._server, self._expected, self._answers, self._seed = server, expected, answers, seed

    def send(self, number: int) -> None:
        choose = random.Random(self._seed)
        with (
            grpc.insecure_channel(self._server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel,
            httpx.Client(base_url=self._server.url, timeout=60) as client,
        ):
            for place in range(number):
                if choose.random() < 0.3:
                    self._grpc(choose, channel)
                else:
                    self._http(choose)
                if place % 100 == 20:
                    self._good(channel, client)

    def _http(self, choose: random.Random) -> None:
        asked = choose.choice(bad.HTTP)(choose)
        answer = bad.send(self._server.address, asked)
        statuses = [int(status) for status in _STATUS.findall(answer)]
        assert all(status < 500 or status == 503 for status in statuses), (asked.kind, asked.pieces, answer)
        assert statuses or not asked.waits, (asked.kind, asked.pieces)
        for status in statuses or [0]:
            self._answers.note(asked.kind, str(status))
        head, _, body = answer.partition(b"\r\n\r\n")
        if len(statuses) == 1 and statuses[0] >= 400 and b"application/json" in head:
            said = json.loads(body)["error"]
            assert said.endswith((".", "?")), said

    def _grpc(self, choose: random.Random, channel: grpc.Channel) -> None:
        if choose.random() < 0.03:
            noise = bad.Bad("gRPC noise", (choose.choice([b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),), waits=False)
            bad.send(self._server.grpc, bad.Bad(noise.kind, (*noise.pieces, choose.randbytes(99)), waits=False))
            self._answers.note(noise.kind, "0")
            return
        methods = ["ModelInfer"] * 12 + ["ModelReady", "ModelMetadata", "ServerLive", "ModelTrain", "\x7f"]
        method = choose.choice(methods)
        asked = bad.message(choose) if choose.random() < 0.995 else bytes(11 * 10**6)
        try:
            channel.unary_unary(_METHOD + method)(asked, timeout=60)
        except grpc.RpcError as refused:
            code, said = refused.code(), refused.details()
        else:
            code, said = grpc.StatusCode.OK, ""
        assert code not in NEVER, (method, asked, code, said)
        self._answers.note(f"gRPC {method}", code.name)

    def _good(self, channel: grpc.Channel, client: httpx.Client) -> None:
        answered = client.post(bad.INFER, json=bad.infer_document())
        assert answered.status_code == 200, answered.text
        outputs = {output["name"]: output["data"] for output in answered.json()["outputs"]}
        np.testing.assert_allclose(outputs["logit"], self._expected, rtol=1e-5, atol=2e-5)
        raw = channel.unary_unary(_METHOD + "ModelInfer")(bad.infer_message().SerializeToString(), timeout=60)
        answer = service_pb2.ModelInferResponse.FromString(raw)
        (logits,) = [output.contents.fp32_contents for output in answer.outputs if output.name == "logit"]
        np.testing.assert_allclose(logits, self._expected, rtol=1e-5, atol=2e-5)
        self._answers.note_good()


def resident(server: Server) -> int:
    """Bytes of a process that are in memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


def expected_logits(folder: Path) -> np.ndarray:
    document = bad.infer_document()
    frame = pl.DataFrame({tensor["name"]: tensor["data"] for tensor in document["inputs"]})
    with limaml.open_store(folder / "store") as store, limaml.Predictor(store, "model") as predictor:
        return predictor.score(frame).logits[:, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds in memory is read from /proc")
def test_bad_requests_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    publish_small(tmp_path)
    expected, answers = expected_logits(tmp_path), Answers()
    options = ["--port", 0, "--grpc-port", 0, "--timeout", 60, "--log-requests", "none"]
    with serving("--store", tmp_path / "store", *options) as server:

        def crowd(requests: int, seed: int) -> None:
            senders = [Sender(server, expected, answers, seed + number) for number in range(THREADS)]
            with ThreadPoolExecutor(THREADS) as pool:
                for sent in [pool.submit(sender.send, requests // THREADS) for sender in senders]:
                    sent.result()

        crowd(REQUESTS // 3, 100)
        warm = resident(server)
        crowd(REQUESTS - REQUESTS // 3, 200)
        Sender(server, expected, answers, 0).send(21)  # with a good one at its end
        grown = resident(server) - warm
        assert server.end() == 0, "".join(server.log)
    said = "".join(server.log)
    assert "Traceback" not in said and "A request failed" not in said, said[-5000:]
    assert grown < KEPT, f"{grown / 2**20:.0f} MiB more than after the first third"
    statuses = Counter[str]()
    for (_, status), number in answers.counts.items():
        statuses[status] += number
    print(f"{sum(statuses.values())} answers: {dict(statuses)}; {answers.good} good ones; {grown / 2**20:+.1f} MiB")
    assert statuses["400"] + statuses["INVALID_ARGUMENT"] > REQUESTS // 3, answers.counts
    assert answers.good >= REQUESTS // 200
