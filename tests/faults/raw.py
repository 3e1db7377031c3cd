"""The bytes of a store by their documentation alone (`store/packing.py`, `lmdb.py`, `redis.py`, `redis_values.py`): a second
reading, that shares no code with the first. Reads whole stores, and believes nothing but the format.

    LMDB       data.mdb: database `catalog` of JSON documents, `embeddings` of values that were upserted; runs/…: published ones
    Redis      PREFIX:{PREFIX}:catalog, a hash of the same documents; PREFIX:{TAG}:NUMBER:PLACE, hashes of values, and …:header

Who was forgotten lies in LMDB's database `forgotten` and in PREFIX:{TAG}:forgotten. Rows that `erase/FILE` lists cannot be read any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import lmdb
import numpy as np
from numpy.typing import NDArray

from tests.store.format import COLD_TEXT, check_of, id_hash, read_run

COLD = ""  # stands for the id of a task type's cold embedding
_NAME = "faults"  # of our own connections
_DTYPES = {0: "<f4", 1: "<f2", 2: "i1"}


class Damaged(AssertionError):
    """A value that is not what the documentation says."""


@dataclass(frozen=True)
class Value:
    count: int
    newest: int
    vector: NDArray[np.float32]
    check: int
    bytes: int  # of its key and itself, as the backend has them


@dataclass
class Tally:
    count: int = 0
    checksum: int = 0
    bytes: int = 0
    cold: int | None = None


@dataclass
class Contents:
    """A whole store: documents by kind, model and version; values by version number and task type's place."""

    documents: dict[str, Any] = field(default_factory=dict)
    values: dict[tuple[int, int], dict[str, Value]] = field(default_factory=dict)  # id → value
    headers: dict[tuple[int, int], Tally] = field(default_factory=dict)  # where counts lie with the values
    left_over: list[str] = field(default_factory=list)  # keys that nothing explains

    def current(self, model: str) -> str | None:
        found: str | None = self.documents.get(f"current/{model}")
        return found

    def records(self) -> list[dict[str, Any]]:
        return [document for key, document in self.documents.items() if key.startswith("record/")]


def decode(prefix: bytes, identity: bytes, raw: bytes, own_bytes: int) -> tuple[str, Value]:
    """The id and the value that lie under `prefix + identity`. Raises `Damaged`."""
    size = _size(identity, raw)
    tail = raw[size:]
    if identity == b"\x02":
        text, name = COLD_TEXT, COLD
    elif identity[:1] == b"\x01":
        if hashlib.blake2b(tail, digest_size=32).digest() != identity[1:]:
            raise Damaged(f"{identity!r} keeps an id that is not its own")
        text, name = tail, tail.decode("utf-8", "surrogatepass")
    else:
        if tail or identity[:1] != b"\x00":
            raise Damaged(f"{identity!r} has {len(tail)} bytes too many")
        text, name = identity[1:], identity[1:].decode("utf-8", "surrogatepass")
    return name, _value(prefix, text, raw[:size], own_bytes)


def _size(identity: bytes, raw: bytes) -> int:
    if len(raw) < 24:
        raise Damaged(f"{identity!r} has {len(raw)} bytes")
    form, dtype, dim = struct.unpack("<BBH", raw[:4])
    if form != 2 or dtype not in _DTYPES:
        raise Damaged(f"{identity!r} has format {form} and dtype {dtype}")
    return -(-(24 + dim * np.dtype(_DTYPES[dtype]).itemsize) // 8) * 8


def _value(prefix: bytes, text: bytes, raw: bytes, own_bytes: int) -> Value:
    if len(raw) != _size(text, raw):
        raise Damaged(f"{text!r} has {len(raw)} bytes")
    _, dtype, dim, count, newest, scale, check = struct.unpack("<BBHIqf", raw[:20]) + struct.unpack("<I", raw[-4:])
    if check_of(raw, text, prefix) != check:
        raise Damaged(f"{text!r} has another check than its bytes")
    vector = np.frombuffer(raw, np.dtype(_DTYPES[dtype]), dim, 20).astype(np.float32) * np.float32(scale)
    return Value(count, newest, vector, check, own_bytes)


def _document(raw: bytes) -> Any:
    return json.loads(raw) if raw[:1] in (b"{", b"[") else raw.decode()


def read_lmdb(path: Path) -> Contents:
    """The store in a folder. Not for a process that has it open already."""
    contents, upserted = Contents(), dict[bytes, list[bytes]]()
    with lmdb.open(str(path), readonly=True, max_dbs=8, map_size=2**30) as environment:
        catalog, values = (
            environment.open_db(b"catalog", create=False),
            environment.open_db(b"embeddings", create=False),
        )
        with environment.begin() as txn:
            for key, raw in txn.cursor(catalog):
                contents.documents[key.decode()] = _document(raw)
            contents.left_over = [file.name for file in (path / "runs").glob("*")]
            for record in contents.records():
                if record["state"] == "removing":
                    continue  # its files are on their way out
                totals = contents.documents.get(f"totals/{record['model']}/{record['id']}", {"types": {}})
                for place, task_type in enumerate(record["dims"]):
                    kept = contents.values.setdefault((record["number"], place), {})
                    prefix = struct.pack(">IH", record["number"], place)
                    for file in totals["types"].get(task_type, {"runs": []})["runs"]:
                        contents.left_over.remove(file)
                        gone = set(contents.documents.get(f"erase/{file}", ()))
                        for each in read_run(path / "runs" / file):
                            if each.row in gone:
                                continue
                            name = each.raw.decode("utf-8", "surrogatepass")
                            own_bytes = (7 if len(each.raw) <= 400 else 39) + len(each.raw) + len(each.value)
                            kept[name] = _value(
                                prefix, each.raw, each.value, own_bytes
                            )  # a later file hides an earlier one
            for key, raw in txn.cursor(values):
                number, place = struct.unpack(">IH", key[:6])
                if key[6:] == b"\x03":  # behind all values of its prefix
                    _check_marks(raw, upserted.get(key[:6], []))
                    continue
                if key[6:] != b"\x02":
                    upserted.setdefault(key[:6], []).append(key[7:] if key[6] == 0 else raw[_size(key, raw) :])
                name, value = decode(key[:6], key[6:], raw, len(key) + len(raw))
                contents.values.setdefault((number, place), {})[name] = value
    return contents


def _check_marks(raw: bytes, ids: list[bytes]) -> None:
    """The bits that say which ids may have an upsert."""
    (count,), bits = struct.unpack("<Q", raw[:8]), raw[8:]
    assert len(bits) in (2**12, 2**14, 2**16, 2**18)
    assert count == sum(map(int.bit_count, bits))
    for each in ids:
        at = id_hash(each) * (8 * len(bits)) >> 64
        if not bits[at // 8] >> at % 8 & 1:
            raise Damaged(f"{each!r} has an upsert that is not marked")


def read_redis(address: str) -> Contents:
    """The store at an address like `redis://127.0.0.1:6379?prefix=x&cluster=true`, once nobody else speaks to the server."""
    import redis

    parts = urlsplit(address)
    options = parse_qs(parts.query)
    prefix, cluster = options["prefix"][0], options.get("cluster") == ["true"]
    contents = Contents()
    host, port = parts.hostname or "", parts.port or 0
    _wait_for_silence(host, port, cluster)
    kind = redis.RedisCluster if cluster else redis.Redis
    with contextlib.closing(kind(host=host, port=port)) as client:
        for key, raw in client.hgetall(f"{prefix}:{{{prefix}}}:catalog").items():
            contents.documents[key.decode()] = _document(raw)
        for key in client.scan_iter(match=f"{prefix}:*", count=1000):
            found = re.fullmatch(rf"{re.escape(prefix)}:\{{\w+\}}:(\d+):(\d+)(:header)?", key.decode())
            if found is None:
                known = rf"{re.escape(prefix)}:(\{{{re.escape(prefix)}\}}:catalog|model:|\{{\w+\}}:forgotten$)"
                if not re.match(known, key.decode()):
                    contents.left_over.append(key.decode())
                continue
            number, place = int(found[1]), int(found[2])
            start = struct.pack(">IH", number, place)
            fields = client.hgetall(key)
            if found[3]:
                header = contents.headers.setdefault((number, place), Tally())
                header.count += int(fields.get(b"count", 0))
                header.checksum += int(fields.get(b"checksum", 0))
                header.bytes += int(fields.get(b"bytes", 0))
                header.cold = int(fields[b"cold"]) if b"cold" in fields else header.cold
                continue
            kept = contents.values.setdefault((number, place), {})
            for identity, raw in fields.items():
                name, value = decode(start, identity, raw, len(identity) + len(raw))
                assert name not in kept, f"{name!r} lies in two buckets"
                kept[name] = value
    return contents


def _wait_for_silence(host: str, port: int, cluster: bool) -> None:
    """Until the servers have done all that killed clients had sent: their lists of clients show ours alone."""
    import redis

    with ExitStack() as stack:
        first = stack.enter_context(redis.Redis(host, port, client_name=_NAME))
        ports = {share[2][1] for share in first.execute_command("CLUSTER SLOTS")} if cluster else {port}
        others = [redis.Redis(host, other, client_name=_NAME) for other in ports - {port}]
        clients = [first, *(stack.enter_context(other) for other in others)]
        until = time.monotonic() + 20
        while any(entry["name"] != _NAME and entry["flags"] != "S" for one in clients for entry in one.client_list()):
            assert time.monotonic() < until, "somebody else speaks to the servers"
            time.sleep(0.01)
