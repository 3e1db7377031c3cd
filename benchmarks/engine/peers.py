"""Who takes part: everybody that is installed, and the reason for everybody that is not."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine.contender import Contender
from benchmarks.engine.loops import FuncLoop, Higher, LeanLoop, TorchoptFunctional, TorchoptModule
from benchmarks.engine.ours import Limaml
from benchmarks.engine.vmaps import VmapBuckets, VmapPadded

__all__ = ["contenders"]

MAKERS: tuple[Callable[[], Contender], ...] = (
    Limaml,
    lambda: Limaml(distinct=False),
    LeanLoop,
    FuncLoop,
    Higher,
    TorchoptFunctional,
    TorchoptModule,
    VmapPadded,
    VmapBuckets,
)


def contenders() -> tuple[list[Contender], list[str]]:
    """Contenders, limaml first, and a sentence for each peer that is missing."""
    found: list[Contender] = []
    missing: list[str] = []
    for make in MAKERS:
        try:
            found.append(make())
        except ImportError as error:
            missing.append(
                f"{getattr(make, '__name__', 'A peer')} does not take part: {error}. Type: pip install '.[bench]'"
            )
    return found, missing
