"""Named columns of a request, and the look-ups that turn them into encoded features.

A `Column` is what a tensor, a list out of JSON and a polars series have in common: values, one per row or one for all,
and what polars would call their type. `Lookups` gives each feature exactly what `Encoder.encode_features` gives it; what
it has encoded once it remembers, so that a request costs a dictionary access per value and not a query plan per feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.errors import DataError
from limaml.interactions.codecs import CLIP, Codec, Scaling, Vocabulary, encode_values
from limaml.interactions.columns import canonical_text, missing_column
from limaml.interactions.encode import Encoder
from limaml.interactions.keys import join_key
from limaml.interactions.schema import Feature, Task
from limaml.types import FeatureKind, Features

__all__ = ["Column", "Lookup", "Lookups", "columns_of", "joined", "keys_of", "plain_type"]

REMEMBERED = 200_000
"""Distinct values of a feature that are kept encoded; beyond that it is begun anew."""


_KINDS: dict[type[pl.DataType], str] = {
    pl.Int64: "Int64",
    pl.UInt64: "UInt64",
    pl.Float64: "Float64",
    pl.String: "String",
    pl.Boolean: "Boolean",
}


_PLAIN: dict[np.dtype[Any], pl.DataType] = {
    np.dtype(np.int64): pl.Int64(),
    np.dtype(np.int32): pl.Int64(),
    np.dtype(np.float32): pl.Float64(),
    np.dtype(np.float64): pl.Float64(),
}
"""What most arrays are, and what polars would call it."""


def plain_type(dtype: np.dtype[Any]) -> pl.DataType | None:
    """What polars would call an array of plain numbers of this type; None for what needs a closer look."""
    return _PLAIN.get(dtype)


class Column:
    """Values `[n]`, or `[1]` for all rows alike. `kind` names their type: only values of one kind are compared."""

    def __init__(self, dtype: pl.DataType, values: list[Any] | None = None, array: NDArray[Any] | None = None) -> None:
        self.dtype, self._values, self.array = dtype, values, array
        self._keys: Sequence[Hashable] | None = None
        self.kind = _KINDS.get(type(dtype)) or str(dtype)

    @classmethod
    def of_array(cls, data: NDArray[Any]) -> Column:
        """Of an array `[n]` of numbers, Booleans or `bytes` (UTF-8), or `[n, width]` of lists of them."""
        plain = _PLAIN.get(data.dtype) if data.ndim == 1 else None
        if plain is not None:
            return cls(plain, array=data)
        if data.dtype.hasobject:
            texts = [value.decode() for value in data.reshape(-1).tolist()]
            dtype: pl.DataType = pl.String()
            values: list[Any] | None = texts if data.ndim == 1 else np.array(texts, object).reshape(data.shape).tolist()
            array = None
        else:
            kind = data.dtype.kind
            wide = kind == "u" and data.dtype.itemsize == 8
            dtype = {"b": pl.Boolean(), "f": pl.Float64()}.get(kind, pl.UInt64() if wide else pl.Int64())
            values, array = None, data
        return cls(dtype if data.ndim == 1 else pl.List(dtype), values, array)

    @classmethod
    def of_series(cls, series: pl.Series) -> Column:
        dtype = series.dtype
        if dtype.is_integer():
            dtype = pl.UInt64() if dtype == pl.UInt64 else pl.Int64()
        elif dtype.is_float():
            dtype, series = pl.Float64(), series.cast(pl.Float64)
        elif isinstance(dtype, pl.Categorical | pl.Enum):
            dtype, series = pl.String(), series.cast(pl.String)
        if dtype.is_numeric() and not dtype.is_decimal() and not series.null_count():
            return cls(dtype, array=series.to_numpy())
        return cls(dtype, series.to_list())

    def __len__(self) -> int:
        array = self.array
        return len(self.values) if array is None else len(array)

    @property
    def _array(self) -> NDArray[Any]:
        assert self.array is not None
        return self.array

    @property
    def values(self) -> list[Any]:
        if self._values is None:
            self._values = self._array.tolist()
        return self._values

    @property
    def keys(self) -> Sequence[Hashable]:
        """The values so that equal ones are equal: lists as tuples, NaN as None."""
        if self._keys is None:
            self._keys = self._as_keys(self.values)
        return self._keys

    def _as_keys(self, values: list[Any]) -> Sequence[Hashable]:
        if self.dtype.is_nested():
            return [None if value is None else tuple(value) for value in values]
        if self.dtype.is_float():
            return [None if value != value else value for value in values]
        return values

    def series(self, values: Sequence[Any] | None = None) -> pl.Series:
        return pl.Series(self.values if values is None else values, dtype=self.dtype)

    def repeated(self, rows: int) -> Column:
        """For `rows` rows, where it is one value for all."""
        if len(self) == rows:
            return self
        if self.array is not None:
            return Column(self.dtype, array=np.repeat(self.array, rows, axis=0))
        return Column(self.dtype, self.values * rows)

    def first(self, rows: Sequence[int]) -> Column:
        """The column of some of its rows."""
        if self.array is not None:
            return Column(self.dtype, array=self.array[list(rows)])
        return Column(self.dtype, [self.values[row] for row in rows])


def columns_of(frame: pl.DataFrame, names: set[str]) -> dict[str, Column]:
    """The columns of a frame that are among `names`."""
    return {name: Column.of_series(frame[name]) for name in frame.columns if name in names}


def joined(columns: Sequence[tuple[Column, int]]) -> Column | None:
    """The columns of several requests, each for so many rows, one after the other; None where they are not all arrays
    of one kind and width."""
    first = columns[0][0]
    arrays = [column.array for column, _ in columns if column.array is not None and column.kind == first.kind]
    if len(arrays) < len(columns) or any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
        return None
    spread = [
        array if len(array) == rows else np.repeat(array, rows, axis=0)
        for array, (_, rows) in zip(arrays, columns, strict=True)
    ]
    return Column(first.dtype, array=np.concatenate(spread))


class Lookup:
    """One feature's encoded values, by value."""

    def __init__(self, feature: Feature, codec: Codec) -> None:
        self.feature, self.codec = feature, codec
        self.is_id = feature.is_id
        self._known: dict[str, dict[Hashable, Any]] = {}
        scaling = codec if isinstance(codec, Scaling) else None
        self._mean = np.array(scaling.mean if scaling else ())
        self._deviation = np.array(scaling.deviation if scaling else ())

    @property
    def datatype(self) -> str:
        """The protocol's datatype that an id feature's values are best sent in."""
        if isinstance(self.codec, Vocabulary) and self.feature.kind is FeatureKind.CATEGORICAL:
            return {"integer": "INT64", "float": "FP64", "text": "BYTES"}[self.codec.kind]
        return "BYTES"

    def check(self, column: Column) -> None:
        """Raise `DataError` if the feature cannot be read from a column of this type."""
        if column.kind not in self._known:
            encode_values(self.feature, self.codec, column.series([]))
            self._known[column.kind] = {}

    def encode(self, column: Column) -> Tensor:
        """Encoded values `[len(column), …]`, as `Encoder.encode_features` has them."""
        if isinstance(self.codec, Scaling):
            return self._scale(self.codec, column)
        self.check(column)
        known, keys = self._known[column.kind], column.keys
        found = list(map(known.get, keys))
        if None in found:
            missing = list(dict.fromkeys(key for key, ids in zip(keys, found, strict=True) if ids is None))
            fresh = encode_values(self.feature, self.codec, column.series(missing)).tolist()
            answers = dict(zip(missing, fresh, strict=True))
            if len(known) + len(missing) > REMEMBERED:
                known.clear()
            if len(missing) <= REMEMBERED:
                known.update(answers)
            found = [answers[key] if ids is None else ids for key, ids in zip(keys, found, strict=True)]
        shape = (len(found),) if self.feature.kind is FeatureKind.CATEGORICAL else (len(found), self.feature.length)
        return torch.from_numpy(np.array(found, dtype=np.int64).reshape(shape))

    def scale_of_one(self) -> Callable[[NDArray[np.float64]], bool] | None:
        """What scales the values `[n]` of a single number where they stand, and says whether all were known; None for
        another feature."""
        codec = self.codec
        single = isinstance(codec, Scaling) and len(codec.mean) == 1 and not codec.indicator
        return self._scale_here if single and self.feature.kind is FeatureKind.NUMERIC else None

    def _scale_here(self, values: NDArray[np.float64]) -> bool:
        """As `Scaling.scale` does, where no value is missing; whether that is so."""
        values -= self._mean
        values /= self._deviation
        np.minimum(np.maximum(values, -CLIP, out=values), CLIP, out=values)
        return not math.isnan(np.add.reduce(values, None))

    def _scale(self, codec: Scaling, column: Column) -> Tensor:
        array = column.array
        if array is None or column.dtype.is_nested() != (self.feature.kind is FeatureKind.VECTOR):
            return encode_values(self.feature, codec, column.series())
        numbers = (array[:, None] if array.ndim == 1 else array).astype(np.float64)
        if numbers.shape[1] == len(self._mean) and not codec.indicator:
            scaled = numbers.copy()
            if self._scale_here(scaled):
                return torch.from_numpy(scaled.astype(np.float32))
        if numbers.shape[1] != len(codec.mean):
            raise DataError(
                f"Feature '{self.feature.name}' reads column '{self.feature.column}' as a dense vector of width "
                f"{len(codec.mean)}, and finds one of width {numbers.shape[1]}."
            )
        return torch.from_numpy(codec.scale(numbers))


class Lookups:
    """The look-ups of an encoder, side by side."""

    def __init__(self, encoder: Encoder) -> None:
        self.schema = encoder.schema
        self._of: dict[str, list[Lookup]] = {}
        for feature in encoder.schema.features:
            self._of.setdefault(feature.side, []).append(Lookup(feature, encoder.codecs[feature.name]))

    def on(self, side: str) -> Sequence[Lookup]:
        return self._of.get(side, ())

    def has_negative(self, column: str) -> bool:
        """Whether training has seen a negative integer in a column of ids."""
        return any(
            isinstance(lookup.codec, Vocabulary)
            and any(value < 0 for value in lookup.codec.values[:1] if isinstance(value, int))
            for lookups in self._of.values()
            for lookup in lookups
            if lookup.feature.column == column and lookup.codec.size > 2
        )

    def check(self, columns: Mapping[str, Column], side: str) -> None:
        """Raise `DataError` where a column of `side` is missing, or of a type that its feature cannot be read from."""
        problems = []
        for lookup in self.on(side):
            feature = lookup.feature
            if feature.column not in columns:
                problems.append(missing_column(feature.column, f"feature '{feature.name}'", list(columns)))
            else:
                lookup.check(columns[feature.column])
        if problems:
            raise DataError("\n".join(problems))

    def features(self, columns: Mapping[str, Column], side: str) -> Features:
        """The features of `side`, `[n, …]`."""
        return {lookup.feature.name: lookup.encode(columns[lookup.feature.column]) for lookup in self.on(side)}


def keys_of(columns: Mapping[str, Column], task: Task) -> tuple[list[str], NDArray[np.int64], list[int]]:
    """The distinct keys of `task` in order of first appearance; for each row which of them it has, `[n]` or, where
    one stands for all rows, `[1]`; and the row in which each stands first. As `task_keys` has them.

    Raises `DataError` where a key column is missing, holds no value, or holds something that cannot name a task.
    """
    if len(task.columns) == 1 and (only := columns.get(task.columns[0])) is not None and len(only) == 1:
        return _texts(only, task.columns[0], task), np.zeros(1, np.int64), [0]  # one task for all rows, as most ask
    problems = [
        missing_column(column, f"part of the key of task '{task.name}'", list(columns))
        for column in task.columns
        if column not in columns
    ]
    if problems:
        raise DataError("\n".join(problems))
    given = [columns[name] for name in task.columns]
    rows = max(map(len, given))
    texts = [_texts(column.repeated(rows), name, task) for name, column in zip(task.columns, given, strict=True)]
    named = texts[0] if len(texts) == 1 else [join_key(parts) for parts in zip(*texts, strict=True)]
    place: dict[str, int] = {}
    first: list[int] = []
    codes = np.empty(len(named), np.int64)
    for row, key in enumerate(named):
        code = codes[row] = place.setdefault(key, len(place))
        if code == len(first):
            first.append(row)
    return list(place), codes, first


def _texts(column: Column, name: str, task: Task) -> list[str]:
    """Each value as canonical text."""
    if column.kind == "Int64" and column.array is not None:
        return list(map(str, column.values))
    if column.dtype.is_nested() or column.dtype == pl.Binary:
        raise DataError(f"Column '{name}' is of type {column.dtype} and cannot name a task; use numbers or text.")
    texts: list[str | None]
    if column.array is not None and column.dtype.is_integer():
        texts = list(map(str, column.values))
    elif column.dtype == pl.String:
        texts = column.values
    else:
        texts = canonical_text(column.series()).to_list()
    if None in texts:
        raise DataError(
            f"Column '{name}' names no '{task.name}' in row {texts.index(None)} (rows count from 0). Remove the rows without "
            "a task key, or give them one."
        )
    return [text for text in texts if text is not None]
