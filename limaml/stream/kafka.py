"""A Kafka topic as a source, by Confluent's client (librdkafka).

Partitions are assigned here, all of them, and not by a group: one worker takes in one run folder's events, and it reads from
the log's positions. The group's offsets are committed for those who watch it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from limaml.errors import ConfigError, require
from limaml.stream.source import Event, SourceDown, begin_at

__all__ = ["KafkaSource"]

_TIMESTAMP_NOT_AVAILABLE = 0
_LOOK_AGAIN_S = 30.0  # for new partitions


class KafkaSource:
    """The messages of one topic. `options` are librdkafka's own (`security.protocol`, `sasl.mechanism`, …)."""

    def __init__(
        self,
        servers: str,
        topic: str,
        group: str,
        *,
        name: str | None = None,
        latest: bool = False,
        timeout: float = 10.0,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._kafka: Any = require("confluent_kafka", "stream")
        self.topic, self.latest, self._timeout = topic, latest, timeout
        self.name = name or f"kafka:{topic}"
        self._shown = f"the topic '{topic}' on {servers}"
        quiet = logging.getLogger(__name__)  # what the client says of lost connections is said by the worker, once
        self._settings = {
            "bootstrap.servers": servers,
            "group.id": group,
            "client.id": "limaml",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,  # what lies at the end may be markers, which are never delivered
            "error_cb": self._failed,
            "logger": quiet,
            **(options or {}),
        }
        quiet.setLevel(logging.CRITICAL)
        self._consumer: Any = None
        self._down: str | None = None
        self._next: dict[int, int] = {}  # partition → offset to fetch next
        self._end: dict[int, int] = {}  # partition → its end when it was assigned
        self._looked = 0.0
        self._known: dict[str, int] = {}

    def open(self, positions: Mapping[str, int]) -> Sequence[str]:
        self.close()
        self._known = dict(positions)
        try:
            self._consumer = self._kafka.Consumer(self._settings)
        except self._kafka.KafkaException as error:
            raise ConfigError(f"The settings of {self._shown} are refused: {error.args[0].str()}.") from error
        partitions = self._partitions()
        self._consumer.poll(0)  # what it met on the way to an answer is told now, and is over
        self._down = None
        return self._assign(partitions)

    def _partitions(self) -> list[int]:
        try:
            found = self._consumer.list_topics(self.topic, timeout=self._timeout).topics[self.topic]
        except self._kafka.KafkaException as error:
            raise self._explained(error) from error
        if found.error is not None or not found.partitions:
            raise SourceDown(
                f"{self._shown[0].upper()}{self._shown[1:]} is not there: {found.error or 'no partitions'}."
            )
        self._looked = time.monotonic()
        return sorted(found.partitions)

    def _assign(self, partitions: Sequence[int]) -> list[str]:
        fresh = [number for number in partitions if number not in self._next]
        places = [self._kafka.TopicPartition(self.topic, number) for number in fresh]
        sentences = []
        try:
            for place in self._consumer.committed(places, timeout=self._timeout):
                low, high = self._consumer.get_watermark_offsets(place, timeout=self._timeout)
                begin, lost = begin_at(
                    self.name,
                    str(place.partition),
                    position=self._known.get(str(place.partition)),
                    committed=place.offset - 1 if place.offset > 0 else None,
                    first=low,
                    end=high,
                    latest=self.latest,
                )
                self._next[place.partition], self._end[place.partition] = begin, high
                sentences += [lost] if lost else []
            self._consumer.assign(
                [self._kafka.TopicPartition(self.topic, number, begin) for number, begin in self._next.items()]
            )
        except self._kafka.KafkaException as error:
            raise self._explained(error) from error
        return sentences

    def fetch(self, limit: int, wait: float) -> Sequence[Event]:
        if self._consumer is None:
            raise SourceDown(f"{self._shown} is not open.")
        if time.monotonic() - self._looked > _LOOK_AGAIN_S:
            partitions = self._partitions()
            if set(partitions) - set(self._next):
                self._assign(partitions)
        # asked for many, the client would wait for all of them
        messages = self._consumer.consume(limit, 0.0) or self._consumer.consume(1, wait)
        events = []
        for message in messages:
            if message.error() is not None:
                if message.error().code() == self._kafka.KafkaError._PARTITION_EOF:
                    self._next[message.partition()] = max(self._next[message.partition()], message.offset())
                    continue
                raise self._explained(self._kafka.KafkaException(message.error()))
            kind, milliseconds = message.timestamp()
            taken = None if kind == _TIMESTAMP_NOT_AVAILABLE else milliseconds / 1000
            events.append(Event(str(message.partition()), message.offset(), message.value() or b"", taken))
            self._next[message.partition()] = message.offset() + 1
        if not events and self._down is not None:
            raise SourceDown(self._down)
        self._down = None if events else self._down
        return events

    def commit(self, positions: Mapping[str, int]) -> None:
        places = [
            self._kafka.TopicPartition(self.topic, int(partition), position + 1)
            for partition, position in positions.items()
        ]
        try:
            for place in self._consumer.commit(offsets=places, asynchronous=False) if places else ():
                if place.error is not None:
                    raise self._kafka.KafkaException(place.error)
        except self._kafka.KafkaException as error:
            raise self._explained(error) from error

    def lag(self) -> Mapping[str, int | None]:
        found: dict[str, int | None] = {}
        for number, offset in self._next.items():
            place = self._kafka.TopicPartition(self.topic, number)
            high = self._consumer.get_watermark_offsets(place, cached=True)[1]  # as of the last fetch; below 0 before
            found[str(number)] = max(0, max(high, self._end[number]) - offset)
        return found

    def close(self) -> None:
        self._next, self._end = {}, {}
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None

    def _failed(self, error: Any) -> None:
        if error.code() == self._kafka.KafkaError._ALL_BROKERS_DOWN:
            self._down = f"No broker of {self._shown} answers: {error.str()}."

    def _explained(self, error: Any) -> Exception:
        said = error.args[0]
        denied = (
            self._kafka.KafkaError._AUTHENTICATION,
            self._kafka.KafkaError.SASL_AUTHENTICATION_FAILED,
            self._kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED,
            self._kafka.KafkaError.GROUP_AUTHORIZATION_FAILED,
        )
        if said.code() in denied:
            return ConfigError(
                f"The brokers of {self._shown} refuse this user: {said.str()}. Correct user:password@ in the address, or what "
                "the user may do."
            )
        return SourceDown(f"The brokers of {self._shown} do not answer as they should: {said.str()}.")
