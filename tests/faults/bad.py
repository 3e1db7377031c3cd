"""Bad requests, as many kinds as somebody may send by mistake or on purpose: each a choice of one random generator."""

from __future__ import annotations

import gzip
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

from tritonclient.grpc import service_pb2

INFER, SCORE = "/v2/models/model/infer", "/v1/score"
COLUMNS = ("user_id", "item_id", "category", "quality")
ODD: Sequence[Any] = (None, True, -1, 2**63, 10**400, 1.5, "", "x", "\0", "\ud800", [], [1], {}, {"a": [{}]}, 1e308)
SHAPES: Sequence[Any] = (
    [-1],
    [0],
    [2**40, 2**40],
    [2**63],
    [1] * 100,
    [],
    [1.5],
    ["2"],
    None,
    2,
    [10**30],
    [4096, 4096],
)
BOMB = gzip.compress(b" " * 2 * 10**7, 1)
NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"00", b"1" * 5000, b"0x1", b"+1", b"nan", b".5")


@dataclass(frozen=True)
class Bad:
    """Bytes for a connection. `waits`: the server has all it needs to answer, and closes when it has."""

    kind: str
    pieces: tuple[bytes, ...]
    waits: bool = True
    pause: float = 0.0  # seconds between two pieces


def score_document() -> dict[str, Any]:
    rows = [{"item_id": item, "category": "a", "quality": 0.5} for item in (3, 4)]
    return {"task": {"user_id": 1}, "candidates": rows}


def infer_document() -> dict[str, Any]:
    values: dict[str, tuple[str, list[Any]]] = {"user_id": ("INT64", [1, 2]), "item_id": ("INT64", [3, 4])}
    values |= {"category": ("BYTES", ["a", "b"]), "quality": ("FP32", [0.5, 1.0])}
    inputs = [
        {"name": name, "datatype": kind, "shape": [len(data)], "data": data} for name, (kind, data) in values.items()
    ]
    return {"id": "1", "inputs": inputs}


def binary() -> tuple[bytes, bytes]:
    """The JSON and the bytes of a request whose tensors are binary."""
    tensors = {"user_id": struct.pack("<2q", 1, 2), "item_id": struct.pack("<2q", 3, 4)}
    tensors |= {"category": b"\1\0\0\0a\1\0\0\0b", "quality": struct.pack("<2f", 0.5, 1.0)}
    document = infer_document()
    for tensor in document["inputs"]:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(tensors[tensor["name"]])}
    return json.dumps(document).encode(), b"".join(tensors[tensor["name"]] for tensor in document["inputs"])


def http(
    body: bytes, path: str = INFER, *, headers: Sequence[str] = (), length: object = None, close: bool = True
) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}"] if length != "" else []
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def flipped(choose: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        found[choose.randrange(len(found))] = choose.randrange(256)
    return bytes(found)


def cut(choose: random.Random, data: bytes) -> bytes:
    return data[: choose.randrange(len(data))]


def _somewhere(choose: random.Random, document: Any, value: Any) -> Any:
    """The document with `value` in one of its places, or without that place."""
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = choose.choice(keys)
    inner = document[key]
    if isinstance(inner, dict | list) and inner and choose.random() < 0.8:
        _somewhere(choose, inner, value)
    elif choose.random() < 0.2:
        del document[key]
    else:
        document[key] = value
    return document


def _good(choose: random.Random) -> tuple[str, Any]:
    return (SCORE, score_document()) if choose.random() < 0.3 else (INFER, infer_document())


def _body(choose: random.Random) -> tuple[str, bytes]:
    path, document = _good(choose)
    return path, json.dumps(document).encode()


def random_bytes(choose: random.Random) -> Bad:
    path, _ = _good(choose)
    return Bad("random bytes", (http(choose.randbytes(choose.randint(0, 300)), path),))


def flips(choose: random.Random) -> Bad:
    path, body = _body(choose)
    return Bad("flipped bytes", (http(flipped(choose, body), path),))


def truncated(choose: random.Random) -> Bad:
    path, body = _body(choose)
    return Bad("truncated", (http(cut(choose, body), path),))


def tensors(choose: random.Random) -> Bad:
    front, behind = binary()
    length: object = len(front)
    what = choose.randrange(5)
    if what == 0:
        behind = cut(choose, behind)
    elif what == 1:
        behind = flipped(choose, behind) + choose.randbytes(choose.randint(0, 9))
    elif what == 2:
        front = flipped(choose, front)
    elif what == 3:
        length = choose.choice([-1, 0, 1, 10**9, 10**30, "x", "", "1e3", len(front) - 1, len(front) + 1])
    else:
        old = b'"binary_data_size": 16'
        front = front.replace(old, old[:-2] + str(choose.choice([-1, 0, 15, 17, 10**20, "1.5", "null", "[]"])).encode())
        length = len(front)
    return Bad("binary tensors", (http(front + behind, headers=[f"Inference-Header-Content-Length: {length}"]),))


def half_sent(choose: random.Random) -> Bad:
    path, body = _body(choose)
    return Bad("half sent", (cut(choose, http(body, path)),), waits=False)


def wrong_length(choose: random.Random) -> Bad:
    path, body = _body(choose)
    if choose.random() < 0.3:
        return Bad("length too long", (http(body, path, length=len(body) + choose.randint(1, 10**6)),), waits=False)
    lengths = [0, 1, len(body) - 1, -1, "x", "1, 2", "1e2", 10**12, 10**40, "5\r\nContent-Length: 6", ""]
    return Bad("wrong length", (http(body, path, length=choose.choice(lengths)),))


def pipelined(choose: random.Random) -> Bad:
    first = [http(_body(choose)[1], close=False) for _ in range(choose.randint(1, 4))]
    last = choose.choice([choose.randbytes(60), b"GET\r\n\r\n", b"\0" * 40, b"POST / HTTP/9.9\r\n\r\n"])
    return Bad("pipelined", (b"".join(first) + last + b"\r\n\r\n",), waits=False)


def chunks(choose: random.Random) -> Bad:
    _, body = _body(choose)
    size = choose.choice([b"zz", b"-5", b"", b"ffffffffffffffffff", b"%x;" % len(body), b"%x" % (len(body) + 3), b"0"])
    sent = http(b"", headers=["Transfer-Encoding: chunked"], length="") + size + b"\r\n" + body + b"\r\n0\r\n"
    return Bad("broken chunks", (sent, choose.randbytes(8) + b"\r\n\r\n"), waits=False)


def no_utf8(choose: random.Random) -> Bad:
    path, body = _body(choose)
    at = body.index(b'"a"') + 1
    broken = choose.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\xf8\x88\x80\x80\x80", b"\0"])
    return Bad("no UTF-8", (http(body[:at] + broken + body[at:], path),))


def numbers(choose: random.Random) -> Bad:
    path, body = _body(choose)
    old = choose.choice([place for place in (b"0.5", b": 1}", b"[1, 2]", b"[2]", b": 3") if place in body])
    return Bad("numbers", (http(body.replace(old, old[:1] + choose.choice(NUMBERS) + old[-1:]), path),))


def deep(choose: random.Random) -> Bad:
    depth = choose.choice([100, 1023, 1025, 5000, 50_000])
    opening, closing = choose.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inner = opening * depth + b"1" + closing * depth
    path, body = choose.choice([(INFER, inner), (INFER, b'{"inputs": %s}'), (SCORE, b'{"rows": %s}')])
    parameters = b'{"task": {"user_id": 1}, "candidates": [{"item_id": 1}], "parameters": {"seed": %s}}'
    if choose.random() < 0.3:
        path, body = SCORE, parameters
    return Bad("deep", (http(body.replace(b"%s", inner), path),))


def shapes(choose: random.Random) -> Bad:
    document = infer_document()
    choose.choice(document["inputs"])["shape"] = choose.choice(SHAPES)
    return Bad("shapes", (http(json.dumps(document).encode()),))


def odd_values(choose: random.Random) -> Bad:
    path, document = _good(choose)
    return Bad("odd values", (http(json.dumps(_somewhere(choose, document, choose.choice(ODD))).encode(), path),))


def noise(choose: random.Random) -> Bad:
    return Bad("noise", (choose.randbytes(choose.randint(1, 200)) + b"\r\n\r\n",), waits=False)


def odd_heads(choose: random.Random) -> Bad:
    path, body = _body(choose)
    paths = ["/v2/models/%ff/infer", "/v2/models/x/infer", "/v2/models/model/versions/v9/infer", "/%00", "/v2/models/"]
    paths += ["/v2/models/model/versions/%f0%9f/infer", "//", "/v1/score?x=%ff", "*", "/v2/models/model/versions/v9"]
    packings = ["gzip", "deflate", "br", "gzip, gzip", "\xff"]
    packed = gzip.compress(body, 1) if choose.random() < 0.95 else BOMB
    return choose.choice(
        [
            Bad("odd path", (http(body, choose.choice(paths)),)),
            Bad("odd packing", (http(body, path, headers=[f"Content-Encoding: {choose.choice(packings)}"]),)),
            Bad("broken gzip", (http(cut(choose, packed), path, headers=["Content-Encoding: gzip"]),)),
            Bad("gzip", (http(packed, path, headers=["Content-Encoding: gzip"]),)),
            Bad("odd method", (http(body, path).replace(b"POST", choose.choice([b"PUT", b"GET", b"TRACE"]), 1),)),
            Bad("long head", (http(body, path, headers=["X: " + "x" * choose.choice([100, 70_000])]),), waits=False),
            Bad("odd id", (http(b"", path, headers=["X-Request-Id: \x01\xff" + "x" * 300]),), waits=False),
        ]
    )


def slow(choose: random.Random) -> Bad:
    path, body = _body(choose)
    sent = http(flipped(choose, body), path)
    step = len(sent) // 8 + 1
    pieces = tuple(sent[at : at + step] for at in range(0, len(sent), step))
    return Bad("slow", pieces, waits=choose.random() < 0.5, pause=0.005)


HTTP: Sequence[Callable[[random.Random], Bad]] = (
    random_bytes, flips, flips, truncated, tensors, tensors, half_sent, wrong_length, pipelined, chunks, no_utf8,
    numbers, deep, shapes, odd_values, odd_values, odd_values, noise, odd_heads, slow,
)  # fmt: skip


FRAMED = (
    random_bytes,
    flips,
    flips,
    truncated,
    tensors,
    tensors,
    no_utf8,
    numbers,
    deep,
    shapes,
    odd_values,
    odd_values,
)
"""Those whose heads are right, so that the next request may follow on the same connection."""


class Kept:
    """A connection for many requests: as long as the server keeps it, else another one."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = host, int(port)
        self._connection: socket.socket | None = None
        self.opened = 0

    def send(self, bad: Bad) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        (request,) = bad.pieces
        if self._connection is None:
            self._connection = socket.create_connection(self._address, timeout=60)
            self.opened += 1
        self._connection.sendall(request.replace(b"Connection: close\r\n", b"", 1))
        answer = HTTPResponse(self._connection, method="POST")
        answer.begin()
        body = answer.read()
        if answer.will_close:
            self.close()
        return answer.status, body

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def send(address: str, bad: Bad) -> bytes:
    """Send, and give what came back until the server closed, or until it was not to be waited for."""
    host, _, port = address.rpartition(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=60 if bad.waits else 0.02) as connection:
        try:
            for piece in bad.pieces:
                connection.sendall(piece)
                time.sleep(bad.pause)
            while part := connection.recv(65536):
                found += part
        except ConnectionError:  # the server closed before it had read what nobody needs
            pass
        except TimeoutError:
            assert not bad.waits, f"{bad.kind} is not answered: {bad.pieces!r:.500}"
        if not bad.waits:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return found


def infer_message() -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="model", id="1")
    fields = {"INT64": "int64_contents", "BYTES": "bytes_contents", "FP32": "fp32_contents"}
    for tensor in infer_document()["inputs"]:
        data = [value.encode() if isinstance(value, str) else value for value in tensor["data"]]
        contents = service_pb2.InferTensorContents(**{fields[tensor["datatype"]]: data})
        request.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"], contents=contents)
    return request


def message(choose: random.Random) -> bytes:
    """The bytes of a `ModelInferRequest` that is nearly right, or of none at all."""
    what = choose.randrange(6)
    if what == 0:
        return choose.randbytes(choose.randint(0, 200))
    request = infer_message()
    if what == 1:
        return flipped(choose, request.SerializeToString())
    if what == 2:
        return cut(choose, request.SerializeToString())
    tensor = choose.choice(request.inputs)
    if what == 3:
        del tensor.shape[:]
        tensor.shape.extend(choose.choice([[-1], [0], [2**40, 2**40], [2**62], [1] * 100, [], [3], [4096, 4096]]))
    elif what == 4:
        tensor.datatype = choose.choice(["", "FP16", "BF16", "BOOL", "INT8", "UINT64", "x", "BYTES", "FP64"])
    else:
        _, behind = binary()
        for one, size in zip(request.inputs, (16, 16, 10, 8), strict=True):
            one.ClearField("contents")
            raw, behind = behind[:size], behind[size:]
            request.raw_input_contents.append(
                raw if choose.random() < 0.6 else choose.choice([cut, flipped])(choose, raw)
            )
        if choose.random() < 0.2:
            request.raw_input_contents.append(b"")
    return request.SerializeToString()
