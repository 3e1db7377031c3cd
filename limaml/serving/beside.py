"""What stands beside a service while it serves: records, a split, a shadow. `limaml serve` puts them there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from limaml.errors import ConfigError
from limaml.serving.record import Recorder, recording
from limaml.serving.service import Service
from limaml.serving.traffic import Shadow, Split, TrafficMetrics, parse_split, routed

__all__ = ["Beside", "standing"]


@dataclass(frozen=True)
class Beside:
    """What was asked for. `recorder` is open; `standing` closes it."""

    split: Split = field(default_factory=Split)
    shadow: str | None = None
    recorder: Recorder | None = None

    @staticmethod
    def of(
        ready: Sequence[str] | None,
        split: Sequence[str] = (),
        shadow: str | None = None,
        record: Path | None = None,
        share: float = 0.01,
        limit: int = 256 * 2**20,
    ) -> Beside:
        """From the options of a command; `ConfigError` if a version that they name is not among those that are `ready`
        (None: which are is not known yet)."""
        shares = parse_split(split)
        for option, version in [*(("--split", version) for version, _ in shares.shares), ("--shadow", shadow)]:
            if version is not None and ready is not None and version not in ready:
                raise ConfigError(
                    f"{option} names the version {version}, which the store does not have; it has {', '.join(ready)}."
                )
        return Beside(shares, shadow, None if record is None else Recorder(record, share=share, limit=limit))

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that must stay loaded beside the current one."""
        return (*(version for version, _ in self.split.shares), *([] if self.shadow is None else [self.shadow]))


@asynccontextmanager
async def standing(beside: Beside, service: Service) -> AsyncIterator[None]:
    """Put what was asked for beside a service, and take it away in the end: records are then written."""
    metrics = TrafficMetrics(service.metrics.registry)
    service.observers.append(metrics.answered)
    shadow: Shadow | None = None
    if beside.split.shares:
        service.route = routed(beside.split)
    if beside.shadow is not None:
        observe = metrics.shadowed(beside.shadow)
        shadow = Shadow(beside.shadow, service.answer, observe, busy=lambda: service.busy)
        service.observers.append(shadow.after)
    if beside.recorder is not None:
        service.observers.append(recording(beside.recorder, service.model))
        metrics.records(beside.recorder)
    try:
        yield
    finally:
        if shadow is not None:
            await shadow.close()
        if beside.recorder is not None:
            beside.recorder.close()
