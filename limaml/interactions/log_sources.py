"""What is appended to a log: frames and files, here or at a URL, in batches, with everything that keeps them out said at once."""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import written

__all__ = ["batches", "explained", "found_sources", "local_file", "plain", "refuse", "refuse_unreadable"]

KINDS = (".parquet", ".pq", ".csv", ".tsv")


def found_sources(given: Iterable[str | Path]) -> list[str]:
    """The files that paths, folders, globs and URLs name, in the order given and sorted within each.

    A folder stands for the tables in it and below it; names that begin with `_` or `.` are left out, as engines write
    marks under them. A URL has a protocol that fsspec knows (`s3://bucket/day=*/`), and names files just as a path does.
    """
    found: list[str] = []
    for source in given:
        text = str(source)
        names = _remote_names(text) if "://" in text else _local_names(Path(text))
        if not names:
            raise DataError(f"There is no {' or '.join(KINDS)} file at {text}. Check the path.")
        found += names
    return list(dict.fromkeys(found))


def _local_names(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(str(p) for p in path.rglob("*") if p.is_file() and _is_table(p.relative_to(path).as_posix()))
    if path.exists() or not glob.has_magic(str(path)):
        return [str(path)]
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    return [name for match in matches for name in (_local_names(Path(match)))]


def _remote_names(url: str) -> list[str]:
    system, path = _filesystem(url)
    with _reached(url):
        if glob.has_magic(url):
            matches = sorted(str(match) for match in system.glob(path))
        elif Path(path).suffix.lower() in KINDS:  # not every protocol can say what is a folder
            return [url]
        else:
            matches = [path]
        names: list[str] = []
        for match in matches:
            inside = sorted(map(str, system.find(match)))
            names += [name for name in inside if _is_table(name.removeprefix(match))]
        return [system.unstrip_protocol(name) for name in names]


def _is_table(inside: str) -> bool:
    parts = inside.strip("/").split("/")
    return Path(inside).suffix.lower() in KINDS and not any(part.startswith(("_", ".")) for part in parts)


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"To read {url}, fsspec is needed. Type: pip install 'limaml[remote]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url} cannot be opened ({error}). fsspec reads it with a package for its protocol: s3fs for s3://, gcsfs for "
            "gs://, adlfs for abfs://, aiohttp for https://."
        ) from None
    return system, str(path)


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Say of an address that cannot be read which one it is: each protocol has errors of its own."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{url} cannot be read ({type(error).__name__}: {error}). Check the address, the credentials and the network."
        ) from error


@contextmanager
def local_file(source: str, scratch: Path) -> Iterator[Path]:
    """The file on this machine's disk: itself, or a copy of what a URL names that lies in `scratch` as long as it is used."""
    if "://" not in source:
        yield Path(source)
        return
    system, path = _filesystem(source)
    scratch.mkdir(parents=True, exist_ok=True)
    copy = scratch / f"{secrets.token_hex(4)}{Path(path).suffix.lower()}"
    try:
        with _reached(source):
            if not system.exists(path):
                raise FileNotFoundError("there is nothing")
        with _reached(source), system.open(path, "rb") as remote, written(copy), copy.open("wb") as file:
            shutil.copyfileobj(remote, file, 2**22)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def refuse_unreadable(sources: Iterable[str]) -> None:
    """Raise one `DataError` that lists every local file that is missing or whose Parquet footer cannot be read."""
    problems = []
    for source in sources:
        if "://" in source:
            continue
        try:
            _scan(Path(source), None, source)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def batches(
    source: pl.DataFrame | str | Path, rows: int, known: pl.Schema | None, what: str | None = None
) -> Iterator[pl.DataFrame]:
    """The frame, or the file `rows` at a time; text files are read in the types of `known`. Messages call it `what`."""
    if isinstance(source, pl.DataFrame):
        yield source
        return
    what = what or str(source)
    lazy = _scan(Path(source), known, what)
    with explained(what):
        some = False
        # one reading from the front to the end: slices would parse a text file again and again
        for frame in lazy.collect_batches(chunk_size=rows, maintain_order=True):
            yield frame.rechunk()  # rows are gathered out of one piece in a fifth of the time
            some = True
        if not some:
            yield lazy.head(0).collect()


def _scan(path: Path, known: pl.Schema | None, what: str) -> pl.LazyFrame:
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise DataError(
            f"The log cannot read {what}: it appends .parquet, .csv and .tsv files. Read the file into a polars frame "
            "and append that."
        )
    if not path.is_file():
        raise DataError(f"There is no file {what} to append. Check the path.")
    with explained(what):
        if kind in (".parquet", ".pq"):
            lazy = pl.scan_parquet(path, glob=False)
            lazy.collect_schema()
            return lazy
        separator = "\t" if kind == ".tsv" else ","
        columns = pl.read_csv(path, separator=separator, n_rows=0, glob=False).columns
        return pl.scan_csv(
            path,
            separator=separator,
            schema_overrides={c: t for c, t in (known or {}).items() if c in columns},
            infer_schema_length=10_000,
            try_parse_dates=True,
            glob=False,
        )


def plain(frame: pl.DataFrame, known: pl.Schema | None) -> pl.DataFrame:
    """Categories as text, because their codes differ from file to file; columns in the log's order; a column without
    any value in the log's type."""
    changed = [
        pl.col(name).cast(pl.String)
        for name, kind in frame.schema.items()
        if isinstance(kind, pl.Categorical | pl.Enum)
    ]
    changed += [
        pl.col(name).cast(known[name])
        for name, kind in frame.schema.items()
        if known is not None and kind == pl.Null and name in known
    ]
    frame = frame.with_columns(changed) if changed else frame
    if known is None or frame.columns == list(known):
        return frame
    return frame.select([*(c for c in known if c in frame.columns), *(c for c in frame.columns if c not in known)])


def refuse(
    frame: pl.DataFrame,
    known: pl.Schema | None,
    task_columns: Sequence[str],
    *,
    what: str,
    folder: Path,
    first_row: int,
) -> None:
    """Raise one `DataError` that lists everything that keeps `frame` out of the log."""
    problems = []
    for column in task_columns:
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
        problems += _drift(known, frame.schema, what, folder, task_columns)
    if problems:
        raise DataError("\n".join(problems))


def _drift(
    known: pl.Schema, found: Mapping[str, pl.DataType], what: str, folder: Path, task_columns: Sequence[str]
) -> list[str]:
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


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Say of a file that cannot be read which one it is."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read ({error}). Check that it is a complete file of its kind.") from error
