"""What every source promises, on a real server of each kind: one suite."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from store.servers import cluster

from limaml.errors import ConfigError, DataError
from limaml.stream.source import Event, Source, SourceDown
from limaml.stream.url import open_source

from .brokers import Broker, broker, redis

KINDS = ["file", "redis", "nats", "kafka"]


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with broker(request.param) as made:
        yield made


@contextmanager
def opened(server: Broker, positions: dict[str, int] | None = None, extra: str = "") -> Iterator[Source]:
    address = server.address + (("&" if "?" in server.address else "?") + extra if extra else "")
    source = open_source(address, "limaml-test")
    try:
        for _ in range(50):
            try:
                source.open(positions or {})
                break
            except SourceDown:
                time.sleep(0.1)
        yield source
    finally:
        source.close()


def drain(source: Source, count: int, limit: int = 1000) -> list[Event]:
    found: list[Event] = []
    until = time.monotonic() + 20
    while len(found) < count and time.monotonic() < until:
        found += source.fetch(limit, 0.2)
    return found


def fetch_until_it_fails(source: Source) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        source.fetch(10, 0.2)


def payloads(start: int, stop: int) -> list[bytes]:
    return [f'{{"n": {number}}}'.encode() for number in range(start, stop)]


def said(events: Sequence[Event]) -> list[bytes]:
    return [event.payload for event in events]


def test_events_come_in_order_with_rising_positions_and_a_time(server: Broker) -> None:
    server.publish(payloads(0, 300))
    with opened(server) as source:
        events = drain(source, 300, limit=64)
        assert source.fetch(10, 0.05) in ([], ())
    assert said(events) == payloads(0, 300)
    assert all(a.position < b.position for a, b in zip(events, events[1:], strict=False))
    assert {event.partition for event in events} == {"0"}
    assert all(event.time is not None and abs(event.time - time.time()) < 300 for event in events)


def test_a_fetch_takes_no_more_than_its_limit(server: Broker) -> None:
    server.publish(payloads(0, 20))
    with opened(server) as source:
        assert 1 <= len(drain(source, 1, limit=7)) <= 7


def test_what_comes_later_is_waited_for(server: Broker) -> None:
    server.publish(payloads(0, 1))
    with opened(server) as source:
        drain(source, 1)
        server.publish(payloads(1, 3))
        assert said(drain(source, 2)) == payloads(1, 3)


def test_reading_goes_on_behind_the_position_it_is_given(server: Broker) -> None:
    server.publish(payloads(0, 10))
    with opened(server) as source:
        events = drain(source, 10)
    with opened(server, {"0": events[3].position}) as source:
        assert said(drain(source, 6)) == payloads(4, 10)
        source.open({"0": events[7].position})  # again, in place
        assert said(drain(source, 2)) == payloads(8, 10)


def test_positions_of_the_log_count_more_than_what_was_committed(server: Broker) -> None:
    server.publish(payloads(0, 10))
    with opened(server) as source:
        events = drain(source, 10)
        source.commit({"0": events[-1].position})
    with opened(server, {"0": events[1].position}) as source:
        assert said(drain(source, 8)) == payloads(2, 10)


def test_what_is_committed_is_seen_by_the_broker_and_is_where_a_new_log_begins(server: Broker) -> None:
    if server.address.startswith("file"):
        pytest.skip("nobody keeps a position for a file")
    server.publish(payloads(0, 10))
    with opened(server) as source:
        first = drain(source, 6, limit=6)
        source.commit({"0": first[-1].position})
        done = len(first)
    assert server.committed("limaml-test") == done
    with opened(server) as source:
        assert said(drain(source, 10 - done)) == payloads(done, 10)


def test_what_was_fetched_and_not_committed_comes_again(server: Broker) -> None:
    server.publish(payloads(0, 5))
    with opened(server) as source:
        drain(source, 5)
    with opened(server) as source:
        assert said(drain(source, 5)) == payloads(0, 5)


def test_start_latest_leaves_out_what_is_there(server: Broker) -> None:
    server.publish(payloads(0, 5))
    with opened(server, extra="start=latest") as source:
        server.publish(payloads(5, 7))
        assert said(drain(source, 2)) == payloads(5, 7)


def test_lag_is_what_lies_behind_the_last_event(server: Broker) -> None:
    server.publish(payloads(0, 8))
    with opened(server) as source:
        first = drain(source, 3, limit=3)
        until = time.monotonic() + 10
        while source.lag()["0"] != 8 - len(first):
            assert time.monotonic() < until, source.lag()
            time.sleep(0.05)
        drain(source, 8 - len(first))
        assert not any(source.lag().values())


def test_a_stream_that_was_made_anew_is_refused(server: Broker) -> None:
    server.publish(payloads(0, 2))
    source = open_source(server.address, "limaml-test")
    try:
        with pytest.raises(DataError, match=r"made anew.*name="):
            source.open({"0": 1 << 120})
    finally:
        source.close()


def test_a_loss_to_retention_is_said(server: Broker) -> None:
    server.publish(payloads(0, 6))
    with opened(server) as source:
        seen = drain(source, 6)
    if not server.trim():
        pytest.skip("this server keeps everything")
    server.publish(payloads(6, 8))
    source = open_source(server.address, "limaml-test")
    try:
        (sentence,) = source.open({"0": seen[1].position})
        assert "removed by the broker before it was read" in sentence
        assert said(drain(source, 2)) == payloads(6, 8)
    finally:
        source.close()


def test_a_server_that_is_gone_is_said_and_one_that_is_back_is_read(server: Broker) -> None:
    server.publish(payloads(0, 4))
    with opened(server) as source:
        events = drain(source, 4)
        server.kill()
        with pytest.raises(SourceDown, match=r"answer|connection"):
            fetch_until_it_fails(source)
    server.start()
    with opened(server, {"0": events[1].position}) as source:
        assert said(drain(source, 2)) == payloads(2, 4)


def test_a_server_that_was_never_there_is_said() -> None:
    for address in ("redis://127.0.0.1:1/s", "nats://127.0.0.1:1/s", "kafka://127.0.0.1:1/t?timeout=0.5"):
        source = open_source(address, "g")
        with pytest.raises(SourceDown, match="answer"):
            source.open({})
        source.close()


def test_all_partitions_of_a_topic_are_read() -> None:
    with broker("kafka") as server:
        for number in range(40):
            server.producer.produce("clicks", b"%d" % number, partition=number % 4)  # type: ignore[attr-defined]
        server.producer.flush(20)  # type: ignore[attr-defined]
        with opened(server) as source:
            events = drain(source, 40)
            last = {event.partition: event.position for event in events}
            source.commit(last)
        assert sorted(int(event.payload) for event in events) == list(range(40))
        assert len(last) == 4
        with opened(server, {**last, "2": last["2"] - 3}) as source:
            assert len(drain(source, 3)) == 3


def test_fields_of_a_redis_entry_are_an_event() -> None:
    with broker("redis") as server:
        server.client.xadd("clicks", {"user_id": "7", "click": "1"})  # type: ignore[attr-defined]
        with opened(server) as source:
            assert drain(source, 1)[0].payload == b'{"user_id": "7", "click": "1"}'


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "is empty"),
        ("amqp://host/q", "No source has the scheme 'amqp://'"),
        ("kafka://host:9092", "must name one topic"),
        ("kafka://host:9092/a/b", "must name one topic"),
        ("kafka://host:9092/t?gruop=x", "option gruop="),
        ("redis://host/s?start=now", "earliest or latest"),
        ("redis://host/s?db=x", "number of a database"),
        ("nats://host/s?durable=a.b", "letters, digits"),
        ("nats://host/s?timeout=never", "number of seconds"),
        ("redis://user:pass@host/s#x", "'%23'"),
        ("none.jsonl", "There is no file none.jsonl"),
    ],
)
def test_a_wrong_address_is_answered_by_a_sentence(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        open_source(address, "g")
    assert "pass@" not in str(raised.value)


def test_a_key_that_holds_no_stream_is_said() -> None:
    with broker("redis") as server:
        server.client.set("clicks", "text")  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="no stream"):
            open_source(server.address, "g").open({})


def test_a_redis_cluster_is_read_and_told() -> None:
    with cluster() as servers:
        client = redis.RedisCluster(host="127.0.0.1", port=servers[0].port)
        for payload in payloads(0, 6):
            client.xadd("clicks", {"event": payload})
        source = open_source(f"redis://127.0.0.1:{servers[1].port}/clicks?cluster=true", "g")
        try:
            assert source.open({}) == []
            events = drain(source, 6)
            source.commit({"0": events[3].position})
            assert said(events) == payloads(0, 6)
            source.open({"0": events[1].position})
            assert said(drain(source, 4)) == payloads(2, 6)
            servers[0].kill()
            servers[2].kill()
            with pytest.raises(SourceDown, match="answer"):
                fetch_until_it_fails(source)
        finally:
            source.close()
            client.close()
