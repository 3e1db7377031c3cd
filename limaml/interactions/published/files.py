"""Files as a publisher offers them, in a folder or an archive, opened lazily and checked before they are read.

Compressed files are unpacked to disk piece by piece, never into memory, and Polars then scans them in pieces, too.
"""

from __future__ import annotations

import csv
import fnmatch
import gzip
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from limaml.errors import DataError

__all__ = ["Files", "Published", "Tables", "scan_json_lines", "scan_text"]


@dataclass(frozen=True)
class Tables:
    """A data set before it is written: nothing has been read but headers. `notes` say what was left out and why."""

    interactions: pl.LazyFrame
    task_features: pl.LazyFrame | None = None
    row_features: pl.LazyFrame | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A data set that its publisher lets people download but not pass on, and what its columns mean.

    `task` is None where no column names a member: whoever uses the set must choose one.
    """

    name: str
    title: str
    about: str
    address: str
    licence: str
    read: Callable[[Files], Tables]
    task: str | None
    row: str | None
    time: str
    unit: str  # of the time column in the files
    label: str
    outcomes: tuple[str, ...] = ()  # columns that are known only afterwards, beside the label
    task_choices: tuple[str, ...] = ()  # where `task` is None


@dataclass(frozen=True)
class Files:
    """The files of a data set: those of a folder, of a zip or tar archive, or one file alone. `scratch` takes what must be
    unpacked."""

    source: Path
    scratch: Path
    _unpacked: dict[str, Path] = field(default_factory=dict)

    def names(self) -> list[str]:
        """All files, by their names in the folder or the archive, sorted."""
        if self.source.is_dir():
            return sorted(str(p.relative_to(self.source)) for p in self.source.rglob("*") if p.is_file())
        if not self.source.exists():
            raise DataError(f"There is nothing at '{self.source}'. Name the folder or the archive that you downloaded.")
        with self._reading(self.source.name):
            if zipfile.is_zipfile(self.source):
                with zipfile.ZipFile(self.source) as archive:
                    return sorted(n for n in archive.namelist() if not n.endswith("/"))
            if tarfile.is_tarfile(self.source):
                with tarfile.open(self.source) as tar:
                    return sorted(m.name for m in tar.getmembers() if m.isfile())
        return [self.source.name]

    def find(self, *patterns: str, needed: str | None = None) -> list[str]:
        """The files whose name, without folders, matches one of the patterns.

        Raises `DataError` where there is none and `needed` says what it would be.
        """
        names = self.names()
        found = [n for n in names if any(fnmatch.fnmatch(n.rpartition("/")[2], p) for p in patterns)]
        found = [n for n in found if not n.startswith("__MACOSX/")]
        if not found and needed is not None:
            has = ", ".join(n.rpartition("/")[2] for n in names[:8]) or "nothing"
            raise DataError(
                f"'{self.source}' has no {needed} (a file called {' or '.join(patterns)}); it has {has}. Name the folder or "
                "the archive of this data set, as published."
            )
        return found

    def one(self, *patterns: str, needed: str) -> Path:
        """The one file that matches, unpacked if need be."""
        found = self.find(*patterns, needed=needed)
        if len(found) > 1:
            raise DataError(
                f"'{self.source}' has {len(found)} files that could be the {needed}: {', '.join(found)}. Name a folder that "
                "has one of them."
            )
        return self.plain(found[0])

    def plain(self, name: str) -> Path:
        """Where the file `name` lies on disk, uncompressed."""
        if name in self._unpacked:
            return self._unpacked[name]
        path = self.source / name if self.source.is_dir() else self.source
        inside = not self.source.is_dir() and name != self.source.name
        target = self.scratch / f"{len(self._unpacked)}-{name.rpartition('/')[2].removesuffix('.gz')}"
        with self._reading(name):
            if inside and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive, archive.open(name) as member:
                    path = _copy(member, target, name)  # type: ignore[arg-type]
            elif inside:
                with tarfile.open(path) as tar:
                    content = tar.extractfile(name)
                    assert content is not None
                    path = _copy(content, target, name)  # type: ignore[arg-type]
            elif name.endswith(".gz"):
                with path.open("rb") as stream:
                    path = _copy(stream, target, name)
        self._unpacked[name] = path
        return path

    def _reading(self, name: str) -> _Reading:
        return _Reading(self.source, name)


class _Reading:
    """What goes wrong in here is told with the file's name."""

    def __init__(self, source: Path, name: str) -> None:
        self.source, self.name = source, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError)):
            raise DataError(
                f"'{self.name}' of '{self.source}' is cut short or damaged ({error}). Download it again, and compare its size "
                "with the publisher's."
            ) from error


def _copy(stream: BinaryIO, target: Path, name: str) -> Path:
    with target.open("wb") as out:
        if name.endswith(".gz"):
            with gzip.open(stream) as content:
                shutil.copyfileobj(content, out, 1 << 20)
        else:
            shutil.copyfileobj(stream, out, 1 << 20)
    return target


def scan_text(
    path: Path,
    columns: Mapping[str, Any],
    *,
    separator: str = ",",
    header: bool = True,
    quote: str | None = '"',
    optional: Sequence[str] = (),
) -> tuple[pl.LazyFrame, list[str]]:
    """Scan delimited text: the columns `columns` (name → type) of it, and the names of those that it has besides.

    Without a header the columns are those of the file, in order. `optional` ones that are lacking become nulls. Raises
    `DataError` for a header or a first line that is not that of this file.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        first = lines.readline().rstrip("\r\n")
    reading = csv.reader([first], delimiter=separator, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE)
    cells = next(reading, [])
    if not cells:
        raise DataError(f"'{path.name}' is empty or starts with an empty line. Download it again.")
    extra: list[str] = []
    if header:
        missing = [name for name in columns if name not in cells and name not in optional]
        if missing:
            raise DataError(
                f"'{path.name}' has no column {', '.join(repr(n) for n in missing)}; its header has {', '.join(cells[:30])}. "
                "It is another file, or another version of this data set."
            )
        extra = [name for name in cells if name not in columns]
    elif len(cells) != len(columns):
        raise DataError(
            f"The first line of '{path.name}' has {len(cells)} cells, and {len(columns)} are needed ({', '.join(columns)}), "
            f"separated by {separator!r}. It is another file, or another version of this data set."
        )
    options: dict[str, Any] = {"separator": separator, "quote_char": quote, "glob": False}
    if header:
        types = {name: kind for name, kind in columns.items() if name in cells}
        # what is not used is read as text: a column that is odd, but not needed, must not stop anything
        frame = pl.scan_csv(path, schema_overrides={**dict.fromkeys(extra, pl.String), **types}, **options)
        lacking = [pl.lit(None, columns[name]).alias(name) for name in columns if name not in cells]
        return frame.with_columns(lacking).select(list(columns)), extra
    frame = pl.scan_csv(path, has_header=False, schema=pl.Schema(dict(columns)), **options)
    return frame, extra


def scan_json_lines(path: Path, columns: Mapping[str, Any], needed: Sequence[str]) -> pl.LazyFrame:
    """Scan a file of one JSON object a line: these of its fields. Those that an object lacks are null."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline().strip()
    if not first.startswith("{") or any(f'"{name}"' not in first for name in needed):
        raise DataError(
            f"The first line of '{path.name}' is no JSON object with {', '.join(needed)}: {first[:120]!r}. It is another file, "
            "or another version of this data set."
        )
    return pl.scan_ndjson(path, schema=dict(columns))
