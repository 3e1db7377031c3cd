"""A hash of what a table says, whatever it is stored in.

Two tables have the same digest if they have the same column names, kinds of value and rows in the same order, and
else not. It does not matter how the rows are cut into batches, which file format or compression they came in, or which version of which
library read them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl
from polars._typing import PolarsDataType

from limaml.errors import DataError
from limaml.interactions.columns import joined_text

__all__ = ["ContentDigest", "content_digest"]


def content_digest(frame: pl.DataFrame) -> str:
    """The sha256 of the table's content, 64 hexadecimal digits."""
    digest = ContentDigest()
    digest.update(frame)
    return digest.hexdigest()


class ContentDigest:
    """The digest of a table that is seen batch by batch."""

    def __init__(self) -> None:
        self._columns: dict[str, _ColumnDigest] = {}
        self._rows = 0

    def update(self, frame: pl.DataFrame) -> None:
        """Add a batch. Every batch has the same columns in the same order."""
        if not self._columns:
            self._columns = {name: _ColumnDigest(kind) for name, kind in frame.schema.items()}
        if list(self._columns) != frame.columns:
            raise DataError(f"A batch has the columns {frame.columns}, the one before {list(self._columns)}.")
        for name, column in self._columns.items():
            column.update(frame[name])
        self._rows += frame.height

    def hexdigest(self) -> str:
        whole = hashlib.sha256(f"{self._rows} rows\n".encode())
        for name, column in self._columns.items():
            whole.update(f"{len(name)} {name} {column.digest()}\n".encode())
        return whole.hexdigest()


class _ColumnDigest:
    """Presence, lengths and values go to hashes of their own, so that the cut into batches leaves no trace."""

    def __init__(self, kind: pl.DataType) -> None:
        self._kind = kind
        self._present = hashlib.sha256()
        self._lengths = hashlib.sha256()
        self._values = hashlib.sha256()
        self._inner: list[_ColumnDigest] = []
        if isinstance(kind, pl.List | pl.Array):
            self._inner = [_ColumnDigest(_instance(kind.inner))]
        elif isinstance(kind, pl.Struct):
            self._inner = [_ColumnDigest(_instance(part.dtype)) for part in kind.fields]

    def update(self, series: pl.Series) -> None:
        if series.dtype != self._kind:
            raise DataError(f"Column '{series.name}' is {series.dtype} in one batch and {self._kind} in another.")
        self._present.update(
            _bytes(series.is_not_null().cast(pl.UInt8), "<u1") if series.null_count() else b"\1" * len(series)
        )
        kind = self._kind
        if isinstance(kind, pl.Categorical | pl.Enum):
            series = series.cast(pl.String)
        if isinstance(kind, pl.Struct):
            for inner, part in zip(self._inner, series.struct.fields, strict=True):
                inner.update(series.struct.field(part))
            return
        filled = series.drop_nulls()
        if isinstance(kind, pl.Array):
            filled = filled.arr.to_list()
        if isinstance(kind, pl.List | pl.Array):
            self._lengths.update(_bytes(filled.list.len(), "<u8"))
            self._inner[0].update(filled.filter(filled.list.len() > 0).explode())
        elif filled.dtype == pl.String or filled.dtype == pl.Binary:
            lengths = filled.str.len_bytes() if filled.dtype == pl.String else filled.bin.size()
            self._lengths.update(_bytes(lengths, "<u8"))
            self._values.update(
                joined_text(filled).encode() if filled.dtype == pl.String else b"".join(filled.to_list())
            )
        elif kind == pl.Boolean:
            self._values.update(_bytes(filled.cast(pl.UInt8), "<u1"))
        elif kind.is_float():
            # -0.0 + 0.0 is 0.0, and every NaN becomes the one NaN
            numbers = filled.cast(pl.Float64).to_numpy() + 0.0
            numbers[np.isnan(numbers)] = np.nan
            self._values.update(numbers.astype("<f8", copy=False).data)
        elif (kind.is_integer() and kind != pl.Int128) or kind.is_temporal():
            physical = filled.to_physical()
            self._values.update(_bytes(physical, f"<{'u' if physical.dtype.is_unsigned_integer() else 'i'}8"))
        elif kind != pl.Null:
            raise DataError(f"Column '{series.name}' is {kind}, which has no digest. Cast it to text or numbers first.")

    def digest(self) -> str:
        parts = [_family(self._kind), self._present.hexdigest(), self._lengths.hexdigest(), self._values.hexdigest()]
        return " ".join([*parts, *(f"({inner.digest()})" for inner in self._inner)])


def _bytes(series: pl.Series, kind: str) -> memoryview:
    return np.ascontiguousarray(series.to_numpy(), dtype=kind).data


def _instance(kind: PolarsDataType) -> pl.DataType:
    return kind if isinstance(kind, pl.DataType) else kind()


def _family(kind: pl.DataType) -> str:
    """A name of the type that no library's new version changes; the width of a number is no part of it."""
    if isinstance(kind, pl.Datetime):
        return f"datetime {kind.time_unit} {kind.time_zone or ''}"
    if isinstance(kind, pl.Duration):
        return f"duration {kind.time_unit}"
    if isinstance(kind, pl.Struct):
        return f"struct {[part.name for part in kind.fields]}"
    if isinstance(kind, pl.List | pl.Array):
        return "list"
    if isinstance(kind, pl.Categorical | pl.Enum | pl.String):
        return "text"
    if kind.is_integer():
        return "integer"
    if kind.is_float():
        return "float"
    names: dict[type[pl.DataType], str] = {
        pl.Binary: "bytes",
        pl.Boolean: "boolean",
        pl.Date: "date",
        pl.Time: "time",
        pl.Null: "null",
    }
    return names.get(type(kind), str(kind))
