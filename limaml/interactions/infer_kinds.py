"""The kind of a feature, read from its values: one for each entity it describes.

lists          of whole numbers or text → tokens; of floats, all of one width → vector
Booleans       → categorical
whole numbers  few, or an id by its name → categorical; else numeric
floats         → numeric
text           parts that come back in many values ("Action|Comedy") → tokens; a code → categorical; else left out
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

from limaml.interactions.columns import is_list, show
from limaml.types import FeatureKind

__all__ = ["Chosen", "Left", "choose_kind"]

FEW = 32
"""Up to so many distinct whole numbers are taken for codes, not for amounts."""

MAX_LENGTH = 32  # of tokens; a longer tail is cut, which `check` counts
REUSE = 1.5  # how often a part must stand on average for text to be a list of parts
_ID_NAME = re.compile(r"(^|_)(ids?|code|zip|zip_?code|postcode|postal|sku|uuid|guid|hash|category|brand|type)$", re.I)


@dataclass(frozen=True)
class Chosen:
    """A kind, its settings, and the reason as half a sentence."""

    kind: FeatureKind
    reason: str
    min_count: int = 1
    length: int = 16
    separator: str = " "


@dataclass(frozen=True)
class Left:
    """A column that makes no feature, and the reason as half a sentence."""

    reason: str


def choose_kind(name: str, values: pl.Series, unit: str) -> Chosen | Left:
    """The kind of column `name`, given its value for each entity, where `unit` says what an entity is."""
    dtype, known = values.dtype, values.drop_nulls()
    if is_list(dtype):
        return _of_lists(known)
    if dtype == pl.Boolean:
        return Chosen(FeatureKind.CATEGORICAL, "it is true or false")
    if dtype.is_temporal():
        return Left("it is a moment in time; turn it into numbers, such as an age in days, to use it")
    if dtype.is_numeric():
        whole = not dtype.is_float() or bool((known.is_finite() & (known == known.floor())).all())
        distinct = known.n_unique()
        if whole and _ID_NAME.search(name):
            return _of_codes(known, distinct, unit, f"by its name it is a code, with {distinct} distinct values")
        if whole and distinct <= FEW:
            return _of_codes(known, distinct, unit, f"it has {distinct} distinct whole numbers")
        return Chosen(FeatureKind.NUMERIC, f"it is a number with {distinct} distinct values")
    if dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum):
        return _of_text(name, known.cast(pl.String), unit)
    return Left(f"columns of type {dtype} are not known to be of any kind")


def _of_lists(known: pl.Series) -> Chosen | Left:
    lists = known.arr.to_list() if isinstance(known.dtype, pl.Array) else known
    inner = lists.dtype.inner if isinstance(lists.dtype, pl.List) else pl.Null()
    lengths = lists.list.len()
    if isinstance(inner, pl.DataType) and inner.is_float():
        widths = lengths.n_unique()
        if widths == 1 and int(lengths[0]) > 0:
            return Chosen(FeatureKind.VECTOR, f"its lists of numbers are all {lengths[0]} wide")
        return Left(f"its lists of numbers are of {widths} different widths")
    if not isinstance(inner, pl.DataType) or inner.is_nested():
        return Left("its lists hold other lists")
    return Chosen(FeatureKind.TOKENS, "it is a list", min_count=2, length=_length(lengths))


def _of_codes(known: pl.Series, distinct: int, unit: str, why: str) -> Chosen | Left:
    """A categorical, unless hardly any value is held by two entities."""
    if distinct <= FEW and distinct * 2 <= len(known):
        return Chosen(FeatureKind.CATEGORICAL, why)
    counts = known.value_counts()["count"]
    floor = 2 if distinct * 2 <= len(known) else 3
    covered = int(counts.filter(counts >= floor).sum())
    if covered < max(2, len(known) // 20):
        return Left(f"{why}, and nearly every {unit} has a value of its own")
    return Chosen(FeatureKind.CATEGORICAL, why, min_count=floor)


def _of_text(name: str, known: pl.Series, unit: str) -> Chosen | Left:
    distinct = known.n_unique()
    for separator in ("|", ";", ", ", ",", " "):
        if chosen := _of_parts(known, distinct, separator):
            return chosen
    spaced = float(known.str.contains(r"\s").mean() or 0)  # type: ignore[arg-type]
    if distinct * 2 > len(known) and distinct > FEW and spaced > 0.5:
        example = show(known[0], 40)
        return Left(f"it is free text, such as {example}, and nearly every {unit} has its own")
    return _of_codes(known, distinct, unit, f"it is text with {distinct} distinct values")


def _of_parts(known: pl.Series, distinct: int, separator: str) -> Chosen | None:
    """Tokens, where text is made of parts that come back in other values; None where it is not."""
    holds = known.str.contains(separator, literal=True)
    if not holds.any() or float(holds.mean() or 0) < 0.05:  # type: ignore[arg-type]
        return None
    lists = known.str.split(separator).list.eval(pl.element().str.strip_chars())
    parts = lists.explode().drop_nulls()
    vocabulary = parts.n_unique()
    if len(parts) < REUSE * vocabulary:
        return None
    # words come back in any prose, and in names such as "college student": parts split at
    # spaces must make up far more values than there are parts
    if separator == " " and vocabulary * 2 > distinct:
        return None
    reason = f"its text is made of {vocabulary} parts separated by {separator!r}"
    return Chosen(
        FeatureKind.TOKENS, reason, min_count=2, length=_length(lists.list.len()), separator=separator.strip() or " "
    )


def _length(lengths: pl.Series) -> int:
    """Long enough for all where that is short, else for all but one in a hundred, at most `MAX_LENGTH`."""
    longest: int = max([1, *lengths.drop_nulls().cast(pl.Int64).unique().to_list()])
    if longest <= 16:
        return max(longest, 1)
    return int(min(max(float(lengths.quantile(0.99, "higher") or 1), 16), MAX_LENGTH))
