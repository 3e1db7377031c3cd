"""What is appended to a log: a frame or a file, in batches, with everything that keeps it out of the log said at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from limaml.errors import DataError

__all__ = ["batches", "explained", "plain", "refuse"]


def batches(source: pl.DataFrame | str | Path, rows: int, known: pl.Schema | None) -> Iterator[pl.DataFrame]:
    """The frame, or the file `rows` at a time; text files are read in the types of `known`."""
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
    with explained(path):
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
def explained(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read which one it is."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read ({error}). Check that it is a complete file of its kind.") from error
