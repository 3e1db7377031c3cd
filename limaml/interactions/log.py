"""The interaction log: the truth that everything else is derived from, on disk, one hash bucket of tasks at a time.

    folder/
      manifest.json                      what is in the log; replaced by one atomic rename
      data/bucket-0003/<append>-0.parquet  rows of the tasks that hash to bucket 3
      .lock                              held while somebody appends

Rows of one task are all in one bucket, so that every later stage (windows, training, generation, refresh) can work in
the memory of one bucket. An append writes its files first and names them in the manifest last: killed at any moment it
leaves the old log, and files no manifest names, which the next append removes. The manifest remembers what each append
held, so that the same rows handed in again change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from limaml.durable import sync
from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import file_sha256, locked
from limaml.interactions.digest import ContentDigest
from limaml.interactions.keys import join_key
from limaml.interactions.log_manifest import Append, File, Manifest, read_manifest, same_append, write_manifest

__all__ = ["Appended", "InteractionLog", "task_bucket"]

BATCH_ROWS = 1_000_000  # rows of a file that are in memory at once while it is appended


@dataclass(frozen=True)
class Appended:
    """What an append did. `new + already == rows`, and one of the two is 0."""

    rows: int  # rows in the source
    new: int  # rows that are in the log now and were not before
    already: int  # rows that an earlier append of the same source had put there
    digest: str  # of the source's content, sha256


def task_bucket(key: Sequence[str | int] | str | int, buckets: int) -> int:
    """The bucket of a task, the same in every process, on every platform and in every version.

    `key` is the task's id, or the ids of a task that several columns name. What is hashed is the task's key as the
    store knows it: an integer as decimal digits, several parts joined by `|`.
    """
    text = join_key([str(part) for part in ([key] if isinstance(key, str | int) else key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % buckets


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
            self._start = Manifest(wanted, 16 if buckets is None else buckets)
        else:
            raise ConfigError(
                f"There is no log in {self.folder} yet. To make one, say which columns name a task: "
                "InteractionLog(folder, task_columns=['user_id'])."
            )

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

    def append(
        self,
        source: pl.DataFrame | str | Path,
        *,
        key: str | None = None,
        wait_s: float = 60.0,
        batch_rows: int = BATCH_ROWS,
    ) -> Appended:
        """Add the rows of a frame, or of a Parquet or CSV file, exactly once.

        The same source is known by its content (column names, types and rows in their order, whatever file they came
        in), and adds nothing the second time. Where a source has a name of its own, such as a stream's offsets, give
        it as `key`: then two batches that happen to be equal are two batches, and a key that returns with another
        content is refused. Waits up to `wait_s` seconds while another process appends. A file is read `batch_rows`
        rows at a time.

        Raises `DataError` if a task column is missing, has nulls or is of a type that cannot be an id, or if the
        columns are not those of the log; `StoreError` if the log stays locked. Nothing is then changed.
        """
        if batch_rows < 1:
            raise ConfigError(f"`batch_rows` is {batch_rows}; set it to 1 or more.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", wait_s):
            if not self._manifest_path.exists():
                write_manifest(self._manifest_path, self._start)  # before any data: data alone is a lost manifest
            manifest = self._load()
            if (manifest.task_columns, manifest.buckets) != (self.task_columns, self.bucket_count):
                raise ConfigError(
                    f"Another process has just made the log in {self.folder} with task columns "
                    f"{list(manifest.task_columns)} and {manifest.buckets} buckets. Open it again."
                )
            self._remove_orphans(manifest)
            try:
                return self._append(manifest, source, key, batch_rows)
            except BaseException:
                self._remove_orphans(self._load())
                raise

    def _append(
        self, manifest: Manifest, source: pl.DataFrame | str | Path, key: str | None, batch_rows: int
    ) -> Appended:
        whole = isinstance(source, pl.DataFrame)
        what = "the frame" if whole else str(source)
        known = self._schema(manifest)
        digest, files, rows = ContentDigest(), list[File](), 0
        types: Mapping[str, str] = manifest.types
        for number, raw in enumerate(_batches(source, batch_rows, known)):
            frame = _plain(raw, known)
            self._check(frame, known, what, first_row=rows)
            digest.update(frame)
            rows += frame.height
            if whole and same_append(manifest, Append(digest.hexdigest(), rows, key)):
                break  # a file's digest is known only at its end, when most of it has been written
            files += self._write(frame, f"{len(manifest.appends):08d}-{number}")
            types = types or {column: str(kind) for column, kind in frame.schema.items()}
        found = Append(digest.hexdigest(), rows, key)
        if rows == 0 or same_append(manifest, found):
            self._remove_orphans(manifest)
            return Appended(rows, 0, rows, found.digest)
        for bucket in {file.bucket for file in files}:
            sync(self.folder / "data" / _bucket_name(bucket))
        sync(self.folder / "data")
        appends, all_files = (*manifest.appends, found), (*manifest.files, *files)
        new = Manifest(manifest.task_columns, manifest.buckets, appends, all_files, types)
        write_manifest(self._manifest_path, new)
        return Appended(rows, rows, 0, found.digest)

    def read(self, task_ids: Sequence[object] | None = None) -> pl.DataFrame:
        """The rows of these tasks (`None`: all), in the order in which they were appended to each bucket.

        An id is a value of the task column, or a tuple of values where several columns name a task. Only the buckets
        of these tasks are opened. An id without rows has none in the result.
        """
        manifest = self._load()
        if task_ids is None:
            return self._frame(manifest, range(manifest.buckets), None)
        wanted = self._wanted(manifest, task_ids)
        return self._frame(manifest, sorted(set(self._bucket_of(wanted))), wanted)

    def buckets(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """Each bucket's number and rows, one bucket in memory at a time. Empty buckets come too, with their columns."""
        manifest = self._load()
        for bucket in range(manifest.buckets):
            yield bucket, self._frame(manifest, [bucket], None)

    def verify(self) -> int:
        """Read every file and compare it with the manifest's hash. Returns the number of rows; lists every problem."""
        manifest = self._load()
        problems = []
        for file in manifest.files:
            problem = self._damage(file)
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

    # --- reading -----------------------------------------------------------------------------------------------------

    def _frame(self, manifest: Manifest, buckets: Sequence[int] | range, wanted: pl.DataFrame | None) -> pl.DataFrame:
        chosen = set(buckets)
        files = [file for file in manifest.files if file.bucket in chosen]
        files.sort(key=lambda file: file.bucket)  # stable: append order inside a bucket
        problems = [problem for file in files if (problem := self._damage(file)) is not None]
        if problems:
            raise DataError("\n".join(problems))
        if not files:
            schema = self._schema(manifest)
            return pl.DataFrame(schema=schema) if schema is not None else pl.DataFrame()
        frames = []
        for file in files:
            with _explained(self.folder / file.path):
                frame = pl.read_parquet(self.folder / file.path)
            if wanted is not None:
                frame = frame.join(wanted, on=list(self.task_columns), how="semi", maintain_order="left")
            frames.append(frame)
        return pl.concat(frames)

    def _wanted(self, manifest: Manifest, task_ids: Sequence[object]) -> pl.DataFrame:
        """The asked ids as a frame with the task columns, each of the type that the log has."""
        columns = self.task_columns
        rows = [tuple(i) if isinstance(i, tuple | list) else (i,) for i in task_ids]
        for position, row in enumerate(rows):
            if len(row) != len(columns):
                raise DataError(
                    f"Task id {position}, {task_ids[position]!r}, has {len(row)} values, but a task of this log is "
                    f"named by {len(columns)}: {list(columns)}. Give one value per column."
                )
        known = self._schema(manifest)
        series = []
        for place, column in enumerate(columns):
            values = [row[place] for row in rows]
            if known is None or known[column] == pl.String:
                series.append(pl.Series(column, [None if v is None else str(v) for v in values], pl.String))
                continue
            numbers = []
            for position, value in enumerate(values):
                try:
                    if isinstance(value, float | bool):
                        raise ValueError
                    numbers.append(int(str(value)))
                except ValueError:
                    raise DataError(
                        f"Task id {position}, {value!r}, is not an integer, but column '{column}' of the log in "
                        f"{self.folder} is {known[column]}. Give integers."
                    ) from None
            # an id beyond the column's range becomes null: it cannot be in the log
            wide = pl.Series(column, [n if n.bit_length() < 120 else None for n in numbers], pl.Int128)
            series.append(wide.cast(known[column], strict=False))
        return pl.DataFrame(series).drop_nulls().unique(maintain_order=True)

    def _damage(self, file: File) -> str | None:
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

    def _schema(self, manifest: Manifest) -> pl.Schema | None:
        """The log's columns and types, or None before anything was appended."""
        if not manifest.files:
            return None
        whole = next((file for file in manifest.files if self._damage(file) is None), None)
        if whole is None:
            raise DataError("\n".join(str(self._damage(file)) for file in manifest.files))
        with _explained(self.folder / whole.path):
            return pl.Schema(pl.read_parquet_schema(self.folder / whole.path))

    # --- appending ---------------------------------------------------------------------------------------------------

    def _check(self, frame: pl.DataFrame, known: pl.Schema | None, what: str, first_row: int) -> None:
        """Raise one `DataError` that lists everything that keeps `frame` out of the log."""
        problems = []
        for column in self.task_columns:
            if column not in frame.columns:
                problems.append(
                    f"Task column '{column}' is missing from {what}, whose columns are {frame.columns}. "
                    "Rename the column that names the task."
                )
                continue
            kind = frame.schema[column]
            if not (kind == pl.String or kind.is_integer()):
                problems.append(
                    f"Task column '{column}' of {what} is {kind}; an id must be text or an integer. Cast it first."
                )
            missing = frame[column].is_null()
            if missing.any():
                row = first_row + (missing.arg_max() or 0)
                problems.append(
                    f"Task column '{column}' of {what} has {missing.sum()} nulls, the first in row {row}: a row without "
                    "a task cannot be stored. Remove these rows, or give their task an id."
                )
        if known is not None:
            problems += _drift(known, frame.schema, what, self.folder, self.task_columns)
        if problems:
            raise DataError("\n".join(problems))

    def _bucket_of(self, frame: pl.DataFrame) -> list[int]:
        return [task_bucket(row, self.bucket_count) for row in frame.select(self.task_columns).iter_rows()]

    def _write(self, frame: pl.DataFrame, stem: str) -> list[File]:
        distinct = frame.select(self.task_columns).unique()
        column = "\x1fbucket"  # cannot be the name of a column of the source that a person wrote
        distinct = distinct.with_columns(pl.Series(column, self._bucket_of(distinct), pl.UInt32))
        placed = frame.join(distinct, on=list(self.task_columns), how="left", maintain_order="left")
        files = []
        for (number,), part in placed.partition_by(column, as_dict=True, include_key=False).items():
            bucket = int(number)
            path = self.folder / "data" / _bucket_name(bucket) / f"{stem}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_parquet(path, compression="zstd", statistics=True)
            sync(path)
            files.append(
                File(
                    path.relative_to(self.folder).as_posix(),
                    bucket,
                    part.height,
                    path.stat().st_size,
                    file_sha256(path),
                )
            )
        return files

    def _remove_orphans(self, manifest: Manifest) -> None:
        """Remove what an append that did not come to its end has left."""
        named = {file.path for file in manifest.files}
        for path in (self.folder / "data").glob("bucket-*/*"):
            if path.relative_to(self.folder).as_posix() not in named:
                path.unlink()
        for path in self.folder.glob(f"{self._manifest_path.name}.*.tmp"):
            path.unlink()

    # --- manifest ----------------------------------------------------------------------------------------------------

    @property
    def _manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    def _load(self) -> Manifest:
        manifest = read_manifest(self._manifest_path)
        return self._start if manifest is None else manifest


def _drift(known: pl.Schema, found: pl.Schema, what: str, folder: Path, task_columns: Sequence[str]) -> list[str]:
    problems = []
    for column, kind in known.items():
        if column not in found:
            if column not in task_columns:  # said already
                problems.append(f"Column '{column}' ({kind}) of the log in {folder} is missing from {what}. Add it.")
        elif found[column] != kind:
            problems.append(
                f"Column '{column}' is {found[column]} in {what}, but {kind} in the log in {folder}. "
                f"Cast it to {kind} first."
            )
    problems += [
        f"Column '{column}' ({found[column]}) of {what} is not in the log in {folder}, whose columns are {list(known)}. "
        "Leave it out, or start a new log."
        for column in found
        if column not in known
    ]
    return problems


def _plain(frame: pl.DataFrame, known: pl.Schema | None) -> pl.DataFrame:
    """Categories as text, because their codes differ from file to file; columns in the log's order; a column without
    any value in the log's type."""
    frame = frame.with_columns(
        pl.col(name).cast(pl.String)
        for name, kind in frame.schema.items()
        if isinstance(kind, pl.Categorical | pl.Enum)
    )
    if known is None:
        return frame
    frame = frame.with_columns(
        pl.col(name).cast(known[name]) for name, kind in frame.schema.items() if kind == pl.Null and name in known
    )
    return frame.select([*(c for c in known if c in frame.columns), *(c for c in frame.columns if c not in known)])


def _batches(source: pl.DataFrame | str | Path, rows: int, known: pl.Schema | None) -> Iterator[pl.DataFrame]:
    if isinstance(source, pl.DataFrame):
        yield source
        return
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in (".parquet", ".pq", ".csv", ".tsv"):
        raise DataError(
            f"The log cannot read {path}: it appends .parquet, .csv and .tsv files. Read the file into a polars frame "
            "and append that."
        )
    if not path.is_file():
        raise DataError(f"There is no file {path} to append. Check the path.")
    with _explained(path):
        if kind in (".parquet", ".pq"):
            lazy = pl.scan_parquet(path)
        else:
            columns = pl.read_csv(path, separator="\t" if kind == ".tsv" else ",", n_rows=0).columns
            types = {c: t for c, t in (known or {}).items() if c in columns}
            lazy = pl.scan_csv(
                path,
                separator="\t" if kind == ".tsv" else ",",
                schema_overrides=types,
                infer_schema_length=10_000,
                try_parse_dates=True,
            )
        start = 0
        while True:
            frame = lazy.slice(start, rows).collect()
            if frame.height or not start:
                yield frame
            start += frame.height
            if frame.height < rows:
                return


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read ({error}). Check that it is a complete file of its kind.") from error


def _bucket_name(bucket: int) -> str:
    return f"bucket-{bucket:04d}"
