"""What an interaction log holds, as one small JSON file that is replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from limaml.errors import DataError
from limaml.interactions.atomic_files import write_atomically

__all__ = ["Append", "File", "Manifest", "read_manifest", "same_append", "write_manifest"]

FORMAT = 3


@dataclass(frozen=True)
class File:
    """Rows of the appends `first` … `last`, in their order."""

    path: str  # relative to the log's folder, with forward slashes
    bucket: int | None  # None: a tail, whose rows are of any bucket
    rows: int
    bytes: int
    sha256: str
    first: int
    last: int

    @property
    def folded(self) -> bool:
        """Whether each row says itself which append it came in."""
        return self.first != self.last


@dataclass(frozen=True)
class Append:
    """A source that is known by its content or its key, so that it is not taken in twice."""

    digest: str
    rows: int
    key: str | None
    number: int


@dataclass(frozen=True)
class Manifest:
    task_columns: tuple[str, ...]
    buckets: int
    id: str = ""  # drawn when the log was made: what was derived from another log is told by it
    last: int = 0  # number of the newest append; the first was 1
    appends: tuple[Append, ...] = ()
    files: tuple[File, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)  # column → type, for people; the files hold the real ones
    positions: Mapping[str, int] = field(default_factory=dict)  # partition of a stream → highest position taken in

    @property
    def tails(self) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.bucket is None)

    def with_files(self, files: list[File]) -> Manifest:
        return replace(self, files=tuple(files))


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in the file `path`, or None if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise DataError(
                f"The log in {path.parent} has format {raw['format']!r}; this version of limaml reads format {FORMAT}. "
                "Use the version of limaml that wrote it, or make the run folder again (limaml train)."
            )
        return Manifest(
            tuple(raw["task_columns"]),
            int(raw["buckets"]),
            str(raw["id"]),
            int(raw["last"]),
            tuple(Append(**entry) for entry in raw["appends"]),
            tuple(File(**entry) for entry in raw["files"]),
            dict(raw["types"]),
            {str(name): int(position) for name, position in raw["positions"].items()},
        )
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"The manifest of the log, {path}, cannot be read ({type(error).__name__}: {error}). "
            "Restore it from a copy."
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    # No indent and no `asdict`: a stream writes this file several times a second, and both are slow.
    rows = {"appends": [vars(entry) for entry in manifest.appends], "files": [vars(file) for file in manifest.files]}
    write_atomically(path, json.dumps({"format": FORMAT, **vars(manifest), **rows}).encode())


def same_append(manifest: Manifest, digest: str, rows: int, key: str | None) -> bool:
    """Whether this source is in the log; refuses a key that came with another content."""
    for earlier in manifest.appends:
        if key is not None and earlier.key == key:
            if earlier.digest != digest:
                raise DataError(
                    f"Key {key!r} was appended before with other content ({earlier.rows} rows then, {rows} now). Give each "
                    "source a key of its own."
                )
            return True
        if key is None and earlier.key is None and earlier.digest == digest:
            return True
    return False
