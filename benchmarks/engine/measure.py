"""Time, arithmetic, and the machine's own peak.

Contenders take turns: in every round each runs once, in another order, so that a noisy neighbour hits all of them. A
contender leaves the rounds when it has had its share of time. What counts is the median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.contender import Outcome

__all__ = ["Timing", "flops_of", "gemm_peak", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: median, fastest, slowest, over `repetitions`."""

    seconds: float
    fastest: float
    slowest: float
    repetitions: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        return Timing(median(samples), min(samples), max(samples), len(samples))


def interleaved(
    works: Mapping[str, Callable[[], Outcome]], *, repetitions: int, seconds_each: float
) -> dict[str, Timing]:
    """Time of each work, already warmed up. Each runs at least once, then until `repetitions` or `seconds_each`."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(repetitions):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            spent = sum(samples[name])
            if samples[name] and spent + spent / len(samples[name]) > seconds_each:
                continue
            started = time.perf_counter()
            works[name]()
            samples[name].append(time.perf_counter() - started)
    return {name: Timing.of(found) for name, found in samples.items()}


def flops_of(work: Callable[[], Outcome]) -> int:
    """Floating-point operations of the matrix products that one run carries out (2 a multiply-add)."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def gemm_peak(seconds: float = 0.5) -> float:
    """The fastest float32 matrix product this machine was seen to do, in FLOP/s, on the threads torch is set to."""
    best = 0.0
    with torch.no_grad():
        for n in (512, 1024, 2048):
            a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
            torch.mm(a, b, out=out)
            until = time.perf_counter() + seconds / 3
            while time.perf_counter() < until:
                started = time.perf_counter()
                torch.mm(a, b, out=out)
                best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best
