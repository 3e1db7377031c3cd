"""Load from another process: as many requests as a server answers, or a given number a second; over HTTP or gRPC.

Requests are bytes made beforehand, so that little is measured of the client. At a given rate each request has its time,
and latency counts from that time, not from when a connection became free: a server that stalls is seen stalling
(no coordinated omission).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop

__all__ = ["Measured", "drive"]

Call = Callable[[int], Awaitable[bool]]
"""Send one prepared request on a connection, wait for the answer: whether it was a good one."""


COARSE, FINE = 0.002, 20e-6
"""Seconds. Event loops sleep by whole milliseconds, which would be part of every latency; the rest is waited for in
steps that are short, and leave the core a little time of its own."""


@dataclass(frozen=True)
class Measured:
    """What a load saw. Latencies are in seconds."""

    requests: int
    failed: int
    seconds: float
    latencies: np.ndarray  # [requests] float64

    @property
    def rate(self) -> float:
        """Answers a second."""
        return (self.requests - self.failed) / self.seconds

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.latencies, q))


@dataclass(frozen=True)
class Load:
    """What to send: HTTP requests as whole messages, or gRPC messages for `method`."""

    kind: str  # "http" or "grpc"
    port: int
    messages: Sequence[bytes]
    seconds: float
    connections: int
    rate: float | None  # requests a second; None: as many as are answered
    method: str = "/inference.GRPCInferenceService/ModelInfer"
    core: int | None = None


def drive(load: Load) -> Measured:
    """Run a load in a process of its own, on `load.core` if given."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (load,))


def _run(load: Load) -> Measured:
    if load.core is not None:
        import os

        os.sched_setaffinity(0, {load.core})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_drive(load))


async def _drive(load: Load) -> Measured:
    calls = await (_http(load) if load.kind == "http" else _grpc(load))
    latencies: list[float] = []
    failed = 0
    order = np.random.default_rng(0).permutation(len(load.messages)).tolist()
    start = time.perf_counter() + 0.2
    stop = start + load.seconds
    sent = 0

    async def worker(call: Call) -> None:
        nonlocal sent, failed
        while True:
            number = sent
            due = start + (0 if load.rate is None else number / load.rate)
            if due >= stop or time.perf_counter() >= stop:
                return
            sent += 1
            await _until(due)
            begun = time.perf_counter() if load.rate is None else due
            good = await call(order[number % len(order)])
            latencies.append(time.perf_counter() - begun)
            failed += not good

    await asyncio.gather(*(worker(call) for call in calls))
    seconds = max(time.perf_counter() - start, 1e-9)
    return Measured(len(latencies), failed, seconds, np.asarray(latencies))


async def _until(due: float) -> None:
    wait = due - time.perf_counter()
    if wait > COARSE:
        await asyncio.sleep(wait - COARSE)
    while time.perf_counter() < due:
        time.sleep(FINE)
        await asyncio.sleep(0)


async def _http(load: Load) -> list[Call]:
    async def connection() -> Call:
        reader, writer = await asyncio.open_connection("127.0.0.1", load.port)

        async def call(number: int) -> bool:
            writer.write(load.messages[number])
            head = await reader.readuntil(b"\r\n\r\n")
            low = head.lower()
            at = low.index(b"\r\ncontent-length:") + 17
            length = int(low[at : low.index(b"\r", at)])
            await reader.readexactly(length)
            return head[9:12] == b"200"

        return call

    return [await connection() for _ in range(load.connections)]


async def _grpc(load: Load) -> list[Call]:
    import grpc

    def same(message: bytes) -> bytes:
        return message

    channel = grpc.aio.insecure_channel(f"127.0.0.1:{load.port}")
    await channel.channel_ready()
    unary: Any = channel.unary_unary(load.method, request_serializer=same, response_deserializer=same)

    async def call(number: int) -> bool:
        try:
            await unary(load.messages[number])
        except grpc.aio.AioRpcError:
            return False
        return True

    return [call] * load.connections
