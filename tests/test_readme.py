"""The README and the guides are run as printed, and the README's tree is the repository's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "score_cold" in done.stdout
    assert len([line for line in code.splitlines() if line.strip()]) <= 22


def test_the_guide_to_exploring_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/exploration.md").read_text(), re.S)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


def test_the_tree_names_what_is_there() -> None:
    tree = README.rsplit("```", 2)[1]
    package = re.findall(r"^  (\w+(?:\.py|/)) ", tree, re.M)
    there = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "limaml").iterdir() if not p.name.startswith("__")}
    assert set(package) == there - {"py.typed"}
    for folder in re.findall(r"^(\w+)/", tree, re.M):
        assert (ROOT / folder).is_dir()
