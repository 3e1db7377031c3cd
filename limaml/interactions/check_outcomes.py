"""The part of `check` that looks at when and with what outcome: times, labels, weights and offsets."""

from __future__ import annotations

import datetime

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.columns import Codes, is_number, without_nan
from limaml.interactions.findings import Finding, Found, any_of, first_row
from limaml.interactions.index import label_values, time_values
from limaml.interactions.schema import Schema
from limaml.types import LossKind

__all__ = ["Moment", "check_amounts", "check_labels", "check_times"]

Moment = int | datetime.date | datetime.datetime


def check_times(frame: pl.DataFrame, schema: Schema, until: Moment | None, now: datetime.datetime | None) -> Found:
    assert schema.time is not None
    name, column = schema.time, without_nan(frame[schema.time])
    problems: list[Finding] = []
    if null := column.null_count():
        row = first_row(column.is_null())
        text = (
            f"Column '{name}' has no time in {null} row(s), the first is row {row}. Remove these rows "
            "(clean(…, timeless=True)), or name another column as the time."
        )
        problems.append(Finding(text, name, row, null))
    rows = np.flatnonzero(column.is_not_null().to_numpy())
    try:
        times, unit = time_values(column.drop_nulls())
    except DataError as error:
        return [*problems, Finding(str(error), name)], []
    if until is not None:
        problems += _after(name, frame, rows, times, unit, until, "the bound of the split")
    clock = now or datetime.datetime.now(datetime.UTC)
    if unit == "us":
        problems += _after(name, frame, rows, times, unit, clock, "now")
        return problems, []
    return problems, _epoch_remarks(name, frame, rows, times, clock) if unit == "integer" else []


def _after(
    name: str, frame: pl.DataFrame, rows: Codes, times: Codes, unit: str, bound: Moment, what: str
) -> list[Finding]:
    if isinstance(bound, datetime.date):
        if unit != "us":
            text = f"The bound of the split is {bound}, but column '{name}' holds {frame[name].dtype}: give a number."
            return [Finding(text, name)]
        limit = _microseconds(bound)
    elif unit == "us":
        text = f"The bound of the split is {bound!r}, but column '{name}' holds dates: give a date or a datetime."
        return [Finding(text, name)]
    elif unit != "integer":
        text = f"Column '{name}' holds {frame[name].dtype}, whose times have no common scale: they cannot be bounded."
        return [Finding(text, name)]
    else:
        limit = int(bound)
    late = times > limit
    if not late.any():
        return []
    row = int(rows[late.argmax()])
    text = (
        f"Column '{name}' has {int(late.sum())} time(s) after {what} ({bound}), the first is {frame[name][row]} in row "
        f"{row}. Correct these times, remove the rows, or move the bound."
    )
    return [Finding(text, name, row, int(late.sum()))]


def _epoch_remarks(
    name: str, frame: pl.DataFrame, rows: Codes, times: Codes, clock: datetime.datetime
) -> list[Finding]:
    """Integers whose middle lies between 1990 and now in some unit are taken to be an epoch in that unit."""
    if not len(times):
        return []
    now = _microseconds(clock)
    middle = int(np.sort(times)[len(times) // 2])
    for unit, scale in (("seconds", 1e6), ("milliseconds", 1e3), ("microseconds", 1.0), ("nanoseconds", 1e-3)):
        if 631_152_000 * 1e6 <= middle * scale <= now:
            late = times > now / scale
            if late.any():
                row = int(rows[late.argmax()])
                text = (
                    f"Column '{name}' looks like {unit} since 1970, and {int(late.sum())} of its times would be in the "
                    f"future; the first is {frame[name][row]} in row {row}. They are used as they are."
                )
                return [Finding(text, name, row, int(late.sum()))]
            return []
    return []


def _microseconds(moment: datetime.date) -> int:
    if not isinstance(moment, datetime.datetime):  # all of that day
        moment = datetime.datetime.combine(moment, datetime.time.max)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


def check_labels(frame: pl.DataFrame, schema: Schema, added: bool = False) -> Found:
    problems: list[Finding] = []
    remarks: list[Finding] = []
    heads: list[pl.Series] = []
    for label in schema.labels:
        if label.column not in frame.columns:
            continue
        try:
            values = label_values(frame, label)
        except DataError as error:
            problems.append(Finding(str(error), label.column))
            continue
        heads.append(values)
        known = values.drop_nulls()
        distinct = known.unique().sort()
        infinite = known.is_infinite()
        if infinite.any():
            row = first_row(values.is_infinite().fill_null(False))
            text = f"Label '{label.name}' is infinite in {int(infinite.sum())} row(s), the first is row {row}. Remove them."
            problems.append(Finding(text, label.column, row, int(infinite.sum())))
        elif label.loss is LossKind.BINARY and not distinct.is_in([0.0, 1.0]).all():
            odd = ~values.is_in([0.0, 1.0]).fill_null(True)
            row = first_row(odd)
            text = (
                f"Label '{label.name}' has a binary loss but is {values[row]:g} in row {row}, and {len(distinct)} values "
                f'in all. Use a rule such as "{label.column} >= {distinct[-1]:g}", or loss: squared.'
            )
            problems.append(Finding(text, label.column, row, int(odd.sum())))
        elif len(distinct) == 1 and not added:
            rule = "" if label.operator is None else f" The rule '{label.name}' holds for all rows or for none."
            text = f"Label '{label.name}' is {distinct[0]:g} in every row: there is nothing to learn.{rule}"
            if label.loss is LossKind.BINARY and distinct[0] == 1.0 and label.operator is None:
                text += " If these are positives only, sample negatives first."
            problems.append(Finding(text, label.column))
    if len(heads) == len(schema.labels):
        problems += _unlabelled(schema, heads)
        if len(heads) > 1:
            remarks += _partly_labelled(schema, heads)
    return problems, remarks


def _unlabelled(schema: Schema, heads: list[pl.Series]) -> list[Finding]:
    bare = ~any_of([values.is_not_null() for values in heads], len(heads[0]))
    count = int(bare.sum())
    if not count:
        return []
    row = first_row(bare)
    columns = ", ".join(f"'{label.column}'" for label in schema.labels)
    text = (
        f"Column {columns} has no label (null or NaN) in {count} row(s), the first is row {row}. Label these rows, or "
        "remove them (clean(…, unlabelled=True))."
    )
    return [Finding(text, schema.labels[0].column, row, count)]


def _partly_labelled(schema: Schema, heads: list[pl.Series]) -> list[Finding]:
    some = any_of([values.is_not_null() for values in heads], len(heads[0]))
    findings = []
    for label, values in zip(schema.labels, heads, strict=True):
        lacking = values.is_null() & some
        if count := int(lacking.sum()):
            row = first_row(lacking)
            text = (
                f"Label '{label.name}' is missing in {count} row(s) that have another label, the first is row {row}: they "
                "count for the other label only."
            )
            findings.append(Finding(text, label.column, row, count))
    return findings


def check_amounts(frame: pl.DataFrame, column: str, *, negative: bool) -> list[Finding]:
    values = frame[column]
    if not is_number(values.dtype):
        return [Finding(f"Column '{column}' is of type {values.dtype}; weights and offsets are numbers.", column)]
    numbers = values.cast(pl.Float64)
    bad = ~(numbers.is_finite().fill_null(False))
    if not negative:
        bad = bad | (numbers < 0).fill_null(False)
    if not bad.any():
        return []
    row = first_row(bad)
    allowed = "a finite number" if negative else "a finite number that is not negative"
    text = f"Column '{column}' is {numbers[row]} in row {row} ({int(bad.sum())} such row(s)); it must be {allowed}."
    return [Finding(text, column, row, int(bad.sum()))]
