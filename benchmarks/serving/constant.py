"""The same HTTP and gRPC servers, reading the same bytes and answering a constant: `python -m benchmarks.serving.constant
--bytes 1024 --grpc-bytes 1024`. What nobody who stands on these libraries can be faster than."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import grpc
import uvicorn
import uvloop

Message = MutableMapping[str, Any]


def application(body: bytes) -> Callable[..., Awaitable[None]]:
    """An ASGI application that reads a request whole and answers `body`."""
    length = str(len(body)).encode()

    async def app(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        more = True
        while more:
            more = (await receive()).get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})

    return app


async def run(http: bytes, other: bytes) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return other

    def same(message: bytes) -> bytes:
        return message

    handler = grpc.unary_unary_rpc_method_handler(answer, request_deserializer=same, response_serializer=same)
    server = grpc.aio.server()
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler})
    server.add_generic_rpc_handlers((service,))
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = uvicorn.Config(
        application(http),
        port=0,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
    )
    found = uvicorn.Server(config)
    running = asyncio.create_task(found.serve())
    while not found.started:
        await asyncio.sleep(0.01)
    port = found.servers[0].sockets[0].getsockname()[1]
    print(f"at http://127.0.0.1:{port} and grpc://127.0.0.1:{grpc_port}.", flush=True)
    await running


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.constant", description=__doc__)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--grpc-bytes", type=int, required=True)
    chosen = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(b"x" * chosen.bytes, b"x" * chosen.grpc_bytes))


if __name__ == "__main__":
    main()
