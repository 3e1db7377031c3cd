"""Peak memory of one run: what the process held at most, above what it held before.

Each contender runs in a child of its own, forked from a process that has loaded everything and built the problem. The
child first runs the contender on a few tasks, so that no library is loaded later; then it hands freed memory back to the
kernel, notes its resident size, resets the kernel's high-water mark, prepares and runs once, and reads the mark. Linux
only; elsewhere nothing is measured.

    python -m benchmarks.engine.memory < request.json > answer.json
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.blocks import SIZES, blocks_of
from benchmarks.engine.peers import contenders
from benchmarks.engine.workload import generated_table, movielens_table, problem_of

__all__ = ["peak_bytes", "peaks"]


def _status(field: str) -> int:
    """A size out of `/proc/self/status`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}.")


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes that `work` needs at most, above what this process holds before. Linux only (`OSError` elsewhere)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(0, _status("VmHWM") - before)


def _in_child(work: Callable[[], int]) -> int | None:
    """The answer of `work` in a forked child; None if it did not live to give one (out of memory, say)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return int(answer) if answer else None


def _answer(request: dict[str, Any]) -> dict[str, int | None]:
    torch.set_num_threads(1)  # a child of a process with a thread pool would wait for it forever
    size = SIZES[request["size"]]
    data = request["data"]
    table = generated_table(request["members"]) if data is None else movielens_table(Path(data), request["members"])
    problem = problem_of(table, request["work"], request["cap"], size.inputs, size.row_width)
    thinned = problem.thinned(request["every"])
    blocks = blocks_of(size)
    found: dict[str, int | None] = {}
    for contender in contenders()[0]:
        chosen = thinned if contender.kind == "loop" or contender.name in request["thinned"] else problem

        def run(contender: Any = contender, chosen: Any = chosen) -> int:
            contender.prepare(blocks, problem.thinned(max(1, problem.tasks // 4)), request["steps"])[0]()
            return peak_bytes(lambda: contender.prepare(blocks, chosen, request["steps"])[0]())

        found[contender.name] = _in_child(run)
    return found


def peaks(request: dict[str, Any]) -> dict[str, int | None]:
    """Peak bytes of each contender, measured in a fresh process; empty where it cannot be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"Measuring memory failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
