"""One part of the work at a size of one's choice, in processes of their own, and what it took:

    python -m benchmarks.scale --part ingest [--tasks 100000 1000000] [--folder FOLDER]

Each part reads the rest of the command line itself; `--part NAME --help` lists what it takes. The interactions are synthetic
(benchmarks/scale/workload.py), made in pieces, and stay in `--folder`, where the next part finds them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module


def _part(module: str) -> Callable[[Sequence[str]], None]:
    """`main(arguments)` of a module, imported when it is called: one part does not wait for what another one needs."""

    def main(arguments: Sequence[str]) -> None:
        import_module(f"benchmarks.scale.{module}").main(arguments)

    return main


PARTS: dict[str, Callable[[Sequence[str]], None]] = {
    "ingest": _part("ingest"),
    "generate": _part("generate"),
    "train": _part("train"),
    "plan": _part("plan"),
    "page": _part("page"),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__, add_help=False)
    parser.add_argument("--part", choices=list(PARTS))
    given, rest = parser.parse_known_args()
    if given.part is None:
        parser.print_help()
        sys.exit(0 if {"-h", "--help"} & set(rest) else 2)
    PARTS[given.part](rest)
