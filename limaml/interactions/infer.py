"""A first schema without any configuration, and a plain sentence for each choice made.

The choices are made on *entities*: what is constant for each row id is looked at once per row id, what is constant for
each task once per task, so that a popular item does not count a thousand times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.columns import Codes, factorise, is_list, is_number, missing_column, show, without_nan
from limaml.interactions.index import label_values
from limaml.interactions.infer_kinds import Left, choose_kind
from limaml.interactions.schema import Feature, Label, Schema, Task, parse_rule, parse_task
from limaml.types import ROW, FeatureKind, LossKind

__all__ = ["Inferred", "infer_schema"]

MIN_COUNT_ROW = 2  # of the row id: an item seen once trains the id that unseen items will have
_BOOKKEEPING = re.compile(
    r"(^|_)(fold|split|partition|index|idx|row|row_?(nr|num|number)|level_\d+)(_|$)|^unnamed", re.I
)
_TIME_NAME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime|day|seq|sequence|order|created|updated)(_|$)", re.I)
_YES = ("1", "true", "t", "yes", "y", "positive", "click", "clicked", "like", "liked")


@dataclass(frozen=True)
class Inferred:
    """A schema that was found, and how: one sentence per choice."""

    schema: Schema
    notes: tuple[str, ...]


def infer_schema(
    frame: pl.DataFrame,
    *,
    task: str | Sequence[str],
    label: str | Sequence[str],
    row: str | None = None,
    time: str | None = None,
    task_columns: Sequence[str] | Mapping[str, Sequence[str]] = (),
    row_columns: Sequence[str] = (),
    weight: str | None = None,
    offset: str | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Inferred:
    """Find the schema of `frame`.

    `task` is the key column of a task type, or several such; `"a+b"` is a compound key. `label` is a column or a rule
    (`"rating >= 4"`), or several. `task_columns` are known to describe the tasks (for several task types: a mapping
    from the task to its columns), `row_columns` to describe the rows; the side of all others is found. `exclude` names
    columns that must not become features. Raises one `DataError` for all columns named here that do not exist.
    """
    tasks = [parse_task(text, frame.columns) for text in ([task] if isinstance(task, str) else task)]
    texts = [label] if isinstance(label, str) else list(label)
    if not tasks or not texts:
        raise DataError("A schema needs at least one task and one label; name their columns.")
    by_task: Mapping[str, Sequence[str]] = task_columns if isinstance(task_columns, Mapping) else {}
    if not by_task:
        by_task = {tasks[0].name: tuple(task_columns)}
    if odd := [name for name in by_task if name not in {known.name for known in tasks}]:
        raise DataError(f"Columns are given for task '{odd[0]}', but the tasks are {[t.name for t in tasks]}.")
    _refuse_missing(frame, tasks, texts, row, time, weight, offset, by_task, row_columns)
    notes: list[str] = []
    labels = tuple(_label(frame, text, notes) for text in texts)
    for one in tasks:
        notes.append(f"Task '{one.name}' is named by {_listed(one.columns)}.")
    if time is None:
        notes.append(f"There is no time column: a shuffle with seed {seed} stands in for the order of time.")
    else:
        notes.append(f"Rows are ordered by '{time}'.")
    taken = {lab.column: "the label is made from it" for lab in reversed(labels)}
    taken |= {name: why for name, why in ((time, "it is the time"), (weight, "it is the weight")) if name is not None}
    if offset is not None:
        taken[offset] = "it is the offset"
    taken |= dict.fromkeys(exclude, "you excluded it")
    for one in tasks:
        if len(one.columns) == 1:
            taken.setdefault(one.columns[0], f"it names task '{one.name}', whose meta embedding takes its place")
    groups = _Groups(frame, tasks, row)
    features: list[Feature] = []
    for column in frame.columns:
        if column in taken:
            if column != time and all(column != lab.column for lab in labels):
                notes.append(f"Column '{column}' is no feature: {taken[column]}.")
            continue
        found = _feature(frame, column, row, time, groups, by_task, row_columns)
        if isinstance(found, Left):
            notes.append(f"Column '{column}' is left out: {found.reason}.")
        else:
            feature, why = found
            features.append(feature)
            notes.append(f"Column '{column}' is {_described(feature)}: {why}.")
    if not features:
        notes.append("No column is left for a feature: only the tasks themselves can be told apart.")
    schema = Schema(
        tasks=tuple(tasks),
        labels=labels,
        features=tuple(features),
        time=time,
        row=row,
        weight=weight,
        offset=offset,
        seed=seed,
    )
    return Inferred(schema, tuple(notes))


def _listed(names: Sequence[str]) -> str:
    return "column " + names[0].join("''") if len(names) == 1 else "columns " + ", ".join(f"'{n}'" for n in names)


def _described(feature: Feature) -> str:
    side = "a row feature" if feature.side == ROW else f"a feature of task '{feature.side}'"
    extra = []
    if feature.kind in (FeatureKind.TOKENS, FeatureKind.SEQUENCE):
        extra.append(f"up to {feature.length} of them")
    if feature.min_count > 1:
        extra.append(f"values rarer than {feature.min_count} are 'unseen'")
    return f"{side}, {feature.kind}" + (f" ({', '.join(extra)})" if extra else "")


def _refuse_missing(
    frame: pl.DataFrame,
    tasks: Sequence[Task],
    labels: Sequence[str],
    row: str | None,
    time: str | None,
    weight: str | None,
    offset: str | None,
    task_columns: Mapping[str, Sequence[str]],
    row_columns: Sequence[str],
) -> None:
    wanted = [(column, f"part of the key of task '{task.name}'") for task in tasks for column in task.columns]
    wanted += [(str(parse_rule(text)["column"]), f"label '{text}'") for text in labels]
    named = ((row, "the row id"), (time, "the time"), (weight, "the weight"), (offset, "the offset"))
    wanted += [(name, role) for name, role in named if name is not None]
    wanted += [(name, f"a feature of task '{task}'") for task, names in task_columns.items() for name in names]
    wanted += [(name, "a row feature") for name in row_columns]
    if problems := [missing_column(name, role, frame.columns) for name, role in wanted if name not in frame.columns]:
        raise DataError("\n".join(dict.fromkeys(problems)))


def _label(frame: pl.DataFrame, text: str, notes: list[str]) -> Label:
    """A rule as it is; a column by its values: two are a binary label, more are predicted by squared error."""
    label = Label.model_validate(text)
    if label.operator is not None:
        values = label_values(frame, label).drop_nulls()
        share = f"{100 * float(values.mean() or 0):.1f} %" if len(values) else "none"  # type: ignore[arg-type]
        notes.append(f"Label '{text}' is a rule, true for {share} of the rows: binary loss.")
        return label
    column = without_nan(frame[label.column])
    if column.dtype.is_nested():
        raise DataError(
            f"Column '{label.column}' is of type {column.dtype} and cannot be a label; use numbers or a rule."
        )
    distinct = column.drop_nulls().unique().sort()
    if column.dtype == pl.Boolean or (is_number(column.dtype) and set(distinct.to_list()) <= {0, 1}):
        notes.append(f"Label '{text}' is 0 or 1: binary loss.")
        return label
    if is_number(column.dtype) and len(distinct) > 2:
        notes.append(
            f"Label '{text}' has {len(distinct)} values from {distinct[0]:g} to {distinct[-1]:g}: squared loss. Give a "
            f'rule such as "{text} >= {distinct[len(distinct) // 2]:g}" to predict a yes or no.'
        )
        return label.model_copy(update={"loss": LossKind.SQUARED})
    yes: object = None
    if is_number(column.dtype) and len(distinct):
        yes = float(distinct[-1])
    elif len(distinct) == 2:
        likely = [value for value in distinct.cast(pl.String).to_list() if value.lower() in _YES]
        yes = likely[0] if len(likely) == 1 else None
    if yes is None:
        raise DataError(
            f"Column '{label.column}' holds {len(distinct)} texts, such as {show(distinct.head(3).to_list())}; a label "
            f"needs a rule that says which of them count as 1, for example \"{label.column} == '{distinct[0]}'\"."
            if len(distinct)
            else f"Column '{label.column}' holds no label at all; name another column."
        )
    notes.append(f"Label '{text}' is not 0 or 1: it counts as 1 where it is {show(yes)}, and its loss is binary.")
    return Label.model_validate({"name": text, "column": label.column, "operator": "==", "value": yes})


class _Groups:
    """The rows by task and by row id, so that "constant within" can be asked of any column."""

    def __init__(self, frame: pl.DataFrame, tasks: Sequence[Task], row: str | None) -> None:
        self.tasks = {task.name: factorise(frame.select(task.columns)) for task in tasks}
        self.compound = {task.name: task.columns for task in tasks if len(task.columns) > 1}
        self.row = None if row is None else factorise(frame[row])
        self.height = frame.height

    @staticmethod
    def constant(codes: Codes, groups: tuple[Codes, Codes]) -> bool:
        owner, first = groups
        return bool((codes == codes[first][owner]).all())

    def repeated(self, groups: tuple[Codes, Codes]) -> bool:
        """Whether enough groups have several rows for their constancy to say anything."""
        return self.height - len(groups[1]) >= max(2, self.height // 100)


def _feature(
    frame: pl.DataFrame,
    column: str,
    row: str | None,
    time: str | None,
    groups: _Groups,
    task_columns: Mapping[str, Sequence[str]],
    row_columns: Sequence[str],
) -> tuple[Feature, str] | Left:
    values = without_nan(frame[column])
    if column == row:
        feature = Feature(name=column, kind=FeatureKind.CATEGORICAL, column=column, min_count=MIN_COUNT_ROW)
        return feature, "it names what is scored"
    known = column in row_columns or any(column in names for names in task_columns.values())
    codes, first = factorise(values)
    if len(first) <= 1:
        return Left(
            "it holds one value in all rows" if values.null_count() < len(values) else "it holds nothing at all"
        )
    if not known and len(first) == len(values) and not values.dtype.is_float() and not is_list(values.dtype):
        return Left("each row has a value of its own, so it says nothing of any other row")
    if (
        time is None
        and not known
        and _TIME_NAME.search(column)
        and (is_number(values.dtype) or values.dtype.is_temporal())
    ):
        return Left("by its name it is an order of time; pass it as the time if it is")
    if not known and _BOOKKEEPING.search(column):
        return Left("by its name it is bookkeeping, not a property of anything")
    side, entities, why = _side(column, codes, groups, task_columns, row_columns)
    per_row_id = row is not None and groups.row is not None and len(entities) == len(groups.row[1]) < len(values)
    unit = side if side != ROW else row if row is not None and per_row_id else "row"
    chosen = choose_kind(column, values.gather(entities), unit)
    if isinstance(chosen, Left):
        return chosen
    feature = Feature(
        name=column,
        column=column,
        side=side,
        kind=chosen.kind,
        min_count=chosen.min_count,
        length=chosen.length,
        separator=chosen.separator,
    )
    return feature, f"{chosen.reason}; {why}"


def _side(
    column: str,
    codes: Codes,
    groups: _Groups,
    task_columns: Mapping[str, Sequence[str]],
    row_columns: Sequence[str],
) -> tuple[str, Codes, str]:
    """The side of a column, the rows that show each of its entities once, and why."""
    every = np.arange(groups.height, dtype=np.int64)
    of_row = groups.row is not None and groups.constant(codes, groups.row)
    row_entities = groups.row[1] if of_row and groups.row is not None else every
    if column in row_columns:
        return ROW, row_entities, "it came with the rows"
    for name, columns in task_columns.items():
        if column in columns:
            if groups.constant(codes, groups.tasks[name]):
                return name, groups.tasks[name][1], f"it came with '{name}'"
            return ROW, row_entities, f"it came with '{name}', yet varies inside some of them"
    for name, group in groups.tasks.items():
        if column in groups.compound.get(name, ()):
            return name, group[1], f"it is a part of the key of '{name}'"
    if of_row:
        return ROW, row_entities, "it is constant for each row id"
    for name, group in groups.tasks.items():
        if groups.repeated(group) and groups.constant(codes, group):
            return name, group[1], f"it is constant inside each '{name}'"
    return ROW, every, "it differs inside tasks"
