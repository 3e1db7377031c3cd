"""A Redis or Valkey stream as a source.

It is read with XREAD behind a position. A group that read it (XREADGROUP) would hand the entries that a dead consumer held
to a second list, out of order; here the group is only told how far things are (XGROUP SETID), so that whoever asks the
server (XINFO GROUPS) sees the lag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from limaml.errors import ConfigError, require
from limaml.stream.source import Event, SourceDown, begin_at

__all__ = ["RedisSource"]

PARTITION = "0"


def position_of(entry: bytes) -> int:
    """`1700000000000-3` as one number that orders entries as the server does."""
    milliseconds, _, sequence = entry.partition(b"-")
    return int(milliseconds) << 64 | int(sequence or 0)


def entry_of(position: int) -> str:
    """The inverse of `position_of`."""
    return f"{position >> 64}-{position & (1 << 64) - 1}"


class RedisSource:
    """Each entry is an event: the JSON in its field `field`, or, where it has none, its fields as texts.

    `url` is what redis-py understands, without the stream. `timeout` bounds the wait for an answer, in seconds.
    """

    def __init__(
        self,
        url: str,
        key: str,
        group: str,
        *,
        name: str | None = None,
        field: str = "event",
        cluster: bool = False,
        latest: bool = False,
        timeout: float = 5.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._redis = require("redis", "stream")
        self.key, self.group, self.latest = key, group, latest
        self.name = name or f"redis:{key}"
        self._field, self._timeout = field.encode(), timeout
        make: Any = self._redis.RedisCluster if cluster else self._redis.Redis
        settings: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "protocol": 2}
        settings |= options or {}
        if not cluster:
            settings["retry"] = self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0)
        self._make: Callable[[], Any] = partial(make.from_url, url, **settings)
        self._client: Any = None
        self._shown = f"the stream '{key}' on {url.rpartition('@')[2].rpartition('//')[2]}"
        self._at = 0
        self._read: int | None = None  # entries up to `_at`, if known

    def open(self, positions: Mapping[str, int]) -> Sequence[str]:
        self.close()
        with self._spoken_to():
            self._client = self._make()
            try:  # from the beginning: what the group has read is known, and so is its lag
                self._client.xgroup_create(self.key, self.group, id="0", mkstream=True, entries_read=0)
            except self._redis.exceptions.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            stream, group = self._client.xinfo_stream(self.key), self._group()
            last = position_of(stream["last-generated-id"])
            done = position_of(group["last-delivered-id"])
            at = positions.get(PARTITION, done)
            read = group.get("entries-read") if done == at else None
            first = 0 if self._complete(at, read, stream) else position_of((stream["first-entry"] or [b"0-0"])[0])
            begin, lost = begin_at(
                self.name,
                PARTITION,
                position=positions.get(PARTITION),
                committed=done or None,
                first=first,
                end=last + 1,
                latest=self.latest,
            )
            self._at = max(0, begin - 1)
            self._read = int(stream["entries-added"]) if self._at == last else None if lost else read
        return [lost] if lost else []

    def _complete(self, at: int, read: int | None, stream: Mapping[str, Any]) -> bool:
        """Whether every entry behind `at` is still there. An entry that is there has all later ones behind it."""
        trimmed = int(stream["entries-added"]) - int(stream["length"])
        if not at or not trimmed or self._client.xrange(self.key, entry_of(at), entry_of(at), count=1):
            return True
        return read is not None and read >= trimmed

    def fetch(self, limit: int, wait: float) -> Sequence[Event]:
        block = int(1000 * min(wait, self._timeout / 2)) or None  # 0 would wait for ever
        with self._spoken_to():
            found = self._opened().xread({self.key: entry_of(self._at)}, count=limit, block=block)
        events = [self._event(entry, fields) for _, entries in found for entry, fields in entries]
        if events:
            self._at = events[-1].position
            self._read = None if self._read is None else self._read + len(events)
        return events

    def _event(self, entry: bytes, fields: Mapping[bytes, bytes]) -> Event:
        payload = fields.get(self._field)
        if payload is None:
            texts = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
            payload = json.dumps(texts, ensure_ascii=False).encode()
        position = position_of(entry)
        return Event(PARTITION, position, payload, (position >> 64) / 1000)

    def commit(self, positions: Mapping[str, int]) -> None:
        done = positions.get(PARTITION)
        if done is None:
            return
        known = () if self._read is None or done != self._at else ("ENTRIESREAD", self._read)
        with self._spoken_to():
            self._opened().execute_command("XGROUP", "SETID", self.key, self.group, entry_of(done), *known)

    def lag(self) -> Mapping[str, int | None]:
        if self._read is None:
            return {PARTITION: None}
        with self._spoken_to():
            added = self._opened().xinfo_stream(self.key)["entries-added"]
        return {PARTITION: max(0, int(added) - self._read)}

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _group(self) -> dict[str, Any]:
        for group in self._client.xinfo_groups(self.key):
            if group["name"] == self.group.encode():
                return dict(group)
        raise SourceDown(f"The group '{self.group}' of {self._shown} was removed just now.")

    def _opened(self) -> Any:
        if self._client is None:
            raise SourceDown(f"{self._shown} is not open.")
        return self._client

    @contextmanager
    def _spoken_to(self) -> Iterator[None]:
        errors = self._redis.exceptions
        try:
            yield
        except (errors.AuthenticationError, errors.NoPermissionError) as error:
            raise ConfigError(
                f"The server of {self._shown} refuses this user: {error}. Correct user:password@ in the address, or what the "
                "user may do (XREAD, XINFO, XGROUP)."
            ) from error
        except errors.ResponseError as error:
            if "WRONGTYPE" in str(error):
                raise ConfigError(
                    f"The key of {self._shown} holds something that is no stream. Name another key."
                ) from error
            raise SourceDown(f"The server of {self._shown} refuses: {error}.") from error
        except (errors.RedisError, OSError) as error:
            raise SourceDown(f"The server of {self._shown} does not answer: {str(error).rstrip('.')}.") from error
