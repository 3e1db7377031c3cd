"""HTTP: who may ask, the body, request ids, numbers and logs around every request; and `infer` itself.

`infer` is answered here, on bytes; what is asked now and then goes on to `limaml.serving.score_api`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal, Protocol
from urllib.parse import unquote_to_bytes

from limaml.serving.bodies import SECONDS, Gone, Receive, read_body
from limaml.serving.open_inference import decode_request, encode_response
from limaml.serving.score_api import OPEN, make_api, refused_response
from limaml.serving.service import Service
from limaml.serving.tensors import Refused

__all__ = ["INFER", "HttpApp", "Told", "access", "infer_headers", "new_identity", "percent_decoded"]

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

access = logging.getLogger("limaml.serving.access")

INFER = re.compile(rb"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
PATIENCE = 0.05
"""Seconds that a request waits before it is looked whether who asked is still there."""

_ENDPOINTS = {"/v1/score": "score", "/metrics": "metrics", "/docs": "docs", "/openapi.json": "docs", "/v2": "metadata"}
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class HttpApp:
    """The ASGI application. `log` says which requests are logged: "all", "errors" (status 400 and above) or "none".

    A body of more than `max_body` bytes, or one that takes longer than `body_seconds` to arrive, is refused. Who hangs up
    while the body is read, or while the request waits, is counted as status 499, and what still waits is not scored.
    """

    def __init__(
        self,
        service: Service,
        *,
        token: str | None = None,
        max_body: int = 10 * 2**20,
        body_seconds: float = SECONDS,
        log: Literal["all", "errors", "none"] = "errors",
    ) -> None:
        self.service, self.max_body, self.body_seconds = service, max_body, body_seconds
        self._token = None if token is None else token.encode()
        self._least_logged = {"all": 0, "errors": 400, "none": 1000}[log]
        self._api = make_api(service, guarded=token is not None)
        self._waiting = _Waiting()
        self._counted: dict[tuple[str, int], tuple[Any, Any]] = {}
        """(endpoint, status) → what counts requests and what their seconds; both are few."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = time.perf_counter()
        headers = dict(scope["headers"])
        identity = _identity(headers.get(b"x-request-id"))
        answer = _Answer(send, identity)
        endpoint = "infer"
        try:
            path = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass")
            infer = INFER.fullmatch(path.partition(b"?")[0])
            if infer is None:
                endpoint = _endpoint(scope["path"])
            if scope["path"] not in OPEN and not self.admits(headers):
                raise Refused(401, "This server wants its token: send the header 'Authorization: Bearer TOKEN'.")
            body = await read_body(receive, headers, self.max_body, self.body_seconds)
            with _Watched(receive, answer, self._waiting):
                if infer is not None and scope["method"] == "POST":
                    await self._infer(infer, headers, body, answer)
                elif infer is not None:
                    raise Refused(405, f"infer is asked by POST, not {scope['method']}.")
                else:
                    await self._api({**scope, "headers": _unpacked(scope["headers"])}, _replayed(body), answer)
        except Refused as refusal:
            await answer.refuse(refusal)
        except Gone:
            answer.status = 499
        except asyncio.CancelledError:  # what was still on its way when the time to drain was over
            await answer.refuse(Refused(503, "The server is ending. Ask another one, or this one later."))
        except Exception:
            access.exception("A request failed.", extra={"request_id": identity})
            await answer.refuse(Refused(500, f"The server failed at this request; its log says why at {identity}."))
        self.note(endpoint, scope, answer, time.perf_counter() - begun)

    def admits(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether who sends these headers may ask."""
        if self._token is None:
            return True
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)

    async def _infer(self, path: re.Match[bytes], headers: dict[bytes, bytes], body: bytes, answer: _Answer) -> None:
        model, version = percent_decoded(path[1]), None if path[2] is None else percent_decoded(path[2])
        length = headers.get(b"inference-header-content-length")
        request, raw = decode_request(model, version, body, None if length is None else length.decode("latin-1"))
        found, json_length = encode_response(await self.service.infer(request), raw)
        await answer.whole(200, infer_headers(json_length), found)

    def note(self, endpoint: str, scope: Mapping[str, Any], answer: Told, seconds: float) -> None:
        """Count and log a request."""
        counted = self._counted.get((endpoint, answer.status))
        if counted is None:
            metrics = self.service.metrics
            counted = metrics.requests.labels(endpoint, str(answer.status)), metrics.seconds.labels(endpoint)
            self._counted[endpoint, answer.status] = counted
        counted[0].inc()
        counted[1].observe(seconds)
        if answer.status >= self._least_logged:
            access.log(
                logging.INFO if answer.status < 500 else logging.WARNING,
                "%s %s %d",
                scope["method"],
                scope["path"][:200],
                answer.status,
                extra={
                    "request_id": answer.identity,
                    "endpoint": endpoint,
                    "status": answer.status,
                    "milliseconds": round(1000 * seconds, 3),
                    "error": answer.error,
                },
            )


class Told(Protocol):
    """What a request was answered with."""

    identity: str
    status: int
    error: str | None


class _Answer:
    """`send` with the request's id among the headers, that remembers the status."""

    def __init__(self, send: Send, identity: str) -> None:
        self._send, self.identity = send, identity
        self.status = 0
        self.error: str | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.identity.encode())]
        try:
            await self._send(message)
        except (
            RuntimeError
        ) as error:  # of uvloop: what came behind this request was so broken that the connection ended
            if "is closed" not in str(error):
                raise
            raise Gone from None

    async def whole(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        headers.append((b"content-length", b"%d" % len(body)))
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    async def refuse(self, refusal: Refused) -> None:
        self.error = refusal.message
        if not self.status:
            try:
                await self.whole(*refused_response(refusal))
            except Gone:
                self.status = 499


class _Waiting(set["_Watched"]):
    """Requests that are not answered yet; one timer for all of them, since one for each would cost more than the rest."""

    _timed = False

    def add(self, request: _Watched) -> None:
        super().add(request)
        if not self._timed:
            self._timed = True
            asyncio.get_running_loop().call_later(PATIENCE, self._look)

    def _look(self) -> None:
        for request in self:
            request.look()
        self._timed = bool(self)
        if self._timed:
            asyncio.get_running_loop().call_later(PATIENCE, self._look)


class _Watched:
    """Ends what is done in here with `Gone` when who asked hangs up before the answer has begun.

    Looking costs a task, and most requests are answered before anybody gives them up: so it begins when a request was seen
    waiting twice, `PATIENCE` apart.
    """

    def __init__(self, receive: Receive, answer: _Answer, waiting: _Waiting) -> None:
        self._receive, self._answer, self._waiting = receive, answer, waiting
        self._seen = self._gone = False
        self._looking: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._asked = asyncio.current_task()
        self._waiting.add(self)

    def look(self) -> None:
        if self._seen and self._looking is None:
            self._looking = asyncio.create_task(self._wait())
        self._seen = True

    async def _wait(self) -> None:
        message = await self._receive()
        begun = self._answer.status != 0  # a finished answer is told by a disconnect, too
        if message["type"] == "http.disconnect" and not begun and self._asked is not None:
            self._gone = True
            self._asked.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._waiting.discard(self)
        if self._looking is not None:
            self._looking.cancel()
        if self._gone and self._asked is not None:
            self._asked.uncancel()
            raise Gone from None


def _identity(given: bytes | None) -> str:
    """The caller's id of the request, if it can be written into a log and a header; else a new one."""
    return given.decode() if given is not None and _ID.fullmatch(given) else new_identity()


def new_identity() -> str:
    """For a request that came without an id."""
    return secrets.token_hex(8)


def infer_headers(json_length: int | None) -> list[tuple[bytes, bytes]]:
    """Headers of a body that `encode_response` made."""
    if json_length is None:
        return [(b"content-type", b"application/json")]
    length = b"%d" % json_length
    return [(b"content-type", b"application/octet-stream"), (b"inference-header-content-length", length)]


def _endpoint(path: str) -> str:
    """What a path is counted under: a few names, whatever is asked for."""
    if path.startswith("/v2/models/"):
        return "ready" if path.endswith("/ready") else "metadata"
    return "health" if path.startswith("/v2/health/") else _ENDPOINTS.get(path, "other")


def percent_decoded(part: bytes) -> str:
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise Refused(400, "The path is no UTF-8.") from None


def _unpacked(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without what the body no longer is."""
    return [(name, value) for name, value in headers if name not in (b"content-encoding", b"content-length")]


def _replayed(body: bytes) -> Receive:
    """A body that was read, for who reads it again."""
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
