"""Fitting features to rows that come in parts: a codec each, the same as if all rows had come at once.

Of an id feature the distinct values and how often each stands are held; of numbers three sums for each entry; of what is hashed nothing.
So memory grows with the vocabularies, not with the rows. Counts are merged exactly; so are the sums of numbers, but for the
rounding of a mean and a deviation that come out of several parts instead of one (a relative error of some 1e-15).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import DataError
from limaml.interactions.codecs import (
    Codec,
    Hashing,
    Scaling,
    Vocabulary,
    as_kind,
    entries_of,
    kind_of,
    numbers_of,
    refuse_unless_scalar,
    split_lists,
)
from limaml.interactions.columns import Codes
from limaml.interactions.schema import Feature
from limaml.types import FeatureKind

__all__ = ["FeatureFit", "fit_of"]

Floats = NDArray[np.float64]
_HELD = 1_000_000  # values that are held before they are counted together


class FeatureFit(Protocol):
    """What is known of one feature so far."""

    def add(self, distinct: pl.Series, counts: Codes) -> None:
        """Take in `distinct` values `[d]` of a part, value `i` standing `counts[i]` times in it."""
        ...

    def codec(self) -> Codec:
        """What is fitted by all that was taken in."""
        ...


def fit_of(feature: Feature) -> FeatureFit:
    """A fit that has seen nothing yet."""
    if feature.kind in (FeatureKind.NUMERIC, FeatureKind.VECTOR):
        return _NumberFit(feature)
    if feature.buckets is not None:
        return _NoFit(Hashing(feature.name, feature.buckets))
    return _IdFit(feature)


@dataclass(frozen=True)
class _NoFit:
    fixed: Hashing

    def add(self, distinct: pl.Series, counts: Codes) -> None:
        """Nothing is fitted."""

    def codec(self) -> Codec:
        return self.fixed


class _IdFit:
    """Counts of values. A token or an entry of a sequence is counted once for each value that contains it."""

    def __init__(self, feature: Feature) -> None:
        self.feature = feature
        self._parts: list[pl.DataFrame] = []
        self._fresh = 0  # rows of parts that were not yet counted together

    def add(self, distinct: pl.Series, counts: Codes) -> None:
        if self.feature.kind is not FeatureKind.CATEGORICAL:
            rows, distinct = entries_of(self.feature, distinct)
            table = pl.DataFrame({"row": rows, "value": distinct}).unique(maintain_order=True)
            distinct, counts = table["value"], counts[table["row"].to_numpy()]
        refuse_unless_scalar(self.feature, distinct.dtype)
        if isinstance(distinct.dtype, pl.Categorical | pl.Enum):
            distinct = distinct.cast(pl.String)
        self._parts.append(pl.DataFrame({"value": distinct, "count": counts}))
        self._fresh += len(distinct)
        if len(self._parts) > 1 and self._fresh > max(_HELD, self._parts[0].height):
            self._parts, self._fresh = [_counted(self._together())], 0

    def _together(self) -> pl.DataFrame:
        typed = [part for part in self._parts if part["value"].dtype != pl.Null] or self._parts
        return pl.concat(typed, how="vertical_relaxed")

    def codec(self) -> Codec:
        table = self._together()
        kind = kind_of(table["value"])
        known = (
            _counted(table.with_columns(as_kind(table["value"], kind).alias("value")).drop_nulls("value"))
            .filter(pl.col("count") >= self.feature.min_count)
            .sort("value")
        )
        return Vocabulary(kind, tuple(known["value"].to_list()))


def _counted(table: pl.DataFrame) -> pl.DataFrame:
    return table.group_by("value").agg(pl.col("count").sum())


@dataclass(frozen=True)
class _Moments:
    """Of one part: how many values each entry has, their sum, and the squares' sum around their own mean, all `[width]`."""

    count: NDArray[np.int64]
    total: Floats
    squares: Floats
    absent: bool  # whether a value is missing


class _NumberFit:
    def __init__(self, feature: Feature) -> None:
        self.feature = feature
        self._width: int | None = 1 if feature.kind is FeatureKind.NUMERIC else None
        self._parts: list[_Moments] = []

    def add(self, distinct: pl.Series, counts: Codes) -> None:
        feature = self.feature
        found = _width(feature, distinct) if feature.kind is FeatureKind.VECTOR else self._width
        if found is None:  # not one vector in this part
            return
        if self._width not in (None, found):
            raise DataError(_ragged(feature, sorted([self._width or 0, found])))
        self._width = found
        values = numbers_of(feature, distinct, found)
        if np.isinf(values).any():
            raise DataError(
                f"Feature '{feature.name}' reads column '{feature.column}', which holds infinite numbers; replace them by "
                "null or by a number before training."
            )
        present = ~np.isnan(values)
        weight = present * counts[:, None]  # [d, width]
        count = weight.sum(axis=0)
        total = (np.where(present, values, 0.0) * weight).sum(axis=0)
        mean = total / np.maximum(count, 1)
        squares = (np.where(present, values - mean, 0.0) ** 2 * weight).sum(axis=0)
        self._parts.append(_Moments(count, total, squares, bool((~present).any())))

    def codec(self) -> Codec:
        width = self._width or 1
        parts = self._parts or [_Moments(np.zeros(width, np.int64), np.zeros(width), np.zeros(width), False)]
        count = np.maximum(np.sum([part.count for part in parts], axis=0), 1)
        mean = _sums([part.total for part in parts]) / count
        # around the common mean: each part's own squares, and those of its mean; exactly 0 where there is one part
        squares = _sums([part.squares for part in parts])
        squares = squares + _sums([part.count * (_mean(part) - mean) ** 2 for part in parts])
        deviation = np.sqrt(squares / count)
        # what is constant up to rounding is constant
        deviation = np.where(deviation > 1e-12 * np.maximum(np.abs(mean), 1.0), deviation, 1.0)
        indicator = self.feature.kind is FeatureKind.NUMERIC and any(part.absent for part in parts)
        return Scaling(tuple(mean.tolist()), tuple(deviation.tolist()), indicator)


def _mean(part: _Moments) -> Floats:
    mean: Floats = part.total / np.maximum(part.count, 1)
    return mean


def _sums(parts: list[Floats]) -> Floats:
    """Entry by entry, rounded once."""
    return np.array([math.fsum(entries) for entries in zip(*parts, strict=True)])


def _width(feature: Feature, values: pl.Series) -> int | None:
    lengths = split_lists(feature, values).list.len().drop_nulls()
    widths = lengths.unique().sort().to_list()
    if len(widths) > 1:
        raise DataError(_ragged(feature, widths))
    if widths == [0]:
        raise DataError(
            f"Feature '{feature.name}' reads column '{feature.column}' as a dense vector, and all are empty."
        )
    return int(widths[0]) if widths else None


def _ragged(feature: Feature, widths: list[int]) -> str:
    return (
        f"Feature '{feature.name}' reads column '{feature.column}' as a dense vector, but its lists are of lengths "
        f"{widths[:5]}; they must all be of one length. Use kind 'tokens' or 'sequence' for lists of any length."
    )
