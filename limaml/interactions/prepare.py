"""From files to a table that can be trained on, with everything that was chosen on the way said in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.check import check, clean
from limaml.interactions.infer import infer_schema
from limaml.interactions.join import join_tables
from limaml.interactions.keys import task_keys
from limaml.interactions.readers import Source, read_table
from limaml.interactions.schema import Schema, parse_task

__all__ = ["Prepared", "prepare", "sample_tasks"]


@dataclass(frozen=True)
class Prepared:
    """A joined, cleaned and checked table; the schema that explains it; and one sentence for all that was decided."""

    frame: pl.DataFrame
    schema: Schema
    notes: tuple[str, ...]
    interactions: pl.DataFrame  # as they were read: what an interaction log keeps
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)  # key → side table, as it was read


def prepare(
    source: Source,
    *,
    task: Sequence[str],
    label: Sequence[str],
    row: str | None = None,
    time: str | None = None,
    task_features: Source | None = None,
    row_features: Source | None = None,
    weight: str | None = None,
    exclude: Sequence[str] = (),
    schema: Schema | None = None,
    max_tasks: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Read, join, find the schema (unless one is given), drop exact duplicates, check. Raises one `DataError` for all.

    `task_features` are joined on the first task's key, `row_features` on `row`. `max_tasks` keeps a seeded sample of the
    first task type.
    """
    interactions = read_table(source)
    notes = [f"{interactions.height} interactions were read."]
    if max_tasks is not None:
        interactions, said = sample_tasks(interactions, task[0], max_tasks, seed)
        notes += said
    tables: dict[str, pl.DataFrame] = {}
    if task_features is not None:
        tables[task[0]] = read_table(task_features)
    if row_features is not None:
        if row is None:
            raise DataError("Row features need the column to join them by: name it as the row (--row item_id).")
        tables[row] = read_table(row_features)
    joined = join_tables(interactions, tables)
    notes += joined.notes
    if schema is None:
        found = infer_schema(
            joined.frame,
            task=task,
            label=label,
            row=row,
            time=time,
            task_columns={task[0]: joined.columns.get(task[0], ())},
            row_columns=() if row is None else joined.columns.get(row, ()),
            weight=weight,
            exclude=exclude,
            seed=seed,
        )
        schema = found.schema
        notes += found.notes
    frame, dropped = clean(joined.frame, schema)
    if dropped.total:
        notes.append(str(dropped))
    report = check(frame, schema)
    report.raise_if_bad()
    notes += [str(remark) for remark in report.remarks]
    return Prepared(frame, schema, tuple(notes), interactions, tables)


def sample_tasks(frame: pl.DataFrame, task: str, most: int, seed: int) -> tuple[pl.DataFrame, list[str]]:
    """All rows of a seeded sample of at most `most` tasks, and a sentence that says so."""
    keys, codes = task_keys(frame, parse_task(task, frame.columns))
    if len(keys) <= most:
        return frame, []
    chosen = np.zeros(len(keys), dtype=bool)
    # By key and not by place: the sample does not depend on the order of the rows.
    order = np.argsort(np.array(keys, dtype=object), kind="stable")
    chosen[order[np.random.default_rng(seed).permutation(len(keys))[:most]]] = True
    kept = frame.filter(pl.Series(chosen[codes]))
    said = (
        f"A sample of {most} of {len(keys)} tasks '{task}' is used (seed {seed}): {kept.height} of {frame.height} rows."
    )
    return kept, [said]
