"""Implicit feedback: a table of what members chose, without anything said of what they did not choose.

A table of ratings becomes one by a rule (`rating >= 4`): what the rule is true of was chosen, the rest is left out. What
remains describes members and items, so that each candidate can be scored for each member: columns that differ within an
item (a device, the hour) describe neither, and are no features.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from limaml.errors import DataError
from limaml.interactions.columns import factorise
from limaml.interactions.index import label_values, shuffled
from limaml.interactions.infer import infer_schema
from limaml.interactions.join import join_tables
from limaml.interactions.prepare import Prepared, sample_tasks
from limaml.interactions.readers import Source, read_table
from limaml.interactions.schema import Schema
from limaml.types import ROW

__all__ = ["CHOSEN", "ORDER", "prepare_implicit"]

CHOSEN = "chosen"
"""The label: 1 for what was chosen, 0 for a sampled negative."""

ORDER = "shuffled_order"
"""Stands in for the time of a table that has none."""


def prepare_implicit(
    source: Source,
    *,
    task: Sequence[str],
    row: str | None,
    time: str | None = None,
    label: str | None = None,
    task_features: Source | None = None,
    row_features: Source | None = None,
    exclude: Sequence[str] = (),
    max_tasks: int | None = None,
    seed: int = 0,
) -> Prepared:
    """The positives of a table, joined with the tables of features, and a schema for them and for sampled negatives.

    `label` is the rule that makes a positive; without one every row is one. Of each member's interactions with one item
    the first counts. `frame` has the columns that the schema names and `CHOSEN`, which is 1 throughout. Raises `DataError`
    for what cannot be used.
    """
    if row is None:
        raise DataError(
            "Implicit feedback needs the column that names what was chosen: give it as the row (--row item_id)."
        )
    interactions = read_table(source)
    notes = [f"{interactions.height} interactions were read."]
    if CHOSEN in interactions.columns and label != CHOSEN:
        raise DataError(f"The table has a column '{CHOSEN}', which is the name of the label here. Rename it.")
    hidden = list(exclude)
    if label is not None:
        rule = infer_schema(interactions, task=task, label=label, row=row, time=time).schema.labels[0]
        positive = label_values(interactions, rule) == 1
        kept = interactions.filter(positive.fill_null(value=False))
        notes.append(
            f"{kept.height} of {interactions.height} interactions are positives, by the rule '{label}'; "
            f"{int((~positive).sum())} others and {positive.null_count()} without a value are left out."
        )
        hidden.append(rule.column)
        interactions = kept
    else:
        notes.append("Every interaction is a positive, as no --label says which are.")
    if not interactions.height:
        raise DataError(f"The table has no positives by the rule '{label}'. Check the rule, and the table.")
    if max_tasks is not None:
        interactions, said = sample_tasks(interactions, task[0], max_tasks, seed)
        notes += said
    tables = {} if task_features is None else {task[0]: read_table(task_features)}
    if row_features is not None:
        tables[row] = read_table(row_features)
    joined = join_tables(interactions, tables)
    notes += joined.notes
    frame = joined.frame.drop(CHOSEN, strict=False).with_columns(pl.lit(1, pl.Int8).alias(CHOSEN))
    found = infer_schema(
        frame,
        task=task,
        label=CHOSEN,
        row=row,
        time=time,
        task_columns={task[0]: joined.columns.get(task[0], ())},
        row_columns=joined.columns.get(row, ()),
        exclude=[name for name in hidden if name in frame.columns],
        seed=seed,
    )
    notes += found.notes
    schema, said = _without_context(frame, found.schema)
    notes += said
    frame, said = _first_of_each(frame, schema)
    notes += said
    if schema.time is None:
        frame = frame.with_columns(pl.Series(ORDER, shuffled(frame.height, schema.seed)))
        schema = schema.model_copy(update={"time": ORDER})
    columns = [row, str(schema.time), CHOSEN]
    columns += [column for one in schema.tasks for column in one.columns] + [f.column for f in schema.features]
    return Prepared(frame.select(list(dict.fromkeys(columns))), schema, tuple(notes), interactions, tables)


def _without_context(frame: pl.DataFrame, schema: Schema) -> tuple[Schema, list[str]]:
    """The schema without the row features that differ within an item: a candidate has no value of them."""
    assert schema.row is not None
    owner, _ = factorise(frame[schema.row])
    context = []
    for feature in schema.features:
        if feature.side == ROW and feature.column != schema.row:
            codes, _ = factorise(frame[feature.column])
            pairs = pl.DataFrame({"owner": owner, "code": codes}).unique().height
            if pairs > int(owner.max()) + 1:  # more values than items
                context.append(feature.name)
    if not context:
        return schema, []
    kept = tuple(feature for feature in schema.features if feature.name not in context)
    note = (
        f"The columns {context} differ within one '{schema.row}' and describe an occasion: a candidate that nobody was shown "
        "has none, so they are left out."
    )
    return schema.model_copy(update={"features": kept}), [note]


def _first_of_each(frame: pl.DataFrame, schema: Schema) -> tuple[pl.DataFrame, list[str]]:
    """The first interaction of each member with each item, and what was left out."""
    assert schema.row is not None
    keys = list(dict.fromkeys([*schema.tasks[0].columns, schema.row]))
    for name in [*keys, *([schema.time] if schema.time else [])]:
        empty = frame[name].null_count()
        if empty:
            raise DataError(
                f"Column '{name}' has {empty} empty values among the positives. Remove these rows or fill them in."
            )
    ordered = frame.sort(schema.time, maintain_order=True) if schema.time else frame
    kept = ordered.unique(keys, keep="first", maintain_order=True)
    gone = frame.height - kept.height
    note = f"{gone} interactions repeat an earlier one of the same {' and '.join(keys)}; the first of each counts."
    return kept, [note] if gone else []
