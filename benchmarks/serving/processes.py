"""Servers as processes of their own, on one core."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Ports", "cpu_seconds", "numbers_of", "said_ports", "waiting_for"]

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)(?: and grpc://127\.0\.0\.1:(\d+))?")


@dataclass(frozen=True)
class Ports:
    process: subprocess.Popen[str]
    http: int
    grpc: int


@contextmanager
def _process(command: Sequence[str], core: int | None, stdout: int) -> Iterator[subprocess.Popen[str]]:
    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    path = f"{os.path.dirname(command[0])}{os.pathsep}{os.environ['PATH']}"  # noqa: PTH120  # MLflow starts uvicorn by name
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": path}
    process = subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=pin,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def said_ports(command: Sequence[str], core: int | None) -> Iterator[Ports]:
    """A server that writes its addresses in its first line."""
    with _process([sys.executable, *command], core, subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = ADDRESS.search(line)
        if found is None:
            raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
        yield Ports(process, int(found[1]), int(found[2] or 0))


@contextmanager
def waiting_for(command: Sequence[str], core: int | None, url: str, seconds: float = 120) -> Iterator[None]:
    """A server that is ready when `url` answers."""
    with _process(command, core, subprocess.DEVNULL) as process:
        until = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(url, timeout=2):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{' '.join(command)} does not answer at {url}.") from None
                time.sleep(0.2)
        yield


def numbers_of(port: int) -> dict[str, float]:
    """What a server says of itself at /metrics: name with labels → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """CPU time of a process so far."""
    with open(f"/proc/{process.pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
