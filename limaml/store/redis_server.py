"""A Redis or Valkey server, or a cluster of them: its address, its failures as sentences, and the catalogue's transactions.

The catalogue is one hash, so that it is in one slot of a cluster. A transaction reads it whole (it is small), and writes what
changed in one script that refuses if anybody wrote meanwhile; then it is done again.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from limaml.errors import StoreDown, StoreError, require
from limaml.store.documents import Documents

__all__ = ["Address", "RedisDocuments", "Server", "parse_address"]

_T = TypeVar("_T")
_LARGEST_WAIT, _ATTEMPTS = 0.05, 200

_COMMIT = """
if KEYS[2] and redis.call('HGET', KEYS[2], 'token') ~= ARGV[3] then return -1 end
if redis.call('HGET', KEYS[1], 'last') == ARGV[2] then return 1 end
if (redis.call('HGET', KEYS[1], 'revision') or '0') ~= ARGV[1] then return 0 end
for at = 4, #ARGV, 3 do
  if ARGV[at] == 'put' then redis.call('HSET', KEYS[1], ARGV[at + 1], ARGV[at + 2])
  else redis.call('HDEL', KEYS[1], ARGV[at + 1]) end
end
redis.call('HSET', KEYS[1], 'last', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'revision', 1)
return 1
"""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limaml" / "models"


@dataclass(frozen=True)
class Address:
    """Where the servers are and how long to wait for them. Times are in seconds."""

    nodes: tuple[tuple[str, int], ...]
    tls: bool = False
    cluster: bool = False
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    prefix: str = "limaml"  # of all keys
    timeout: float = 5.0  # for an answer
    connect_timeout: float = 2.0
    lease: float = 30.0  # until a publisher or reader that gives no sign of life counts as dead
    buckets: int = 16  # that a store is begun with: hashes for each task type of a version, at least one for each node
    cache: Path = field(default_factory=_cache)  # folder for copies of model folders
    ca: str | None = None  # files for TLS: authority, and the client's own certificate and key
    cert: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        nodes = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        return (
            f"redis{'s' if self.tls else ''}://{nodes}{'' if self.cluster else f'/{self.db}'} (prefix '{self.prefix}')"
        )


def parse_address(text: str) -> Address:
    """`redis[s]://[user:password@]host[:port][,host:port…][/db][?cluster=true&prefix=…&timeout=…]`."""
    parts = urlsplit(text)
    where = f"The address {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    nodes = []
    for node in parts.netloc.rpartition("@")[2].split(","):
        try:
            one = urlsplit(f"//{node}")
            nodes.append((one.hostname or "localhost", one.port or 6379))
        except ValueError as error:
            raise StoreError(f"{where} has the node {node!r}, which is no host and port: {error}.") from None
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    found: dict[str, Any] = {"nodes": tuple(nodes), "tls": parts.scheme.lower() == "rediss"}
    found |= {name: unquote(given) for name, given in (("user", user), ("password", password)) if given}
    if parts.path.strip("/"):
        if not parts.path.strip("/").isdigit():
            raise StoreError(f"{where} must end with the number of a database, such as /0, or with nothing.")
        found["db"] = int(parts.path.strip("/"))
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "cluster" and value.lower() in ("true", "false", "1", "0"):
            found[name] = value.lower() in ("true", "1")
        elif name in ("timeout", "connect_timeout", "lease"):
            found[name] = _seconds(where, name, value)
        elif name == "buckets" and value.isdecimal() and 1 <= int(value) <= 4096:
            found[name] = int(value)
        elif (name == "prefix" and value and not set(value) & set("{}")) or (name in ("ca", "cert", "key") and value):
            found[name] = value
        elif name == "cache" and value:
            found[name] = Path(value)
        else:
            raise StoreError(
                f"{where} has the option {name}={value}, which cannot be used. Known are cluster=true, prefix=NAME (without "
                "braces), timeout=, connect_timeout= and lease= in seconds, buckets= from 1 to "
                "4096, cache=FOLDER, and ca=, cert=, key=FILE for rediss://."
            )
    if parts.fragment:
        raise StoreError(f"{where} has something behind '#'; write '%23' inside a name or a password.")
    address = Address(**found)
    if address.cluster and address.db:
        raise StoreError(
            f"{where} names database {address.db}, but a cluster has 0 alone; tell stores apart by prefix=NAME."
        )
    if len(nodes) > 1 and not address.cluster:
        raise StoreError(f"{where} names {len(nodes)} nodes; add ?cluster=true, or leave one.")
    return address


def _seconds(where: str, name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 86400:
        raise StoreError(f"{where} has {name}={value}; it must be a number of seconds from 0.05 to 86400.")
    return seconds


class Transaction:
    """One state of the catalogue, and what is to be written."""

    def __init__(self, documents: dict[bytes, bytes]) -> None:
        self.documents = documents
        self.changes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes, default: bytes | None = None, db: Any = None) -> bytes | None:
        return self.documents.get(key, default)

    def put(self, key: bytes, value: bytes, db: Any = None) -> None:
        self.documents[key] = self.changes[key] = value

    def delete(self, key: bytes, db: Any = None) -> bool:
        self.changes[key] = None
        return self.documents.pop(key, None) is not None


class RedisDocuments(Documents):
    """The catalogue's documents in a `Transaction`."""

    def documents(self, txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return ((key, value) for key, value in sorted(txn.documents.items()) if key.startswith(prefix))


class Server:
    """A client with its failures translated. Every wait is bounded by the address's timeouts; nothing is tried twice
    but for what a cluster moved, so that no change is made twice."""

    catalog: Any = None  # `Transactions`: transactions here have one set of documents

    def __init__(self, address: Address) -> None:
        self.address, self.path = address, str(address)
        self._redis = require("redis", "redis")
        self.key = f"{address.prefix}:{{{address.prefix}}}:catalog"
        with self.spoken_to():
            self.client = self._connect()
            self.client.ping()

    def _connect(self) -> Any:
        address = self.address
        once = self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0)
        options: dict[str, Any] = {
            "username": address.user,
            "password": address.password,
            "socket_timeout": address.timeout,
            "socket_connect_timeout": min(address.connect_timeout, address.timeout),
            "retry": once,
        }
        if address.tls:
            options |= {
                "ssl": True,
                "ssl_ca_certs": address.ca,
                "ssl_certfile": address.cert,
                "ssl_keyfile": address.key,
            }
        if not address.cluster:
            host, port = address.nodes[0]
            return self._redis.Redis(host=host, port=port, db=address.db, **options)
        nodes = [self._redis.cluster.ClusterNode(host, port) for host, port in address.nodes]
        return self._redis.RedisCluster(startup_nodes=nodes, **options)

    def close(self) -> None:
        self.client.close()

    # ---------------------------------------------------------------------------------------------------- commands

    def call(self, *command: Any) -> Any:
        with self.spoken_to():
            return self.client.execute_command(*command)

    def script(self, code: str, keys: Sequence[str], *arguments: Any) -> Any:
        return self.call("EVAL", code, len(keys), *keys, *arguments)

    def many(self, commands: Sequence[tuple[Any, ...]], atomic: bool = False) -> list[Any]:
        """Answers to many commands, sent together; `atomic` makes them one step where there is one server."""
        if not commands:
            return []
        with self.spoken_to(), self.client.pipeline(transaction=atomic and not self.address.cluster) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            found: list[Any] = pipeline.execute()
            return found

    @contextmanager
    def spoken_to(self) -> Iterator[None]:
        errors = self._redis.exceptions
        try:
            yield
        except errors.OutOfMemoryError as error:
            raise StoreError(
                f"The store {self.path} is full ({error}). What it serves is untouched: expire versions, or give it more memory."
            ) from error
        except (
            errors.AuthenticationError,
            errors.NoPermissionError,
            errors.AuthenticationWrongNumberOfArgsError,
        ) as error:
            raise StoreError(
                f"The store {self.path} refuses this user: {error}. Correct user:password@ in the address, or what the user may do."
            ) from error
        except (
            errors.ConnectionError,
            errors.TimeoutError,
            errors.ClusterError,
            errors.RedisClusterException,
            OSError,
        ) as error:
            raise StoreDown(
                f"The store {self.path} does not answer: {str(error).rstrip('.')}. See whether the server runs and the address is "
                f"right (an answer is waited for {self.address.timeout:g} s); a change that was under way may have been made."
            ) from error
        except errors.RedisError as error:
            raise StoreError(f"The store {self.path} refuses: {error}.") from error

    # ------------------------------------------------------------------------------------------------ transactions

    def read(self, work: Callable[[Any], _T]) -> _T:
        return work(self._snapshot())

    def write(self, work: Callable[[Any], _T], lease: tuple[str, str] | None = None) -> _T:
        """With `lease`, a lease's key and token, only while it is held."""
        for attempt in range(_ATTEMPTS):
            txn = self._snapshot()
            revision = txn.documents.get(b"revision", b"0")
            result = work(txn)
            changes = [
                ("put", key, value) if value is not None else ("del", key, b"") for key, value in txn.changes.items()
            ]
            if not changes:
                return result
            keys, token = ([self.key, lease[0]], lease[1]) if lease else ([self.key], "")
            flat = [part for change in changes for part in change]
            done = self.script(_COMMIT, keys, revision, uuid.uuid4().hex, token, *flat)
            if done == 1:
                return result
            if done == -1:
                raise StoreError(
                    f"This publication lost its lease on the store {self.path}, as it gave no sign of life for "
                    f"{self.address.lease:g} s, and changed nothing. Begin again, with resume."
                )
            time.sleep(random.random() * min(_LARGEST_WAIT, 0.001 * 2**attempt))
        raise StoreError(f"The catalogue of the store {self.path} is changed by others all the time; try again.")

    def _snapshot(self) -> Transaction:
        return Transaction(dict(self.call("HGETALL", self.key)))
