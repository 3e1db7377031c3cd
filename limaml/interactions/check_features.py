"""The part of `check` that looks at features: their type and values against their kind, their constancy in a task."""

from __future__ import annotations

import numpy as np
import polars as pl

from limaml.interactions.codecs import split_lists
from limaml.interactions.columns import factorise, is_list, is_number, show, without_nan
from limaml.interactions.findings import Finding, Found, any_of, first_row
from limaml.interactions.keys import task_keys
from limaml.interactions.schema import Feature, Schema, Task
from limaml.types import ROW, FeatureKind

__all__ = ["check_constancy", "check_feature"]


def check_feature(frame: pl.DataFrame, schema: Schema, feature: Feature) -> Found:
    """The type and the values of one feature's column, against its kind."""
    name, column = feature.column, frame[feature.column]
    head = f"Feature '{feature.name}' reads column '{name}'"

    def problem(text: str, row: int | None = None, count: int = 1) -> Found:
        return [Finding(text, name, row, count)], []

    if column.null_count() == len(column):
        return [], [Finding(f"{head}, which holds nothing at all: the model can learn nothing from it.", name)]
    if feature.kind is FeatureKind.NUMERIC:
        if not is_number(column.dtype):
            row = first_row(column.is_not_null())
            return problem(
                f"{head} as numeric, but it is of type {column.dtype} ({show(column[row])} in row {row}). Make the "
                "column numbers, or the feature categorical.",
                row,
            )
        if name == schema.row or any(name in task.columns for task in schema.tasks):
            return problem(
                f"{head}, an id, as numeric: ids that are close have nothing in common. Make the feature categorical."
            )
        infinite = column.cast(pl.Float64).is_infinite().fill_null(False)
        if infinite.any():
            row = first_row(infinite)
            count = int(infinite.sum())
            return problem(
                f"{head}, which is infinite in {count} row(s), the first is row {row}. Replace these values by null or "
                "by a number.",
                row,
                count,
            )
        return [], []
    if feature.kind is FeatureKind.CATEGORICAL:
        if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
            return problem(
                f"{head} as categorical, but it is of type {column.dtype}. For a list column use kind 'tokens' or "
                "'sequence'."
            )
        return [], []
    if not is_list(column.dtype) and not isinstance(column.dtype, pl.String | pl.Categorical | pl.Enum):
        return problem(
            f"{head} as {feature.kind}, but it is of type {column.dtype}. It needs a list column, or text with a "
            "separator."
        )
    return _lists(feature, column, head)


def _lists(feature: Feature, column: pl.Series, head: str) -> Found:
    codes, first = factorise(column)
    lists = split_lists(feature, column.gather(first))
    lengths = lists.list.len().cast(pl.Int64)[codes]
    if feature.kind is FeatureKind.VECTOR:
        usual = lengths.drop_nulls().mode().sort()[0]
        odd = (lengths != usual).fill_null(False)
        if odd.any():
            row = first_row(odd)
            text = (
                f"{head} as a dense vector, and its widths differ: {usual} entries in most rows, {lengths[row]} in row "
                f"{row}. Make them all of one width, or null."
            )
            return [Finding(text, feature.column, row, int(odd.sum()))], []
        entries = lists.explode()
        numbers = entries.cast(pl.Float64, strict=False)
        bad = numbers.is_infinite().fill_null(False) | (numbers.is_null() & entries.is_not_null())
        if bad.any():
            value = entries[first_row(bad)]
            text = f"{head} as a dense vector, and it holds {show(value)}, which is no finite number. Replace it."
            return [Finding(text, feature.column)], []
        return [], []
    if feature.kind is FeatureKind.TOKENS:
        lengths = lists.list.unique().list.len().cast(pl.Int64)[codes]
    long = (lengths > feature.length).fill_null(False)
    if not long.any():
        return [], []
    row = first_row(long)
    kept = "first" if feature.kind is FeatureKind.TOKENS else "last"
    text = (
        f"{head}, which has more than {feature.length} entries in {int(long.sum())} row(s), the first is row {row} with "
        f"{lengths[row]}; the {kept} {feature.length} are used. Raise the feature's length to use all."
    )
    return [], [Finding(text, feature.column, row, int(long.sum()))]


def check_constancy(frame: pl.DataFrame, task: Task, features: list[Feature]) -> list[Finding]:
    """Task-side features that are not constant within each task. Null beside one value is no variation."""
    rows = np.flatnonzero(
        any_of([without_nan(frame[c]).is_null() for c in task.columns], frame.height).not_().to_numpy()
    )
    if any(frame[column].dtype.is_nested() for column in task.columns) or not len(rows):
        return []
    keys, owner = task_keys(frame.select(task.columns)[rows], task)
    findings = []
    for feature in features:
        codes, first = factorise(without_nan(frame[feature.column])[rows])
        known = frame[feature.column][rows].is_not_null().to_numpy()
        reference = np.full(len(keys), -1, np.int64)
        reference[owner[known][::-1]] = codes[known][::-1]  # of each task, its first value
        differs = known & (codes != reference[owner])
        if not differs.any():
            continue
        at = int(differs.argmax())
        key = keys[owner[at]]
        one = frame[feature.column][int(rows[first[reference[owner[at]]]])]
        two = frame[feature.column][int(rows[at])]
        tasks = len(np.unique(owner[differs]))
        text = (
            f"Feature '{feature.name}' is on side '{task.name}' but column '{feature.column}' varies inside {tasks} "
            f"task(s): {task.name} {key} has {show(_plain(one))} and, in row {int(rows[at])}, {show(_plain(two))}. Put "
            f"the feature on side '{ROW}', or make its column constant for each task."
        )
        findings.append(Finding(text, feature.column, int(rows[at]), tasks))
    return findings


def _plain(value: object) -> object:
    return value.to_list() if isinstance(value, pl.Series) else value
