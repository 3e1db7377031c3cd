"""`infer` on the connection itself: a request whose head was seen before is answered without a task and without ASGI.

    bytes ─► head known, body whole ─► Service.begin ─► answer in one write
                    │ else
                    └────────────────► uvicorn ─► HttpApp, which admits and answers; the head is known from then on

A client that asks again sends the same head, byte by byte, as long as its requests have one length: nothing in it is
parsed or checked a second time. What comes in pieces, one behind the other, or with an id of its own goes the long way.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from limaml.serving.http import INFER, HttpApp, access, infer_headers, new_identity, percent_decoded
from limaml.serving.open_inference import decode_request, encode_response
from limaml.serving.score_api import refused_response
from limaml.serving.tensors import InferResponse, Refused

__all__ = ["direct_protocol"]

HEADS_KEPT, LONGEST_HEAD = 256, 4096
BEGIN = b"POST /v2/models/"

_SPECIAL = {
    b"connection",
    b"content-encoding",
    b"expect",
    b"transfer-encoding",
    b"upgrade",
    b"x-request-id",
}
"""Headers that change how a request is read or answered."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What the head of a request says, once it was answered the long way."""

    model: str
    version: str | None
    header_length: str
    length: int
    path: str


class _Event:
    """Nobody waits for the body: it is there."""

    def set(self) -> None:
        pass


_EVENT = _Event()


class _Asked:
    """One request, and to uvicorn the cycle that its connection is in."""

    message_event = _EVENT
    body = b""

    def __init__(self, protocol: _Direct, head: _Head, begun: float) -> None:
        self._protocol, self._head, self._begun = protocol, head, begun
        self.identity, self.status, self.error = new_identity(), 0, None
        self.response_complete = self.disconnected = False
        self.keep_alive = True
        self.future: asyncio.Future[Any] | None = None

    identity: str
    error: str | None

    def begin(self, body: bytes) -> bool:
        """Whether it is under way, or answered; if not, nothing has been done."""
        protocol, head = self._protocol, self._head
        try:
            request, self._raw = decode_request(head.model, head.version, body, head.header_length)
            self.future = protocol.direct.service.begin(request, self._finished)
        except Exception as error:
            protocol.cycle = self  # type: ignore[assignment]  # as far as uvicorn looks at it
            self._finished(error)
            return True
        if self.future is None:
            return False
        protocol.cycle = self  # type: ignore[assignment]
        protocol.asked = self
        protocol.tasks.add(self.future)  # type: ignore[arg-type]  # uvicorn ends what is left when the time to drain is over
        return True

    def _finished(self, found: InferResponse | BaseException) -> None:
        if self.future is not None:
            self._protocol.tasks.discard(self.future)
        try:
            if isinstance(found, BaseException):
                raise found
            body, json_length = encode_response(found, self._raw)
            self._write(200, infer_headers(json_length), body)
        except Refused as refusal:
            self._refuse(refusal)
        except asyncio.CancelledError:
            self._refuse(Refused(503, "The server is ending. Ask another one, or this one later."))
        except Exception as error:
            access.error("A request failed.", exc_info=error, extra={"request_id": self.identity})
            self._refuse(Refused(500, f"The server failed at this request; its log says why at {self.identity}."))
        scope = {"method": "POST", "path": self._head.path}
        self._protocol.direct.note("infer", scope, self, time.perf_counter() - self._begun)
        self._done()

    def _refuse(self, refusal: Refused) -> None:
        self.error = refusal.message
        self._write(*refused_response(refusal))

    def _write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        protocol = self._protocol
        if self.disconnected or protocol.transport.is_closing():
            self.status, self.error = 499, None
            return
        self.status = status
        headers.append((b"content-length", b"%d" % len(body)))
        headers.append((b"x-request-id", self.identity.encode()))
        if not self.keep_alive:
            headers.append((b"connection", b"close"))
        lines = [b"%b: %b\r\n" % header for header in (*protocol.server_state.default_headers, *headers)]
        protocol.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))

    def _done(self) -> None:
        protocol = self._protocol
        self.response_complete = True
        protocol.asked = None
        if self.disconnected:
            return
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()

    def gone(self) -> None:
        """Who asked hung up: what waits is not scored."""
        self.disconnected = True
        if self.future is not None:
            self.future.cancel()


class _Direct(HttpToolsProtocol):
    """uvicorn's protocol, which is asked only where the head is not known."""

    direct: HttpApp
    heads: dict[bytes, _Head]
    asked: _Asked | None = None
    _within = False  # whether uvicorn's parser is in the midst of a request

    def data_received(self, data: bytes) -> None:
        free = not self._within and (self.cycle is None or self.cycle.response_complete)
        if not (free and data.startswith(BEGIN)):
            super().data_received(data)
            return
        begun = time.perf_counter()
        end = data.find(b"\r\n\r\n") + 4
        head = self.heads.get(data[:end])
        if head is not None and head.length == len(data) - end and not self.flow.write_paused:
            self._unset_keepalive_if_required()
            if _Asked(self, head, begun).begin(data[end:]):
                return
        super().data_received(data)
        if head is None and 4 <= end <= LONGEST_HEAD and not self._within:
            self._remember(data[:end], len(data) - end)

    def on_message_begin(self) -> None:
        self._within = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._within = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.asked is not None:
            self.asked.gone()
        super().connection_lost(exc)

    def _remember(self, head: bytes, length: int) -> None:
        """Know a head from now on, if requests with it may be answered directly. It was parsed just now."""
        scope, listed = self.scope, list(self.scope["headers"])
        headers = dict(listed)
        infer = INFER.fullmatch(scope.get("raw_path", b""))
        header_length = headers.get(b"inference-header-content-length")
        if (
            infer is None
            or header_length is None
            or len(headers) < len(listed)
            or not _SPECIAL.isdisjoint(headers)
            or scope["http_version"] != "1.1"
            or headers.get(b"content-length") != b"%d" % length
            or length > self.direct.max_body
            or not self.direct.admits(headers)
        ):
            return
        try:
            model, version = (None if part is None else percent_decoded(part) for part in infer.groups())
        except Refused:
            return
        while len(self.heads) >= HEADS_KEPT:
            self.heads.pop(next(iter(self.heads)))
        self.heads[head] = _Head(model or "", version, header_length.decode("latin-1"), length, scope["path"])


def direct_protocol(app: HttpApp) -> type[HttpToolsProtocol]:
    """The protocol of a server whose application is `app`."""
    return type("Direct", (_Direct,), {"direct": app, "heads": {}})
