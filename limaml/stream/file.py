"""A file of JSON lines as a source: to try a stream without a server, or to take what another program appends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from limaml.errors import ConfigError
from limaml.stream.source import Event, SourceDown, begin_at

__all__ = ["FileSource"]

PARTITION = "0"
_CHUNK = 1 << 20


class FileSource:
    """Each line is an event, its position the place of its last byte. A file only ever grows.

    With `follow`, a last line without its end is left until it has one, and the source never ends by itself.
    """

    def __init__(self, path: Path, *, name: str | None = None, follow: bool = False, latest: bool = False) -> None:
        self.path, self.follow, self.latest = path, follow, latest
        self.name = name or f"file:{path.resolve()}"
        self._at = self._end = 0
        if not path.exists() and not follow:
            raise ConfigError(
                f"There is no file {path} to read events from. Check the path, or wait for it: ?follow=true."
            )

    def open(self, positions: Mapping[str, int]) -> Sequence[str]:
        size = self._size()
        self._at, lost = begin_at(
            self.name,
            PARTITION,
            position=positions.get(PARTITION),
            committed=None,
            first=0,
            end=size,
            latest=self.latest,
        )
        return [lost] if lost else []

    def fetch(self, limit: int, wait: float) -> Sequence[Event]:
        deadline = time.monotonic() + wait
        while True:
            found = self._lines(limit)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(0.05, left))

    def _lines(self, limit: int) -> list[Event]:
        events: list[Event] = []
        if not self.path.exists():
            return events
        try:
            with self.path.open("rb") as file:
                taken = self.path.stat().st_mtime
                file.seek(self._at)
                while len(events) < limit and (line := file.readline()):
                    if not line.endswith(b"\n") and self.follow:
                        break
                    self._at += len(line)
                    if line.strip():
                        events.append(Event(PARTITION, self._at - 1, line.strip(), taken))
        except OSError as error:
            raise SourceDown(f"The file {self.path} cannot be read: {error.strerror}.") from error
        return events

    def commit(self, positions: Mapping[str, int]) -> None:
        """Nobody has to be told."""

    def lag(self) -> Mapping[str, int | None]:
        """Lines behind the last fetched one."""
        if not self.path.exists():
            return {PARTITION: 0}
        with self.path.open("rb") as file:
            file.seek(self._at)
            count, last = 0, b"\n"
            while part := file.read(_CHUNK):
                count, last = count + part.count(b"\n"), part[-1:]
        return {PARTITION: count + (last != b"\n" and not self.follow)}

    def close(self) -> None:
        pass

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0
