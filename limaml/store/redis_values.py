"""The embeddings in Redis: which keys hold them, and the scripts that change and check them.

One task type of one version is spread over *buckets* (16, or as many as the store was begun with) by a hash of the task's
identity. A bucket is a hash from identity to packed value, and beside it a *header*: its count, checksum and bytes. Both have
the same hash tag, so that they are in one slot of a cluster and one script changes them together; the tags are chosen so that
buckets lie evenly over the slots.
A bucket without a header belongs to a version that was removed: nothing can be written into it any more. A third key with that
tag, a hash of all versions, holds the tombstones of the bucket's tasks: task type and identity → the id, where it was hashed. The
script that writes reads it, and the one that forgets removes and forbids in one step.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from limaml.errors import StoreError
from limaml.store.batch import (
    Batch,
    Layout,
    check_values,
    cold_rows,
    damaged,
    name_of,
    owners,
    raw_of,
    readable,
    text_of,
)
from limaml.store.catalog import Tally
from limaml.store.catalogued import Stored
from limaml.store.packing import COLD, checks, checksum
from limaml.store.redis_server import Server

__all__ = ["Values", "estimate_bytes"]

_SLOTS = 16384
_BUCKET_BYTES = 300  # of two keys, a header and an empty bucket
_SMALL = 2000
"""Embeddings in a bucket that are read in one step; larger buckets are walked."""

# KEYS: header, bucket, tombstones; header, bucket, tombstones; …  ARGV: size of a value, number of task types that own it, these,
# then for each bucket n and n times identity, value. The event time is compared in two halves: a Lua number has 53 bits.
_WRITE = """
local size, owners, applied, kept_out = tonumber(ARGV[1]), tonumber(ARGV[2]), 0, {}
local at = 3 + owners
for k = 1, #KEYS, 3 do
  if redis.call('EXISTS', KEYS[k]) == 0 then return {-1, '', {}} end
end
local start, banned = {}, {}
for k = 1, #KEYS, 3 do
  start[k] = at
  local tombstones = redis.call('EXISTS', KEYS[k + 2]) == 1
  for i = at + 1, at + 2 * tonumber(ARGV[at]), 2 do
    if tombstones then
      for o = 3, 2 + owners do
        if redis.call('HEXISTS', KEYS[k + 2], ARGV[o] .. ARGV[i]) == 1 then banned[ARGV[i]] = true end
      end
      if banned[ARGV[i]] then kept_out[#kept_out + 1] = ARGV[i] end
    end
    local old = redis.call('HGET', KEYS[k + 1], ARGV[i])
    if old and (#old < size or string.sub(old, 1, 4) ~= string.sub(ARGV[i + 1], 1, 4)) then return {-2, ARGV[i], {}} end
  end
  at = at + 1 + 2 * tonumber(ARGV[at])
end
for k = 1, #KEYS, 3 do
  local count, sum, bytes, first = 0, 0, 0, start[k]
  for i = first + 1, first + 2 * tonumber(ARGV[first]), 2 do
    local name, new = ARGV[i], ARGV[i + 1]
    local old = redis.call('HGET', KEYS[k + 1], name)
    local above = not banned[name]
    if above and old then
      local n0, low0, high0 = struct.unpack('<I4I4i4', old, 5)
      local n1, low1, high1 = struct.unpack('<I4I4i4', new, 5)
      above = n1 > n0 or (n1 == n0 and (high1 > high0 or (high1 == high0 and low1 > low0)))
      if above then sum = sum - struct.unpack('<I4', old, size - 3) end
    elseif above then
      count, bytes = count + 1, bytes + #name + #new
    end
    if above then
      redis.call('HSET', KEYS[k + 1], name, new)
      sum, applied = sum + struct.unpack('<I4', new, size - 3), applied + 1
    end
  end
  redis.call('HINCRBY', KEYS[k], 'count', count)
  redis.call('HINCRBY', KEYS[k], 'checksum', string.format('%.0f', sum))
  redis.call('HINCRBY', KEYS[k], 'bytes', bytes)
end
return {applied, '', kept_out}
"""

# KEYS: tombstones, then header, bucket of each version's task type.  ARGV: n, n times (task type .. identity, id or ''), then for
# each pair of keys the size of a value, then the n identities. Returns how many tombstones are new, and what each pair lost.
_FORGET = """
local n, added, lost = tonumber(ARGV[1]), 0, {}
for i = 2, 2 * n, 2 do added = added + redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) end
local pairs = (#KEYS - 1) / 2
for p = 1, pairs do
  local header, bucket, size = KEYS[2 * p], KEYS[2 * p + 1], tonumber(ARGV[1 + 2 * n + p])
  local count, sum, bytes = 0, 0, 0
  for i = 2 + 2 * n + pairs, #ARGV do
    local old = redis.call('HGET', bucket, ARGV[i])
    if old then
      count, bytes = count + 1, bytes + #ARGV[i] + #old
      if #old >= size then sum = sum + struct.unpack('<I4', old, size - 3) end
      redis.call('HDEL', bucket, ARGV[i])
    end
  end
  if count > 0 then
    redis.call('HINCRBY', header, 'count', -count)
    redis.call('HINCRBY', header, 'checksum', string.format('%.0f', -sum))
    redis.call('HINCRBY', header, 'bytes', -bytes)
  end
  lost[p] = count
end
return {added, lost}
"""

_WRITE_COLD = """
if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
local old = redis.call('HGET', KEYS[2], ARGV[1])
if not old then redis.call('HINCRBY', KEYS[1], 'bytes', #ARGV[1] + #ARGV[2]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[1], 'cold', ARGV[3])
return 1
"""

_BOTH = "return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2])}"


@cache
def _tags(buckets: int) -> tuple[int, ...]:
    """For each bucket the smallest number whose slot lies in the bucket's share of the slots."""
    from redis.crc import key_slot

    found: dict[int, int] = {}
    number = 0
    while len(found) < buckets:
        found.setdefault(key_slot(str(number).encode()) * buckets // _SLOTS, number)
        number += 1
    return tuple(found[bucket] for bucket in range(buckets))


class Values:
    """Embeddings on one server or cluster. Keys are a layout's prefix and an identity, as everywhere in the store."""

    def __init__(self, server: Server, buckets: int) -> None:
        self._server, self.buckets = server, buckets

    def begin(self, layouts: Sequence[Layout]) -> None:
        self._server.many(
            [
                ("HSETNX", self._keys(layout, bucket)[0], "count", 0)
                for layout in layouts
                for bucket in range(self.buckets)
            ]
        )

    def remove(self, layouts: Sequence[Layout]) -> None:
        """Header and bucket go in one step; the server frees the memory in the background."""
        self._server.many(
            [("UNLINK", *self._keys(layout, bucket)) for layout in layouts for bucket in range(self.buckets)]
        )

    def write(self, batch: Batch) -> Stored:
        """Store what is above the stored revisions, and not forgotten. One step on one server; in a cluster, one for each
        bucket."""
        layout, start = batch.layout, len(batch.layout.prefix)
        names, values = batch.names, batch.values
        parts: list[tuple[tuple[str, ...], list[Any]]] = []
        for bucket, rows in self._shares(layout, names).items():
            pairs: list[Any] = [len(rows)]
            for row in rows:
                pairs += (names[row][start:], values[row])
            parts.append(((*self._keys(layout, bucket), self._tombstones(bucket)), pairs))
        if not parts:
            return Stored(0, set())
        if not self._server.address.cluster:
            parts = [(tuple(key for keys, _ in parts for key in keys), [part for _, flat in parts for part in flat])]
        whose = [owner.encode("utf-8", "surrogatepass") for owner in owners(layout.task_type)]
        found = self._server.many(
            [("EVAL", _WRITE, len(keys), *keys, layout.size, len(whose), *whose, *flat) for keys, flat in parts]
        )
        for applied, name, _ in found:
            if applied == -1:
                raise StoreError(
                    f"Version {layout.version} of model '{layout.model}' was removed: it cannot be written to."
                )
            if applied == -2:
                raise StoreError(damaged(layout, readable(layout, layout.prefix + name)))
        kept_out = {layout.prefix + name for _, _, left_out in found for name in left_out}
        forgotten = (
            {raw for name, raw in zip(names, batch.raws, strict=True) if name in kept_out} if kept_out else set()
        )
        return Stored(sum(applied for applied, _, _ in found), forgotten)

    def forget(self, task_type: str, raws: Sequence[bytes], layouts: Sequence[Layout]) -> tuple[int, list[int]]:
        """Tombstones for ids, and their embeddings gone from `layouts`: one step for each bucket. Returns how many
        tombstones are new, and what each layout lost."""
        added, lost, commands = 0, [0] * len(layouts), []
        for bucket, identities in self._by_bucket(raws).items():
            keys = [self._tombstones(bucket), *(key for layout in layouts for key in self._keys(layout, bucket))]
            flat = [part for name, raw in identities for part in (_stone(task_type, name), raw if name[0] else b"")]
            sizes = [layout.size for layout in layouts]
            names = [name for name, _ in identities]
            commands.append(("EVAL", _FORGET, len(keys), *keys, len(names), *flat, *sizes, *names))
        for new, gone in self._server.many(commands):
            added += new
            lost = [one + other for one, other in zip(lost, gone, strict=True)]
        return added, lost

    def recall(self, task_type: str, raws: Sequence[bytes]) -> int:
        shares = self._by_bucket(raws)
        return sum(
            self._server.many(
                [
                    ("HDEL", self._tombstones(bucket), *(_stone(task_type, name) for name, _ in identities))
                    for bucket, identities in shares.items()
                ]
            )
        )

    def forgotten(self, task_type: str) -> list[str]:
        found = self._server.many([("HGETALL", self._tombstones(bucket)) for bucket in range(self.buckets)])
        start = task_type.encode("utf-8", "surrogatepass")
        return sorted(
            text_of(raw or name[len(start) + 1 :])
            for flat in found
            for name, raw in _mapping(flat).items()
            if name.startswith((start + b"\x00", start + b"\x01"))
        )

    def write_cold(self, layout: Layout, value: bytes) -> None:
        check = int(checks(cold_rows(layout, value))[0])
        if self._server.script(_WRITE_COLD, self._keys(layout, self._bucket(COLD)), COLD, value, check) != 1:
            raise StoreError(
                f"Version {layout.version} of model '{layout.model}' was removed: it cannot be written to."
            )

    def fetch(
        self, layout: Layout, names: Sequence[bytes], *also: tuple[Any, ...]
    ) -> tuple[list[bytes | None], list[Any]]:
        """The values under `names`, one look-up for each bucket, all sent together; and the answers to `also`."""
        shares, start = self._shares(layout, names), len(layout.prefix)
        looks = [
            ("HMGET", self._keys(layout, bucket)[1], *(names[row][start:] for row in rows))
            for bucket, rows in shares.items()
        ]
        answers = self._server.many([*also, *looks], atomic=True)
        values: list[bytes | None] = [None] * len(names)
        for rows, found in zip(shares.values(), answers[len(also) :], strict=True):
            for row, value in zip(rows, found, strict=True):
                values[row] = value
        return values, answers[: len(also)]

    def present(self, layout: Layout, names: Sequence[bytes]) -> list[bool]:
        start = len(layout.prefix)
        keys = [(self._keys(layout, self._bucket(name[start:]))[1], name[start:]) for name in names]
        return [bool(found) for found in self._server.many([("HEXISTS", key, name) for key, name in keys])]

    def pieces(self, layout: Layout, limit: int) -> Iterator[tuple[list[str], list[bytes], list[bytes]]]:
        """Ids, keys and values of a task type, each once, bucket after bucket; not the cold embedding."""
        for bucket in range(self.buckets):
            seen: set[bytes] = set()  # a walk may meet a key twice
            key, cursor = self._keys(layout, bucket)[1], -1
            while cursor:
                with self._server.spoken_to():
                    cursor, part = self._server.client.hscan(key, max(cursor, 0), count=min(limit, _SMALL))
                fresh = [name for name in part if name not in seen and name != COLD]
                seen.update(fresh)
                for start in range(0, len(fresh), limit):  # a small bucket comes whole, whatever was asked for
                    some = fresh[start : start + limit]
                    names, values = [layout.prefix + name for name in some], [part[name] for name in some]
                    raws = [raw_of(layout, name, value) for name, value in zip(names, values, strict=True)]
                    yield [text_of(raw) for raw in raws], names, values

    def tallies(self, layouts: Sequence[Layout]) -> dict[str, Tally]:
        keys = [self._keys(layout, bucket)[0] for layout in layouts for bucket in range(self.buckets)]
        headers = [_header(raw) for raw in self._server.many([("HGETALL", key) for key in keys])]
        return {
            layout.task_type: _total(headers[place * self.buckets : (place + 1) * self.buckets])
            for place, layout in enumerate(layouts)
        }

    def usage(self, layouts: Sequence[Layout]) -> tuple[int, int]:
        """Embeddings, cold ones too, and bytes of memory as the server counts them (large buckets by samples)."""
        pairs = [self._keys(layout, bucket) for layout in layouts for bucket in range(self.buckets)]
        keys = self._server.many([("HLEN", bucket) for _, bucket in pairs])
        used = self._server.many([("MEMORY USAGE", key, "SAMPLES", 20) for pair in pairs for key in pair])
        return sum(keys), sum(number or 0 for number in used)

    def verify(self, layout: Layout) -> int:
        """Read a task type back: every value's check, then the count and the checksum. Returns the count."""
        count, total, headers = 0, 0, []
        for header, pairs in self._buckets(layout):
            cold = pairs.pop(COLD, None)
            names = [layout.prefix + name for name in pairs]
            table = check_values(layout, names, list(pairs.values()))
            count, total = count + len(names), total + checksum(checks(table))
            headers.append(header)
            there = header.cold is not None or cold is not None
            if there and int(checks(cold_rows(layout, cold or b""))[0]) != header.cold:
                raise StoreError(damaged(layout, "(cold)"))
        tally = _total(headers)
        if count != tally.count or total != tally.checksum:
            raise StoreError(
                f"Version {layout.version} of model '{layout.model}' is not as it was written: task type "
                f"'{layout.task_type}' has {count} embeddings with checksum {total}, where {tally.count} with "
                f"{tally.checksum} were put. Publish it again, or serve another version."
            )
        return count

    def _buckets(self, layout: Layout) -> Iterator[tuple[Tally, dict[bytes, bytes]]]:
        """Each bucket with its header as both were at one moment."""
        pairs = [self._keys(layout, bucket) for bucket in range(self.buckets)]
        lengths = self._server.many([("HLEN", bucket) for _, bucket in pairs])
        small = [pair for pair, length in zip(pairs, lengths, strict=True) if length <= _SMALL]
        for header, content in self._server.many([("EVAL", _BOTH, 2, *pair) for pair in small]):
            yield _header(_mapping(header)), _mapping(content)
        for pair, length in zip(pairs, lengths, strict=True):
            if length > _SMALL:
                yield self._steady(*pair)

    def _steady(self, header: str, bucket: str) -> tuple[Tally, dict[bytes, bytes]]:
        for _ in range(3):
            before, content, cursor = self._server.call("HGETALL", header), {}, -1
            while cursor:
                with self._server.spoken_to():
                    cursor, part = self._server.client.hscan(bucket, max(cursor, 0), count=_SMALL)
                content.update(part)
            if self._server.call("HGETALL", header) == before:
                return _header(before), content
        found = self._server.script(_BOTH, [header, bucket])  # written to all the time: read in one step
        return _header(_mapping(found[0])), _mapping(found[1])

    def _keys(self, layout: Layout, bucket: int) -> tuple[str, str]:
        number, place = struct.unpack(">IH", layout.prefix)
        stem = f"{self._server.address.prefix}:{{{_tags(self.buckets)[bucket]}}}:{number}:{place}"
        return f"{stem}:header", stem

    def _bucket(self, identity: bytes) -> int:
        return zlib.crc32(identity) % self.buckets

    def _shares(self, layout: Layout, names: Sequence[bytes]) -> dict[int, list[int]]:
        """Bucket → rows of `names`."""
        start, shares = len(layout.prefix), dict[int, list[int]]()
        for row, name in enumerate(names):
            shares.setdefault(self._bucket(name[start:]), []).append(row)
        return shares

    def _tombstones(self, bucket: int) -> str:
        return f"{self._server.address.prefix}:{{{_tags(self.buckets)[bucket]}}}:forgotten"

    def _by_bucket(self, raws: Sequence[bytes]) -> dict[int, list[tuple[bytes, bytes]]]:
        """Bucket → identities and ids."""
        shares: dict[int, list[tuple[bytes, bytes]]] = {}
        for raw in raws:
            name = name_of(b"", raw)
            shares.setdefault(self._bucket(name), []).append((name, raw))
        return shares


def estimate_bytes(keys: int, identity: int, value: int, buckets: int) -> int:
    """Memory of a task type: entries, and for each bucket its two keys. The constants are what Valkey 9 says of itself
    (`MEMORY USAGE`): small entries of small buckets lie side by side, others are allocated, long values by themselves."""
    if value <= 64 and keys <= 512 * buckets:
        entry = identity + value + 6
    else:
        entry = identity + value + (30 if identity + value <= 115 else 52)
    return keys * entry + buckets * _BUCKET_BYTES


def _stone(task_type: str, identity: bytes) -> bytes:
    return task_type.encode("utf-8", "surrogatepass") + identity


def _mapping(flat: Any) -> dict[bytes, bytes]:
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


def _header(raw: dict[bytes, bytes]) -> Tally:
    cold = raw.get(b"cold")
    count, total, size = (int(raw.get(name, 0)) for name in (b"count", b"checksum", b"bytes"))
    return Tally(count, total, size, None if cold is None else int(cold))


def _total(headers: Sequence[Tally]) -> Tally:
    return Tally(
        sum(header.count for header in headers),
        sum(header.checksum for header in headers),
        sum(header.bytes for header in headers),
        next((header.cold for header in headers if header.cold is not None), None),
    )
