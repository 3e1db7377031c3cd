"""The encoder: everything fitted on the training rows that turns a table into tensors, and travels with the model.

    index_interactions(frame, schema)  →  split  →  Encoder.fit(frame, schema, train)  →  encoder.encode(frame)

What is counted when fitting: a row-side value once per training *row*, since its embedding learns from every row it
stands in; a task-side value once per *task*, since a member with a thousand rows still tells of one member only. So
`min_count=3` on a zip code means three members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from limaml.errors import DataError
from limaml.interactions.codecs import Codec, codec_from_json, encode_values, spec_of
from limaml.interactions.columns import Codes, factorise, missing_column, without_nan
from limaml.interactions.fitting import FeatureFit, fit_of
from limaml.interactions.index import index_interactions, sort_order
from limaml.interactions.keys import task_keys
from limaml.interactions.schema import Feature, Schema, Task
from limaml.types import ROW, Features, FeatureSpec, Interactions

__all__ = ["Encoder", "EncoderFit", "index_interactions"]

FORMAT = 1


@dataclass(frozen=True)
class Encoder:
    """A schema and one fitted codec for each of its features. Made by `Encoder.fit`; never changed."""

    schema: Schema
    codecs: Mapping[str, Codec]  # feature name → what was fitted of it

    @staticmethod
    def fit(frame: pl.DataFrame, schema: Schema, train: Tensor | None = None) -> Encoder:
        """Fit vocabularies and scalings on the training rows of `frame`.

        `train` is a Boolean mask `[rows]` in the order of `index_interactions(frame, schema)`, that is of time, not of
        the table; None means every row. Rows outside it leave no trace in the result. A task-side feature is read from
        the task's latest training row that has a value.
        """
        fit = EncoderFit(schema)
        fit.add(frame, train)
        return fit.encoder()

    @property
    def specs(self) -> tuple[FeatureSpec, ...]:
        """What blocks must know of each encoded feature, in the schema's order."""
        return tuple(spec_of(feature, self.codecs[feature.name]) for feature in self.schema.features)

    def encode(self, frame: pl.DataFrame) -> Interactions:
        """All rows of `frame` as tensors, in order of time.

        The row side holds each distinct combination of *encoded* row features once (values that training has not
        seen are one and the same to the model). A task side holds one entry per task of `frame`, its features read from
        the task's latest row that has a value, else "no value".
        """
        _need_columns(frame, self.schema.features)
        plain = index_interactions(frame, self.schema)
        assert plain.source_row is not None
        order = plain.source_row.numpy()
        sides: dict[str, Features] = {}
        index = dict(plain.index)
        for task in self.schema.tasks:
            features = _on(self.schema, task.name)
            if features:
                _, table, _ = _task_table(frame, task, features, order)
                sides[task.name] = self.encode_features(table, task.name)
            else:
                sides[task.name] = {}
        sides[ROW], index[ROW] = self._encode_rows(frame, order)
        return replace(plain, sides=sides, index=index)

    def encode_features(self, frame: pl.DataFrame, side: str) -> Features:
        """The features of `side` for each row of `frame` `[n, …]`, in the frame's order, as serving needs them.

        Only that side's columns are read. A value that training has not seen is id 1, null is id 0 (a number: the
        training mean). Raises `DataError` where a column is missing: send nulls where nothing is known.
        """
        features = _on(self.schema, side)
        _need_columns(frame, features)
        encoded: Features = {}
        for feature in features:
            codes, first = factorise(frame[feature.column])
            distinct = encode_values(feature, self.codecs[feature.name], frame[feature.column].gather(first))
            encoded[feature.name] = distinct[torch.from_numpy(codes)]
        return encoded

    def unknown_features(self, side: str, count: int = 1) -> Features:
        """The features of `count` things of `side` of which nothing is known."""
        columns = {feature.column for feature in _on(self.schema, side)}
        return self.encode_features(pl.DataFrame({column: pl.Series([None] * count) for column in columns}), side)

    def to_json(self) -> dict[str, object]:
        """Plain data for `json.dumps`; `from_json` gives the same encoder back, to the last bit."""
        return {
            "format": FORMAT,
            "schema": self.schema.model_dump(mode="json"),
            "codecs": {name: codec.to_json() for name, codec in self.codecs.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Encoder:
        """The encoder that `to_json` made `data` of. Raises `DataError` where it is something else."""
        if data.get("format") != FORMAT:
            raise DataError(
                f"The encoder is saved in format {data.get('format')!r}; this version of limaml reads format {FORMAT}."
            )
        codecs = data.get("codecs")
        if not isinstance(codecs, Mapping):
            raise DataError("The saved encoder has no 'codecs'; it must come from Encoder.to_json.")
        try:
            schema = Schema.model_validate(data.get("schema"))
        except ValueError as error:
            raise DataError(f"The saved encoder has a schema that cannot be read: {error}") from error
        wanted = {feature.name for feature in schema.features}
        if wanted != set(codecs):
            raise DataError(
                f"The saved encoder has codecs for {sorted(codecs)}, but its schema has features {sorted(wanted)}."
            )
        fitted = {feature.name: codec_from_json(codecs[feature.name]) for feature in schema.features}
        return Encoder(schema, fitted)

    def _encode_rows(self, frame: pl.DataFrame, order: Codes) -> tuple[Features, Tensor]:
        """The distinct row-side entries, and for each row `[rows]` which of them it has.

        Each column is encoded at its distinct values, then reduced to the distinct encodings, then combined with the
        others: nothing of size rows × features is ever made.
        """
        features = _on(self.schema, ROW)
        if not features:
            return {}, torch.zeros(len(order), dtype=torch.int64)
        distinct: dict[str, Tensor] = {}
        columns: dict[str, Codes] = {}
        for feature in features:
            codes, first = factorise(frame[feature.column])
            values = encode_values(feature, self.codecs[feature.name], frame[feature.column].gather(first))
            again, kept = _distinct_rows(values)
            distinct[feature.name] = values[torch.from_numpy(kept)]
            columns[feature.name] = again[codes][order]
        table = pl.DataFrame(columns)
        index, first = factorise(table)
        picked = {name: torch.from_numpy(codes[first]) for name, codes in columns.items()}
        return {name: values[picked[name]] for name, values in distinct.items()}, torch.from_numpy(index)


def _distinct_rows(values: Tensor) -> tuple[Codes, Codes]:
    """`factorise` for the first dimension of a tensor `[d, …]`."""
    flat = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    return factorise(pl.DataFrame({str(i): column.numpy() for i, column in enumerate(flat.unbind(1))}))


class EncoderFit:
    """Fits an encoder on rows that come in parts, one part in memory at a time: the encoder that all rows give at once.

    Rows of one task of the first type must come in one part, as the buckets of an interaction log have them. Features of
    further task types are held for each of their tasks until the end, as a task's rows may stand in all parts.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._fits: dict[str, FeatureFit] = {feature.name: fit_of(feature) for feature in schema.features}
        self._latest: dict[str, dict[str, pl.DataFrame]] = {task.name: {} for task in schema.tasks}

    def add(self, frame: pl.DataFrame, train: Tensor | None = None) -> None:
        """Take in the rows of a part; `train` as in `Encoder.fit`."""
        schema = self.schema
        _need_columns(frame, schema.features)
        order, times, unit = sort_order(frame, schema)
        time = np.empty(len(order), np.int64)
        time[order] = times
        if train is not None:
            if train.dtype != torch.bool or train.shape != (frame.height,):
                raise DataError(
                    f"The mask of training rows is {train.dtype} of shape {tuple(train.shape)}; it must be Boolean of "
                    f"shape ({frame.height},), in the order of the indexed interactions."
                )
            order = order[train.cpu().numpy()]
        for feature in _on(schema, ROW):
            self._count(feature, frame[feature.column][order])
        for task in schema.tasks:
            features = _on(schema, task.name)
            if not features:
                continue
            keys, table, source = _task_table(frame, task, features, order)
            if task == schema.tasks[0]:
                for feature in features:
                    self._count(feature, table[feature.column])
                continue
            for column, row in source.items():
                when = pl.Series(time[row]).set(pl.Series(row < 0), None)
                part = pl.DataFrame({"key": keys, "value": table[column], "time": when})
                self._latest[task.name][column] = self._later(task, self._latest[task.name].get(column), part, unit)

    def _later(self, task: Task, held: pl.DataFrame | None, part: pl.DataFrame, unit: str) -> pl.DataFrame:
        """Of each key the newer value; the part's, where both are as new."""
        if held is None:
            return part
        if unit == "order":
            raise DataError(
                "The times give an order within one part of the rows only, so that the latest features of "
                f"'{task.name}', whose rows stand in several parts, cannot be told. Use numbers or dates as the time."
            )
        both = pl.concat([held, part], how="vertical_relaxed").sort(
            "time", maintain_order=True
        )  # those of no time first
        return both.group_by("key", maintain_order=True).last()

    def _count(self, feature: Feature, values: pl.Series) -> None:
        codes, first = factorise(values)
        self._fits[feature.name].add(values.gather(first), np.bincount(codes, minlength=len(first)))

    def encoder(self) -> Encoder:
        """The encoder of all parts. To be called once, behind the last one."""
        for task in self.schema.tasks[1:]:
            for feature in _on(self.schema, task.name):
                self._count(feature, self._latest[task.name][feature.column]["value"])
        return Encoder(self.schema, {name: fit.codec() for name, fit in self._fits.items()})


def _task_table(
    frame: pl.DataFrame, task: Task, features: list[Feature], order: Codes
) -> tuple[list[str], pl.DataFrame, dict[str, Codes]]:
    """Keys of the tasks in the rows `order`; for each the last value of each feature's column in that order; and, by
    column, the row of the frame that this value stands in, −1 where there is none."""
    columns = list(dict.fromkeys(feature.column for feature in features))
    keys, codes = task_keys(frame.select(task.columns)[order], task)
    result: dict[str, pl.Series] = {}
    source: dict[str, Codes] = {}
    for column in columns:
        values = frame[column]
        present = without_nan(values).is_not_null().to_numpy()[order]
        last = source[column] = np.full(len(keys), -1, np.int64)
        last[codes[present]] = order[present]  # the later of two assignments to one place stays
        result[column] = values.gather(pl.Series(np.where(last < 0, 0, last)))
        nothing = pl.Series(last < 0)
        result[column] = pl.select(pl.when(~nothing).then(result[column])).to_series()
    return keys, pl.DataFrame(result), source


def _on(schema: Schema, side: str) -> list[Feature]:
    known = {ROW, *(task.name for task in schema.tasks)}
    if side not in known:
        raise DataError(f"There is no side '{side}'; the sides are {sorted(known)}.")
    return [feature for feature in schema.features if feature.side == side]


def _need_columns(frame: pl.DataFrame, features: tuple[Feature, ...] | list[Feature]) -> None:
    problems = [
        missing_column(feature.column, f"feature '{feature.name}'", frame.columns)
        for feature in features
        if feature.column not in frame.columns
    ]
    if problems:
        raise DataError("\n".join(problems))
