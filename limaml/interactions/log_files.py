"""The files of a log: what each holds, and how they are written, read and found to be damaged."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.durable import sync
from limaml.errors import DataError
from limaml.interactions.atomic_files import file_sha256, written
from limaml.interactions.key_hash import key_hash, key_hashes
from limaml.interactions.keys import join_key
from limaml.interactions.log_manifest import File, Manifest
from limaml.interactions.log_sources import explained

__all__ = ["APPEND", "LogFiles", "bucket_of_key", "task_bucket"]

APPEND = "\x1fappend"
"""Column that numbers the appends; no column of a source that a person wrote is called so."""

_BUCKET = "\x1fbucket"


def task_bucket(key: Sequence[str | int] | str | int, buckets: int) -> int:
    """The bucket of a task, the same in every process, on every platform and in every version.

    `key` is the task's id, or the ids of a task that several columns name. What is hashed is the task's key as the
    store knows it: an integer as decimal digits, several parts joined by `|`.
    """
    return bucket_of_key(join_key([str(part) for part in ([key] if isinstance(key, str | int) else key)]), buckets)


def bucket_of_key(text: str, buckets: int) -> int:
    """The bucket of a task by its key, as the store knows it."""
    return key_hash(text) % buckets


class LogFiles:
    """The files under `folder`, of a log that `task_columns` partition into `buckets`."""

    def __init__(self, folder: Path, task_columns: Sequence[str], buckets: int) -> None:
        self.folder, self.task_columns, self.buckets = folder, list(task_columns), buckets

    def bucket_of(self, frame: pl.DataFrame) -> NDArray[np.uint32]:
        """The bucket `[rows]` of each row."""
        return (key_hashes(frame, self.task_columns) % np.uint64(self.buckets)).astype(np.uint32)

    def write(self, frame: pl.DataFrame, bucket: int | None, first: int, last: int) -> File:
        """Write rows of the appends `first` … `last` durably. Their `APPEND` column is kept where these are several."""
        if first == last and APPEND in frame.columns:
            frame = frame.drop(APPEND)
        name = "tail" if bucket is None else f"bucket-{bucket:04d}"
        path = self.folder / "data" / name / f"{first:08d}-{secrets.token_hex(4)}.parquet"
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # nobody looks for statistics, and level 1 is as small as level 3 within 2 %
            frame.write_parquet(
                path,
                compression="zstd" if bucket is not None else "lz4",
                compression_level=1 if bucket is not None else None,
                statistics=False,
            )
            sync(path)
        relative = path.relative_to(self.folder).as_posix()
        return File(relative, bucket, frame.height, path.stat().st_size, file_sha256(path), first, last)

    def write_buckets(self, parts: Sequence[tuple[int, pl.DataFrame]]) -> list[File]:
        """Write the rows of some appends, given with their numbers in order, each into its bucket: one file a bucket.

        Empties `parts`, if it is a list, as it goes through them: their rows are in memory once, not twice.
        """
        numbers = [number for number, _ in parts]
        first, last = min(numbers), max(numbers)
        sorted_parts = [self._by_bucket(number, frame, numbered=first != last) for number, frame in _taken(parts)]

        def write(bucket: int) -> File | None:
            slices = [rows[int(at[bucket]) : int(at[bucket + 1])] for rows, at in sorted_parts]
            whole = pl.concat([rows for rows in slices if rows.height] or slices[:1])
            return self.write(whole, bucket, first, last) if whole.height else None

        # encoding, hashing and the disk all work beside each other
        with _threads() as pool:
            return [file for file in pool.map(write, range(self.buckets)) if file is not None]

    def _by_bucket(self, number: int, frame: pl.DataFrame, *, numbered: bool) -> tuple[pl.DataFrame, NDArray[np.int64]]:
        """The rows in the order of their buckets, and where each bucket begins, `[buckets + 1]`."""
        buckets = self.bucket_of(frame)
        if self.buckets <= 2**16:
            buckets = buckets.astype(np.uint16)  # sorted by a counting sort
        order = pl.Series(np.argsort(buckets, kind="stable").astype(np.uint32))
        ordered = frame.rechunk()[order]
        if numbered:
            ordered = ordered.with_columns(pl.lit(number, pl.UInt32).alias(APPEND))
        return ordered, np.append(0, np.cumsum(np.bincount(buckets, minlength=self.buckets)))

    def sync_folders(self, files: Iterable[File]) -> None:
        """Flush the names of new files to the disk."""
        folders = {(self.folder / file.path).parent for file in files}
        if not folders:
            return
        if len(folders) == 1:
            sync(folders.pop())
        else:
            with _threads() as pool:
                list(pool.map(sync, folders))
        sync(self.folder / "data")

    def read(self, file: File, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows of a file, with their `APPEND` column; or these columns of them alone."""
        with explained(self.folder / file.path):
            frame = pl.read_parquet(self.folder / file.path, columns=None if columns is None else list(columns))
        if file.folded or columns is not None:
            return frame
        return frame.with_columns(pl.lit(file.first, pl.UInt32).alias(APPEND))

    def columns(self, files: Sequence[File], columns: Sequence[str]) -> pl.DataFrame:
        """Some columns of the rows of `files`, in their order. At least one file."""
        self.refuse_damaged(files)
        return pl.concat([self.read(file, columns) for file in files])

    def gather(
        self, files: Sequence[File], *, buckets: set[int] | None = None, wanted: pl.DataFrame | None = None
    ) -> pl.DataFrame:
        """The rows of `files` in the log's order: by bucket, then by append, then as they came; with `APPEND`.

        Only those in `buckets`, and only those of the tasks `wanted`, where these are given. At least one file.
        """
        self.refuse_damaged(files)
        ordered = sorted(files, key=lambda file: (-1 if file.bucket is None else file.bucket, file.first))
        frames = []
        for file in ordered:
            frame = self.read(file)
            if wanted is not None:
                frame = frame.join(wanted, on=self.task_columns, how="semi", maintain_order="left")
            frames.append(frame)
        whole = pl.concat(frames)
        if all(file.bucket is not None for file in files):
            return whole
        whole = whole.with_columns(pl.Series(_BUCKET, self.bucket_of(whole)))
        if buckets is not None:
            whole = whole.filter(pl.col(_BUCKET).is_in(sorted(buckets)))
        return whole.sort(_BUCKET, APPEND, maintain_order=True).drop(_BUCKET)

    def appends(self, files: Sequence[File], position: int, through: int) -> Iterator[tuple[int, pl.DataFrame]]:
        """Number and rows of each append after `position` up to `through`, oldest first, without `APPEND`."""
        wanted = [file for file in files if position < file.last and file.first <= through]
        for together in _overlapping(wanted):
            rows = self.gather(together).filter((pl.col(APPEND) > position) & (pl.col(APPEND) <= through))
            for (number,), part in sorted(rows.partition_by(APPEND, as_dict=True, maintain_order=True).items()):
                yield int(number), part.drop(APPEND)

    def schema(self, files: Sequence[File]) -> pl.Schema | None:
        """The log's columns and types, or None before anything was appended."""
        if not files:
            return None
        whole = next((file for file in reversed(files) if self.damage(file) is None), None)
        if whole is None:
            raise DataError("\n".join(str(self.damage(file)) for file in files))
        with explained(self.folder / whole.path):
            found = pl.read_parquet_schema(self.folder / whole.path)
        return pl.Schema({column: kind for column, kind in found.items() if column != APPEND})

    def damage(self, file: File) -> str | None:
        """A sentence that says what is wrong with a file, as far as its size shows it."""
        path = self.folder / file.path
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return f"The log's file {path} ({file.rows} rows) is missing. Restore it from a copy."
        if size != file.bytes:
            return (
                f"The log's file {path} has {size} bytes, but {file.bytes} were written ({file.rows} rows). "
                "Restore it from a copy."
            )
        return None

    def refuse_damaged(self, files: Sequence[File]) -> None:
        problems = [problem for file in files if (problem := self.damage(file)) is not None]
        if problems:
            raise DataError("\n".join(problems))

    def remove(self, files: Iterable[File]) -> None:
        """Remove files that the manifest names no more."""
        for file in files:
            (self.folder / file.path).unlink(missing_ok=True)

    def remove_unnamed(self, manifest: Manifest) -> None:
        """Remove what an append that did not come to its end has left."""
        named = {file.path for file in manifest.files}
        for path in (self.folder / "data").glob("*/*"):
            if path.relative_to(self.folder).as_posix() not in named:
                path.unlink(missing_ok=True)
        for path in self.folder.glob("*.json.*.tmp"):
            path.unlink(missing_ok=True)


def _overlapping(files: Sequence[File]) -> Iterator[list[File]]:
    """Files in portions that share no append, oldest first; within a portion they stay in their order."""
    ends = sorted((file.first, file.last) for file in files)
    while ends:
        first, last = ends[0]
        while ends and ends[0][0] <= last:
            last = max(last, ends.pop(0)[1])
        yield [file for file in files if first <= file.first <= last]


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))


def _taken(parts: Sequence[tuple[int, pl.DataFrame]]) -> Iterator[tuple[int, pl.DataFrame]]:
    if isinstance(parts, list):
        while parts:
            yield parts.pop(0)
    yield from parts
