"""Request bodies, read whole: never more than the limit, packed or unpacked, and never for ever."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from limaml.serving.tensors import Refused

__all__ = ["SECONDS", "Gone", "Receive", "read_body", "unpacked"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

SECONDS = 30.0
"""For a body to arrive."""

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Gone(Exception):
    """Who asked has hung up."""


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int, seconds: float = SECONDS) -> bytes:
    """The body, unpacked; `Refused` with 413 if it is longer than `limit` bytes, 408 if it takes longer than `seconds`;
    `Gone` if who asked hangs up."""
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise _too_long(limit)
    try:
        async with asyncio.timeout(seconds):
            body = await _whole(receive, limit)
    except TimeoutError:
        raise Refused(408, f"The request's body did not arrive within {seconds:g} s.") from None
    encoding = headers.get(b"content-encoding")
    return body if encoding is None else unpacked(body, encoding.decode("latin-1").strip().lower(), limit)


async def _whole(receive: Receive, limit: int) -> bytes:
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_long(limit)
        more = bool(message.get("more_body"))
    return b"".join(parts)


def unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its Content-Encoding: unpacking stops at the limit, however small the packed body was."""
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW:
        raise Refused(415, f"Content-Encoding {encoding[:40]!r} cannot be read; use gzip, deflate or none.")
    machine = zlib.decompressobj(_WINDOW[encoding])
    try:
        found = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused(400, f"The body is not what Content-Encoding: {encoding} says: {error}.") from None
    if len(found) > limit:
        raise _too_long(limit)
    if not machine.eof:
        raise Refused(400, f"The body ends within its {encoding} data.")
    if machine.unused_data:
        raise Refused(400, f"There are {len(machine.unused_data)} bytes behind the body's {encoding} data.")
    return found


def _too_long(limit: int) -> Refused:
    return Refused(413, f"The body is longer than {limit} bytes, even unpacked; send fewer rows at a time.")
