"""Scores of rows: what `Predictor` and the service both stand on.

    columns ──ask──► Asked ──look_up──► Entries, one set per task type ──logits──► [n, heads]
             (checked)     (one version's reader)                      (global block)

Several `Asked` are scored in one forward. Where the global block is cut (`limaml.types.CutBlock`), what it makes of a
row's ids is kept (`RowCache`), what depends on a task is computed once per task, and only its `score` runs on every row.
The block that ships is packed for this (`PackedInteraction`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.embeddings.features import feature_width, features_type, unpack_features
from limaml.interactions import Task
from limaml.meta.blocks import add_parts
from limaml.meta.precision import full, precision_of_blocks
from limaml.meta.saved import TrainedModel
from limaml.meta.scorer import calling, gather_parts
from limaml.serving.columns import Column, Lookup, Lookups, joined, keys_of
from limaml.serving.packed import PackedInteraction
from limaml.serving.packed_batch import PackedBatch
from limaml.serving.row_cache import RowCache
from limaml.store.contract import Reader
from limaml.types import ROW, CutBlock, FeatureKind, Features, Parts, embedding_name

__all__ = ["DEFAULT_CACHE_BYTES", "Asked", "AskedTask", "Entries", "Scorer"]

DEFAULT_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class AskedTask:
    """The tasks of one type that a request names."""

    keys: list[str]  # [k] distinct
    codes: NDArray[np.int64]  # [n] in 0 … k − 1, or [1]: which of them each row has
    columns: Mapping[str, Column] | None  # of the features that came with the request, [k] each; None: the store's


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """`rows` rows of one request, checked against the model's schema."""

    rows: int
    ids: Mapping[str, Column]  # columns that the row side's id features read
    numbers: Mapping[str, Column]  # those that its other features read
    tasks: Mapping[str, AskedTask]


@dataclass(slots=True, eq=False)
class Entries:
    """The tasks of one type in a batch, as one version knows them."""

    keys: list[str]  # [k]
    owner: Tensor  # [n] int64: which of them each row has
    found: NDArray[np.bool_]  # [k] whether the store knows it
    count: NDArray[np.int64]  # [k] interactions its embedding was computed from
    event_time: NDArray[np.int64]  # [k] of the newest of them
    z: Tensor  # [k, dim]; cold where the store does not know the task
    table: Features = field(default_factory=dict)  # the task's own features, [k, …]


class Scorer:
    """Scores with one trained model; versions that share it share this. One thread at a time.

    `packed` False: the model's own block is run also where it could be packed.
    """

    def __init__(self, trained: TrainedModel, *, cache_bytes: int = DEFAULT_CACHE_BYTES, packed: bool = True) -> None:
        self.trained, self.model, self.schema = trained, trained.model, trained.encoder.schema
        self.lookups = Lookups(trained.encoder)
        self._dtype, self._device = trained.model.dtype, trained.model.device
        self._ids = [lookup for lookup in self.lookups.on(ROW) if lookup.is_id]
        self._numbers = [lookup for lookup in self.lookups.on(ROW) if not lookup.is_id]
        self._width = {task.name: feature_width(trained.encoder.specs, task.name) for task in self.schema.tasks}
        self._own = {
            task.name: {lookup.feature.column for lookup in self.lookups.on(task.name)} for task in self.schema.tasks
        }
        self.kinds: dict[str, set[FeatureKind]] = {
            column: {feature.kind for feature in self.schema.features if feature.column == column}
            for column in [feature.column for feature in self.schema.features]
        }
        self.keys = {column for task in self.schema.tasks for column in task.columns}
        self.columns = self.keys | {feature.column for feature in self.schema.features}
        named = self.keys if self.schema.row is None else self.keys | {self.schema.row}
        self.not_negative = {name for name in named if not self.lookups.has_negative(name)}
        elsewhere = self.keys | {lookup.feature.column for lookup in self.lookups.on(ROW)}
        self.together = {task: own - elsewhere for task, own in self._own.items()}  # are sent all or none
        self.packed = PackedInteraction.of(self.model.global_block) if packed else None
        self._binary = not bool(self.model.losses.squared.any())
        names = [lookup.feature.column for lookup in self._ids]
        if self.schema.row in names:  # what tells most rows apart comes first
            names.sort(key=lambda name: name != self.schema.row)
        self.cache = RowCache(names, self._encode_ids, cache_bytes)
        self._batch = None
        if self.packed is not None:
            self._batch = PackedBatch(self.packed, self.cache, self._numbers, self._encode_numbers, self._on_device)

    # ------------------------------------------------------------------------------------------------- one request

    def ask(self, columns: Mapping[str, Column], rows: int, *, checked: bool = False) -> Asked:
        """Check the columns of `rows` rows, each `[rows]` or `[1]` for all. `DataError` says what is wrong with them.

        Features of a task type may be left out together: the store knows those of the tasks it knows. `checked`: columns of these
        names and types have been asked before.
        """
        if not checked:
            self.lookups.check(columns, ROW)
        ids = {name: columns[name] for name in self.cache.names}
        numbers = {lookup.feature.column: columns[lookup.feature.column] for lookup in self._numbers}
        return Asked(rows, ids, numbers, {task.name: self._ask_task(columns, task, rows) for task in self.schema.tasks})

    def _ask_task(self, columns: Mapping[str, Column], task: Task, rows: int) -> AskedTask:
        keys, codes, first = keys_of(columns, task)
        own = self._own[task.name]
        if not own or not own <= columns.keys():
            return AskedTask(keys, codes, None)
        self.lookups.check(columns, task.name)
        given = {name: columns[name] for name in own}
        return AskedTask(
            keys, codes, {name: each.first(first) if len(each) > 1 else each for name, each in given.items()}
        )

    # --------------------------------------------------------------------------------------------------- the store

    def look_up(self, reader: Reader | None, asked: Sequence[Asked]) -> dict[str, Entries]:
        """The tasks of a batch by type, read out of one version; without a reader, as if it knew none of them."""
        return {task: self._entries(reader, task, [one.tasks[task] for one in asked], asked) for task in self._own}

    def _entries(self, reader: Reader | None, task: str, given: Sequence[AskedTask], asked: Sequence[Asked]) -> Entries:
        keys = [key for one in given for key in one.keys]
        place = torch.from_numpy(_owner(given, asked))
        table = self._table(reader, task, given)
        k, dim = len(keys), self.model.dims[task] or 0
        if reader is None:
            none = np.zeros(k, np.int64)
            return Entries(
                keys, place, none.astype(np.bool_), none, none, self.cold(task, table, torch.arange(k)), table
            )
        stored = reader.get(task, keys)
        found = np.asarray(stored.found)
        z = torch.from_numpy(np.array(stored.vectors)).to(self._dtype).reshape(k, dim)
        if not found.all():
            unknown = torch.from_numpy(np.flatnonzero(~found))
            z[unknown] = self.cold(task, table, unknown).to(z)
        return Entries(keys, place, found, np.asarray(stored.count), np.asarray(stored.event_time), z, table)

    def _table(self, reader: Reader | None, task: str, given: Sequence[AskedTask]) -> Features:
        """The task's own features: those that came with a request, else those published with the tasks, else unknown."""
        if not self._width[task]:
            return {}
        tables: list[Features] = []
        for one in given:
            if one.columns is not None:
                columns = {name: column.repeated(len(one.keys)) for name, column in one.columns.items()}
                tables.append(self.lookups.features(columns, task))
            else:
                tables.append({})
        bare = [key for one in given if one.columns is None for key in one.keys]
        if bare:
            stored = self._stored(reader, task, bare)
            place = 0
            for i, one in enumerate(given):
                if one.columns is None:
                    part = slice(place, place + len(one.keys))
                    tables[i] = {name: values[part] for name, values in stored.items()}
                    place = part.stop
        if len(tables) == 1:
            return tables[0]
        return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}

    def _stored(self, reader: Reader | None, task: str, keys: list[str]) -> Features:
        if reader is None:
            return self.trained.encoder.unknown_features(task, len(keys))
        stored = reader.get(features_type(task), keys, fill=True)
        return unpack_features(stored.vectors, self.trained.encoder.specs, task)

    def cold(self, task: str, table: Features, entries: Tensor) -> Tensor:
        """Cold embeddings `[k, dim]` of the entries of a table of task features."""
        with torch.no_grad():
            return self.model.cold_of(task, table, entries)

    # --------------------------------------------------------------------------------------------------- the block

    def logits(
        self, asked: Sequence[Asked], entries: Mapping[str, Entries], embeddings: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits `[n, heads]` of all rows of a batch; `embeddings` (task type → `[k, dim]`) in place of the entries'."""
        z = {task: one.z for task, one in entries.items()} if embeddings is None else embeddings
        if self._batch is not None and any(one.rows for one in asked):
            with torch.inference_mode(), full("cpu"):
                return torch.from_numpy(self._batch.logits(asked, entries, z))
        with torch.no_grad():
            return self._called(asked, entries, z)

    def differentiable(self, asked: Sequence[Asked], entries: Mapping[str, Entries]) -> Tensor:
        """`logits`, for who needs their slopes by the entries' embeddings."""
        return self._called(asked, entries, {task: one.z for task, one in entries.items()}, whole=True)

    def _called(
        self, asked: Sequence[Asked], entries: Mapping[str, Entries], z: Mapping[str, Tensor], *, whole: bool = False
    ) -> Tensor:
        """The model's own block, on `whole` rows or cut where it is."""
        block, rows = self.model.global_block, sum(one.rows for one in asked)
        if not rows:
            return torch.zeros(0, self.model.losses.heads, dtype=self._dtype)
        shapes: Features = {embedding_name(task): value for task, value in z.items()}
        with calling(f"The global block {type(block).__name__}", precision_of_blocks(self._device), lambda: shapes):
            logits = (
                self._cut(block, asked, entries, z)
                if isinstance(block, CutBlock) and not whole
                else block(self._whole(asked, entries, z))
            )
        return logits.reshape(rows, -1) if logits.dim() == 1 else logits

    def predictions(self, logits: Tensor) -> Tensor:
        """Probabilities of binary labels, values of others, `[n, heads]`."""
        with torch.no_grad():
            return torch.sigmoid(logits) if self._binary else self.model.losses.predictions(logits)

    def _cut(
        self, block: CutBlock, asked: Sequence[Asked], entries: Mapping[str, Entries], z: Mapping[str, Tensor]
    ) -> Tensor:
        parts: Parts | None = self.cache.parts([(one.ids, one.rows) for one in asked]) if self._ids else None
        if self._numbers:
            numbers = block.encode(self._on_device(self._encode_numbers(asked)))
            parts = numbers if parts is None else add_parts(parts, numbers)
        for task, one in entries.items():
            own = block.condition({embedding_name(task): z[task] if self.packed else z[task].to(self._device)})
            if one.table:
                own = add_parts(own, block.encode(self._on_device(one.table)))
            if parts is None or len(one.keys) > 1 or any(part is None for part in parts):
                own = gather_parts(own, one.owner.to(self._device))
            parts = own if parts is None else add_parts(parts, own)  # what is one task's is added to all rows
        assert parts is not None
        return block.score(parts)

    def _whole(self, asked: Sequence[Asked], entries: Mapping[str, Entries], z: Mapping[str, Tensor]) -> Features:
        """Every feature of every row, for a block that is not cut."""
        features: Features = self._encode_numbers(asked) if self._numbers else {}
        if self._ids:
            encoded = [self._encode(self._ids, one.ids, one.rows) for one in asked]
            features |= {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        for task, one in entries.items():
            features |= {name: values[one.owner] for name, values in one.table.items()}
            features[embedding_name(task)] = z[task][one.owner]
        return self._on_device(features)

    def _encode_numbers(self, asked: Sequence[Asked]) -> Features:
        if len(asked) == 1:
            return self._encode(self._numbers, asked[0].numbers, asked[0].rows)
        features: Features = {}
        for lookup in self._numbers:
            name = lookup.feature.column
            whole = joined([(one.numbers[name], one.rows) for one in asked])
            features[lookup.feature.name] = (
                lookup.encode(whole)
                if whole is not None
                else torch.cat([self._encode([lookup], one.numbers, one.rows)[lookup.feature.name] for one in asked])
            )
        return features

    def _encode(self, lookups: Sequence[Lookup], columns: Mapping[str, Column], rows: int) -> Features:
        features: Features = {}
        for lookup in lookups:
            values = lookup.encode(columns[lookup.feature.column])
            features[lookup.feature.name] = values if len(values) == rows else values.expand(rows, *values.shape[1:])
        return features

    @torch.no_grad()
    def _encode_ids(self, columns: Mapping[str, Column]) -> Parts:
        """What the block makes of the id features of some rows."""
        block = self.packed or self.model.global_block
        assert isinstance(block, CutBlock)
        rows = len(next(iter(columns.values())))
        return block.encode(self._on_device(self._encode(self._ids, columns, rows)))

    def _on_device(self, features: Features) -> Features:
        if self.packed is not None and self._dtype == torch.float32:
            return features  # as they are encoded
        return {
            name: values.to(self._device, self._dtype if values.is_floating_point() else None)
            for name, values in features.items()
        }


def _owner(given: Sequence[AskedTask], asked: Sequence[Asked]) -> NDArray[np.int64]:
    """Which of a batch's entries each of its rows has."""
    if all(len(one.codes) == 1 for one in given):  # each request is of one task, as most are
        return np.repeat(np.arange(len(given)), [each.rows for each in asked])
    owner, start = [], 0
    for one, each in zip(given, asked, strict=True):
        owner.append((one.codes if len(one.codes) == each.rows else np.repeat(one.codes, each.rows)) + start)
        start += len(one.keys)
    return np.concatenate(owner)
