"""What is fitted of one feature, and how its values become tensors.

    Vocabulary   a value is one id: 0 no value, 1 unseen in training (or rarer than `min_count`), 2 … known values
    Hashing      a value is one of `buckets` ids from 2 on; nothing is fitted, so nothing is ever unseen
    Scaling      numbers and dense vectors: standardised by the training rows' mean and deviation, clipped to ±6

A codec turns *distinct* values into tensors; whoever holds a long column factorises it first and gathers. Each codec is
data: it goes to JSON and comes back exactly. A new kind of feature is a new codec here and a line in `fit_of` (fitting.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.errors import DataError
from limaml.interactions.columns import (
    Codes,
    canonical_text,
    factorise,
    is_list,
    is_number,
    places_in,
    show,
    without_nan,
)
from limaml.interactions.schema import Feature
from limaml.types import MISSING, UNSEEN, FeatureKind, FeatureSpec

__all__ = [
    "CLIP",
    "Codec",
    "Hashing",
    "Scaling",
    "Vocabulary",
    "as_kind",
    "codec_from_json",
    "encode_values",
    "entries_of",
    "kind_of",
    "numbers_of",
    "refuse_unless_scalar",
    "spec_of",
    "split_lists",
]

CLIP = 6.0
"""Standardised values are cut to ± this: a slip of a decimal point must not reach the weights."""

RESERVED = 2  # MISSING and UNSEEN
ValueKind = Literal["integer", "float", "text"]

_LONG = 512  # values, from which on a search by numpy is faster than a dict


@dataclass(frozen=True)
class Vocabulary:
    """The values of an id feature that training knows, ascending; value `i` has id `2 + i`.

    Integers and texts are kept apart in the file, yet a request may send either: `"42"` finds the integer 42 and 42
    the text `"42"`, as JSON and CSV mix them up. (`"042"` is neither.)
    """

    kind: ValueKind
    values: tuple[int, ...] | tuple[float, ...] | tuple[str, ...]

    @property
    def size(self) -> int:
        return RESERVED + len(self.values)

    @cached_property
    def _ids(self) -> dict[int | float | str, int]:
        known: list[int | float | str] = list(self.values)
        return {value: RESERVED + i for i, value in enumerate(known)}

    @cached_property
    def _ascending(self) -> Codes | None:
        """The values as an array that can be searched, where they are integers of 64 bits."""
        if self.kind != "integer":
            return None
        try:
            found = np.array(self.values, dtype=np.int64)
        except OverflowError:
            return None
        return found if len(found) and bool((np.diff(found) > 0).all()) else None

    def ids(self, values: pl.Series) -> Codes:
        """Id `[n]` of each scalar; null and NaN are 0."""
        own = as_kind(values, self.kind)
        ascending = self._ascending if len(own) > _LONG else None
        if ascending is not None:
            asked = own.cast(pl.Int64, strict=False)
            numbers = asked.fill_null(0).to_numpy()
            place = places_in(ascending, numbers)
            known_too = (ascending[place] == numbers) & asked.is_not_null().to_numpy()
            ids = np.where(known_too, RESERVED + place, UNSEEN).astype(np.int64)
        else:
            known = self._ids
            found = [UNSEEN if value is None else known.get(value, UNSEEN) for value in own.to_list()]
            ids = np.array(found, dtype=np.int64)
        ids[without_nan(values).is_null().to_numpy()] = MISSING
        return ids

    def to_json(self) -> dict[str, object]:
        return {"codec": "vocabulary", "kind": self.kind, "values": list(self.values)}


@dataclass(frozen=True)
class Hashing:
    """Ids by a hash that is the same in every process, on every platform and in every version (BLAKE2b).

    The feature's name is part of what is hashed, so that two features do not collide on the same values.
    """

    name: str
    buckets: int

    @property
    def size(self) -> int:
        return RESERVED + self.buckets

    def ids(self, values: pl.Series) -> Codes:
        """Id `[n]` of each scalar; null and NaN are 0."""
        person = hashlib.blake2b(self.name.encode(), digest_size=16).digest()
        return np.array(
            [
                MISSING
                if text is None
                else RESERVED
                + int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=person).digest(), "little")
                % self.buckets
                for text in canonical_text(values).to_list()
            ],
            dtype=np.int64,
        )

    def to_json(self) -> dict[str, object]:
        return {"codec": "hashing", "name": self.name, "buckets": self.buckets}


@dataclass(frozen=True)
class Scaling:
    """Mean and deviation of each entry over the training rows; `indicator`: a last entry says 1 where there is none."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]  # > 0
    indicator: bool = False

    @property
    def size(self) -> int:
        return len(self.mean) + self.indicator

    def scale(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """`[n, width]` with NaN where there is no value → `[n, size]` float32; no value is 0, the training mean."""
        with np.errstate(over="ignore"):  # what is beyond all bounds is clipped like what is far
            scaled = np.clip((values - np.array(self.mean)) / np.array(self.deviation), -CLIP, CLIP)
        absent = np.isnan(values)
        scaled[absent] = 0.0
        if self.indicator:
            scaled = np.concatenate([scaled, absent.any(axis=1, keepdims=True)], axis=1)
        single: NDArray[np.float32] = scaled.astype(np.float32)
        return single

    def to_json(self) -> dict[str, object]:
        return {
            "codec": "scaling",
            "mean": list(self.mean),
            "deviation": list(self.deviation),
            "indicator": self.indicator,
        }


Codec = Vocabulary | Hashing | Scaling


def codec_from_json(data: Mapping[str, object]) -> Codec:
    """The codec that `to_json` made `data` of."""
    match data:
        case {"codec": "vocabulary", "kind": "integer" | "float" | "text" as kind, "values": list() as values}:
            cast = {"integer": int, "float": float, "text": str}[kind]
            if all(type(value) is cast for value in values):
                return Vocabulary(kind, tuple(values))
        case {"codec": "hashing", "name": str() as name, "buckets": int() as buckets}:
            return Hashing(name, buckets)
        case {
            "codec": "scaling",
            "mean": list() as mean,
            "deviation": list() as deviation,
            "indicator": bool() as flag,
        }:
            if len(mean) == len(deviation):
                return Scaling(tuple(map(float, mean)), tuple(map(float, deviation)), flag)
    raise DataError(f"This is not the JSON of a fitted feature: {show(dict(data))}. It must come from Encoder.to_json.")


def encode_values(feature: Feature, codec: Codec, values: pl.Series) -> Tensor:
    """Tensor `[n, …]` of a column of `feature`, as `FeatureSpec` describes it; meant for distinct values."""
    if isinstance(codec, Scaling):
        width = len(codec.mean)
        return torch.from_numpy(codec.scale(numbers_of(feature, values, width)))
    if feature.kind is FeatureKind.CATEGORICAL:
        refuse_unless_scalar(feature, values.dtype)
        return torch.from_numpy(codec.ids(values))
    return torch.from_numpy(_encode_lists(feature, codec, values))


def spec_of(feature: Feature, codec: Codec) -> FeatureSpec:
    """What a block must know of the encoded feature."""
    length = feature.length if feature.kind in (FeatureKind.TOKENS, FeatureKind.SEQUENCE) else 1
    return FeatureSpec(feature.name, feature.kind, feature.side, codec.size, length)


def split_lists(feature: Feature, values: pl.Series) -> pl.Series:
    """A tokens, sequence or vector column as lists: text is split at the separator, blanks and empty parts go."""
    if is_list(values.dtype):
        return values.arr.to_list() if isinstance(values.dtype, pl.Array) else values
    if isinstance(values.dtype, pl.Categorical | pl.Enum) or values.dtype == pl.Null:
        values = values.cast(pl.String)
    if values.dtype != pl.String:
        raise DataError(
            f"Feature '{feature.name}' reads column '{feature.column}' as {feature.kind} and finds type {values.dtype}; "
            "it needs a list column, or text with a separator."
        )
    parts = values.str.split(feature.separator).list.eval(pl.element().str.strip_chars())
    return parts.list.eval(pl.element().filter(pl.element() != ""))


def entries_of(feature: Feature, values: pl.Series) -> tuple[Codes, pl.Series]:
    """Entries of all lists, one after the other, and the list each comes from; nulls inside lists are left out."""
    table = (
        split_lists(feature, values).to_frame("value").with_row_index("row").explode("value").drop_nulls("value")
    )  # null and empty lists explode to one null
    return table["row"].to_numpy().astype(np.int64), without_nan(table["value"])


def _encode_lists(feature: Feature, codec: Vocabulary | Hashing, values: pl.Series) -> Codes:
    """Ids `[n, length]`: the first `length` distinct ids of a set, the last `length` entries of a sequence."""
    rows, entries = entries_of(feature, values)
    codes, first = factorise(entries)
    ids = codec.ids(entries.gather(first))[codes]
    table = pl.DataFrame({"row": rows, "id": ids})
    if feature.kind is FeatureKind.TOKENS:
        table = table.unique(maintain_order=True)
    place = pl.int_range(pl.len()).over("row")
    if feature.kind is FeatureKind.SEQUENCE:  # counted from where the last `length` begin
        place = place - (pl.len().over("row").cast(pl.Int64) - feature.length).clip(lower_bound=0)
    table = table.with_columns(place=place).filter((pl.col("place") >= 0) & (pl.col("place") < feature.length))
    encoded = np.zeros((len(values), feature.length), np.int64)
    encoded[table["row"].to_numpy(), table["place"].to_numpy()] = table["id"].to_numpy()
    return encoded


def numbers_of(feature: Feature, values: pl.Series, width: int) -> NDArray[np.float64]:
    """A numeric or vector column as `[n, width]` float64, NaN where there is no value."""
    if feature.kind is FeatureKind.NUMERIC:
        if not is_number(values.dtype) and values.dtype != pl.Null:
            raise DataError(
                f"Feature '{feature.name}' reads column '{feature.column}' as numeric and finds type {values.dtype}; "
                "make the column numbers, or the feature categorical."
            )
        return values.cast(pl.Float64).fill_null(float("nan")).to_numpy().reshape(-1, 1).copy()
    lists = split_lists(feature, values)
    lengths = lists.list.len().fill_null(width).to_numpy()
    if (lengths != width).any():
        row = int((lengths != width).argmax())
        raise DataError(
            f"Feature '{feature.name}' reads column '{feature.column}' as a dense vector of width {width}, and finds "
            f"one of width {lengths[row]}: {show(lists[row].to_list())}. Make them all of one width, or null."
        )
    full = np.full((len(values), width), np.nan)
    present = lists.is_not_null().to_numpy()
    entries = lists.drop_nulls().explode() if present.any() else pl.Series([], dtype=pl.Float64)
    try:
        numbers = entries.cast(pl.Float64)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"Feature '{feature.name}' reads column '{feature.column}' as a dense vector, and not all its entries are "
            "numbers."
        ) from error
    full[present] = numbers.fill_null(float("nan")).to_numpy().reshape(-1, width)
    return full


def kind_of(values: pl.Series) -> ValueKind:
    """Integers, and floats that are all whole, make a vocabulary of integers; other numbers one of floats."""
    dtype = values.dtype
    if dtype.is_integer():
        return "integer"
    if dtype.is_float():
        finite = without_nan(values).drop_nulls()
        whole = bool((finite.is_finite() & (finite == finite.floor()) & (finite.abs() < 2**53)).all())
        return "integer" if whole else "float"
    return "text"


def as_kind(values: pl.Series, kind: ValueKind) -> pl.Series:
    """Scalars as values of a vocabulary of `kind`; null where they can be none."""
    values = without_nan(values)
    if kind == "text":
        return canonical_text(values)
    if values.dtype.is_numeric():
        if kind == "float":
            return values.cast(pl.Float64)
        if values.dtype.is_integer():
            return values
        return pl.select(pl.when(values == values.floor()).then(values)).to_series().cast(pl.Int64, strict=False)
    text = canonical_text(values)
    if kind == "float":
        return text.cast(pl.Float64, strict=False)
    number = text.cast(pl.Int64, strict=False)
    # "042" is not the integer 42: zip codes and article numbers that differ by a zero are different things
    return pl.select(pl.when(canonical_text(number) == text).then(number)).to_series()


def refuse_unless_scalar(feature: Feature, dtype: pl.DataType) -> None:
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
        raise DataError(
            f"Feature '{feature.name}' reads column '{feature.column}' as {feature.kind} and finds type {dtype}; an id "
            "is a number, a text or a Boolean. For a list column use kind 'tokens' or 'sequence'."
        )
