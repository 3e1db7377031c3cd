"""What an interaction log holds, as one small JSON file that is replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from limaml.errors import DataError
from limaml.interactions.atomic_files import write_atomically

__all__ = ["Append", "File", "Manifest", "read_manifest", "same_append", "write_manifest"]

FORMAT = 1


@dataclass(frozen=True)
class File:
    path: str  # relative to the log's folder, with forward slashes
    bucket: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Append:
    digest: str
    rows: int
    key: str | None


@dataclass(frozen=True)
class Manifest:
    task_columns: tuple[str, ...]
    buckets: int
    appends: tuple[Append, ...] = ()
    files: tuple[File, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)  # column → type, for people; the files hold the real ones


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
                "Use the version of limaml that wrote it."
            )
        return Manifest(
            tuple(raw["task_columns"]),
            int(raw["buckets"]),
            tuple(Append(**entry) for entry in raw["appends"]),
            tuple(File(**entry) for entry in raw["files"]),
            dict(raw["types"]),
        )
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"The manifest of the log, {path}, cannot be read ({type(error).__name__}: {error}). "
            "Restore it from a copy."
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_atomically(path, json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1).encode())


def same_append(manifest: Manifest, found: Append) -> bool:
    """Whether this source is in the log; refuses a key that came with another content."""
    for earlier in manifest.appends:
        if found.key is not None and earlier.key == found.key:
            if earlier.digest != found.digest:
                raise DataError(
                    f"Key {found.key!r} was appended before with other content ({earlier.rows} rows then, {found.rows} "
                    "now). Give each source a key of its own."
                )
            return True
        if found.key is None and earlier.key is None and earlier.digest == found.digest:
            return True
    return False
