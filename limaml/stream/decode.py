"""Payloads as rows of the log: each is taken whole or refused with a sentence, and a refused one takes no other with it.

An event is a JSON object that has the log's columns by name. A column that the model uses must be named, and may be null
but for the task keys and the time; every other column of the log may be left out, and what the log does not have is left
out.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from limaml.errors import ConfigError, DataError
from limaml.interactions.columns import missing_column, show, without_nan
from limaml.interactions.index import label_values, time_values
from limaml.interactions.schema import Label, Schema
from limaml.stream.convert import EPOCHS, can_hold, to_column
from limaml.types import LossKind

__all__ = ["Decoded", "Decoder"]

_ABSENT = object()


@dataclass(frozen=True)
class Decoded:
    """`rows` came out of the payloads `places`, in their order; `refused` is a payload's place → why it has no row."""

    rows: pl.DataFrame
    places: Sequence[int]
    refused: Mapping[int, str] = field(default_factory=dict)


class Decoder:
    """Events for a log with the columns and types `types`, described by `schema`.

    `epoch` is the unit of numbers that stand for times in a column of datetimes (s, ms, us, ns). `max_ahead_s` is how far
    an event may lie in the future; times in a column of integers are compared in the unit in which `latest()`, a time of
    the log, lies between 1990 and now, and not at all where there is none. `accepts` raises a `DataError` for rows that the
    model could not read; what it refuses is searched for row by row. `now` is the clock.
    """

    def __init__(
        self,
        types: Mapping[str, pl.DataType],
        schema: Schema,
        *,
        epoch: str = "s",
        max_ahead_s: float = 300.0,
        latest: Callable[[], int | None] = lambda: None,
        accepts: Callable[[pl.DataFrame], object] | None = None,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        if epoch not in EPOCHS:
            raise ConfigError(f"The unit of times is {epoch!r}; it is one of {', '.join(EPOCHS)}.")
        if schema.time is None:
            raise ConfigError(
                "The model was trained without --time, so that new events cannot be placed behind those that are there. "
                "Train again with a time column (limaml train … --time)."
            )
        self.types, self.schema, self.epoch = dict(types), schema, epoch
        self._max_ahead_us, self._accepts, self._now = int(1e6 * max_ahead_s), accepts, now
        self._time = schema.time
        keys = [column for task in schema.tasks for column in task.columns]
        self._present = dict.fromkeys([*keys, self._time])  # columns that are never null
        used = [*self._present, *(label.column for label in schema.labels), *(f.column for f in schema.features)]
        used += [column for column in (schema.row, schema.weight, schema.offset) if column is not None]
        self._used = dict.fromkeys(column for column in used if column in self.types)
        problems = [
            f"Column '{column}' of the log is {self.types[column]}, of which JSON has no values: events cannot bring it."
            for column in self._used
            if not can_hold(self.types[column])
        ]
        if time_values(pl.Series(self._time, [], self.types[self._time]))[1] == "order":
            problems.append(
                f"The time column '{self._time}' is {self.types[self._time]}, which only gives an order within one table. "
                "Use numbers or dates as the time, and train again (limaml train)."
            )
        if problems:
            raise ConfigError("\n".join(problems))
        self._latest: Callable[[], int | None] = latest
        self._scale: float | None = None  # microseconds in one unit of an integer time, once it is known

    def decode(self, payloads: Sequence[bytes]) -> Decoded:
        """Rows and refusals of `payloads` `[n]`."""
        refused: dict[int, str] = {}
        places, objects = list[int](), list[dict[str, object]]()
        for place, payload in enumerate(payloads):
            found = _parse(payload)
            if isinstance(found, str):
                refused[place] = found
            else:
                places.append(place)
                objects.append(found)
        columns = []
        bad: dict[int, str] = {}
        for name, kind in self.types.items():
            if not can_hold(kind):
                columns.append(pl.Series(name, [None] * len(objects), dtype=kind))
                continue
            values = [each.get(name, _ABSENT) for each in objects]
            for row in [row for row, value in enumerate(values) if value is _ABSENT]:
                values[row] = None
                if name in self._used:
                    bad.setdefault(row, missing_column(name, self._role(name), list(objects[row])))
            column, problems = to_column(name, values, kind, self.epoch)
            columns.append(column)
            for row, why in problems.items():
                bad.setdefault(row, why)
        frame = pl.DataFrame(columns) if columns else pl.DataFrame()
        for check in (self._nulls, self._times, self._labels, self._amounts):
            for row, why in check(frame).items():
                bad.setdefault(row, why)
        if bad:
            keep = np.ones(len(objects), bool)
            keep[list(bad)] = False
            refused |= {places[row]: why for row, why in bad.items()}
            frame, places = frame.filter(pl.Series(keep)), [places[row] for row in np.flatnonzero(keep)]
        if self._accepts is not None and frame.height:
            unread = self._unreadable(frame, 0)
            if unread:
                refused |= {places[row]: why for row, why in unread.items()}
                keep = np.ones(frame.height, bool)
                keep[list(unread)] = False
                frame, places = frame.filter(pl.Series(keep)), [places[row] for row in np.flatnonzero(keep)]
        return Decoded(frame, places, dict(sorted(refused.items())))

    # --- what makes a row unusable: each returns row → sentence ------------------------------------------------------

    def _nulls(self, frame: pl.DataFrame) -> dict[int, str]:
        found: dict[int, str] = {}
        for column in self._present:
            for row in _where(without_nan(frame[column]).is_null()):
                found.setdefault(row, f"Column '{column}' is null, but it is {self._role(column)}. Send a value.")
        return found

    def _times(self, frame: pl.DataFrame) -> dict[int, str]:
        column = frame[self._time]
        found = {}
        if column.dtype == pl.UInt64:
            for row in _where((column >= 2**63).fill_null(False)):
                found[row] = f"Column '{self._time}' holds {column[row]}, a time that does not fit 64 bits with a sign."
        if column.dtype.is_float():
            odd = (column != column.floor()) | ~column.is_finite() | (column.abs() >= 2**53)
            for row in _where(odd.fill_null(False)):
                found[row] = f"Column '{self._time}' holds {column[row]}, which is no whole number and thus no time."
        if found:
            column = pl.Series(
                column.name, [None if row in found else value for row, value in enumerate(column)], column.dtype
            )
        rows = np.flatnonzero(without_nan(column).is_not_null().to_numpy())
        times, unit = time_values(column.drop_nulls())
        if unit == "integer" and self._scale is None:
            self._scale = _epoch_scale(self._latest(), self._now())
        scale = 1.0 if unit == "us" else self._scale
        if scale is not None:
            now = (self._now() - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(
                microseconds=1
            )
            for at in np.flatnonzero(times > (now + self._max_ahead_us) / scale):
                row = int(rows[at])
                found[row] = (
                    f"The event lies in the future: '{self._time}' is {column[row]}, more than {self._max_ahead_us / 1e6:g} s "
                    "ahead of this machine's clock (--max-ahead allows for more; --epoch names the unit of numbers)."
                )
        return found

    def _labels(self, frame: pl.DataFrame) -> dict[int, str]:
        found: dict[int, str] = {}
        missing = pl.Series([True] * frame.height, dtype=pl.Boolean)
        for label in self.schema.labels:
            raw, values = frame[label.column], label_values(frame, label)
            missing = missing & values.is_null()
            if raw.dtype.is_float():
                for row in _where(raw.is_nan().fill_null(False)):
                    found.setdefault(row, f"Label '{label.name}' is NaN. Send null where there is no label.")
            for row in _where(values.is_infinite().fill_null(False)):
                found.setdefault(row, f"Label '{label.name}' is infinite. Send a finite number.")
            if label.loss is LossKind.BINARY:
                for row in _where(~values.is_in([0.0, 1.0]).fill_null(True)):
                    found.setdefault(row, f"Label '{label.name}' is {show(raw[row])}; it must be 0 or 1.")
        for row in _where(missing):
            found.setdefault(row, f"The event has no label: {self._label_names()} is null. Send one.")
        return found

    def _amounts(self, frame: pl.DataFrame) -> dict[int, str]:
        found: dict[int, str] = {}
        for column, negative in ((self.schema.weight, False), (self.schema.offset, True)):
            if column is not None and column in frame.columns:
                numbers = frame[column].cast(pl.Float64)
                bad = ~numbers.is_finite().fill_null(False)
                bad = bad if negative else bad | (numbers < 0).fill_null(False)
                allowed = "a finite number" if negative else "a finite number that is not negative"
                for row in _where(bad):
                    found.setdefault(row, f"Column '{column}' is {numbers[row]}; it must be {allowed}.")
        return found

    def _unreadable(self, frame: pl.DataFrame, first: int) -> dict[int, str]:
        """Rows that `accepts` refuses, found by halves."""
        assert self._accepts is not None
        try:
            self._accepts(frame)
        except DataError as error:
            if frame.height == 1:
                return {first: str(error)}
            half = frame.height // 2
            return self._unreadable(frame[:half], first) | self._unreadable(frame[half:], first + half)
        return {}

    def _role(self, column: str) -> str:
        for task in self.schema.tasks:
            if column in task.columns:
                return f"part of the key of task '{task.name}'"
        if column == self._time:
            return "the time"
        for label in self.schema.labels:
            if column == label.column:
                return f"label '{label.name}'"
        return "the row id" if column == self.schema.row else "a feature of the model (null is allowed)"

    def _label_names(self) -> str:
        return ", ".join(f"'{label.column}'" for label in _unique(self.schema.labels))


def _unique(labels: Sequence[Label]) -> list[Label]:
    return list({label.column: label for label in labels}.values())


def _where(rows: pl.Series) -> list[int]:
    return [int(row) for row in rows.arg_true()] if rows.any() else []


def _parse(payload: bytes) -> dict[str, object] | str:
    """The object in a payload, or why there is none."""
    if not payload:
        return "The message is empty. Send a JSON object."
    try:
        found = json.loads(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"The message is not UTF-8 (byte {error.start}). Send a JSON object in UTF-8."
    except RecursionError:
        return "The message is nested too deeply. Send a JSON object with the columns of the log."
    except ValueError as error:
        return f"The message is no JSON ({error}). Send a JSON object."
    if not isinstance(found, dict):
        return f"The message is JSON, but no object: {show(found)}. Send an object with the columns of the log."
    return found


def _epoch_scale(latest: int | None, now: datetime.datetime) -> float | None:
    """Microseconds in one unit of an integer time, if `latest`, in some unit since 1970, lies between 1990 and now."""
    if latest is not None:
        for scale in (1e6, 1e3, 1.0, 1e-3):
            if 631_152_000 * 1e6 <= latest * scale <= now.timestamp() * 1e6:
                return scale
    return None
