"""Bad requests in crowds: a server refuses each in a sentence, goes on answering the good ones, and keeps nothing of them."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from serving.process import Server, serving
from serving.published import publish_small
from tritonclient.grpc import service_pb2

import limaml

from . import bad
from .conftest import FULL

REQUESTS = 100_000 if FULL else 600
THREADS = 8
SLOW = 100  # connections
BODY_S = 30.0  # as documented, for a body
MADE = 1500 if FULL else 10  # requests for each operation described
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
            closing(bad.Kept(self._server.address)) as kept,
        ):
            for place in range(number):
                chance = choose.random()
                if chance < 0.3:
                    self._grpc(choose, channel)
                elif chance < 0.65:
                    self._kept(choose, kept)
                else:
                    self._http(choose)
                if place % 100 == 20:
                    self._good(channel, client)

    def ask_until(self, until: float) -> None:
        """Good ones alone, one at least."""
        with (
            grpc.insecure_channel(self._server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel,
            httpx.Client(base_url=self._server.url, timeout=60) as client,
        ):
            self._good(channel, client)
            while time.monotonic() < until:
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
            self._is_a_sentence(body)

    def _kept(self, choose: random.Random, kept: bad.Kept) -> None:
        asked = choose.choice(bad.FRAMED)(choose)
        status, body = kept.send(asked)
        assert status < 500 or status == 503, (asked.kind, asked.pieces, status, body)
        self._answers.note(asked.kind, str(status))
        if status >= 400:
            self._is_a_sentence(body)

    def _is_a_sentence(self, body: bytes) -> None:
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


def test_slow_senders_in_crowds_hold_nobody_up(tmp_path: Path) -> None:
    """Heads and bodies that come a byte at a time, or never, on many connections at once: others are answered all the while, a body
    that takes too long is refused, and so is what has not come when the server ends."""
    publish_small(tmp_path)
    expected, answers = expected_logits(tmp_path), Answers()
    head, body = bad.http(b"", headers=["X: " + "x" * 10_000]), bad.http(bytes(10_000))
    options = ["--port", 0, "--grpc-port", 0, "--timeout", 60, "--drain", 1, "--log-requests", "none"]
    with serving("--store", tmp_path / "store", *options) as server, ExitStack() as stack:
        host, _, port = server.address.rpartition(":")
        slow = [stack.enter_context(socket.create_connection((host, int(port)), 60)) for _ in range(SLOW)]
        place = body.index(b"\r\n\r\n") + 4
        sent = [head, body, body[:place], body] * (SLOW // 4)
        for connection, whole in zip(slow, sent, strict=True):
            connection.sendall(whole[:place])
        asking = Sender(server, expected, answers, 0)
        until = time.monotonic() + (BODY_S + 3 if FULL else 1.5)
        with ThreadPoolExecutor(1) as pool:
            good = pool.submit(asking.ask_until, until)
            while time.monotonic() < until:
                for connection, whole in zip(slow, sent, strict=True):
                    with contextlib.suppress(OSError):  # refused by now
                        connection.sendall(whole[place : place + 1])
                place += 1
                time.sleep(0.2)
            good.result()
        assert server.end() == 0, "".join(server.log)
        told = Counter(connection.recv(12).decode() for connection in slow)
    assert told == {"HTTP/1.1 408" if FULL else "HTTP/1.1 503": SLOW * 3 // 4, "": SLOW // 4}
    assert "Traceback" not in "".join(server.log)
    print(f"\n{answers.good} good answers beside {SLOW} slow senders, who were told {dict(told)}")


def test_what_is_made_from_the_description_is_answered_as_it_says(tmp_path: Path) -> None:
    """schemathesis: requests made from the server's own /openapi.json, right ones and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install 'limaml[dev]'")
    publish_small(tmp_path)
    options = ["--port", 0, "--timeout", 60, "--log-requests", "none"]
    statuses = Counter[int]()
    with serving("--store", tmp_path / "store", *options) as server, httpx.Client(timeout=60) as client:
        document = client.get(f"{server.url}/openapi.json").json()
        for operation in schemathesis.openapi.from_dict(document).get_all_operations():
            right = operation.ok().as_strategy()
            wrong = operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

            @settings(max_examples=MADE, database=None, suppress_health_check=list(HealthCheck))
            @given(right | wrong)
            def ask(case: Any) -> None:
                sent = case.as_transport_kwargs(base_url=server.url)
                headers = {key: value for key, value in (sent.get("headers") or {}).items() if value.isascii()}
                content = sent.get("data") if isinstance(sent.get("data"), str | bytes) else None
                body = {"content": content} if sent.get("json") is None else {"json": sent["json"]}
                try:
                    asked = client.build_request(
                        sent["method"], sent["url"], params=sent.get("params"), headers=headers, **body
                    )
                except (httpx.InvalidURL, ValueError):
                    return  # the client knows no bytes for it
                found = client.send(asked)
                assert found.status_code < 500 or found.status_code == 503, (found.text, sent)
                described = document["paths"].get(case.path, {}).get(case.method.lower(), {}).get("responses", {})
                assert str(found.status_code) in {*described, "400", "404", "405"}, (found.status_code, sent)
                statuses[found.status_code] += 1

            ask()
        assert client.get(f"{server.url}/v2/health/ready").status_code == 200
        assert server.end() == 0, "".join(server.log)
    assert "Traceback" not in "".join(server.log)
    print(f"\n{statuses.total()} answers: {dict(statuses)}")
