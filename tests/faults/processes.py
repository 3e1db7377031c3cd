"""Commands as processes of their own, out of a nursery: waited for, killed at a time or at a call, with a full disk or another clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COUNT, KILL, FULL, STOP = range(4)  # as in preload.c
_PATIENCE = 300.0  # seconds until a process counts as hung


@dataclass(frozen=True)
class Ended:
    """What a command left. `code` is negative for a signal; `seen` are its calls, -1 if it was killed or nobody counted."""

    code: int
    said: str
    seen: int

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Running:
    def __init__(self, nursery: Nursery, process: int, out: Path) -> None:
        self._nursery, self.process, self.out = nursery, process, out
        self._code: int | None = None

    def said(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def ended(self) -> bool:
        if self._code is None:
            self._code = self._nursery._ask({"wait": self.process})
        return self._code is not None

    def signal(self, number: int) -> None:
        if not self.ended():  # the nursery keeps the id until it was asked, so that it is nobody else's
            os.kill(self.process, number)

    def kill(self) -> Ended:
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = _PATIENCE) -> Ended:
        until = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < until, f"{self.process} hangs: {self.said()}"
            time.sleep(0.005)
        assert self._code is not None
        seen = Path(f"{self.out}.seen")
        return Ended(self._code, self.said(), int(seen.read_text()) if seen.exists() else -1)

    def wait_stopped(self) -> None:
        """Until it has stopped at the call of STOP, or ended before it."""
        until = time.monotonic() + _PATIENCE
        while not self.ended():
            if Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return
            assert time.monotonic() < until, f"{self.process} never stops: {self.said()}"
            time.sleep(0.005)

    def wait_until(self, text: str) -> None:
        """Until it has said so."""
        until = time.monotonic() + _PATIENCE
        while text not in self.said():
            assert not self.ended(), f"{self.process} ended: {self.said()}"
            assert time.monotonic() < until, f"{self.process} never says {text!r}: {self.said()}"
            time.sleep(0.005)


class Nursery:
    """Starts `limaml` commands. `counting` says whether `preload.c` could be compiled and is in them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        library = compiled(folder)
        self.counting = library is not None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, *argv: object, at: int = -1, how: int = COUNT, clock: int = 0) -> Running:
        self._number += 1
        out = self._folder / f"{self._number:05d}.out"
        asked = {"argv": list(map(str, argv)), "out": str(out), "at": at, "how": how, "clock": clock}
        return Running(self, self._ask(asked), out)

    def run(self, *argv: object, at: int = -1, how: int = COUNT, clock: int = 0) -> Ended:
        return self.start(*argv, at=at, how=how, clock=clock).wait()

    def do(self, *argv: object, clock: int = 0) -> str:
        """A command that must come to its end. Returns what it said."""
        ended = self.run(*argv, clock=clock)
        assert ended.code == 0, f"limaml {' '.join(map(str, argv))} ended with {ended.code}: {ended.said}"
        return ended.said

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    folder.mkdir(parents=True, exist_ok=True)
    opened = Nursery(folder)
    try:
        yield opened
    finally:
        opened.close()


def compiled(folder: Path) -> Path | None:
    """`preload.c` as a library; None where there is no compiler, or no LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "preload.so"
    source = Path(__file__).with_name("preload.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    return library
