"""Rows of a table as bytes, one string of bytes a row, and back, for tables whose columns are known.

    row = null bits | values of fixed width | lengths of the others | the others

Two rows have the same bytes if and only if they are equal in every column (NaN equals NaN, and −0.0 equals 0.0, as where
duplicates are dropped). Numbers, Booleans and times have a fixed width; text and binaries are their bytes; a list of
numbers is an array, and what is nested otherwise JSON. Everything is little-endian.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from polars._typing import PolarsDataType

from limaml.errors import DataError

__all__ = ["RowCodec"]

Values = list[bytes]
_FIXED: dict[pl.DataType, str] = {
    pl.Int8(): "<i1",
    pl.Int16(): "<i2",
    pl.Int32(): "<i4",
    pl.Int64(): "<i8",
    pl.UInt8(): "<u1",
    pl.UInt16(): "<u2",
    pl.UInt32(): "<u4",
    pl.UInt64(): "<u8",
    pl.Float32(): "<f4",
    pl.Float64(): "<f8",
    pl.Boolean(): "<u1",
}
_PLAIN, _JSON = b"\0", b"\1"


class RowCodec:
    """Packs and unpacks the rows of tables of one schema. `DataError` for a type that has no packed form."""

    def __init__(self, schema: pl.Schema) -> None:
        self.schema = schema
        self._fixed = {name: width for name, kind in schema.items() if (width := _width(kind)) is not None}
        self._varying = [name for name, kind in schema.items() if name not in self._fixed and kind != pl.Null]
        self._nullable = [*self._fixed, *self._varying]
        parts: list[Any] = [("nulls", "<u1", (max(1, (len(self._nullable) + 7) // 8),))]
        parts += [(f"v{i}", width) for i, width in enumerate(self._fixed.values())]
        parts += [(f"n{i}", "<u4") for i in range(len(self._varying))]
        self._record = np.dtype(parts)
        for name in self._varying:
            _refuse(name, schema[name])

    def pack(self, frame: pl.DataFrame) -> list[bytes]:
        """The rows of `frame`, whose columns are the schema's in any order."""
        whole, size, varying = self._packed_parts(frame)
        heads = [whole[at : at + size] for at in range(0, len(whole), size)]
        return [b"".join(parts) for parts in zip(heads, *varying, strict=True)] if varying else heads

    def pack_joined(self, frame: pl.DataFrame) -> tuple[bytes, NDArray[np.int64]]:
        """The rows of `frame` one after the other, and the bytes of each, `[rows]`."""
        if self._varying:
            rows = self.pack(frame)
            return b"".join(rows), np.fromiter(map(len, rows), np.int64, len(rows))
        whole, size, _ = self._packed_parts(frame)
        return whole, np.full(frame.height, size)

    def _packed_parts(self, frame: pl.DataFrame) -> tuple[bytes, int, list[Values]]:
        """The heads of all rows, the bytes of each head, and what follows it, by column."""
        record = np.zeros(frame.height, self._record)
        absent = [frame[name].is_null().to_numpy() for name in self._nullable]
        if absent and frame.height:
            record["nulls"] = np.packbits(np.stack(absent, 1), axis=1)
        for i, (name, width) in enumerate(self._fixed.items()):
            values = frame[name].to_physical()
            filled = values.fill_null(False if values.dtype == pl.Boolean else 0).to_numpy()
            record[f"v{i}"] = _one_nan(filled) if values.dtype.is_float() else filled.astype(width)
        varying = [_encode(frame[name]) for name in self._varying]
        for i, column in enumerate(varying):
            record[f"n{i}"] = [len(value) for value in column]
        return record.tobytes(), self._record.itemsize, varying

    def unpack(self, packed: bytes, starts: NDArray[np.int64], columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows that begin at `starts` `[rows]` of `packed`, in that order; only `columns`, where they are given."""
        size, rows = self._record.itemsize, len(starts)
        if not rows:
            wanted = self.schema if columns is None else {name: self.schema[name] for name in columns}
            return pl.DataFrame(schema=dict(wanted))
        taken = sliding_window_view(np.frombuffer(packed, np.uint8), size)[starts]
        record = np.ascontiguousarray(taken).view(self._record).reshape(rows)
        absent = np.unpackbits(record["nulls"], axis=1, count=len(self._nullable)).astype(bool)
        lengths = [record[f"n{i}"].astype(np.int64) for i in range(len(self._varying))]
        fixed = {name: i for i, name in enumerate(self._fixed)}
        series = []
        for name in self.schema if columns is None else columns:
            kind = self.schema[name]
            if kind == pl.Null:
                series.append(pl.Series(name, [None] * rows, pl.Null))
                continue
            nulls = absent[:, self._nullable.index(name)]
            if name in fixed:
                values = pl.Series(name, np.ascontiguousarray(record[f"v{fixed[name]}"]))
                values = values.cast(pl.Boolean) if kind == pl.Boolean else values.cast(kind)
                if nulls.any():
                    values = pl.select(pl.when(~pl.Series(nulls)).then(values)).to_series().alias(name)
            else:
                place = self._varying.index(name)
                begin = starts + size + sum(lengths[:place], np.zeros(rows, np.int64))
                end = begin + lengths[place]
                pieces: list[bytes | None] = [packed[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
                for row in np.flatnonzero(nulls).tolist():
                    pieces[row] = None
                values = _decode(pieces, kind).alias(name)
            series.append(values)
        return pl.DataFrame(series)


def _width(kind: PolarsDataType) -> str | None:
    if isinstance(kind, pl.Date):
        return "<i4"
    if isinstance(kind, pl.Datetime | pl.Duration | pl.Time):
        return "<i8"
    return _FIXED.get(kind)  # type: ignore[arg-type]


def _inner(kind: PolarsDataType) -> PolarsDataType | None:
    return kind.inner if isinstance(kind, pl.List | pl.Array) else None


def _refuse(name: str, kind: PolarsDataType, nested: bool = False) -> None:
    inner = _inner(kind)
    if inner is not None:
        _refuse(name, inner, True)
    elif isinstance(kind, pl.Struct):
        for part in kind.fields:
            _refuse(name, part.dtype, True)
    elif not (kind == pl.String or _width(kind) is not None or kind == pl.Null or (kind == pl.Binary and not nested)):
        raise DataError(
            f"Column '{name}' holds {kind}{' inside lists or structs' if nested else ''}, which has no packed form, so that "
            "the windows of recent interactions cannot keep it. Leave the column out of the log, or write it as text."
        )


def _one_nan(values: NDArray[Any]) -> NDArray[Any]:
    """One NaN for all, and no −0.0."""
    plain: NDArray[Any] = values + values.dtype.type(0)
    plain[np.isnan(plain)] = np.nan
    return plain


def _encode(values: pl.Series) -> Values:
    kind = values.dtype
    if kind == pl.String or kind == pl.Binary:
        return values.cast(pl.Binary).fill_null(b"").to_list()
    inner = _inner(kind)
    physical = values.to_physical()
    width = None if inner is None else _width(inner)
    whole = physical.to_list()
    if width is None:
        return [b"" if value is None else _json(value) for value in whole]
    return [
        b"" if value is None else _json(value) if None in value else _PLAIN + _array(value, width) for value in whole
    ]


def _array(value: Sequence[Any], width: str) -> bytes:
    numbers = np.array(value, dtype=width)
    return (_one_nan(numbers) if numbers.dtype.kind == "f" else numbers).tobytes()


def _json(value: Any) -> bytes:
    return _JSON + json.dumps(_canonical(value), separators=(",", ":"), ensure_ascii=False).encode()


def _canonical(value: Any) -> Any:
    if isinstance(value, float):
        return value + 0.0
    if isinstance(value, list):
        return [_canonical(part) for part in value]
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    return value


def _decode(pieces: list[bytes | None], kind: pl.DataType) -> pl.Series:
    if kind == pl.Binary:
        return pl.Series(pieces, dtype=pl.Binary)
    if kind == pl.String:
        return pl.Series(pieces, dtype=pl.Binary).cast(pl.String)
    inner = _inner(kind)
    width = None if inner is None else _width(inner)
    physical = pl.Series([], dtype=kind).to_physical().dtype
    if width is not None:
        vectors = _vectors(pieces, width)
        if vectors is not None:
            return vectors.cast(kind)

    def value(piece: bytes) -> Any:
        if piece[:1] == _JSON:
            return json.loads(piece[1:])
        return np.frombuffer(piece, width or "<u1", offset=1).tolist()

    return _of_distinct(pieces, value, physical).cast(kind)


def _vectors(pieces: list[bytes | None], width: str) -> pl.Series | None:
    """Lists of numbers that are all there and all of one length, read at once."""
    sizes = {0 if piece is None or piece[:1] != _PLAIN else len(piece) for piece in pieces}
    size = sizes.pop()
    if sizes or size < 2:
        return None
    table = np.frombuffer(b"".join(pieces), np.uint8).reshape(len(pieces), size)  # type: ignore[arg-type]
    return pl.Series(np.ascontiguousarray(table[:, 1:]).view(width)).arr.to_list()


def _of_distinct(pieces: list[bytes | None], value: Callable[[bytes], Any], kind: pl.DataType) -> pl.Series:
    known: dict[bytes | None, int] = {}
    codes = [known.setdefault(piece, len(known)) for piece in pieces]
    distinct = [None if piece is None else value(piece) for piece in known]
    return pl.Series(distinct, dtype=kind).gather(pl.Series(codes, dtype=pl.UInt32))
