"""The interaction log: the truth that everything else is derived from, on disk, one hash bucket of tasks at a time.

    folder/
      manifest.json                        what is in the log; replaced by one atomic rename
      forgotten.json                       the tasks whose rows are no longer taken in
      data/bucket-0003/<append>-….parquet  rows of the tasks that hash to bucket 3
      data/tail/<append>-….parquet         rows of a stream's small append, of any bucket, until they are folded
      .lock                                held while somebody writes

Rows of one task are all in one bucket, so that every later stage (windows, training, generation, refresh) can work in
the memory of one bucket. An append writes its files first and names them in the manifest last: killed at any moment it
leaves the old log, and files no manifest names, which a later append removes. The manifest remembers what each append
held, so that the same rows handed in again change nothing. Appends are numbered 1, 2, …; what is derived from the log
remembers the number that it has come to (`since`).
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import file_sha256, locked
from limaml.interactions.log_append import Appended, Appending, unforgotten
from limaml.interactions.log_compact import folded, without
from limaml.interactions.log_files import APPEND, LogFiles, bucket_of_key, task_bucket
from limaml.interactions.log_ids import wanted_ids
from limaml.interactions.log_manifest import File, Manifest, read_manifest, write_manifest
from limaml.interactions.log_retain import Retained, Retention, TimeUnit, cut
from limaml.interactions.log_sources import batches, found_sources, local_file, refuse_unreadable
from limaml.interactions.tombstones import Tombstone, named, read_tombstones, write_tombstones

__all__ = ["APPEND", "Appended", "Compacted", "InteractionLog", "buckets_for", "task_bucket"]

BATCH_ROWS = 1_000_000  # rows of a file that are read at a time
BUFFER_BYTES = 2**29  # of rows that wait in memory to be written; the peak is about twice that
WAIT_S = 60.0
BUCKETS = 16  # of a log of which nothing else is said
BUCKET_ROWS = 2_000_000  # so many rows are joined, encoded and adapted in about a gibibyte

_T = TypeVar("_T")


@dataclass(frozen=True)
class Compacted:
    """What a compaction did. `before == after` where nothing was to be done."""

    before: int  # files
    after: int
    rows: int  # rows that were written again


def buckets_for(rows: int) -> int:
    """A number of buckets for a log that begins with so many rows: a power of two, at least `BUCKETS`, of `BUCKET_ROWS` rows or
    fewer each, should tasks be alike."""
    return int(max(BUCKETS, 1 << max(0, (rows - 1) // BUCKET_ROWS).bit_length()))


class InteractionLog:
    """Interactions on disk, hash-partitioned by task, appended to exactly once.

    `task_columns` name the task (one column, or several together) and `buckets` is the number of partitions; both are
    fixed when the log is made, and may be left out afterwards. Rule of thumb for `buckets`: the whole log's size in
    memory divided by what one worker may use, times four.

    Reading needs no lock: a reader sees the log as it was before an append or after it.
    """

    def __init__(
        self, folder: str | Path, task_columns: str | Sequence[str] | None = None, buckets: int | None = None
    ) -> None:
        self.folder = Path(folder)
        wanted = (task_columns,) if isinstance(task_columns, str) else tuple(task_columns or ())
        if buckets is not None and buckets < 1:
            raise ConfigError(f"A log has at least 1 bucket, not {buckets}. Set `buckets` to 1 or more.")
        if len(set(wanted)) < len(wanted):
            raise ConfigError(f"The task columns {list(wanted)} name one column twice. Name each column once.")
        if self._manifest_path.exists():
            manifest = self._load()
            if wanted and wanted != manifest.task_columns:
                raise ConfigError(
                    f"The log in {self.folder} is partitioned by {list(manifest.task_columns)}, not by {list(wanted)}. "
                    "Leave `task_columns` out, or append to a log in another folder."
                )
            if buckets is not None and buckets != manifest.buckets:
                raise ConfigError(
                    f"The log in {self.folder} has {manifest.buckets} buckets, not {buckets}. "
                    "Leave `buckets` out, or append to a log in another folder."
                )
            self._start = Manifest(manifest.task_columns, manifest.buckets)
        elif any((self.folder / "data").glob("*/*")):
            raise DataError(
                f"The log in {self.folder} has data but no manifest.json. Restore manifest.json, or, to start a new "
                "log there, remove the folder."
            )
        elif wanted:
            self._start = Manifest(wanted, BUCKETS if buckets is None else buckets)
        else:
            raise ConfigError(
                f"There is no log in {self.folder} yet. To make one, say which columns name a task: "
                "InteractionLog(folder, task_columns=['user_id']), or limaml log append FOLDER SOURCE --task user_id."
            )
        self._files = LogFiles(self.folder, self.task_columns, self.bucket_count)
        self._tidy = False  # whether this process has looked for what others left

    def __repr__(self) -> str:
        return f"InteractionLog({str(self.folder)!r}, {list(self.task_columns)}, buckets={self.bucket_count})"

    @property
    def task_columns(self) -> tuple[str, ...]:
        return self._start.task_columns

    @property
    def bucket_count(self) -> int:
        return self._start.buckets

    @property
    def rows(self) -> int:
        """Rows in the log now."""
        return sum(file.rows for file in self._load().files)

    @property
    def position(self) -> int:
        """The number of the newest append; 0 before the first."""
        return self._load().last

    @property
    def id(self) -> str:
        """What tells this log from any other one; empty before the first append."""
        return self._load().id

    def contents(self) -> Manifest:
        """What is in the log now: its files, its sources, the types of its columns."""
        return self._load()

    @property
    def tails(self) -> int:
        """Number of small files that `compact` would fold."""
        return len(self._load().tails)

    @property
    def schema(self) -> pl.Schema:
        """Columns and types of the rows; empty before the first append."""
        return self._steadily(lambda manifest: self._files.schema(manifest.files) or pl.Schema())

    def positions(self) -> dict[str, int]:
        """The highest position that was taken in of each partition of a stream, as `append` was given them."""
        return dict(self._load().positions)

    def append(
        self,
        source: pl.DataFrame | str | Path,
        *,
        key: str | None = None,
        positions: Mapping[str, int] | None = None,
        wait_s: float = WAIT_S,
        batch_rows: int = BATCH_ROWS,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> Appended:
        """Add the rows of a frame, or of a Parquet or CSV file, exactly once.

        The same source is known by its content (column names, types and rows in their order, whatever file they came
        in), and adds nothing the second time. Where a source has a name of its own, give it as `key`: then two batches
        that happen to be equal are two batches, and a key that returns with another content is refused.

        A stream gives `positions` instead: partition → position of its last event in this batch, for example
        `{"kafka:clicks:3": 1234}`. They are kept in the same step (`positions()` gives them back), so that a stream that
        starts again can leave out what is at or below them; a batch whose positions are all taken in adds nothing.
        It is written as one small file, whatever buckets it touches, until `compact` folds it in.

        Rows of forgotten tasks are dropped and counted. Waits up to `wait_s` seconds while another process appends. A
        file, which may be at a URL as in `append_all`, is read `batch_rows` rows at a time, and about `buffer_bytes` of them
        are in memory.

        Raises `DataError` if a task column is missing, has nulls or is of a type that cannot be an id, or if the
        columns are not those of the log; `StoreError` if the log stays locked. Nothing is then changed.
        """
        with self._writing(wait_s, tidy=positions is None) as manifest:
            appending = Appending(self._files, manifest, buffer_bytes)
            what = "the frame" if isinstance(source, pl.DataFrame) else str(source)
            with nullcontext(source) if isinstance(source, pl.DataFrame) else self._local(what) as here:
                done = appending.take(batches(here, _positive(batch_rows), appending.known, what), what, key, positions)
            appending.flush()
            return done

    def append_all(
        self,
        sources: Iterable[str | Path],
        *,
        wait_s: float = WAIT_S,
        batch_rows: int = BATCH_ROWS,
        buffer_bytes: int = BUFFER_BYTES,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> dict[str, Appended]:
        """Append many files, each exactly once by its content: what each of them did.

        A source is a Parquet or CSV file, a folder of such files, a glob, or a URL of one of these that fsspec reads
        (`s3://bucket/clicks/`; extra `remote`). About `buffer_bytes` of rows are in memory, whatever the files' sizes and
        number; small files share the files of the log. Killed, it has taken in some of the sources, each whole or not at all:
        the same call goes on. Called back is `progress(rows, done, total)`: rows read so far, and sources.

        Raises as `append` does. Files here that are missing or cut off are all named before any is taken; of another fault
        the sources before it are taken in, and the message says how many these are.
        """
        names = found_sources(sources)
        refuse_unreadable(names)
        done: dict[str, Appended] = {}
        rows = 0

        def told(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
            nonlocal rows
            for frame in frames:
                yield frame
                rows += frame.height
                if progress is not None:
                    progress(rows, len(done), len(names))

        with self._writing(wait_s, tidy=True) as manifest:
            appending = Appending(self._files, manifest, buffer_bytes)
            for name in names:
                try:
                    with self._local(name) as here:
                        frames = batches(here, _positive(batch_rows), appending.known, name)
                        done[name] = appending.take(told(frames), name, None, None)
                except DataError as error:
                    appending.flush()
                    if not done:
                        raise
                    raise DataError(
                        f"{error}\nThe {len(done)} of {len(names)} sources before it were taken in. Put this one right and "
                        "give all of them again: what is in the log adds nothing."
                    ) from error
            appending.flush()
        if progress is not None:
            progress(rows, len(done), len(names))
        return done

    def _local(self, source: str) -> AbstractContextManager[Path]:
        return local_file(source, self.folder / "data" / "incoming")

    def read(self, task_ids: Sequence[object] | None = None, *, through: int | None = None) -> pl.DataFrame:
        """The rows of these tasks (`None`: all), bucket by bucket, in the order in which they were appended.

        An id is a value of the task column, or a tuple of values where several columns name a task. Only the buckets
        of these tasks are opened. An id without rows has none in the result. `through`: only appends up to this one.
        """

        def read(manifest: Manifest) -> pl.DataFrame:
            if task_ids is None:
                return self._frame(manifest, through=through)
            known = self._files.schema(manifest.files)
            wanted = wanted_ids(task_ids, self.task_columns, known, self.folder)
            buckets = set(self._files.bucket_of(wanted).tolist())
            return self._frame(manifest, buckets=buckets, wanted=wanted, through=through)

        return self._steadily(read).drop(APPEND, strict=False)

    def buckets(self, *, through: int | None = None, numbered: bool = False) -> Iterator[tuple[int, pl.DataFrame]]:
        """Each bucket's number and rows, one bucket in memory at a time. Empty buckets come too, with their columns.

        `through`: only appends up to this one (default: the newest now). `numbered`: with the number of each row's append
        in the column `APPEND`.
        """
        end = self.position if through is None else through
        for number in range(self.bucket_count):
            yield number, self.bucket(number, through=end, numbered=numbered)

    def bucket(self, number: int, *, through: int | None = None, numbered: bool = False) -> pl.DataFrame:
        """The rows of one bucket, as `buckets` gives them."""
        if not 0 <= number < self.bucket_count:
            raise ConfigError(f"The log in {self.folder} has buckets 0 to {self.bucket_count - 1}, and no {number}.")
        frame = self._steadily(lambda manifest: self._frame(manifest, buckets={number}, through=through))
        return frame if numbered else frame.drop(APPEND, strict=False)

    def bucket_of(self, frame: pl.DataFrame) -> NDArray[np.uint32]:
        """The bucket `[rows]` of each row of `frame`."""
        return self._files.bucket_of(frame)

    def unforgotten(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of `frame` that are not of a forgotten task."""
        return unforgotten(frame, self._forgotten_path)

    def since(self, position: int) -> Iterator[tuple[int, pl.DataFrame]]:
        """Number and rows of each append after append `position`, oldest first; only files that hold them are read.

        The rows of one append come bucket by bucket. Appends without rows are left out.
        """
        through = self.position
        while True:
            manifest = self._load()
            try:
                for number, frame in self._files.appends(manifest.files, position, through):
                    yield number, frame
                    position = number
                return
            except (DataError, FileNotFoundError):
                if set(manifest.files) <= set(self._load().files):
                    raise

    def compact(self, *, wait_s: float = WAIT_S) -> Compacted:
        """Fold small files, and a stream's tails, into the buckets. No row and no order changes; killed at any moment it
        leaves the old files or the new ones."""
        with self._writing(wait_s, tidy=True) as manifest:
            return self._compact(manifest)[1]

    def _compact(self, manifest: Manifest) -> tuple[Manifest, Compacted]:
        before, rows = len(manifest.files), 0
        while True:
            files = folded(self._files, manifest)
            rows += sum(file.rows for file in set(files) - set(manifest.files))
            manifest = self._replace(manifest, manifest.files, files)
            if not manifest.tails:
                return manifest, Compacted(before, len(files), rows)

    def _replace(self, manifest: Manifest, old: Sequence[File], new: Sequence[File]) -> Manifest:
        """Name the files `new` in place of `old`, in one step; then these are removed."""
        before, after = set(old), set(new)
        fresh, gone = after - before, before - after
        if not fresh and not gone:
            return manifest
        self._files.sync_folders(fresh)
        manifest = manifest.with_files([*(file for file in manifest.files if file not in before), *new])
        write_manifest(self._manifest_path, manifest)
        self._files.remove(gone)
        return manifest

    def retain(
        self,
        time: str,
        *,
        newer_than: dt.timedelta | None = None,
        last: int | None = None,
        now: dt.datetime | None = None,
        unit: TimeUnit | None = None,
        dry_run: bool = False,
        wait_s: float = WAIT_S,
        progress: Callable[[int, int], None] | None = None,
    ) -> Retained:
        """Remove for good what is too old, and what is beyond each task's `last` rows; a row stays if both rules keep it.

        `time` is the column of event times; of rows with one time the later appended are the newer. `newer_than` counts back
        from `now` (default: the clock); a column of integers needs the `unit` they count since 1970. The sources stay known,
        so that handing them in again brings nothing back. Bucket by bucket, each in one step, in the memory of one bucket's
        times and one file: killed at any moment, the same call goes on. With `dry_run` nothing is removed, only counted.
        Called back is `progress(done, total)`, with numbers of buckets.

        Raises `ConfigError` for settings that make no sense, and `DataError` if a time is missing or if nothing at all would
        be newer, which a wrong unit would look like. Nothing is then changed.
        """
        rule = Retention(time, self.task_columns, newer_than, last, now, unit)
        with self._writing(wait_s, tidy=True) as manifest:
            rule.check(self._files, manifest)
            if not dry_run:
                manifest, _ = self._compact(manifest)
            rows, removed = sum(file.rows for file in manifest.files), 0
            for bucket in range(self.bucket_count if rows else 0):
                own = [file for file in manifest.files if file.bucket == bucket]
                if dry_run:  # tails were not folded
                    removed += int((~rule.mask(self._frame(manifest, buckets={bucket}))).sum())
                elif own:
                    keep = rule.mask(self._files.columns(own, rule.columns))
                    removed += int((~keep).sum())
                    alone = len(own) == len(manifest.files)
                    manifest = self._replace(manifest, own, cut(self._files, own, keep, keep_one=alone))
                if progress is not None:
                    progress(bucket + 1, self.bucket_count)
            return Retained(rows, removed)

    def forget(self, task: str, columns: Sequence[str], keys: Collection[str], *, wait_s: float = WAIT_S) -> int:
        """Remove the rows of tasks for good; later appends drop theirs. Returns the number of rows removed.

        `task` names the task type, `columns` the columns that name its tasks, `keys` are keys as the store knows them.
        The tombstones come first: killed at any moment, the same call completes it.
        """
        self.mark_forgotten(task, columns, keys, wait_s=wait_s)
        own = {task: Tombstone(tuple(columns), frozenset(keys))}
        with self._writing(wait_s, tidy=True) as manifest:
            first = tuple(columns) == self.task_columns
            buckets = {bucket_of_key(key, self.bucket_count) for key in keys}

            def chosen(file: File) -> bool:
                return not first or file.bucket is None or file.bucket in buckets

            files, removed = without(self._files, manifest, chosen, lambda frame: named(frame, own))
            self._replace(manifest, manifest.files, files)
            return removed

    def mark_forgotten(
        self, task: str, columns: Sequence[str], keys: Collection[str], *, wait_s: float = WAIT_S
    ) -> None:
        """Leave tombstones: rows of these tasks are not appended any more."""
        with self._writing(wait_s):
            known = read_tombstones(self._forgotten_path)
            earlier = known.get(task, Tombstone(tuple(columns))).keys
            if not earlier >= set(keys):
                known[task] = Tombstone(tuple(columns), earlier | set(keys))
                write_tombstones(self._forgotten_path, known)

    def recall(self, task: str, keys: Collection[str], *, wait_s: float = WAIT_S) -> int:
        """Lift tombstones, for tasks that come back: their rows are appended again from now on. Returns how many."""
        with self._writing(wait_s):
            known = read_tombstones(self._forgotten_path)
            held = known.get(task, Tombstone(()))
            lifted = held.keys & set(keys)
            if lifted:
                known[task] = replace(held, keys=held.keys - lifted)
                write_tombstones(self._forgotten_path, known)
            return len(lifted)

    def forgotten(self) -> dict[str, frozenset[str]]:
        """Task type → keys of the tasks that were forgotten."""
        return {task: tombstone.keys for task, tombstone in read_tombstones(self._forgotten_path).items()}

    def verify(self) -> int:
        """Read every file and compare it with the manifest's hash. Returns the number of rows; lists every problem."""

        def verify(manifest: Manifest) -> int:
            problems = []
            for file in manifest.files:
                problem = self._files.damage(file)
                if problem is None and file_sha256(self.folder / file.path) != file.sha256:
                    problem = (
                        f"The log's file {self.folder / file.path} is not what was written: its sha256 differs. "
                        "Restore it from a copy."
                    )
                if problem is not None:
                    problems.append(problem)
            if problems:
                raise DataError("\n".join(problems))
            return sum(file.rows for file in manifest.files)

        return self._steadily(verify)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _frame(
        self,
        manifest: Manifest,
        *,
        buckets: set[int] | None = None,
        wanted: pl.DataFrame | None = None,
        through: int | None = None,
    ) -> pl.DataFrame:
        end = manifest.last if through is None else through
        files = [
            file
            for file in manifest.files
            if (buckets is None or file.bucket is None or file.bucket in buckets) and file.first <= end
        ]
        if not files:
            schema = self._files.schema(manifest.files)
            return pl.DataFrame(schema=schema) if schema is not None else pl.DataFrame()
        frame = self._files.gather(files, buckets=buckets, wanted=wanted)
        return frame if end >= manifest.last else frame.filter(pl.col(APPEND) <= end)

    def _steadily(self, read: Callable[[Manifest], _T]) -> _T:
        """`read(manifest)`, done again if the files it was about to read were folded or rewritten meanwhile."""
        while True:
            manifest = self._load()
            try:
                return read(manifest)
            except (DataError, FileNotFoundError):
                if set(manifest.files) <= set(self._load().files):
                    raise

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, wait_s: float, *, tidy: bool = False) -> Iterator[Manifest]:
        """The manifest, while nobody else writes. `tidy` removes first what others left; an error, what it left itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", wait_s):
            if not self._manifest_path.exists():  # before any data: data alone is a lost manifest
                write_manifest(self._manifest_path, replace(self._start, id=secrets.token_hex(8)))
            manifest = self._load()
            if (manifest.task_columns, manifest.buckets) != (self.task_columns, self.bucket_count):
                raise ConfigError(
                    f"Another process has just made the log in {self.folder} with task columns "
                    f"{list(manifest.task_columns)} and {manifest.buckets} buckets. Open it again."
                )
            if tidy or not self._tidy:
                self._files.remove_unnamed(manifest)
                self._tidy = True
            try:
                yield manifest
            except BaseException:
                self._files.remove_unnamed(self._load())
                raise

    @property
    def _manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def _forgotten_path(self) -> Path:
        return self.folder / "forgotten.json"

    def _load(self) -> Manifest:
        manifest = read_manifest(self._manifest_path)
        return self._start if manifest is None else manifest


def _positive(rows: int) -> int:
    if rows < 1:
        raise ConfigError(f"`batch_rows` is {rows}; set it to 1 or more.")
    return rows
