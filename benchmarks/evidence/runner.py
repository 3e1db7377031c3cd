"""Runs what a plan still lacks, in worker processes of one thread each, until nothing is left or the time is over."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import Plan
from benchmarks.evidence.units import Cache, Runnable
from limaml.evaluate.compare import start_worker

__all__ = ["run_plan"]


def _work(unit: Runnable, folder: Path, device: str) -> dict[str, Any]:
    return unit.run(folder, device)


def run_plan(
    plan: Plan,
    cache: Cache,
    *,
    workers: int,
    device: str = "cpu",
    hours: float | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run all open units of the plan. Returns those that failed by a fault of the program: name → what was said.

    Every result is on disk before it counts, so that a run may be killed at any time; another one goes on. After `hours`
    no unit is started any more, and those that run are waited for.
    """
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    failed: dict[str, str] = {}
    running: dict[Future[dict[str, Any]], Runnable] = {}
    busy: set[str] = set()
    done = 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (None,)) as pool:
        try:
            while True:
                over = hours is not None and time.monotonic() - started > hours * 3600
                if not over:
                    for unit in plan.open_units(cache):
                        if len(running) >= workers:
                            break
                        if unit.key not in busy:
                            busy.add(unit.key)
                            running[pool.submit(_work, unit, cache.folder, device)] = unit
                if not running:
                    return failed
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    over_with = running.pop(future)
                    done += 1
                    clock = f"[{(time.monotonic() - started) / 60:6.1f} min, {done}]"
                    fault = future.exception()
                    if fault is not None:  # `busy` keeps it from being tried again in this run
                        failed[over_with.name] = f"{type(fault).__name__}: {fault}"
                        tell(f"{clock} FAILED {over_with.name}: {failed[over_with.name]}")
                        continue
                    result = future.result()
                    cache.add(over_with.key, result)
                    busy.discard(over_with.key)
                    tell(f"{clock} {over_with.name}: {_said(result)}")
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def _said(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"refused: {result['error']}"
    took = f"{result.get('seconds', 0):.0f} s"
    if "valid_loss" in result:
        return f"validation loss {min(result['valid_loss']):.5f} after {result['epochs']} epochs, {took}"
    return f"done, {took}"
