"""Leases in Redis: "somebody alive holds this", said again every third of the lease's time, gone once that has passed.

An exclusive one is a hash of token and note that expires; shared ones are members of a sorted set, each with the end of its
time. Time is the server's. Whoever writes under an exclusive lease passes its token along, so that a process that slept
through its lease changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid

from limaml.errors import StoreError
from limaml.store.redis_server import Server

__all__ = ["Leases", "RedisLease"]

_HOLD = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local token, span, exclusive, again = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', ARGV[4] == '1'
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if exclusive then
  local holder = redis.call('HGET', KEYS[1], 'token')
  if again then
    if holder ~= token then return 0 end
  elseif holder or redis.call('ZCARD', KEYS[2]) > 0 then return 0
  else redis.call('HSET', KEYS[1], 'token', token) end
  redis.call('PEXPIRE', KEYS[1], span)
else
  if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
  redis.call('ZADD', KEYS[2], now + span, token)
  redis.call('PEXPIRE', KEYS[2], 2 * span)
end
return 1
"""

_LET_GO = """
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return redis.call('ZREM', KEYS[2], ARGV[1])
"""

_NOTE = (
    "if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('HSET', KEYS[1], 'note', ARGV[2]) end return 1"
)


class Leases:
    """The leases that this process holds on one server, and the thread that keeps them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._held: set[RedisLease] = set()
        self._guard = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def lease(self, name: str) -> RedisLease:
        return RedisLease(self, name)

    def keep(self, lease: RedisLease) -> None:
        with self._guard:
            self._held.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, name="limaml-leases", daemon=True)
                self._thread.start()

    def forget(self, lease: RedisLease) -> None:
        with self._guard:
            self._held.discard(lease)

    def close(self) -> None:
        self._end.set()
        for lease in list(self._held):
            lease.release()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(2 * self.server.address.timeout)

    def _renew(self) -> None:
        while not self._end.wait(self.server.address.lease / 3):
            with self._guard:
                held = list(self._held)
            for lease in held:
                with contextlib.suppress(StoreError):  # the server may be back before the lease is over
                    lease.renew()


class RedisLease:
    """`take` says whether it was got; it never waits for another holder."""

    def __init__(self, leases: Leases, name: str) -> None:
        self._leases, self._server = leases, leases.server
        stem = f"{self._server.key}:lease:{name}"
        self._keys = [stem, f"{stem}:shared"]
        self._token = uuid.uuid4().hex
        self._exclusive = self._mine = False
        self._process, self._until = os.getpid(), 0.0

    @property
    def fence(self) -> tuple[str, str]:
        """What a transaction must find to be this lease's holder's."""
        return self._keys[0], self._token

    def take(self, *, exclusive: bool) -> bool:
        self._exclusive = exclusive
        self._mine = self._hold(again=False)
        if self._mine:
            self._leases.keep(self)
        return self._mine

    def renew(self) -> None:
        if self._mine and not self._hold(again=True):
            self._mine = False
            self._leases.forget(self)

    def release(self, *, remove: bool = False) -> None:
        if self._process != os.getpid():
            return  # a fork's copy: the lease is its parent's
        self._mine = False
        self._leases.forget(self)
        with contextlib.suppress(StoreError):  # it ends by itself
            self._server.script(_LET_GO, self._keys, self._token)

    @property
    def valid(self) -> bool:
        return self._mine and self._process == os.getpid() and time.monotonic() < self._until

    def note(self, text: str) -> None:
        self._server.script(_NOTE, self._keys[:1], self._token, text)

    def read_note(self) -> str:
        """The holder's word; waits a moment for one that is just being left."""
        for _ in range(20):
            found = self._server.call("HGET", self._keys[0], "note")
            if found is not None:
                return str(found.decode(errors="replace"))
            time.sleep(0.005)
        return ""

    def _hold(self, again: bool) -> bool:
        begun, span = time.monotonic(), self._server.address.lease
        arguments = (self._token, int(span * 1000), int(self._exclusive), int(again))
        got = bool(self._server.script(_HOLD, self._keys, *arguments) == 1)
        if got:
            self._until = begun + span
        return got
