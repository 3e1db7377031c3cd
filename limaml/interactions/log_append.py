"""Rows on their way into a log: collected from one or many sources, and written when there are enough of them.

A source is whole or not at all in the log, and known again by its content or its key. What is written goes by memory, not by
source: many small files become one file a bucket, and one large file becomes several. So there are three places where rows are:
those of whole sources and those of the source that is being read, both in memory, and what did not fit of the latter, already
in files that no manifest names yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from limaml.errors import DataError
from limaml.interactions.digest import ContentDigest
from limaml.interactions.log_files import LogFiles
from limaml.interactions.log_manifest import Append, File, Manifest, same_append, write_manifest
from limaml.interactions.log_sources import plain, refuse
from limaml.interactions.tombstones import named, read_tombstones

__all__ = ["Appended", "Appending", "unforgotten"]


@dataclass(frozen=True)
class Appended:
    """What an append did: `new + already + forgotten == rows`."""

    rows: int  # rows in the source
    new: int  # rows that are in the log now and were not before
    already: int  # rows that an earlier append of the same source had put there
    digest: str  # of the source's content, sha256; empty for what came with positions alone
    forgotten: int = 0  # rows of forgotten tasks, which were dropped


def unforgotten(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The rows of `frame` that are not of a task that the list at `path` says is forgotten."""
    tombstones = read_tombstones(path)
    return frame.filter(~named(frame, tombstones)) if tombstones else frame


class Appending:
    """Sources that are appended to the log of `files`, one after the other, while nobody else writes.

    `take` reads one; `flush` writes what was taken and names it in the manifest. About `buffer_bytes` of rows are in memory.
    """

    def __init__(self, files: LogFiles, manifest: Manifest, buffer_bytes: int) -> None:
        self._files, self._budget = files, buffer_bytes
        self._manifest = manifest  # as it will be when all that was taken is written
        self._written: list[File] = []  # of whole sources
        self._whole: list[tuple[int, pl.DataFrame]] = []
        self._own: list[tuple[int, pl.DataFrame]] = []  # of the source that is being read
        self._own_files: list[File] = []
        self._held = 0
        self._known = files.schema(manifest.files)
        self._pending = False

    @property
    def known(self) -> pl.Schema | None:
        """Columns and types of the log; None before the first rows."""
        return self._known

    def take(
        self, frames: Iterable[pl.DataFrame], what: str, key: str | None, positions: Mapping[str, int] | None
    ) -> Appended:
        """Read one source, which messages call `what`. If it is refused, the sources before it are kept."""
        try:
            return self._take(frames, what, key, positions)
        except BaseException:
            self._drop()
            raise

    def _take(
        self, frames: Iterable[pl.DataFrame], what: str, key: str | None, positions: Mapping[str, int] | None
    ) -> Appended:
        manifest, known, number = self._manifest, self._known, self._manifest.last + 1
        taken = positions is not None and _behind(manifest, positions, self._files.folder)
        digest, rows, dropped = ContentDigest(), 0, 0
        types = dict(manifest.types)
        forgotten = self._files.folder / "forgotten.json"
        for raw in frames:
            frame = plain(raw, known)
            refuse(frame, known, self._files.task_columns, what=what, folder=self._files.folder, first_row=rows)
            rows += frame.height
            if positions is None or key is not None:
                digest.update(frame)
            if taken or not frame.height:
                continue
            known = frame.schema
            kept = unforgotten(frame, forgotten)
            dropped += frame.height - kept.height
            if positions is not None:
                self._own_files.append(self._files.write(kept, None, number, number))
            elif kept.height:
                self._own.append((number, kept))
                self._make_room(kept)
            types = types or {column: str(kind) for column, kind in frame.schema.items()}
        identity = digest.hexdigest() if positions is None or key is not None else ""
        if taken or (identity and same_append(manifest, identity, rows, key)) or (rows == 0 and positions is None):
            self._drop()
            return Appended(rows, 0, rows, identity)
        self._whole += self._own
        self._written += self._own_files
        self._own, self._own_files = [], []
        self._manifest = replace(
            self._manifest,  # with the files that were written meanwhile
            last=number if rows else manifest.last,
            appends=(*manifest.appends, Append(identity, rows, key, number)) if identity else manifest.appends,
            types=types,
            positions={**manifest.positions, **(positions or {})},
        )
        self._known, self._pending = known, True
        return Appended(rows, rows - dropped, 0, identity, dropped)

    def flush(self) -> None:
        """Write what was taken, and name it in the manifest: from now on it is in the log."""
        if not self._pending:
            return
        if self._whole:
            self._written += self._files.write_buckets(self._whole)
        if self._written:
            self._files.sync_folders(self._written)
        self._manifest = self._manifest.with_files([*self._manifest.files, *self._written])
        write_manifest(self._files.folder / "manifest.json", self._manifest)
        self._written, self._pending = [], False
        self._held = _size(self._own)

    def _make_room(self, frame: pl.DataFrame) -> None:
        self._held += _size([(0, frame)])
        if self._held < self._budget:
            return
        self.flush()
        if self._held >= self._budget / 2:
            self._own_files += self._files.write_buckets(self._own)
            self._held = 0

    def _drop(self) -> None:
        for file in self._own_files:
            (self._files.folder / file.path).unlink(missing_ok=True)
        self._held -= _size(self._own)
        self._own, self._own_files = [], []


def _size(parts: Iterable[tuple[int, pl.DataFrame]]) -> int:
    return sum(int(frame.estimated_size()) for _, frame in parts)


def _behind(manifest: Manifest, positions: Mapping[str, int], folder: Path) -> bool:
    """Whether all `positions` were taken in before; refuses those that run behind for a part of them."""
    behind = {name: at for name, at in positions.items() if at <= manifest.positions.get(name, at - 1)}
    if behind and len(behind) < len(positions):
        name, at = next(iter(behind.items()))
        raise DataError(
            f"The batch ends at position {at} of '{name}', but the log in {folder} has taken that in up to "
            f"{manifest.positions[name]}, while other partitions go on. Leave out what is at or below `positions()`."
        )
    return bool(behind)
