"""A process that has everything imported, and forks one process for each command that it is asked for: run as a script.

A line of JSON on standard input asks, one on standard output answers. A forked process does `limaml ARGUMENTS` as a fresh one
would, with descriptors, locks and a process id of its own, but begins in a hundredth of the time. `preload.c` is armed as
late as that, so that calls are counted from the command's first.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import limaml.cli


def preloaded() -> Any:
    library = ctypes.CDLL(None)
    if not hasattr(library, "faults_arm"):
        return None
    library.faults_arm.argtypes = [ctypes.c_long, ctypes.c_int]
    library.faults_clock.argtypes = [ctypes.c_long]
    library.faults_seen.restype = ctypes.c_long
    return library


def be_the_command(asked: dict[str, Any]) -> NoReturn:
    """Arguments `argv`; output to the file `out`; `at` and `how` of faults_arm; `clock` of faults_clock, in seconds."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        file = os.open(asked["out"] if descriptor else os.devnull, flags, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(1, 2)
    library = preloaded()
    if library is not None:
        library.faults_clock(asked["clock"])
        library.faults_arm(asked["at"], asked["how"])
    code = 0
    try:
        limaml.cli.main(asked["argv"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    if library is not None:
        seen = library.faults_seen()
        library.faults_arm(-1, 0)
        Path(asked["out"] + ".seen").write_text(str(seen))
    # what a process does at its end, but for taking the interpreter apart, which is most of a second's work
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    gc.collect()
    gc.freeze()  # a collection in a forked process then leaves these pages shared
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if "argv" in asked:
            process = os.fork()
            if process == 0:
                be_the_command(asked)
            answer: int | None = process
        else:
            process, status = os.waitpid(asked["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
