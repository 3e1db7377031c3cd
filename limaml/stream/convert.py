"""Values of JSON as values of a column's type, a whole column at a time; what a type cannot hold is said, value by value.

Nothing is changed on the way: `42`, `42.0` and `"42"` are the integer 42, and the text `42` in a column of text; `1.5` is no
integer, `true` no number. Times are ISO 8601 (without a zone: UTC) or numbers since 1970 in the unit that the caller names.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence

import polars as pl

from limaml.interactions.columns import show

__all__ = ["EPOCHS", "can_hold", "to_column"]

EPOCHS: Mapping[str, int] = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0}
"""Microseconds in one unit of a number that stands for a time; a nanosecond is a thousandth of one."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LARGEST = 9_000_000_000_000_000  # microseconds: beyond, nanoseconds would not fit 64 bits
_NULL = type(None)


class _Not(ValueError):
    """A value that a type cannot hold; the message ends the sentence "… is …"."""


def can_hold(kind: pl.DataType) -> bool:
    """Whether JSON has values for a column of this type."""
    if isinstance(kind, pl.List | pl.Array):
        return can_hold(_inner(kind)) and not isinstance(_inner(kind), pl.List | pl.Array)
    return (
        kind.is_integer()
        or kind.is_float()
        or kind in (pl.String, pl.Boolean, pl.Date)
        or isinstance(kind, pl.Datetime)
    )


def to_column(
    name: str, values: Sequence[object], kind: pl.DataType, epoch: str = "s"
) -> tuple[pl.Series, dict[int, str]]:
    """The column `[n]` in the type `kind`, and for each value that the type cannot hold (null in the column) a sentence."""
    if isinstance(kind, pl.List | pl.Array):
        return _lists(name, values, kind, epoch)
    quick = _QUICK.get(kind.base_type())
    if quick is not None and set(map(type, values)) <= quick:
        try:
            return pl.Series(name, values, dtype=kind, strict=True), {}
        except (pl.exceptions.PolarsError, OverflowError, TypeError, UnicodeEncodeError, ValueError):
            pass  # one of them does not fit: found below
    convert = _converter(kind, epoch)
    found: list[object] = []
    problems: dict[int, str] = {}
    for place, value in enumerate(values):
        try:
            found.append(None if value is None else convert(value))
        except (_Not, OverflowError, UnicodeEncodeError) as problem:
            found.append(None)
            why = str(problem) if isinstance(problem, _Not) else f"no {kind}"
            problems[place] = (
                f"Column '{name}' holds {show(value)}, which is {why}; the rows that are kept have {kind} there. "
                "Send it in that type."
            )
    return _series(name, found, kind), problems


_QUICK: Mapping[type[pl.DataType] | pl.DataType, set[type]] = {
    **{
        each: {int, _NULL}
        for each in (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
    },
    pl.Float64: {float, _NULL},
    pl.String: {str, _NULL},
    pl.Boolean: {bool, _NULL},
}


def _series(name: str, found: Sequence[object], kind: pl.DataType) -> pl.Series:
    if isinstance(kind, pl.Datetime):
        times = pl.Series(name, found, dtype=pl.Int64).cast(pl.Datetime("us", "UTC" if kind.time_zone else None))
        zone = kind.time_zone
        return (times.dt.convert_time_zone(zone) if zone else times).cast(kind)
    return pl.Series(name, found, dtype=kind)


def _converter(kind: pl.DataType, epoch: str) -> Callable[[object], object]:
    if kind.is_integer():
        low, high = (pl.select(getattr(kind, end)()).item() for end in ("min", "max"))
        return lambda value: _integer(value, low, high, kind)
    if kind.is_float():
        return _float32 if kind == pl.Float32 else _float
    if kind == pl.String:
        return _text
    if kind == pl.Boolean:
        return _boolean
    if kind == pl.Date:
        return _date
    if isinstance(kind, pl.Datetime):
        return lambda value: _time(value, epoch)
    raise TypeError(f"JSON has no {kind}")  # `can_hold` was not asked


def _integer(value: object, low: int, high: int, kind: pl.DataType) -> int:
    if isinstance(value, bool):
        raise _Not("no number: true and false are not taken for 1 and 0")
    if isinstance(value, str):
        digits = value.strip()
        if not digits.removeprefix("-").isascii() or not digits.removeprefix("-").isdigit() or len(digits) > 40:
            raise _Not("no integer")
        value = int(digits)
    if isinstance(value, float):
        if not value.is_integer():
            raise _Not("no integer")
        value = int(value)
    if not isinstance(value, int):
        raise _Not("no integer")
    if not low <= value <= high:
        raise _Not(f"out of the range of {kind}")
    return value


def _float(value: object) -> float:
    if isinstance(value, bool):
        raise _Not("no number: true and false are not taken for 1 and 0")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _Not("no number") from None
    if not isinstance(value, int | float):
        raise _Not("no number")
    return float(value)


def _float32(value: object) -> float:
    number = _float(value)
    if math.isfinite(number) and abs(number) > 3.4028234663852886e38:
        raise _Not("out of the range of Float32")
    return number


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Not("no text")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # as every table that is read: 42.0 and 42 are one id
    if isinstance(value, float) and math.isnan(value):
        raise _Not("no text")
    text = value if isinstance(value, str) else str(value)
    text.encode()  # half a surrogate pair cannot be stored
    return text


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Not("neither true nor false")
    return value


def _date(value: object) -> datetime.date:
    try:
        if not isinstance(value, str) or len(value) != 10:
            raise ValueError
        return datetime.date.fromisoformat(value)
    except ValueError:
        raise _Not("no date such as 2024-05-31") from None


def _time(value: object, epoch: str) -> int:
    """Microseconds since 1970."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Not("no time")
    if isinstance(value, str):
        try:
            moment = datetime.datetime.fromisoformat(value)
        except ValueError:
            raise _Not("no time such as 2024-05-31T12:30:00Z") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        microseconds = (moment - _EPOCH) // datetime.timedelta(microseconds=1)
        if abs(microseconds) > _LARGEST:
            raise _Not("too far from 1970 for a time")
        return microseconds
    if not math.isfinite(value):
        raise _Not("no time")
    scale = EPOCHS[epoch]
    found = value // 1000 if not scale else value * scale if isinstance(value, int) else round(value * scale)
    if abs(found) > _LARGEST:
        raise _Not(f"no time in {epoch} since 1970 (--epoch names the unit)")
    return int(found)


def _inner(kind: pl.List | pl.Array) -> pl.DataType:
    inner = kind.inner
    return inner() if isinstance(inner, type) else inner


def _lists(
    name: str, values: Sequence[object], kind: pl.List | pl.Array, epoch: str
) -> tuple[pl.Series, dict[int, str]]:
    width = kind.shape[0] if isinstance(kind, pl.Array) else None
    problems = {
        place: f"Column '{name}' holds {show(value)}, which is no list; the rows that are kept have {kind} there. Send a list."
        for place, value in enumerate(values)
        if value is not None and not isinstance(value, list)
    }
    problems |= {
        place: f"Column '{name}' holds a list of {len(value)}, but the rows that are kept have {width} entries there."
        for place, value in enumerate(values)
        if width is not None and isinstance(value, list) and len(value) != width
    }
    lists = [value if isinstance(value, list) and place not in problems else None for place, value in enumerate(values)]
    entries, wrong = to_column(name, [entry for value in lists for entry in value or ()], _inner(kind), epoch)
    flat = entries.to_list()
    found: list[object] = []
    at = 0
    for place, value in enumerate(lists):
        if value is None:
            found.append(None)
            continue
        for entry in range(at, at + len(value)) if wrong else ():
            if entry in wrong:
                problems[place] = wrong[entry].replace(" holds ", f" holds, as entry {entry - at} of a list, ", 1)
                break
        found.append(flat[at : at + len(value)] if place not in problems else None)
        at += len(value)
    return pl.Series(name, found, dtype=kind), problems
