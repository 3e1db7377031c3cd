"""What a result was made on: kept in every report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

__all__ = ["command_line", "environment"]


def environment() -> dict[str, object]:
    """Versions and machine."""
    found: dict[str, object] = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("limaml", "torch", "numpy", "polars"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "cores": os.cpu_count()}


def command_line() -> str:
    """The command that is running, as it would be typed again."""
    return shlex.join(["limaml", *sys.argv[1:]])
