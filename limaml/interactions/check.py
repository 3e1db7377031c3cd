"""Everything that is wrong with a table, found before anything is trained on it, and said all at once.

A *problem* must be put right first; a *remark* is for the reader to judge. Rows are counted from 0, as in the table
that was read. `clean` removes what may be removed, and counts it.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.check_features import check_constancy, check_feature
from limaml.interactions.check_outcomes import Moment, check_amounts, check_labels, check_times
from limaml.interactions.columns import factorise, missing_column, without_nan
from limaml.interactions.findings import Finding, any_of, first_row
from limaml.interactions.index import label_values
from limaml.interactions.leaks import leak_remarks
from limaml.interactions.schema import Feature, Schema, Task

__all__ = ["CheckReport", "Dropped", "Finding", "check", "clean"]


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. An empty list of problems means that the table can be used."""

    problems: tuple[Finding, ...]
    remarks: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raise one `DataError` that lists every problem, if there is any."""
        if self.problems:
            lines = "\n".join(f"  {i}. {finding}" for i, finding in enumerate(self.problems, start=1))
            count = len(self.problems)
            head = "There is 1 problem" if count == 1 else f"There are {count} problems"
            raise DataError(f"{head} with the interactions (rows count from 0):\n{lines}")


@dataclass(frozen=True)
class Dropped:
    """Rows that `clean` removed, by reason."""

    duplicates: int = 0
    unlabelled: int = 0
    keyless: int = 0
    timeless: int = 0

    @property
    def total(self) -> int:
        return self.duplicates + self.unlabelled + self.keyless + self.timeless

    def __str__(self) -> str:
        parts = [
            f"{count} {what}"
            for count, what in (
                (self.keyless, "without a task key"),
                (self.timeless, "without a time"),
                (self.unlabelled, "without a label"),
                (self.duplicates, "exact duplicates"),
            )
            if count
        ]
        return f"{self.total} row(s) dropped" + (f": {', '.join(parts)}." if parts else ".")


def check(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    until: Moment | None = None,
    now: datetime.datetime | None = None,
    sample: int = 100_000,
    added: bool = False,
) -> CheckReport:
    """Look for everything that would spoil training on `frame`; nothing is changed and nothing is raised.

    `until` is the bound of a split: times after it are a problem. It is a number for a numeric time column, else a date
    or a datetime. `now` (default: the clock) does the same for datetimes and dates; numbers that look like an epoch
    are only remarked on, as their unit is a guess. `sample` rows are looked at for features that give the label away.
    With `added`, the rows are a few that come to known ones: that all have the same label is no problem.
    """
    problems: list[Finding] = []
    remarks: list[Finding] = []
    problems += _missing_columns(frame, schema)
    present = set(frame.columns)
    if frame.height == 0:
        problems.append(Finding("The table has no rows. Check the path, and the filters that were applied to it."))
        return CheckReport(tuple(problems), ())
    for task in schema.tasks:
        problems += _keys(frame, task)
    if schema.time in present:
        found, said = check_times(frame, schema, until, now)
        problems, remarks = problems + found, remarks + said
    found, said = check_labels(frame, schema, added)
    problems, remarks = problems + found, remarks + said
    for column in (schema.weight, schema.offset):
        if column in present:
            problems += check_amounts(frame, column, negative=column == schema.offset)
    usable: list[Feature] = []
    for feature in schema.features:
        if feature.column in present:
            found, said = check_feature(frame, schema, feature)
            problems, remarks = problems + found, remarks + said
            if not found:
                usable.append(feature)
    for task in schema.tasks:
        own = [feature for feature in usable if feature.side == task.name]
        if own and present.issuperset(task.columns):
            problems += check_constancy(frame, task, own)
    remarks += _duplicates(frame, schema)
    remarks += [Finding(text, column=column) for column, text in leak_remarks(frame, schema, usable, sample)]
    return CheckReport(tuple(problems), tuple(remarks))


def clean(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    duplicates: bool = True,
    unlabelled: bool = False,
    keyless: bool = False,
    timeless: bool = False,
) -> tuple[pl.DataFrame, Dropped]:
    """Remove what may be removed, in the order kept by `frame`, and count it by reason.

    Exact duplicates (every column equal, the time included) go by default, the first of each stays. Without a time
    column equal rows may be repeated attempts: they stay. Rows without any label, task key or time go only if asked.
    """
    named = {column for task in schema.tasks for column in task.columns} | {label.column for label in schema.labels}
    named |= {schema.time} if schema.time is not None else set()
    if absent := [finding for finding in _missing_columns(frame, schema) if finding.column in named]:
        CheckReport(tuple(absent), ()).raise_if_bad()
    dropped: dict[str, int] = {}

    def drop(reason: str, bad: pl.Series) -> None:
        nonlocal frame
        dropped[reason] = int(bad.sum())
        if dropped[reason]:
            frame = frame.filter(~bad)

    if keyless:
        columns = [column for task in schema.tasks for column in task.columns]
        drop("keyless", any_of([without_nan(frame[column]).is_null() for column in columns], frame.height))
    if timeless and schema.time is not None:
        drop("timeless", without_nan(frame[schema.time]).is_null())
    if unlabelled:
        present = [label_values(frame, label).is_not_null() for label in schema.labels]
        drop("unlabelled", ~any_of(present, frame.height))
    if duplicates and schema.time is not None:
        drop("duplicates", _duplicated(frame, schema))
    return frame, Dropped(**dropped)


def _missing_columns(frame: pl.DataFrame, schema: Schema) -> list[Finding]:
    wanted = [(column, f"part of the key of task '{task.name}'") for task in schema.tasks for column in task.columns]
    wanted += [(label.column, f"label '{label.name}'") for label in schema.labels]
    wanted += [(feature.column, f"feature '{feature.name}'") for feature in schema.features]
    for column, role in (
        (schema.time, "the time"),
        (schema.row, "the row id"),
        (schema.weight, "the weight of each row"),
        (schema.offset, "the offset of each logit"),
    ):
        if column is not None:
            wanted.append((column, role))
    return [
        Finding(missing_column(column, role, frame.columns), column)
        for column, role in dict(reversed(wanted)).items()  # one finding a column, for the first role it has
        if column not in frame.columns
    ][::-1]


def _keys(frame: pl.DataFrame, task: Task) -> list[Finding]:
    findings = []
    for column in task.columns:
        if column not in frame.columns:
            continue
        values = frame[column]
        if values.dtype.is_nested() or values.dtype == pl.Binary:
            text = f"Column '{column}' is of type {values.dtype} and cannot name a task; use numbers or text."
            findings.append(Finding(text, column))
        elif null := int(without_nan(values).null_count()):
            row = first_row(without_nan(values).is_null())
            text = (
                f"Column '{column}' names no '{task.name}' in {null} row(s), the first is row {row}. Give these rows a "
                "task key, or remove them (clean(…, keyless=True))."
            )
            findings.append(Finding(text, column, row, null))
    return findings


def _duplicates(frame: pl.DataFrame, schema: Schema) -> list[Finding]:
    duplicated = _duplicated(frame, schema)
    count = int(duplicated.sum())
    if not count:
        return []
    row = first_row(duplicated)
    if schema.time is None:
        text = (
            f"{count} row(s) equal an earlier row in every column, the first is row {row}. Without a time column these "
            "may be repeated attempts: they are kept."
        )
    else:
        text = (
            f"{count} row(s) are exact duplicates of an earlier row, the time included; the first is row {row}. They "
            "count twice unless clean() drops them."
        )
    return [Finding(text, None, row, count)]


def _duplicated(frame: pl.DataFrame, schema: Schema) -> pl.Series:
    """Rows that equal an earlier row in every column."""
    narrow = [column for task in schema.tasks for column in task.columns] + [label.column for label in schema.labels]
    narrow += [column for column in (schema.time, schema.row) if column is not None]
    narrow = [column for column in dict.fromkeys(narrow) if column in frame.columns]
    duplicated = np.zeros(frame.height, bool)
    if narrow:  # all columns are compared only where the few that name an interaction agree
        hashes = frame.select(narrow).hash_rows().to_numpy()
        order = np.sort(hashes)
        rows = np.flatnonzero(np.isin(hashes, order[1:][order[1:] == order[:-1]]))
    else:
        rows = np.arange(frame.height)
    if len(rows):
        _, first = factorise(frame[rows])
        again = np.ones(len(rows), bool)
        again[first] = False
        duplicated[rows] = again
    return pl.Series("duplicated", duplicated)
