"""Model folders in Redis, in pieces, and copies of them in a local folder where they can be read."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from limaml.artifact import copy_folder, verify_folder
from limaml.errors import ArtifactError, StoreError
from limaml.store.redis_server import Server

__all__ = ["RedisFolders"]

_PIECE = 4 * 2**20
_GRACE = 3600.0
"""Seconds that a folder which no version names is left: its publisher may not have begun the version yet."""


class RedisFolders:
    """Documents `model/DIGEST` say under which token the pieces lie; `upload/TOKEN` that they are on their way."""

    def __init__(self, server: Server, cache: Path) -> None:
        self._server, self._cache = server, cache

    def put(self, folder: str | Path) -> str:
        """Copy a folder here, verified; returns its digest."""
        digest = verify_folder(folder).digest
        if self._touch(digest):
            return digest
        token = uuid.uuid4().hex
        self._server.write(lambda txn: txn.put(b"upload/" + token.encode(), _stamp(token)))
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "model"
            if copy_folder(folder, place).digest != digest:
                raise StoreError(f"The model folder {folder} was replaced while it was copied; put it again.")
            for file in sorted(place.iterdir()):
                with file.open("rb") as content:
                    number = 0
                    while (piece := content.read(_PIECE)) or number == 0:
                        self._server.call("HSET", self._key(token), f"{number:06d}/{file.name}", piece)
                        number += 1

        def publish(txn: Any) -> None:
            txn.delete(b"upload/" + token.encode())
            txn.put(_name(digest), _stamp(token))

        self._server.write(publish)
        return digest

    def has(self, digest: str) -> bool:
        return digest in self.digests()

    is_kept = has  # a version that names a folder keeps it: both are in one catalogue

    def digests(self) -> list[str]:
        start = b"model/"
        return self._server.read(
            lambda txn: sorted(key[len(start) :].decode() for key in txn.documents if key.startswith(start))
        )

    def path(self, digest: str) -> Path:
        raw = self._server.read(lambda txn: txn.get(_name(digest)))
        if raw is None:
            raise StoreError(f"The store has no model folder {digest!r}; it has {', '.join(self.digests()) or 'none'}.")
        place = self._cache / digest
        try:
            if place.is_dir() and verify_folder(place).digest == digest:
                return place
        except ArtifactError:
            shutil.rmtree(place, ignore_errors=True)  # the copy was damaged
        with tempfile.TemporaryDirectory() as scratch:
            key, loaded = self._key(json.loads(raw)["token"]), Path(scratch) / "model"
            loaded.mkdir()
            for name in sorted(self._server.call("HKEYS", key)):
                with (loaded / Path(name.decode().partition("/")[2]).name).open("ab") as file:
                    file.write(self._server.call("HGET", key, name) or b"")
            if copy_folder(loaded, place).digest != digest:
                raise StoreError(
                    f"The model folder {digest} in the store {self._server.path} is damaged; put it again."
                )
        return place

    def size(self) -> int:
        raws = self._server.read(lambda txn: [raw for key, raw in txn.documents.items() if key.startswith(b"model/")])
        usage = self._server.many([("MEMORY USAGE", self._key(json.loads(raw)["token"])) for raw in raws])
        return sum(number or 0 for number in usage)

    def remove(self, digest: str, used: Callable[[Any], Collection[str | None]]) -> None:
        """Remove a folder if `used(txn)`, what versions name, does not have it."""
        self._delete(lambda txn: [_name(digest)] if digest not in used(txn) else [])

    def sweep(self, used: Callable[[Any], Collection[str | None]]) -> list[str]:
        """Remove the folders that no version names and that were put an hour ago or more; returns their digests."""

        def old(txn: Any) -> list[bytes]:
            names = {_name(digest) for digest in used(txn) if digest is not None}
            return [
                key
                for key, raw in txn.documents.items()
                if key.startswith((b"model/", b"upload/"))
                and key not in names
                and not 0 <= time.time() - json.loads(raw)["put"] < _GRACE
            ]

        return [key.decode()[6:] for key in self._delete(old) if key.startswith(b"model/")]

    def _delete(self, choose: Callable[[Any], list[bytes]]) -> list[bytes]:
        def work(txn: Any) -> list[tuple[bytes, str]]:
            chosen = [(key, json.loads(txn.get(key))["token"]) for key in choose(txn) if txn.get(key) is not None]
            for key, _ in chosen:
                txn.delete(key)
            return chosen

        gone = self._server.write(work)
        self._server.many([("UNLINK", self._key(token)) for _, token in gone])
        return [key for key, _ in gone]

    def _touch(self, digest: str) -> bool:
        def work(txn: Any) -> bool:
            raw = txn.get(_name(digest))
            if raw is not None:
                txn.put(_name(digest), _stamp(json.loads(raw)["token"]))
            return raw is not None

        return self._server.write(work)

    def _key(self, token: str) -> str:
        return f"{self._server.address.prefix}:model:{token}"


def _name(digest: str) -> bytes:
    return b"model/" + digest.encode("utf-8", "surrogatepass")


def _stamp(token: str) -> bytes:
    return json.dumps({"token": token, "put": time.time()}).encode()
