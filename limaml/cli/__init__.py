"""The command line: one file per verb."""

from limaml.cli.main import main

__all__ = ["main"]
