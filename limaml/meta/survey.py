"""The first pass over the buckets: what must be known of all rows before the first of them is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from limaml.artifact import read_folder, write_folder
from limaml.errors import DataError
from limaml.interactions import Encoder, Schema, index_interactions
from limaml.interactions.buckets import Buckets
from limaml.interactions.encode import EncoderFit
from limaml.meta.losses import LabelMoments
from limaml.tasks import BucketWindows, Split, split_by_task_order
from limaml.types import Interactions

__all__ = ["Held", "Survey", "Totals", "held_out", "read_survey", "survey", "write_survey"]

KIND, FORMAT = "survey", 1


@dataclass(frozen=True)
class Totals:
    """Of the rows that are trained on: their number, their weight, and the moments of their labels, part by part."""

    rows: int
    weight: float
    labels: tuple[LabelMoments, ...]

    @staticmethod
    def of(data: Interactions, train: Tensor) -> Totals:
        """Of the rows where `train` `[rows]` is true, as one part."""
        moments = LabelMoments.of(data.labels[train], data.weights[train])
        return Totals(int(train.sum()), float(data.weights[train].sum()), (moments,))

    @staticmethod
    def joined(parts: Sequence[Totals]) -> Totals:
        """Of all parts together."""
        labels = tuple(moments for part in parts for moments in part.labels)
        return Totals(sum(part.rows for part in parts), math.fsum(part.weight for part in parts), labels)


@dataclass(frozen=True)
class Held:
    """Which rows are held out: the last `share` of each task of those `buckets`."""

    share: float
    buckets: frozenset[int]


def held_out(data: Interactions, task: str, held: Held, bucket: Tensor) -> Split:
    """The rows of `data` that are held out, as the test of a split; all others are its training rows and its support.

    `bucket` `[rows of the table]` says where each row of the encoded table came from.
    """
    assert data.source_row is not None
    among = torch.isin(bucket[data.source_row], torch.tensor(sorted(held.buckets), dtype=torch.int64))
    split = split_by_task_order(data, task, share=held.share, among=among)
    return Split(split.protocol, task, ~split.test, ~split.test, split.test, split.tied)


@dataclass(frozen=True)
class Survey:
    """The encoder of all rows; how many tasks of the first type there are; totals of all rows, and of those that are left
    where validation rows are held out."""

    encoder: Encoder
    windows: BucketWindows
    tasks: int
    all: Totals
    kept: Totals


def survey(
    buckets: Buckets,
    schema: Schema,
    windows: BucketWindows,
    held: Held | None = None,
    look: Callable[[int, pl.DataFrame], None] | None = None,
) -> Survey:
    """Read all buckets once, a window of them in memory at a time. `look(number, frame)` is shown each bucket on the way."""
    fit, tasks = EncoderFit(schema), 0
    everything: list[Totals] = []
    kept: list[Totals] = []
    for some in windows.ascending():
        frame, bucket = read_buckets(buckets, some, look)
        if not frame.height:
            continue
        fit.add(frame)
        data = index_interactions(frame, schema)
        first = schema.tasks[0].name
        tasks += data.count(first)
        every = torch.ones(len(data), dtype=torch.bool)
        everything.append(Totals.of(data, every))
        kept.append(everything[-1] if held is None else Totals.of(data, held_out(data, first, held, bucket).train))
    if not everything:
        raise DataError(
            "There are no rows to train on. Check the path, and the filters that were applied to the table."
        )
    return Survey(fit.encoder(), windows, tasks, Totals.joined(everything), Totals.joined(kept))


def read_buckets(
    buckets: Buckets, numbers: Sequence[int], look: Callable[[int, pl.DataFrame], None] | None = None
) -> tuple[pl.DataFrame, Tensor]:
    """The rows of these buckets in their order, and the bucket of each row `[rows]`."""
    frames = []
    for number in numbers:
        frame = buckets.read(number)
        if look is not None:
            look(number, frame)
        frames.append(frame)
    bucket = torch.from_numpy(np.repeat(np.array(numbers, np.int64), [frame.height for frame in frames]))
    return frames[0] if len(frames) == 1 else pl.concat(frames), bucket


# --- kept beside the checkpoints, so that a run that was killed need not read everything again ---------------------------------


def write_survey(folder: Path, found: Survey) -> None:
    """Keep a survey. Called by one rank."""
    told = {
        "count": found.windows.count,
        "size": found.windows.size,
        "tasks": found.tasks,
        "all": _totals_to_json(found.all),
        "kept": _totals_to_json(found.kept),
    }
    documents = {"encoder": found.encoder.to_json(), "survey": told}
    write_folder(folder, documents=documents, kind=KIND, format=FORMAT)


def read_survey(folder: Path) -> Survey | None:
    """The survey that was kept there, or None."""
    if not folder.exists():
        return None
    documents: Any = read_folder(folder, kind=KIND, format=FORMAT).documents
    told = documents["survey"]
    return Survey(
        Encoder.from_json(documents["encoder"]),
        BucketWindows(told["count"], told["size"]),
        told["tasks"],
        _totals_from_json(told["all"]),
        _totals_from_json(told["kept"]),
    )


def _totals_to_json(totals: Totals) -> dict[str, object]:
    labels = [[part.weight.tolist(), part.total.tolist(), part.squares.tolist()] for part in totals.labels]
    return {"rows": totals.rows, "weight": totals.weight, "labels": labels}


def _totals_from_json(told: Any) -> Totals:
    labels = [LabelMoments(*(torch.tensor(one, dtype=torch.float64) for one in part)) for part in told["labels"]]
    return Totals(told["rows"], told["weight"], tuple(labels))
