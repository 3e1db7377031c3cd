"""Work in a process of its own, how long it took and the most memory it had."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from limaml.evaluate.machine import processor_name

__all__ = ["RESULTS", "ROOT", "in_child", "keep", "usage"]

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scale"

_CHILD = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
print(json.dumps(getattr(importlib.import_module(module), name)(**arguments)))
"""


def in_child(module: str, name: str, **arguments: Any) -> dict[str, Any]:
    """What `module.name(**arguments)` returns (a dict of JSON), run in a new process; `peak_gib` is added, the most
    resident memory it had, and `process_s`, from its start to its end."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps([module, name, arguments])], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}.")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    scale = 1 if sys.platform == "darwin" else 1024
    return {**found, "peak_gib": used.ru_maxrss * scale / 2**30, "process_s": time.perf_counter() - begun}


def usage() -> float:
    """Seconds of all cores that this process has used."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return mine.ru_utime + mine.ru_stime


def keep(out: Path, size: dict[str, Any]) -> None:
    """Write what was found for a number of tasks to a result file; other sizes stay as they were."""
    known = json.loads(out.read_text(encoding="utf-8"))["sizes"] if out.exists() else []
    sizes = sorted([one for one in known if one["tasks"] != size["tasks"]] + [size], key=lambda one: int(one["tasks"]))
    size |= {"machine": processor_name(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"sizes": sizes}, indent=1) + "\n", encoding="utf-8")
