"""Messages that could not become rows, kept with the reason until somebody looks: one SQLite file, `RUN/dead-letters.sqlite`.

A message is there once for each position of its partition, however often it is delivered. It is durable when `put` returns,
and stays until it is replayed, dropped or forgotten; deleted pages are overwritten.
"""

from __future__ import annotations

import datetime
import json
import re
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limaml.errors import DataError, StoreError
from limaml.interactions.atomic_files import locked
from limaml.interactions.keys import join_key, split_key
from limaml.interactions.log import InteractionLog
from limaml.interactions.log_manifest import read_manifest
from limaml.stream.decode import Decoder

__all__ = ["DeadLetter", "DeadLetters", "Replayed", "mentions"]

_DIGITS = 40  # of a position as text that sorts as the number does: a Redis position has up to 128 bits
_TABLE = """CREATE TABLE IF NOT EXISTS letters (
 source TEXT, part TEXT, position TEXT, payload BLOB NOT NULL, reason TEXT NOT NULL, time REAL, at TEXT NOT NULL, batch TEXT,
 PRIMARY KEY (source, part, position)) WITHOUT ROWID"""
_COLUMNS = "source, part, position, payload, reason, time, at"


@dataclass(frozen=True)
class DeadLetter:
    """A message and why it has no row. `time`: when the source took it, seconds since 1970; `at`: when it was refused."""

    source: str
    partition: str
    position: int
    payload: bytes
    reason: str
    time: float | None = None
    at: str = ""  # ISO 8601, UTC

    @property
    def id(self) -> str:
        """`kafka:clicks:3@1234`."""
        return f"{self.source}:{self.partition}@{self.position}"


@dataclass(frozen=True)
class Replayed:
    """What a replay did: `taken` messages are rows of the log now and no letters any more; the `kept` are refused still."""

    taken: int
    kept: int


class DeadLetters:
    """The dead letters of one run folder. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "dead-letters.sqlite"
        self._lock = folder / ".dead-letters.lock"

    def put(self, letters: Iterable[DeadLetter]) -> int:
        """Keep letters durably; returns how many were not there yet."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        rows = [
            (each.source, each.partition, _text(each.position), each.payload, each.reason, each.time, each.at or now)
            for each in letters
        ]
        if not rows:
            return 0
        with self._writing() as connection:
            before = connection.total_changes
            connection.executemany(f"INSERT OR IGNORE INTO letters ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            return connection.total_changes - before

    def count(self) -> int:
        return int(self._select("SELECT count(*) FROM letters")[0][0])

    def list(self, *, source: str | None = None, limit: int | None = None) -> Sequence[DeadLetter]:
        """Letters by source, partition and position."""
        where, arguments = ("WHERE source = ?", [source]) if source is not None else ("", [])
        found = self._select(
            f"SELECT {_COLUMNS} FROM letters {where} ORDER BY source, part, position LIMIT ?",
            [*arguments, -1 if limit is None else limit],
        )
        return [DeadLetter(row[0], row[1], int(row[2]), bytes(row[3]), *row[4:]) for row in found]

    def get(self, name: str) -> DeadLetter:
        """The letter with this id. Raises `DataError` if there is none."""
        found = self._select(f"SELECT {_COLUMNS} FROM letters WHERE (source, part, position) = (?, ?, ?)", _parts(name))
        if not found:
            raise DataError(f"There is no dead letter {name!r}. List them with: limaml dead-letters list RUN.")
        row = found[0]
        return DeadLetter(row[0], row[1], int(row[2]), bytes(row[3]), *row[4:])

    def drop(self, names: Iterable[str] | None = None) -> int:
        """Remove letters by their ids (None: all); returns how many there were."""
        if names is None:
            return self._change("DELETE FROM letters", [()])
        return self._change("DELETE FROM letters WHERE (source, part, position) = (?, ?, ?)", map(_parts, names))

    def forget(self, columns: Sequence[str], keys: Collection[str]) -> int:
        """Remove the letters of tasks that `columns` name, by their keys; returns how many. `mentions` says which."""
        wanted = frozenset(keys)
        return self.drop([each.id for each in self.list() if mentions(each.payload, columns, wanted)])

    def replay(self, decoder: Decoder, log: InteractionLog, names: Collection[str] | None = None) -> Replayed:
        """Decode letters (None: all) again, append what has a row now to the log, and remove it here. Each message gets
        into the log once, wherever this is interrupted."""
        with locked(self._lock, 60.0):
            self._settle(log)
            letters = [self.get(name) for name in names] if names is not None else self.list()
            decoded = decoder.decode([letter.payload for letter in letters])
            for place, why in decoded.refused.items():
                self._change(
                    "UPDATE letters SET reason = ? WHERE (source, part, position) = (?, ?, ?)",
                    [(why, *_parts(letters[place].id))],
                )
            taken = [letters[place] for place in decoded.places]
            if taken:
                batch = uuid.uuid4().hex
                self._change(
                    "UPDATE letters SET batch = ? WHERE (source, part, position) = (?, ?, ?)",
                    [(batch, *_parts(letter.id)) for letter in taken],
                )
                log.append(decoded.rows, key=_key(batch))
                self._settle(log)
            return Replayed(len(taken), len(decoded.refused))

    def _settle(self, log: InteractionLog) -> None:
        """Remove the letters of replays that the log has; those of one that did not come so far are letters again."""
        manifest = read_manifest(log.folder / "manifest.json")
        known = {entry.key for entry in manifest.appends} if manifest is not None else set()
        for (batch,) in self._select("SELECT DISTINCT batch FROM letters WHERE batch IS NOT NULL"):
            if _key(batch) in known:
                self._change("DELETE FROM letters WHERE batch = ?", [(batch,)])
            else:
                self._change("UPDATE letters SET batch = NULL WHERE batch = ?", [(batch,)])

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60.0)  # raises OperationalError where there is no folder
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute(_TABLE)
        except sqlite3.OperationalError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            raise DataError(
                f"The dead letters in {self.path} cannot be read ({error}). Restore the file from a copy, or move it away."
            ) from error
        return connection

    def _select(self, query: str, arguments: Sequence[object] = ()) -> Sequence[Any]:
        if not self.path.exists():
            return [(0,)] if "count(" in query else []
        with closing(self._connect()) as connection:
            return connection.execute(query, arguments).fetchall()

    def _change(self, query: str, arguments: Iterable[Sequence[object]]) -> int:
        if not self.path.exists():
            return 0
        with self._writing() as connection:
            return connection.executemany(query, arguments).rowcount

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self._connect()) as connection, connection:
                yield connection
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"The dead letters in {self.path} cannot be written ({error}). Nothing was changed; make room, or see who "
                "holds the file."
            ) from error


def mentions(payload: bytes, columns: Sequence[str], keys: Collection[str]) -> bool:
    """Whether a message is of one of these tasks. One that does not say whose it is counts if it holds a key as a word."""
    with suppress(ValueError, RecursionError):
        found = json.loads(payload)
        if isinstance(found, dict) and all(_is_id(found.get(column)) for column in columns):
            parts = [found[column] for column in columns]
            return join_key([str(int(p)) if isinstance(p, float) and p.is_integer() else str(p) for p in parts]) in keys
    for key in keys:
        words = [re.escape(part.encode()) for part in split_key(key, len(columns))]
        if all(re.search(rb"(?<![0-9A-Za-z_])" + word + rb"(?![0-9A-Za-z_])", payload) for word in words):
            return True
    return False


def _is_id(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _text(position: int) -> str:
    return f"{position:0{_DIGITS}d}"


def _parts(name: str) -> tuple[str, str, str]:
    """Source, partition and position of an id, as the table has them."""
    place, _, position = name.rpartition("@")
    source, _, partition = place.rpartition(":")
    if not source or not position.isdigit() or len(position) > _DIGITS:
        raise DataError(
            f"{name!r} is no dead letter's id, which looks like kafka:clicks:3@1234 (limaml dead-letters list RUN)."
        )
    return source, partition, _text(int(position))


def _key(batch: str) -> str:
    return f"replay:{batch}"
