"""From the address of a source to the source."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from limaml.errors import ConfigError
from limaml.stream.file import FileSource
from limaml.stream.kafka import KafkaSource
from limaml.stream.nats import NatsSource
from limaml.stream.redis import RedisSource
from limaml.stream.source import Source

__all__ = ["open_source"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters or more: C:\events is a path
_EXAMPLES = {
    "kafka": "kafka://host:9092/topic?group=limaml",
    "redis": "redis://host:6379/stream-key?group=limaml",
    "rediss": "rediss://user:password@host:6379/stream-key?ca=FILE",
    "nats": "nats://host:4222/stream?subject=clicks.>&durable=limaml",
    "file": "events.jsonl, or file:///absolute/path?follow=true",
}


def open_source(address: str, group: str) -> Source:
    """The source at `kafka://…`, `redis[s]://…`, `nats://…`, `file://…` or a path of a file of JSON lines.

    `group` is the name under which the broker is told how far things are, where the address has none. For all of them:
    `name=` (in the log, default made of the topic's), `start=latest` (skip what is there now). Raises `ConfigError` for
    an address that cannot be understood; nothing is connected to yet.
    """
    match = _SCHEME.match(address)
    if match is None:
        if not address:
            raise ConfigError("The address of a source is empty. Such as: " + "; ".join(_EXAMPLES.values()) + ".")
        return FileSource(Path(address))
    scheme = match[1].lower()
    if scheme not in _EXAMPLES:
        raise ConfigError(f"No source has the scheme '{scheme}://'. Known are: " + "; ".join(_EXAMPLES.values()) + ".")
    parts = urlsplit(address)
    where = f"The address {scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.fragment:
        raise ConfigError(f"{where} has something behind '#'; write '%23' inside a name or a password.")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    common: dict[str, Any] = {"latest": _choice(where, options, "start", {"earliest": False, "latest": True}, False)}
    common["name"] = options.pop("name", None)
    if common["name"] is not None and not 0 < len(common["name"]) <= 200:
        raise ConfigError(f"{where} has a name of {len(common['name'])} characters; it has from 1 to 200.")
    path = unquote(parts.path.removeprefix("/"))
    if scheme == "file":
        follow = _choice(where, options, "follow", {"true": True, "false": False}, False)
        _none_left(where, options, "follow=true, name= and start=latest")
        return FileSource(Path(unquote(parts.netloc + parts.path)), follow=follow, **common)
    if not path or "/" in path:
        raise ConfigError(f"{where} must name one topic or stream, such as {_EXAMPLES[scheme]}.")
    common["timeout"] = _seconds(where, options.pop("timeout", "10" if scheme == "kafka" else "5"))
    return _BROKERS[scheme.removesuffix("s") if scheme == "rediss" else scheme](
        where, parts, path, group, options, common
    )


def _kafka(
    where: str, parts: SplitResult, topic: str, group: str, options: dict[str, str], common: Mapping[str, Any]
) -> Source:
    group = options.pop("group", group)
    own = {name: options.pop(name) for name in list(options) if "." in name}
    credentials, _, hosts = parts.netloc.rpartition("@")
    if credentials:
        user, _, password = credentials.partition(":")
        own = {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", **own}
        own |= {"sasl.username": unquote(user), "sasl.password": unquote(password)}
    _none_left(where, options, "group=, name=, start=latest, timeout=SECONDS, and librdkafka's own, which have a dot")
    servers = ",".join(host if re.search(r":\d+$", host) else f"{host}:9092" for host in hosts.split(",") if host)
    return KafkaSource(servers or "localhost:9092", topic, group, options=own, **common)


def _redis(
    where: str, parts: SplitResult, key: str, group: str, options: dict[str, str], common: Mapping[str, Any]
) -> Source:
    group, field = options.pop("group", group), options.pop("field", "event")
    cluster = _choice(where, options, "cluster", {"true": True, "false": False}, False)
    database = options.pop("db", "0")
    if not database.isdigit():
        raise ConfigError(f"{where} has db={database}; it must be the number of a database.")
    files = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
    tls = {files[name]: options.pop(name) for name in list(options) if name in files}
    _none_left(where, options, "group=, field=, db=, cluster=true, name=, start=latest, timeout=, ca=, cert= and key=")
    url = f"{parts.scheme.lower()}://{parts.netloc}/{'' if cluster else database}"
    return RedisSource(url, key, group, field=field, cluster=cluster, options=tls, **common)


def _nats(
    where: str, parts: SplitResult, stream: str, group: str, options: dict[str, str], common: Mapping[str, Any]
) -> Source:
    durable, subject = options.pop("durable", group), options.pop("subject", None)
    if re.search(r"[\s.*>/\\]", durable) or not durable:
        raise ConfigError(f"{where} has durable={durable!r}; it may have letters, digits, '-' and '_'.")
    own = {"user_credentials": options.pop("credentials")} if "credentials" in options else {}
    _none_left(where, options, "subject=, durable=, name=, start=latest, timeout= and credentials=FILE")
    user, _, hosts = parts.netloc.rpartition("@")
    prefix = f"nats://{quote(unquote(user), safe=':')}@" if user else "nats://"
    servers = [prefix + host for host in hosts.split(",") if host]
    return NatsSource(servers or [prefix + "localhost:4222"], stream, durable, subject=subject, options=own, **common)


_BROKERS: dict[str, Callable[[str, SplitResult, str, str, dict[str, str], Mapping[str, Any]], Source]] = {
    "kafka": _kafka,
    "redis": _redis,
    "nats": _nats,
}


def _choice(where: str, options: dict[str, str], name: str, known: Mapping[str, bool], default: bool) -> bool:
    given = options.pop(name, None)
    if given is not None and given not in known:
        raise ConfigError(f"{where} has {name}={given}; it must be {' or '.join(known)}.")
    return default if given is None else known[given]


def _seconds(where: str, given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise ConfigError(f"{where} has timeout={given}; it must be a number of seconds from 0.05 to 3600.")
    return seconds


def _none_left(where: str, options: Mapping[str, str], known: str) -> None:
    if options:
        raise ConfigError(f"{where} has the option {next(iter(options))}=, which is not known. Known are {known}.")
