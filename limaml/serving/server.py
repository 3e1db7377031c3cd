"""One server process: a service, HTTP, gRPC if asked for, and the signals that end them.

SIGTERM, SIGINT ─► not ready ─► nothing new is accepted ─► what is in flight is answered ─► versions let go, exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn

from limaml.errors import ConfigError
from limaml.serving.direct import direct_protocol
from limaml.serving.http import HttpApp
from limaml.serving.service import Service

__all__ = ["Listening", "serve"]


@dataclass(frozen=True)
class Listening:
    """Where a server listens and for whom. Port 0 is any that is free; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    token: str | None = None
    tls: tuple[Path, Path] | None = None  # certificate and key
    max_body: int = 10 * 2**20
    drain: float = 10.0
    log: Literal["all", "errors", "none"] = "errors"


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to us: its own way of ending is to raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(service: Service, listening: Listening, announce: Callable[[str, str | None], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was begun. `announce` is called once requests are answered,
    with the addresses (HTTP, gRPC)."""
    with _bound(listening) as found:
        await service.start()
        grpc = None
        try:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            server = _Server(_config(service, listening))
            running = asyncio.create_task(server.serve(sockets=[found]))
            while not server.started and not running.done():
                await asyncio.sleep(0.005)
            grpc, grpc_address = await _start_grpc(service, listening)
            scheme = "http" if listening.tls is None else "https"
            announce(f"{scheme}://{_shown(listening.host)}:{found.getsockname()[1]}", grpc_address)
            waiting = asyncio.create_task(stop.wait())
            await asyncio.wait({waiting, running}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            server.should_exit = True
            if grpc is not None:
                await grpc.stop(listening.drain)
            await running
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(service.drain(), listening.drain)


def _config(service: Service, listening: Listening) -> uvicorn.Config:
    app = HttpApp(service, token=listening.token, max_body=listening.max_body, log=listening.log)
    asgi: Any = app
    return uvicorn.Config(
        asgi,
        http=direct_protocol(app),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(listening.drain)),
        h11_max_incomplete_event_size=64 * 2**10,
        ssl_certfile=None if listening.tls is None else listening.tls[0],
        ssl_keyfile=None if listening.tls is None else listening.tls[1],
    )


async def _start_grpc(service: Service, listening: Listening) -> tuple[Any, str | None]:
    if listening.grpc_port is None:
        return None, None
    from limaml.serving.grpc import GrpcServer

    server = GrpcServer(service, max_body=listening.max_body, token=listening.token, log=listening.log)
    host = _shown(listening.host)
    port = await server.start(f"{host}:{listening.grpc_port}", listening.tls)
    return server, f"{host}:{port}"


@contextlib.contextmanager
def _bound(listening: Listening) -> Iterator[socket.socket]:
    """The socket, bound before anything is loaded: a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    with socket.socket(family) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((listening.host, listening.port))
        except OSError as error:
            raise ConfigError(
                f"HTTP cannot listen on {listening.host}:{listening.port}: {error.strerror}. Choose another --port, or 0 for any that "
                "is free."
            ) from error
        found.setblocking(False)
        yield found


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
