"""The Open Inference Protocol over gRPC, on the same service as HTTP.

    tritonclient.grpc, KServe, grpcurl ──► GRPCInferenceService ──► Service.infer
    load balancer, Kubernetes          ──► grpc.health.v1.Health ──► Service.ready

Every answer but the scores is a gRPC status with a sentence; `STATUS` says which for which. Requests arrive here as bytes
and are parsed here, so that broken ones get such a sentence too.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limaml.errors import ConfigError, require
from limaml.serving.grpc_messages import decode_infer, encode_infer, encode_metadata, message, parse
from limaml.serving.service import Service
from limaml.serving.tensors import Refused

if TYPE_CHECKING:
    import grpc
    from grpc import aio
else:
    grpc, aio = require("grpc", "grpc"), require("grpc.aio", "grpc")

__all__ = ["STATUS", "GrpcServer"]

logger = logging.getLogger("limaml.serving.grpc")
access = logging.getLogger("limaml.serving.access")

ENDPOINTS = {
    "ServerLive": "grpc_health",
    "ServerReady": "grpc_health",
    "ModelReady": "grpc_ready",
    "ServerMetadata": "grpc_metadata",
    "ModelMetadata": "grpc_metadata",
    "ModelInfer": "grpc_infer",
}
"""Method → what it is counted under."""

STATUS: Mapping[int, grpc.StatusCode] = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status of a refusal → gRPC's; any other 4xx is INVALID_ARGUMENT."""

SERVICE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
WATCH_EVERY = 0.5
"""Seconds between two looks at whether the service is ready, for those who watch."""
LONGEST_MESSAGE = 2000
"""Characters of a refusal that are sent: a status travels in a header, of which clients take 8 KiB."""

if TYPE_CHECKING:
    Context = aio.ServicerContext[bytes, bytes]
Answer = Callable[[bytes, "Context"], Awaitable[bytes]]


class GrpcServer:
    """Answers for one service. `token` is the bearer token that `authorization` must carry; health is asked without.

    `max_body` bounds a request, in bytes, also after it is decompressed. `log` says which requests are logged.
    """

    def __init__(
        self,
        service: Service,
        *,
        max_body: int = 10 * 2**20,
        token: str | None = None,
        log: Literal["all", "errors", "none"] = "errors",
    ) -> None:
        self.service, self._token = service, token
        self._least_logged = {"all": 0, "errors": 400, "none": 1000}[log]
        self._draining = False
        self._counted: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._server = aio.server(
            options=[
                ("grpc.max_receive_message_length", max_body),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
            ]
        )
        answers: dict[str, Answer] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }
        unary = grpc.unary_unary_rpc_method_handler
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE, {name: unary(self._guarded(ENDPOINTS[name], answer)) for name, answer in answers.items()}
                ),
                grpc.method_handlers_generic_handler(
                    HEALTH,
                    {
                        "Check": unary(self._guarded("grpc_health", self._check, open_to_all=True)),
                        "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
                    },
                ),
            )
        )

    async def start(self, address: str, tls: tuple[Path, Path] | None = None) -> int:
        """Listen on `address` (`host:port`, port 0: any that is free) and return the port. `tls`: certificate and key."""
        try:
            if tls is None:
                port = self._server.add_insecure_port(address)
            else:
                certificate, key = (path.read_bytes() for path in tls)
                credentials = grpc.ssl_server_credentials([(key, certificate)])
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"gRPC cannot listen on {address}: the port is taken, the address is not this machine's, or the "
                "certificate and key do not belong together. Choose another --grpc-port, or look at them."
            ) from error
        if not port:
            raise ConfigError(f"gRPC cannot listen on {address}; look at the certificate and its key.")
        await self._server.start()
        return port

    async def stop(self, grace: float) -> None:
        """Take nothing new, say so to who watches, and give what is in flight `grace` seconds."""
        self._draining = True
        await self._server.stop(grace)

    def _guarded(self, endpoint: str, answer: Answer, *, open_to_all: bool = False) -> Answer:
        """An answer whose refusals become statuses, for those who may ask; counted and logged as `endpoint`."""

        async def guarded(raw: bytes, context: Context) -> bytes:
            begun = time.perf_counter()
            metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
            request_id = _request_id(metadata.get("x-request-id"))
            trailing: list[tuple[str, str]] = [("x-request-id", request_id)]
            said: Refused | None = None
            try:
                if not open_to_all:
                    self._authorise(metadata.get("authorization"))
                context.set_trailing_metadata(tuple(trailing))
                return await answer(raw, context)
            except Refused as refusal:
                said = refusal
            except Exception:
                logger.exception("A request failed.", extra={"request_id": request_id})
                said = Refused(500, f"The server failed at this request; its log says why at {request_id}.")
            finally:
                self._note(endpoint, request_id, said, time.perf_counter() - begun)
            if said.retry_after is not None:
                trailing.append(("grpc-retry-pushback-ms", str(int(said.retry_after * 1000))))
            code = STATUS.get(said.status, grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(code, said.message[:LONGEST_MESSAGE], tuple(trailing))
            raise AssertionError("abort raises")

        return guarded

    def _note(self, endpoint: str, request_id: str, refusal: Refused | None, seconds: float) -> None:
        """Count and log a request as HTTP's are, its status in HTTP's words; 499: the caller went away."""
        cancelled = refusal is None and isinstance(sys.exception(), asyncio.CancelledError)
        status = 499 if cancelled else 200 if refusal is None else refusal.status
        counted = self._counted.get((endpoint, status))
        if counted is None:
            metrics = self.service.metrics
            counted = metrics.requests.labels(endpoint, str(status)), metrics.seconds.labels(endpoint)
            self._counted[endpoint, status] = counted
        counted[0].inc()
        counted[1].observe(seconds)
        if status >= self._least_logged:
            access.log(
                logging.INFO if status < 500 else logging.WARNING,
                "%s %d",
                endpoint,
                status,
                extra={
                    "request_id": request_id,
                    "endpoint": endpoint,
                    "status": status,
                    "milliseconds": round(1000 * seconds, 3),
                    "error": None if refusal is None else refusal.message,
                },
            )

    def _authorise(self, given: str | bytes | None) -> None:
        if self._token is None:
            return
        text = given if isinstance(given, str) else ""
        wanted = f"Bearer {self._token}"
        if not hmac.compare_digest(text.encode("utf-8", "replace"), wanted.encode()):
            raise Refused(401, "Send the server's token as metadata: authorization: Bearer TOKEN.")

    async def _server_live(self, raw: bytes, context: Context) -> bytes:
        parse(_REQUESTS["ServerLiveRequest"], raw)
        return _bytes("ServerLiveResponse", live=self.service.live)

    async def _server_ready(self, raw: bytes, context: Context) -> bytes:
        parse(_REQUESTS["ServerReadyRequest"], raw)
        return _bytes("ServerReadyResponse", ready=self._ready())

    async def _model_ready(self, raw: bytes, context: Context) -> bytes:
        asked = parse(_REQUESTS["ModelReadyRequest"], raw)
        ready = not self._draining and self.service.ready(asked.name, asked.version or None)
        return _bytes("ModelReadyResponse", ready=ready)

    async def _server_metadata(self, raw: bytes, context: Context) -> bytes:
        parse(_REQUESTS["ServerMetadataRequest"], raw)
        return _bytes("ServerMetadataResponse", name="limaml", version=_version(), extensions=[])

    async def _model_metadata(self, raw: bytes, context: Context) -> bytes:
        asked = parse(_REQUESTS["ModelMetadataRequest"], raw)
        return encode_metadata(await self.service.model_metadata(asked.name, asked.version or None))

    async def _model_infer(self, raw: bytes, context: Context) -> bytes:
        request, as_raw = decode_infer(raw)
        return encode_infer(await self.service.infer(request), as_raw)

    def _ready(self) -> bool:
        return not self._draining and self.service.ready()

    def _status(self, asked: str) -> int:
        if asked not in ("", SERVICE):
            return _SERVICE_UNKNOWN
        return _SERVING if self._ready() else _NOT_SERVING

    async def _check(self, raw: bytes, context: Context) -> bytes:
        status = self._status(parse(_HEALTH_REQUEST, raw).service)
        if status == _SERVICE_UNKNOWN:
            raise Refused(404, f"There is no such service here; ask for '' or '{SERVICE}'.")
        answer: bytes = _HEALTH_RESPONSE(status=status).SerializeToString()
        return answer

    async def _watch(self, raw: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            asked = parse(_HEALTH_REQUEST, raw).service
        except Refused as refusal:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refusal.message)
        said = None
        while not self._draining:
            status = self._status(asked)
            if status != said:
                said = status
                yield _HEALTH_RESPONSE(status=status).SerializeToString()
            await asyncio.sleep(WATCH_EVERY)
        yield _HEALTH_RESPONSE(status=_NOT_SERVING).SerializeToString()


_REQUESTS = {
    f"{name}Request": message(f"inference.{name}Request")
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
}
_HEALTH_REQUEST, _HEALTH_RESPONSE = (message(f"grpc.health.v1.HealthCheck{side}") for side in ("Request", "Response"))
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3


def _bytes(kind: str, /, **fields: Any) -> bytes:
    encoded: bytes = message(f"inference.{kind}")(**fields).SerializeToString()
    return encoded


def _request_id(given: str | bytes | None) -> str:
    """The id that the client gave the request, if it can stand in a log line, else a new one."""
    if isinstance(given, str) and re.fullmatch(r"[\w.:/=+-]{1,128}", given, re.ASCII):
        return given
    return uuid.uuid4().hex


def _version() -> str:
    try:
        return version("limaml")
    except PackageNotFoundError:
        return "0"
