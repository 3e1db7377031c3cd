"""Side tables that are joined again and again: read once, their keys looked up instead of matched.

`join_tables` matches whole tables and says what it finds. Here a few rows come at a time, for hours, and only the columns
that a model reads are wanted; the result is the same for them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import DataError
from limaml.interactions.columns import canonical_text, factorise, missing_column, places_in
from limaml.interactions.keys import join_key
from limaml.interactions.side_parts import PartedTable, is_large, stamp_of

__all__ = ["SideTables"]

_LONG = 4096  # rows, from which on distinct keys are found first
_SIGNED = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)


class SideTables:
    """The tables of a folder with `tables.json` (key → file), or none if there is no such file.

    A file that is replaced is read again the next time that something is joined. A large one is looked up part by part, so that
    the rows of a bucket of the log are joined in the memory of one part.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._read: dict[str, tuple[tuple[int, int, int], _Table | PartedTable[_Table]]] = {}

    @property
    def keys(self) -> list[str]:
        """The keys that tables are joined by, in order."""
        return list(self._files())

    def columns(self, frame: Collection[str]) -> list[str]:
        """Columns of a table with the columns `frame` that a join reads."""
        return [name for key in self.keys for name in _names(key, frame)]

    def join(self, frame: pl.DataFrame, wanted: Collection[str]) -> pl.DataFrame:
        """`frame` with those columns of the tables that are `wanted`, null where a key is not in its table.

        A column that stands in both is the frame's; the table's is then called `<column>_of_<key>`.
        """
        known = set(frame.columns)
        for key, path in self._files().items():
            table = self._table(key, path, frame.columns)
            names = {name: f"{name}_of_{key}" if name in known else name for name in table.columns}
            needed = [name for name, new in names.items() if new in wanted]
            if needed:
                frame = frame.with_columns(table.look_up(frame, needed).rename({n: names[n] for n in needed}))
            known |= set(names.values())
        return frame

    def _files(self) -> Mapping[str, Path]:
        if self._folder is None or not (self._folder / "tables.json").exists():
            return {}
        files = json.loads((self._folder / "tables.json").read_text(encoding="utf-8"))
        return {key: self._folder / file for key, file in files.items()}

    def _table(self, key: str, path: Path, columns: Collection[str]) -> _Table | PartedTable[_Table]:
        stamp, held = stamp_of(path), self._read.get(key)
        if held is None or held[0] != stamp:
            names = _names(key, columns)
            if is_large(path, names):
                held = stamp, PartedTable(path, names, lambda rows: _Table(key, rows, names))
            else:
                held = stamp, _Table(key, pl.read_parquet(path), names)
            self._read[key] = held
        return held[1]


def _names(key: str, columns: Collection[str]) -> list[str]:
    return [key] if key in columns else key.split("+")


class _Table:
    """A side table, a row of nulls at its end, and where each key stands."""

    def __init__(self, key: str, table: pl.DataFrame, names: list[str]) -> None:
        self._key, self._names, self._keys = key, names, table.select(names)
        values = table.drop(names)
        self._values = pl.concat([values, values.clear(1)])
        self.columns = values.columns
        self._last = table.height
        if self._keys.drop_nulls().is_duplicated().any():
            raise DataError(f"The side table of '{key}' has several rows for one '{key}'. Keep one row for each.")

    def look_up(self, frame: pl.DataFrame, needed: Sequence[str]) -> pl.DataFrame:
        """The columns `needed` of the row of the table for each row of `frame`, null where there is none."""
        values = self._values.select(needed)
        if frame.height <= _LONG or any(name not in frame.columns for name in self._names):
            return values[self.positions(frame)]
        codes, first = factorise(frame.select(self._names))  # each key is searched once, and its row read once
        return values[self.positions(frame.select(self._names)[first])][codes]

    def positions(self, frame: pl.DataFrame) -> NDArray[np.int64]:
        """The row of the table for each row of `frame`, `[rows]`."""
        for name in self._names:
            if name not in frame.columns:
                raise DataError(missing_column(name, "the key to join the interactions by", frame.columns))
        if len(self._names) == 1 and frame.schema[self._names[0]] in _SIGNED and self._sorted is not None:
            numbers, place = self._sorted
            values = frame[self._names[0]].cast(pl.Int64)
            asked = values.fill_null(0).to_numpy()
            at = places_in(numbers, asked)
            found = (numbers[at] == asked) & values.is_not_null().to_numpy()
            return np.where(found, place[at], self._last)
        codes, first = factorise(frame.select(self._names))
        texts = _texts(frame.select(self._names)[first])
        distinct = np.array([self._by_text.get(text, self._last) if text is not None else self._last for text in texts])
        return distinct.astype(np.int64)[codes] if len(codes) else np.zeros(0, np.int64)

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The keys in ascending order and their rows, if they are integers and there are some."""
        values = self._keys[self._names[0]]
        if values.dtype not in _SIGNED or values.null_count() == len(values):
            return None
        rows = np.flatnonzero(values.is_not_null().to_numpy())
        numbers = values.drop_nulls().cast(pl.Int64).to_numpy()
        order = np.argsort(numbers, kind="stable")
        return numbers[order], rows[order].astype(np.int64)

    @cached_property
    def _by_text(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(_texts(self._keys)) if text is not None}


def _texts(keys: pl.DataFrame) -> list[str | None]:
    parts = [canonical_text(keys[name]).to_list() for name in keys.columns]
    return [None if None in row else join_key(row) for row in zip(*parts, strict=True)]
