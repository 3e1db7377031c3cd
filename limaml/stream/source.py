"""What every source of events does, whatever broker keeps them. `tests/stream/conformance.py` holds each to it.

A source is read by position, not by acknowledgement: the interaction log remembers, in the same step as the events, how
far it has taken each partition in, and a source that is opened goes on behind that. What the broker is told (a consumer
group's offset, say) follows after the store has the result. It is there for those who watch the broker, and it is where
a run folder that has no position begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from limaml.errors import DataError, LimamlError

__all__ = ["Event", "Source", "SourceDown", "begin_at", "partition_key"]


class SourceDown(LimamlError, RuntimeError):
    """A source does not answer now; it may later. The worker waits and opens it again."""


@dataclass(frozen=True, slots=True)
class Event:
    """One message. Positions rise within a partition, and may have gaps."""

    partition: str
    position: int  # ≥ 0
    payload: bytes
    time: float | None = None  # when the source took it, seconds since 1970


@runtime_checkable
class Source(Protocol):
    """Events that are pulled. Everything but `name` raises `SourceDown` while the broker does not answer."""

    @property
    def name(self) -> str:
        """Names the source in the log: `kafka:clicks`. Another host with the same events has the same name."""
        ...

    def open(self, positions: Mapping[str, int]) -> Sequence[str]:
        """Begin behind `positions` (partition → position); a partition without one begins at what was committed, else
        where the address says. Returns a sentence for each loss the reader should know of.

        May be called again at any time: then everything fetched and not in `positions` comes again. Raises `DataError`
        if a partition ends before its position: it was made anew, and its events would pass for old ones."""
        ...

    def fetch(self, limit: int, wait: float) -> Sequence[Event]:
        """At most `limit` events, each partition's in order; waits up to `wait` seconds for the first one."""
        ...

    def commit(self, positions: Mapping[str, int]) -> None:
        """Tell the broker that everything up to `positions` has been dealt with."""
        ...

    def lag(self) -> Mapping[str, int | None]:
        """Events behind the last fetched one, by partition; None where the broker cannot say."""
        ...

    def close(self) -> None: ...


def partition_key(source: str, partition: str) -> str:
    """The key of a partition among the log's positions: `kafka:clicks:3`."""
    return f"{source}:{partition}"


def begin_at(
    name: str,
    partition: str,
    *,
    position: int | None,
    committed: int | None,
    first: int,
    end: int,
    latest: bool,
) -> tuple[int, str | None]:
    """The position from which a partition is read, and a sentence if events are lost.

    `position` is the log's, `committed` the broker's (each the last one dealt with), `first` the oldest that is there,
    `end` one more than the newest. Raises `DataError` for a partition that was made anew.
    """
    done = position if position is not None else committed
    if position is not None and position >= end:
        raise DataError(
            f"Partition '{partition}' of {name} ends at position {end - 1}, but the log has taken in up to {position}: it was "
            f"made anew, and its events would be taken for those that are in the log. Read it under another name: add "
            f"name=… to the address of the source."
        )
    if done is None:
        return (end if latest else first), None
    if done + 1 < first:
        return first, (
            f"Partition '{partition}' of {name} begins at position {first}, but the log has taken in only up to {done}: "
            "what lay between was removed by the broker before it was read. Bring it in from a file (limaml refresh)."
        )
    return done + 1, None
