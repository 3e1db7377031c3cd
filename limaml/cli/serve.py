"""`limaml serve`: scores over HTTP, and over gRPC if asked for."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

import torch
from cyclopts import Parameter

from limaml.cli.console import console
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.errors import ConfigError, StoreDown, require
from limaml.store import open_store
from limaml.store.contract import Store

__all__ = ["serve_command"]


def serve_command(
    folder: Annotated[
        Path | None, Parameter(help="Run folder whose store is served; without one, --store says where it is.")
    ] = None,
    /,
    *,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    model: Annotated[str, Parameter(help="Name of the model in the store.")] = MODEL_NAME,
    host: Annotated[
        str, Parameter(help="Address to listen on; one that others reach needs --token-file or --open.")
    ] = ("127.0.0.1"),
    port: Annotated[int, Parameter(help="HTTP port; 0: any that is free.")] = 8000,
    grpc_port: Annotated[int | None, Parameter(help="gRPC port as well; 0: any that is free.")] = None,
    token_file: Annotated[Path | None, Parameter(help="File with the bearer token that requests must carry.")] = None,
    open_: Annotated[bool, Parameter(name="--open", help="Anybody may ask.", negative=())] = False,
    tls_cert: Annotated[Path | None, Parameter(help="Certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, Parameter(help="Its key (PEM).")] = None,
    threads: Annotated[int, Parameter(help="Threads of torch.")] = 1,
    runtime: Annotated[Literal["torch", "onnx"], Parameter(help="What runs the global block.")] = "torch",
    max_batch: Annotated[int, Parameter(help="Rows in one forward, and in one request.")] = 4096,
    max_body: Annotated[int, Parameter(help="Bytes in one request.")] = 10_000_000,
    queue: Annotated[int, Parameter(help="Requests that wait at the most; more get a 503.")] = 1024,
    timeout: Annotated[float, Parameter(help="Seconds for one request; then a 504.")] = 1.0,
    poll: Annotated[float, Parameter(help="Seconds between looks at the store's pointer.")] = 1.0,
    store_timeout: Annotated[
        float, Parameter(help="Seconds for the store to answer, where its URL does not say timeout=.")
    ] = 0.5,
    on_store_error: Annotated[
        Literal["cold", "fail"], Parameter(help="Without the store: cold embeddings, or a 503.")
    ] = "cold",
    drain: Annotated[float, Parameter(help="Seconds for what is in flight when the server is told to end.")] = 10.0,
    pinned: Annotated[int, Parameter(help="Other versions that stay loaded for who asks for them by name.")] = 2,
    cache_mib: Annotated[int, Parameter(help="MiB for encodings of rows, for each model.")] = 64,
    split: Annotated[
        list[str] | None,
        Parameter(help="VERSION=SHARE of the members who see that version; repeat for more.", negative=()),
    ] = None,
    shadow: Annotated[
        str | None,
        Parameter(help="Version that scores all requests as well, unseen: only its differences are exported."),
    ] = None,
    record: Annotated[Path | None, Parameter(help="Folder for a sample of the requests: see check-served.")] = None,
    record_share: Annotated[float, Parameter(help="Share of the requests that is recorded.")] = 0.01,
    record_mib: Annotated[int, Parameter(help="MiB of records; the oldest go.")] = 256,
    log_requests: Annotated[Literal["all", "errors", "none"], Parameter(help="Which requests are logged.")] = "errors",
) -> None:
    """Serve scores out of a store: Open Inference Protocol v2 (HTTP, gRPC), and JSON at POST /v1/score.

    `limaml serve runs/mine`

    `curl localhost:8000/v1/score -d '{"task": {"user_id": 42}, "candidates": [{"item_id": 7}, {"item_id": 8}]}' -H 'content-type: application/json'`

    Follows the store: a version that is published is loaded beside the one that is served and takes over between two
    batches. A store that is down is waited for: live, and not ready, until it answers. SIGTERM finishes what was begun and ends with 0. Docs of all endpoints: /docs, numbers: /metrics.
    """
    for module in ("uvicorn", "fastapi", "httptools", "orjson", "prometheus_client"):
        require(module, "serve")
    if grpc_port is not None:
        require("grpc", "grpc")
    for module in ("onnx", "onnxscript", "onnxruntime") if runtime == "onnx" else ():
        require(module, "onnx")
    from limaml.serving.access import check_bind, check_tls, read_token
    from limaml.serving.beside import Beside, standing
    from limaml.serving.logs import log_as_json
    from limaml.serving.server import Listening, serve
    from limaml.serving.service import Options, Service
    from limaml.serving.versions import Versions

    _check(max_batch=max_batch, max_body=max_body, queue=queue, threads=threads, cache_mib=cache_mib)
    _check(timeout=timeout, poll=poll, store_timeout=store_timeout, drain=drain)
    token = None if token_file is None else read_token(token_file)
    tls = check_tls(tls_cert, tls_key)
    check_bind(host, token=token is not None, open_to_all=open_)
    listening = Listening(host, port, grpc_port, token, tls, max_body, drain, log_requests)
    address = _address(folder, store)
    remote = "://" in address
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="limaml-onnx-") as onnx_folder, ExitStack() as stores:
        versions = Versions(
            lambda: stores.enter_context(_opened(address, store_timeout)),
            model,
            runtime=runtime,
            threads=threads,
            onnx_folder=Path(onnx_folder),
            cache_bytes=cache_mib * 2**20,
        )
        try:
            ready: list[str] | None = versions.ready()
        except StoreDown:  # the service waits for it
            ready = None
        beside = Beside.of(ready, split or (), shadow, record, record_share, record_mib * 2**20)
        options = Options(
            kept=beside.versions,
            max_batch=max_batch,
            queue=queue,
            timeout=timeout,
            poll=poll,
            retry=min(1.0, poll),
            on_store_error=on_store_error,
            pinned=pinned,
            inline=not remote,
        )

        def announce(http: str, grpc: str | None) -> None:
            console.print(f"Serving '{model}' of {_shown(address)} at {http}" + (f" and grpc://{grpc}" if grpc else "") + "."
                          + (f" Not ready yet: {service.waits_for}" if service.waits_for else ""),
                          markup=False, highlight=False, soft_wrap=True)  # fmt: skip

        service = Service(versions, options)

        async def run() -> None:
            log_as_json()
            async with standing(beside, service):
                await serve(service, listening, announce)

        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < 2**40:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0.")


def _address(folder: Path | None, store: str | None) -> str:
    if store is not None:
        return store
    if folder is None:
        raise ConfigError("Say what to serve: a run folder (limaml serve runs/mine), or --store with a path or URL.")
    path = Workspace(folder).folder / "store"
    if not path.is_dir():
        raise ConfigError(f"{folder} has no store yet: nothing was published from it. Type: limaml embed {folder}")
    return str(path)


def _shown(address: str) -> str:
    """Without user and password."""
    scheme, separator, rest = address.partition("://")
    return address if not separator else f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def _opened(address: str, timeout: float) -> Store:
    """The store; one on a server is given `timeout` seconds for an answer unless its URL says how long."""
    parts = urlsplit(address)
    if "://" in address and "timeout" not in dict(parse_qsl(parts.query, keep_blank_values=True)):
        address += f"{'&' if parts.query else '?'}timeout={timeout:g}"
    return open_store(address, create=False)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
