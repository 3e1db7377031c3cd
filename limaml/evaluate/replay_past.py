"""What was known at a moment: interactions up to a row, encoded by what was fitted up to a row.

Policies of a replay see the data through a `View` alone, so that nothing of the future can reach them: rows to learn from
end where a period begins, and the rows to be scored come without their labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch

from limaml.errors import DataError
from limaml.interactions import Encoder, Schema, index_interactions
from limaml.types import Features, Interactions

__all__ = ["Timeline", "View"]


@dataclass(frozen=True)
class Timeline:
    """All rows in order of time, and who they are of; no feature is fitted."""

    frame: pl.DataFrame
    schema: Schema
    plain: Interactions

    @staticmethod
    def of(frame: pl.DataFrame, schema: Schema) -> Timeline:
        """Put the rows in order of time. Raises `DataError` for a table without a time column."""
        if schema.time is None:
            raise DataError("Replay walks through time, but the table has no time column: name one with --time.")
        order = index_interactions(frame, schema).source_row
        assert order is not None
        frame = frame[order.numpy()]
        return Timeline(frame, schema, index_interactions(frame, schema))

    def view(self, rows: int) -> View:
        """The data as an encoder sees it that was fitted on the first `rows` rows."""
        encoder = Encoder.fit(self.frame.head(rows), self.schema)
        return View(self, encoder, encoder.encode(self.frame), rows)

    def tasks_before(self, task: str, rows: int) -> int:
        """How many tasks have appeared in the first `rows` rows: entries are numbered in order of appearance."""
        return int(self.plain.index[task][:rows].max()) + 1 if rows else 0


@dataclass(frozen=True)
class View:
    """A timeline, encoded with vocabularies and scalings of its first `fitted` rows."""

    timeline: Timeline
    encoder: Encoder
    encoded: Interactions  # all rows; handed out in part only
    fitted: int

    def before(self, rows: int) -> Interactions:
        """The first `rows` rows, and of each task what they say of it."""
        return self._first(rows, rows)

    def serving(self, first: int, last: int) -> Interactions:
        """The first `last` rows, to score those from `first` on: these have no labels.

        Of a task that was there before, its features are those of its rows before `first`; a new task brings them with
        its first row.
        """
        data = self._first(last, first)
        labels = data.labels.clone()
        labels[first:] = torch.nan
        return replace(data, labels=labels)

    def _first(self, rows: int, known: int) -> Interactions:
        """The first `rows` rows, with what the first `known` of them, and the first row of each new task, say of tasks."""
        data, sides, ids = self.encoded, dict(self.encoded.sides), {}
        for task in self.encoder.schema.tasks:
            count = self.timeline.tasks_before(task.name, rows)
            ids[task.name] = data.ids[task.name][:count]
            if sides[task.name]:
                sides[task.name] = self._task_features(task.name, rows, known)
        return replace(
            data,
            sides=sides,
            index={side: index[:rows] for side, index in data.index.items()},
            ids=ids,
            labels=data.labels[:rows],
            weights=data.weights[:rows],
            time=data.time[:rows],
            offset=None if data.offset is None else data.offset[:rows],
            source_row=None if data.source_row is None else data.source_row[:rows],
        )

    def _task_features(self, task: str, rows: int, known: int) -> Features:
        """Features of the tasks of the first `rows` rows, in order of appearance; each the last value that was there."""
        index = self.timeline.plain.index[task][:rows].numpy()
        columns = list(dict.fromkeys(f.column for f in self.encoder.schema.features if f.side == task))
        first = np.unique(index, return_index=True)[1]
        told = np.arange(rows) < known
        told[first] = True
        values = without_nans(self.timeline.frame.select(columns).head(rows)).with_columns(pl.Series("", index))
        table = values.filter(pl.Series(told)).group_by("").agg(pl.all().drop_nulls().last()).sort("")
        return self.encoder.encode_features(table.select(columns), task)


def without_nans(frame: pl.DataFrame) -> pl.DataFrame:
    """NaN is no value."""
    return frame.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
