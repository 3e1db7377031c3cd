"""A NATS JetStream stream as a source.

The durable consumer is made anew behind the log's position whenever the source is opened. One that was kept would hand out
what a dead worker had not acknowledged only after a pause, behind newer messages; a gap in what it delivers is seen by its
own count, and then it is made anew, too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from limaml.errors import ConfigError, require
from limaml.stream.source import Event, SourceDown, begin_at

__all__ = ["NatsSource"]

PARTITION = "0"
_T = TypeVar("_T")


class NatsSource:
    """The messages of one stream, of one subject where one is given. `timeout` bounds the wait for an answer, in s."""

    def __init__(
        self,
        servers: Sequence[str],
        stream: str,
        durable: str,
        *,
        name: str | None = None,
        subject: str | None = None,
        latest: bool = False,
        timeout: float = 5.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._nats: Any = require("nats", "stream")
        self._errors: Any = require("nats.errors", "stream")
        self._api: Any = require("nats.js.api", "stream")
        self.stream, self.durable, self.subject, self.latest = stream, durable, subject, latest
        self.name = name or (f"nats:{stream}" if subject is None else f"nats:{stream}:{subject}")
        self._servers, self._timeout, self._options = list(servers), timeout, dict(options or {})
        hosts = ",".join(server.rpartition("@")[2].rpartition("//")[2] for server in self._servers)
        self._shown = f"the stream '{stream}' on {hosts}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._subscription: Any = None
        self._last: Any = None  # message fetched last
        self._delivered = 0  # the consumer's own count
        self._at = 0
        self._pending: int | None = None

    def open(self, positions: Mapping[str, int]) -> Sequence[str]:
        self.close()
        self._loop = asyncio.new_event_loop()  # runs all the time: the server wants its pings answered
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()
        with self._spoken_to():
            return self._run(self._open(positions.get(PARTITION)))

    async def _open(self, position: int | None) -> list[str]:
        errors = require("nats.js.errors", "stream")

        async def quiet(_error: Exception) -> None:
            """What goes wrong is said by the call that meets it."""

        self._client = await self._nats.connect(
            self._servers,
            connect_timeout=self._timeout,
            allow_reconnect=False,  # the worker opens it again
            max_reconnect_attempts=1,  # of the first connection
            reconnect_time_wait=0.05,
            error_cb=quiet,
            name="limaml",
            **self._options,
        )
        manager = self._client.jetstream(timeout=self._timeout)
        state = (await manager.stream_info(self.stream)).state
        committed: int | None = None
        with suppress(errors.NotFoundError):
            floor = (await manager.consumer_info(self.stream, self.durable)).ack_floor
            committed = floor.stream_seq or None
        begin, lost = begin_at(
            self.name,
            PARTITION,
            position=position,
            committed=committed,
            first=max(1, state.first_seq),
            end=state.last_seq + 1,
            latest=self.latest,
        )
        with suppress(errors.NotFoundError):
            await manager.delete_consumer(self.stream, self.durable)
        config = self._api.ConsumerConfig(
            durable_name=self.durable,
            deliver_policy=self._api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=begin,
            ack_policy=self._api.AckPolicy.ALL,
            ack_wait=3600.0,
            filter_subject=self.subject,
            max_ack_pending=-1,
        )
        info = await manager.add_consumer(self.stream, config)
        self._pending = info.num_pending
        self._subscription = await manager.pull_subscribe_bind(consumer=self.durable, stream=self.stream)
        self._at, self._delivered, self._last = begin - 1, 0, None
        return [lost] if lost else []

    def fetch(self, limit: int, wait: float) -> Sequence[Event]:
        with self._spoken_to():
            messages = self._run(self._fetch(limit, max(wait, 0.01)))
        events = []
        for message in messages:
            about = message.metadata
            if about.sequence.consumer != self._delivered + 1 or about.sequence.stream <= self._at:
                raise SourceDown(
                    f"A message of {self._shown} was lost on its way, or another worker reads with the durable "
                    f"'{self.durable}': it is read again from where things are."
                )
            self._delivered, self._at = about.sequence.consumer, about.sequence.stream
            self._pending, self._last = about.num_pending, message
            events.append(Event(PARTITION, self._at, message.data, about.timestamp.timestamp()))
        return events

    async def _fetch(self, limit: int, wait: float) -> Sequence[Any]:
        if self._client is None or not self._client.is_connected:
            raise SourceDown(f"The server of {self._shown} has closed the connection.")
        try:
            found: Sequence[Any] = await self._subscription.fetch(limit, timeout=wait)
        except (self._errors.TimeoutError, TimeoutError):
            return ()
        return found

    def commit(self, positions: Mapping[str, int]) -> None:
        """Acknowledge all that was fetched. (`positions` are those of the last fetch: there is nothing between.)"""
        if self._last is None or not positions:
            return
        with self._spoken_to():
            self._run(self._last.ack_sync(timeout=self._timeout))
        self._last = None

    def lag(self) -> Mapping[str, int | None]:
        """As of the last fetched message, or, if there was none, of now."""
        if not self._pending:  # none then, but perhaps now
            with self._spoken_to():
                manager = self._client.jetstream(timeout=self._timeout)
                self._pending = self._run(manager.consumer_info(self.stream, self.durable)).num_pending
        return {PARTITION: self._pending}

    def close(self) -> None:
        if self._loop is None or self._thread is None:
            return
        if self._client is not None:
            with suppress(Exception):
                self._run(self._client.close())
        self._client = self._subscription = self._last = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None:
            work.close()
            raise SourceDown(f"{self._shown} is not open.")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextmanager
    def _spoken_to(self) -> Iterator[None]:
        errors = require("nats.js.errors", "stream")
        try:
            yield
        except errors.NotFoundError as error:
            raise SourceDown(
                f"{self._shown[0].upper()}{self._shown[1:]} is not there ({error.description}). Make it, or correct the address."
            ) from error
        except self._errors.AuthorizationError as error:
            raise ConfigError(
                f"The server of {self._shown} refuses this user. Correct user:password@ in the address."
            ) from error
        except (TimeoutError, self._errors.Error, OSError) as error:
            said = str(error).rstrip(".") or type(error).__name__
            raise SourceDown(f"The server of {self._shown} does not answer as it should: {said}.") from error
