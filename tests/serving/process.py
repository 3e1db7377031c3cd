"""`limaml serve` as a process of its own, as it is run in production."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


class Server:
    """A running server; `log` collects what it writes to stderr."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-c", "from limaml.cli import main; main()", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.log: list[str] = []
        assert self.process.stderr is not None and self.process.stdout is not None
        self._reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        found = re.search(r"at (https?://\S+:\d+)(?: and grpc://(\S+:\d+))?", line)
        if found is None:
            self.process.wait(60)
            self._reader.join(5)
            raise AssertionError(f"the server did not start: {line} {''.join(self.log)}")
        self.url, self.grpc = found[1], found[2]

    @property
    def address(self) -> str:
        return self.url.partition("://")[2]

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal and give the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


@contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def wait_for_version(url: str, version: str, seconds: float = 60) -> None:
    """Until the server's default is `version`."""
    until = time.monotonic() + seconds
    while f'version="{version}"' not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < until, f"{version} is not served"
        time.sleep(0.02)


def store_of(folder: Path) -> Path:
    return folder / "store"
