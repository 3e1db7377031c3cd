"""The periods of a replay: where training ends, and the stretches of time that are served one after the other.

A period is named by rows: rows are in order of time, and rows of one moment are never parted.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from limaml.errors import ConfigError, DataError
from limaml.types import Interactions

__all__ = ["Period", "Periods", "choose_periods", "equal_parts"]

Ints = NDArray[np.int64]

NATURAL: Mapping[str, int] = {"1 hour": 3600, "1 day": 86400, "1 week": 7 * 86400, "4 weeks": 28 * 86400}
"""Lengths of time that people plan in, in seconds."""

WANTED = 11
"""Periods where nothing else is asked for."""

FEWEST, MOST = 8, 16
"""A natural length is taken where it makes so many periods; else the rows are cut into equal parts."""

LEAST_SHARE = 0.25
"""…and where no period has fewer rows than this share of an equal part."""

_SECONDS = (300_000_000, 5_000_000_000)  # from 1979 to 2128
_LENGTH = re.compile(r"^\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>h|d|w)?\s*$")
_UNITS: Mapping[str, int] = {"h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Period:
    """Rows `first` … `last − 1`, in order of time. `start` and `end` are the times of the first and of the last row."""

    first: int
    last: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Periods:
    """What is trained on first, and what is served then."""

    train_rows: int
    periods: tuple[Period, ...]
    length: str  # in words: "1 week", or "equal parts of the rows"
    seconds: float | None  # in one unit of the time column; None where the unit is not known
    left_out: int = 0  # stretches of the chosen length without a row

    def __len__(self) -> int:
        return len(self.periods)

    def shown(self, time: int) -> str:
        """A time of the column for people."""
        if self.seconds is None:
            return str(time)
        moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=time * self.seconds)
        return moment.strftime("%Y-%m-%d %H:%M")


def choose_periods(
    data: Interactions,
    task: str,
    *,
    periods: int | None = None,
    period: str | None = None,
    start: int | None = None,
    train_share: float = 0.5,
) -> Periods:
    """Cut the rows of `data`, which are in order of time, into training rows and periods.

    Training ends at time `start`, or at the first `train_share` of the rows. The rest is cut into stretches of the length
    `period` (`12h`, `1d`, `4w`; or a number in the time column's own unit), or into `periods` equal parts of the rows. With
    neither, the natural length (hour, day, week, 4 weeks) that makes about 11 periods is taken, if one makes 8 to 16 that
    all have rows enough; else 11 equal parts.

    Raises `DataError` where the time is no clock that all tasks share, and `ConfigError` for what cannot be cut.
    """
    time = data.time.numpy()
    _refuse_no_clock(data, task)
    if periods is not None and period is not None:
        raise ConfigError("Give the number of periods or their length, not both.")
    if periods is not None and periods < 1:
        raise ConfigError(f"A replay needs at least 1 period, not {periods}.")
    if not 0 < train_share < 1:
        raise ConfigError(f"The share of the rows to train on must lie between 0 and 1, but is {train_share}.")
    if start is None:
        start = int(time[min(len(time) - 1, int(len(time) * train_share))])
    cut = int(np.searchsorted(time, start))
    if cut == 0 or cut == len(time):
        raise ConfigError(
            f"The replay is to start at {start}, but the rows reach from {time[0]} to {time[-1]}: nothing would be left to "
            f"{'train on' if cut == 0 else 'replay'}. Choose another --start."
        )
    seconds = _unit(data)
    if period is not None:
        return _of_length(time, cut, start, _length(period, seconds), period, seconds)
    if periods is None and seconds is not None:
        found = _natural(time, cut, start, seconds)
        if found is not None:
            return found
    return _equal_parts(time, cut, periods or WANTED, seconds)


def _refuse_no_clock(data: Interactions, task: str) -> None:
    """Rows of different tasks must be comparable in time: a shuffle is not, and a count within each task neither."""
    if not len(data):
        raise DataError("There are no interactions to replay.")
    entries = data.count(task)
    first = np.full(entries, np.iinfo(np.int64).max)
    np.minimum.at(first, data.index[task].numpy(), data.time.numpy())
    same = int((first == data.time[0].item()).sum())
    if data.time_unit != "us" and entries > 2 and same > entries / 2:
        raise DataError(
            f"Replay needs one clock for all tasks, but {same} of {entries} tasks '{task}' begin at the same time, "
            f"{int(data.time[0])}: the time column counts within each task. Give a column that says when each row happened."
        )


def _unit(data: Interactions) -> float | None:
    """Seconds in one unit of the time column. Whole numbers that would be dates between 1979 and 2128 are taken as seconds."""
    if data.time_unit == "us":
        return 1e-6
    low, high = int(data.time[0]), int(data.time[-1])
    return 1.0 if data.time_unit == "integer" and _SECONDS[0] <= low and high <= _SECONDS[1] else None


def _length(text: str, seconds: float | None) -> int:
    """A length of time in the column's unit."""
    match = _LENGTH.match(text)
    if match is None or float(match["number"]) == 0:
        raise ConfigError(
            f"The period {text!r} cannot be read: write a length such as 12h, 1d or 4w, or a number in the time column's unit."
        )
    if match["unit"] is None:
        return max(1, round(float(match["number"])))
    if seconds is None:
        raise ConfigError(
            f"The period {text!r} is in hours, days or weeks, but the time column holds numbers of unknown unit: write the "
            "period as a number in the column's own unit."
        )
    return max(1, round(float(match["number"]) * _UNITS[match["unit"]] / seconds))


def _natural(time: Ints, cut: int, start: int, seconds: float) -> Periods | None:
    spans = {name: (int(time[-1]) - start + 1) * seconds / length for name, length in NATURAL.items()}
    name = min(spans, key=lambda n: abs(math.log(spans[n] / WANTED)))
    made = _of_length(time, cut, start, round(NATURAL[name] / seconds), name, seconds)
    enough = LEAST_SHARE * (len(time) - cut) / len(made)
    if made.left_out or not FEWEST <= len(made) <= MOST or min(map(len, made.periods)) < enough:
        return None
    return made


def _of_length(time: Ints, cut: int, start: int, length: int, name: str, seconds: float | None) -> Periods:
    number = (time[cut:] - start) // length
    edges = cut + np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(number)]])
    stretches = int(number[-1]) + 1
    return Periods(cut, _periods(time, edges), name, seconds, stretches - (len(edges) - 1))


def equal_parts(time: Ints, cut: int, parts: int) -> tuple[Period, ...]:
    """The rows from `cut` on in at most `parts` about equal parts; rows of one time `[rows]` stay together."""
    wanted = cut + (len(time) - cut) * np.arange(1, parts) // parts
    inner = np.searchsorted(time, time[wanted])  # the first row of its moment
    return _periods(time, np.unique(np.concatenate([[cut], inner, [len(time)]])))


def _equal_parts(time: Ints, cut: int, periods: int, seconds: float | None) -> Periods:
    made = equal_parts(time, cut, periods)
    if len(made) < periods:
        raise ConfigError(
            f"The rows after the start cannot be cut into {periods} periods: too many share one time. Ask for at most "
            f"{len(made)}."
        )
    return Periods(cut, made, f"1/{periods} of the rows", seconds)


def _periods(time: Ints, edges: Ints) -> tuple[Period, ...]:
    return tuple(
        Period(int(a), int(b), int(time[a]), int(time[b - 1])) for a, b in zip(edges[:-1], edges[1:], strict=True)
    )
