"""From the address of a store to the store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from limaml.errors import StoreError
from limaml.store.contract import Store
from limaml.store.lmdb import LmdbStore
from limaml.store.redis import RedisStore

__all__ = ["open_store"]

_SCHEMES = ("lmdb", "redis", "rediss")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters or more: C:\store is a path


def open_store(address: str | Path, **options: Any) -> Store:
    """Open the store at a path or at `lmdb:///absolute/path` (`lmdb://relative/path` and percent signs work too), or at
    `redis[s]://[user:password@]host:port[/db]`; `RedisStore` says what may follow a '?', such as `cluster=true`.

    Options: `create` (default True: a new folder becomes a store), `map_size` (of LMDB: bytes of address space
    to begin with; it grows), `buffer_bytes` (what a publication gathers before it writes). Raises `StoreError` for a scheme that
    no backend has, and for a folder that is something else.
    """
    text = str(address)
    match = None if isinstance(address, Path) else _SCHEME.match(text)
    if match is None:
        if not text:
            raise StoreError("The address of a store is empty; give a path, or lmdb:///path.")
        return LmdbStore(text, **options)
    scheme = match[1].lower()
    if scheme not in _SCHEMES:
        known = ", ".join(f"{each}://" for each in _SCHEMES)
        raise StoreError(f"{text!r} has the scheme '{scheme}://', which no store has; known are a path and {known}.")
    if scheme != "lmdb":
        return RedisStore(text, **options)
    parts = urlsplit(text)
    if parts.query or parts.fragment:
        raise StoreError(
            f"{text!r} has something behind '?' or '#', which lmdb:// does not know; write '%3F' or '%23'."
        )
    path = unquote(parts.netloc + parts.path)
    if not path:
        raise StoreError(f"{text!r} has no path; write lmdb:///path.")
    return LmdbStore(path, **options)
