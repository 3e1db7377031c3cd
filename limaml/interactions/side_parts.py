"""A side table too large to be held: partitioned by its key as a log is, so that the rows of one bucket of the log need one part.

    side/0.parquet          the table: the truth
    side/0.parquet.parts/   the same rows as a log by the table's key; derived, made again where the table was replaced

A log of 2ⁿ buckets or of a multiple of it has each of its buckets in one part of a table of 2ⁿ parts: a task's bucket is
its hash modulo their number.
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import DataError
from limaml.interactions.atomic_files import locked, write_atomically
from limaml.interactions.columns import missing_column
from limaml.interactions.log import InteractionLog
from limaml.interactions.log_sources import batches

__all__ = ["PartedTable", "forget_parts", "is_large", "stamp_of"]

LARGE_BYTES = 2**26
"""A Parquet file of more is looked up part by part."""

PART_BYTES = 2**23
HELD_BYTES = 2**28
"""So much of the parts that were looked up is kept in memory."""

BATCH_ROWS = 1_000_000
WAIT_S = 3600.0


class Lookup(Protocol):
    def look_up(self, frame: pl.DataFrame, needed: Sequence[str]) -> pl.DataFrame: ...


_Part = TypeVar("_Part", bound=Lookup)


def stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def is_large(path: Path, names: Sequence[str]) -> bool:
    """Whether a table is looked up part by part: it is large, and its keys are what a log takes as ids."""
    if path.stat().st_size <= LARGE_BYTES:
        return False
    types = pl.read_parquet_schema(path)
    return all(name in types and (types[name] == pl.String or types[name].is_integer()) for name in names)


def forget_parts(path: Path) -> None:
    """Remove what was derived from the table `path`, as its rows must not stay there when they leave the table."""
    if _folder(path).exists():
        with locked(_lock(path), WAIT_S):
            shutil.rmtree(_folder(path), ignore_errors=True)


class PartedTable(Generic[_Part]):
    """The table `path`, of which `names` are the key; `read` makes a part of it that can be looked up."""

    def __init__(self, path: Path, names: list[str], read: Callable[[pl.DataFrame], _Part]) -> None:
        self._names, self._read = names, read
        self._log = _partitioned(path, names)
        self._held: OrderedDict[int, tuple[_Part, int]] = OrderedDict()
        self._types = pl.Schema(pl.read_parquet_schema(path))
        self.columns = [name for name in self._types if name not in names]

    def look_up(self, frame: pl.DataFrame, needed: Sequence[str]) -> pl.DataFrame:
        """The columns `needed` of the row of the table for each row of `frame`, null where there is none."""
        for name in self._names:
            if name not in frame.columns:
                raise DataError(missing_column(name, "the key to join the interactions by", frame.columns))
        if not frame.height:
            return self._part(0).look_up(frame, needed)
        keys = frame.select(self._names)
        place = self._places(keys)
        if (place == place[0]).all():  # the rows of a bucket of the log
            return self._part(int(place[0])).look_up(keys, needed)
        order = np.argsort(place, kind="stable")
        found, starts = np.unique(place[order], return_index=True)
        cuts = [*starts.tolist(), len(order)]
        parts = [
            self._part(int(number)).look_up(keys[order[start:end]], needed)
            for number, start, end in zip(found, cuts, cuts[1:], strict=False)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pl.concat(parts)[back]

    def _places(self, keys: pl.DataFrame) -> NDArray[np.int64]:
        """The part of each row's key; 0 for a key that is null, which no part has."""
        whole = keys.select(pl.all_horizontal(pl.all().is_not_null())).to_series().to_numpy()
        place = np.zeros(keys.height, np.int64)
        place[whole] = self._log.bucket_of(keys.filter(whole))
        return place

    def _part(self, number: int) -> _Part:
        held = self._held.pop(number, None)
        if held is None:
            rows = self._log.bucket(number)
            rows = rows.cast(self._types) if rows.width else pl.DataFrame(schema=self._types)
            held = self._read(rows), int(rows.estimated_size())
        self._held[number] = held
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return held[0]


def _partitioned(path: Path, names: list[str]) -> InteractionLog:
    """The rows of the table as a log, made if it is not there or the table is another one now."""
    folder, mark = _folder(path), _folder(path) / "of.json"
    with locked(_lock(path), WAIT_S):
        told = json.dumps(stamp_of(path))
        if not mark.exists() or mark.read_text(encoding="utf-8") != told:
            shutil.rmtree(folder, ignore_errors=True)
            parts = 1 << max(0, (path.stat().st_size // PART_BYTES - 1).bit_length())
            log = InteractionLog(folder, names, parts)
            for number, rows in enumerate(batches(path, BATCH_ROWS, None)):
                # by a position in place of a digest: a table may have columns that have none
                log.append(rows.drop_nulls(names), positions={"batch": number})
            log.compact()
            write_atomically(mark, told.encode())
        return InteractionLog(folder)


def _folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
