"""Tables as people have them, read into polars: files of several formats, folders of files, frames of other libraries.

What cannot be read is a `DataError` that names the file. Text that looks like numbers with leading zeros (zip codes,
article numbers) stays text, as `"02460"` and `"2460"` are two things.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

import polars as pl

from limaml.errors import DataError, require
from limaml.interactions.columns import show

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["Source", "read_table"]

Source: TypeAlias = (
    "str | Path | Sequence[str | Path] | pl.DataFrame | pl.LazyFrame | pd.DataFrame | pa.Table | Mapping[str, Any]"
)
"""All that `read_table` reads."""

ATOMIC = (".inter", ".user", ".item", ".kg", ".link", ".net")
"""Suffixes of RecBole's atomic files: tab-separated, the header's cells are `name:type`."""

_ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
_LEADING_ZERO = r"^[+-]?0[0-9]"


def read_table(
    source: Source,
    *,
    separator: str | None = None,
    null_values: Sequence[str] = (),
) -> pl.DataFrame:
    """Read a table.

    `source` is a path (`.parquet`, `.csv`, `.tsv`, `.txt`, each of the last three also `.gz`, `.arrow`/`.feather`,
    `.jsonl`/`.ndjson`, or a RecBole atomic file), a folder or a list of such files with the same columns, which are put
    one below the other (a folder's in order of their names; files of other kinds in it are left alone), or a table that
    is in memory already: of polars, pandas or pyarrow, or a mapping of column names to values.

    `separator` and `null_values` are for CSV: the separator is found from the header if it isn't given, and an empty
    cell is always null. Raises `DataError` that names the file, and the line where that is known.
    """
    if isinstance(source, pl.LazyFrame):
        return _of_known_types(source.collect())
    if isinstance(source, pl.DataFrame):
        return _of_known_types(source)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _concatenate(_files_of(path), separator, null_values)
        return _read_file(path, separator, null_values)
    if isinstance(source, Mapping):
        return _in_memory("mapping", lambda: pl.DataFrame(dict(source)))
    if isinstance(source, Sequence):
        if not source:
            raise DataError("The list of files to read is empty; name at least one.")
        if not all(isinstance(item, str | Path) for item in source):
            raise DataError("A list of tables must be a list of paths; concatenate frames before you pass them.")
        return _concatenate([Path(item).expanduser() for item in source], separator, null_values)
    library = type(source).__module__.partition(".")[0]
    if library == "pandas":
        require("pyarrow", "pandas")
        return _in_memory("pandas frame", lambda: _from_pandas(source))
    if library == "pyarrow":
        return _in_memory("pyarrow table", lambda: pl.DataFrame(pl.from_arrow(source)))
    raise DataError(
        f"A {type(source).__name__} cannot be read as a table. Pass a path, a list of paths, or a frame of polars, "
        "pandas or pyarrow."
    )


def _in_memory(what: str, convert: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    try:
        frame = convert()
    except Exception as error:
        raise DataError(f"The {what} cannot be turned into a table: {error}. Make each column of one type.") from error
    return _of_known_types(frame)


def _of_known_types(frame: pl.DataFrame) -> pl.DataFrame:
    for name, dtype in frame.schema.items():
        if dtype == pl.Object:
            raise DataError(f"Column '{name}' holds Python objects of no common type; make it numbers, text or lists.")
    return frame


def _from_pandas(frame: Any) -> pl.DataFrame:
    odd = [name for name in frame.columns if not isinstance(name, str)]
    if odd:
        raise ValueError(f"column names must be text, and {odd[0]!r} is not")
    named = any(name is not None for name in frame.index.names)  # an unnamed index is pandas's own row number
    return pl.DataFrame(pl.from_pandas(frame, include_index=named))


def _files_of(folder: Path) -> list[Path]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part[0] in "._" for part in path.relative_to(folder).parts)
        and _format(path) is not None
    )
    if not files:
        raise DataError(f"The folder '{folder}' has no file that can be read; known are {', '.join(_known())}.")
    return files


def _concatenate(paths: Sequence[Path], separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    frames: list[pl.DataFrame] = []
    for path in paths:
        frame = _read_file(path, separator, null_values)
        if frames and set(frame.columns) != set(frames[0].columns):
            lacking = [name for name in frames[0].columns if name not in frame.columns]
            extra = [name for name in frame.columns if name not in frames[0].columns]
            raise DataError(
                f"'{path}' and '{paths[0]}' do not have the same columns: the first named lacks {lacking} and has "
                f"{extra} besides. Read tables of different kinds one by one and join them."
            )
        frames.append(frame.select(frames[0].columns) if frames else frame)
    for name in frames[0].columns:
        for path, frame in zip(paths, frames, strict=True):
            if not _go_together(frames[0].schema[name], frame.schema[name]):
                raise DataError(
                    f"Column '{name}' is of type {frames[0].schema[name]} in '{paths[0]}' and of type "
                    f"{frame.schema[name]} in '{path}'. Make it one type in both files."
                )
    return pl.concat(frames, how="vertical_relaxed", rechunk=True)


def _go_together(one: pl.DataType, other: pl.DataType) -> bool:
    """Types of one column in two files: integers become text beside text, as a part of a CSV may hold digits only."""
    pair = (one, other)
    if one == other or pl.Null in pair or all(dtype.is_numeric() for dtype in pair):
        return True
    return pl.String in pair and any(dtype.is_integer() for dtype in pair)


def _known() -> list[str]:
    return [*_READERS, ".csv.gz", ".tsv.gz", ".txt.gz", *ATOMIC]


def _format(path: Path) -> str | None:
    """The suffix that says how to read the file, or None."""
    name = path.name.lower()
    suffix = Path(name).suffix
    if suffix == ".gz":
        inner = Path(name[:-3]).suffix
        return inner if inner in (".csv", ".tsv", ".txt", *ATOMIC) else None
    return suffix if suffix in _READERS or suffix in ATOMIC else None


def _read_file(path: Path, separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    if not path.exists():
        raise DataError(f"There is no file '{path}'. Check the path; the working folder is '{Path.cwd()}'.")
    if path.is_dir():
        raise DataError(f"'{path}' is a folder; a list must name files.")
    suffix = _format(path)
    if suffix is None:
        raise DataError(f"'{path}' is of no known format; known are {', '.join(_known())}.")
    try:
        if suffix in ATOMIC:
            return _read_atomic(path, null_values)
        return _READERS[suffix](path, separator, null_values)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except (pl.exceptions.PolarsError, OSError, EOFError, csv.Error) as error:
        if "utf-8" in str(error).lower() or "utf8" in str(error).lower():
            raise _not_utf8(path, error) from error
        raise DataError(
            f"'{path}' cannot be read as {suffix[1:]}: {_reason(error)} The file may be cut short, damaged, or of "
            "another format than its name says."
        ) from error


def _not_utf8(path: Path, error: Exception) -> DataError:
    return DataError(
        f"'{path}' is not UTF-8 text ({_reason(error)}) Convert it, for example with iconv, and try again."
    )


def _reason(error: Exception) -> str:
    """The first line of what a library said, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."


def _read_parquet(path: Path, separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    return pl.read_parquet(path, glob=False, hive_partitioning=False)


def _read_arrow(path: Path, separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    return pl.read_ipc(path)


def _read_json_lines(path: Path, separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    return pl.read_ndjson(path, infer_schema_length=None)


def _read_csv(path: Path, separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    header = _header(path)
    separator = separator or _separator(header)
    names = next(csv.reader([header], delimiter=separator))
    _refuse_bad_header(path, names)
    try:
        frame = _parse(path, separator, null_values, {})
    except pl.exceptions.ComputeError:
        _refuse_uneven_lines(path, separator, len(names))  # names the line, which polars does not
        raise
    padded = _leading_zeros(path, separator, frame)
    if padded:
        frame = _parse(path, separator, null_values, dict.fromkeys(padded, pl.String))
    if frame.width > 1 and frame[frame.columns[-1]].null_count():
        _refuse_uneven_lines(path, separator, frame.width)  # polars fills a line that is too short with nulls
    return frame


def _read_tsv(path: Path, separator: str | None, null_values: Sequence[str]) -> pl.DataFrame:
    return _read_csv(path, separator or "\t", null_values)


_READERS: dict[str, Callable[[Path, str | None, Sequence[str]], pl.DataFrame]] = {
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_csv,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
}


def _read_atomic(path: Path, null_values: Sequence[str]) -> pl.DataFrame:
    """RecBole: a token is an integer where all of the column's are, else text; a sequence is split at spaces."""
    header = _header(path)
    cells = header.split("\t")
    problems = [cell for cell in cells if cell.rpartition(":")[2] not in _ATOMIC_TYPES or not cell.rpartition(":")[0]]
    if problems:
        raise DataError(
            f"'{path}' is named like a RecBole atomic file, but its header has {problems[0]!r}; each cell must be "
            f"'name:type' with a type of {', '.join(_ATOMIC_TYPES)}, separated by tabs."
        )
    kinds = {cell.rpartition(":")[0]: cell.rpartition(":")[2] for cell in cells}
    _refuse_bad_header(path, [cell.rpartition(":")[0] for cell in cells])
    overrides: dict[str, Any] = dict.fromkeys(cells, pl.String)
    _refuse_uneven_lines(path, "\t", len(cells), quoting=csv.QUOTE_NONE)
    frame = _parse(path, "\t", null_values, overrides, quote=None)
    frame = frame.rename(dict(zip(cells, kinds, strict=True)))
    return frame.select(_atomic_column(path, frame[name], kind) for name, kind in kinds.items())


def _atomic_column(path: Path, values: pl.Series, kind: str) -> pl.Series:
    lists = kind.endswith("_seq")
    entries = values
    if lists:
        values = values.str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
        entries = values.explode()
    if kind.startswith("float"):
        numbers = entries.cast(pl.Float64, strict=False)
        bad = entries.is_not_null() & numbers.is_null()
        if bad.any():
            at = int(bad.arg_max() or 0)
            place = "" if lists else f" in row {at} (rows count from 0)"
            raise DataError(f"'{path}' declares '{values.name}' as {kind}, and it holds {show(entries[at])}{place}.")
        return values.cast(pl.List(pl.Float64)) if lists else numbers
    present = entries.drop_nulls()
    integers = present.cast(pl.Int64, strict=False)
    if len(present) and not integers.null_count() and bool((integers.cast(pl.String) == present).all()):
        return values.cast(pl.List(pl.Int64) if lists else pl.Int64)
    return values


def _header(path: Path) -> str:
    """The first line, without a byte-order mark."""
    with _open(path) as lines:
        line = lines.readline()
    if not line.strip():
        raise DataError(f"'{path}' is empty or starts with an empty line; its first line must name the columns.")
    return line.rstrip("\r\n")


def _open(path: Path) -> IO[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast("IO[str]", opener(path, "rt", encoding="utf-8-sig", newline=""))


def _separator(header: str) -> str:
    """A comma, unless the header has none of them but has another usual separator."""
    return "," if "," in header else max("\t;|,", key=header.count)


def _refuse_bad_header(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"'{path}' has {names.count(name)} columns called '{name}'; give each a name of its own.")


def _parse(
    path: Path,
    separator: str,
    null_values: Sequence[str],
    types: Mapping[str, Any],
    quote: str | None = '"',
) -> pl.DataFrame:
    return pl.read_csv(
        path,
        separator=separator,
        quote_char=quote,
        null_values=list(null_values) or None,
        schema_overrides=types,
        infer_schema_length=None,
        try_parse_dates=True,
        glob=False,
    )


def _leading_zeros(path: Path, separator: str, frame: pl.DataFrame) -> list[str]:
    """Columns that were read as numbers and would lose a leading zero."""
    names = [name for name, dtype in frame.schema.items() if dtype.is_integer()]
    if not names:
        return []
    raw = pl.scan_csv(path, separator=separator, infer_schema=False, glob=False)
    found = raw.select(pl.col(names).str.contains(_LEADING_ZERO).any()).collect()
    return [name for name in names if found[name][0]]


def _refuse_uneven_lines(path: Path, separator: str, width: int, quoting: int = csv.QUOTE_MINIMAL) -> None:
    """A cell that was forgotten, or one too many, must not move its neighbours."""
    with _open(path) as lines:
        reader = csv.reader(lines, delimiter=separator, quoting=quoting)  # type: ignore[arg-type]
        for row in reader:
            if row and len(row) != width:
                raise DataError(
                    f"'{path}' has {len(row)} cell(s) in line {reader.line_num}, and {width} columns in its header. "
                    f"Correct the line, or check the separator ({separator!r})."
                )
