"""Event times as people write them, and as a store counts them: microseconds since 1970 for dates, else the numbers themselves."""

from __future__ import annotations

import datetime as dt

import polars as pl

from limaml.errors import ConfigError
from limaml.interactions.index import time_values

__all__ = ["parsed_time", "shown_time"]


def shown_time(time: int | None, kind: pl.DataType) -> str:
    """An event time of a column of type `kind`, for people."""
    if time is None:
        return "nothing"
    if isinstance(kind, pl.Datetime | pl.Date):
        return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=time)).isoformat()
    return str(time)


def parsed_time(text: str, kind: pl.DataType) -> int:
    """The inverse: a date or datetime (without a zone it is UTC), or a number, as the column's type has it."""
    try:
        if isinstance(kind, pl.Datetime | pl.Date):
            found = dt.datetime.fromisoformat(text)
            found = found if found.tzinfo else found.replace(tzinfo=dt.UTC)
            return int(time_values(pl.Series([found]))[0][0])
        return int(text)
    except ValueError:
        wanted = "a date such as 2026-03-01T12:00" if isinstance(kind, pl.Datetime | pl.Date) else "a whole number"
        raise ConfigError(
            f"The time {text!r} cannot be read: the time column holds {kind}, so write {wanted}."
        ) from None
