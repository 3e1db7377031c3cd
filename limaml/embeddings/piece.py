"""Some tasks of one type as a store is given them: meta embeddings, their revisions, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from limaml.embeddings.factors import factor_type, factor_width, pack_factors
from limaml.embeddings.features import feature_width, features_type, pack_features
from limaml.embeddings.generate import Generated
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Publication
from limaml.types import Interactions

__all__ = ["Piece", "adapted_piece", "empty_piece", "one_piece", "revisions"]


@dataclass(frozen=True, eq=False)
class Piece:
    """`n` tasks of the type `task`. `count` and `time` order embeddings of one task; both are 0 for a cold one."""

    task: str
    ids: list[str]  # [n] keys, as the store knows them
    vectors: NDArray[np.float32]  # [n, dim]
    count: NDArray[np.int64]  # [n] interactions that it was adapted on, those beyond `max_support` included
    time: NDArray[np.int64]  # [n] time of the newest
    features: NDArray[np.float32] | None = None  # [n, width] the tasks' own, where the model has any
    factors: NDArray[np.float32] | None = None  # [n, dim · (dim + 1) / 2] of the posteriors, where they were asked for

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def stored(self) -> dict[str, NDArray[np.float32]]:
        """Stored task type → its vectors. The embedding comes last: whoever sees it sees what belongs to it."""
        found = {}
        if self.factors is not None:
            found[factor_type(self.task)] = self.factors
        if self.features is not None:
            found[features_type(self.task)] = self.features
        return {**found, self.task: self.vectors}

    def put(self, publication: Publication, *, resumed: bool = False) -> None:
        """Into a version that is being written; if that is `resumed`, only what it lacks."""
        for name, vectors in self.stored.items():
            if not resumed:
                publication.put(name, self.ids, vectors, self.count, self.time)
                continue
            lacks = np.flatnonzero(~publication.written(name, self.ids))
            ids = [self.ids[place] for place in lacks.tolist()]
            publication.put(name, ids, vectors[lacks], self.count[lacks], self.time[lacks])


def revisions(generated: Generated) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count and newest event time of each task's support, as a store orders them; (0, 0) for a cold task."""
    newest = torch.where(generated.count > 0, generated.newest, 0)
    return generated.count.numpy(), newest.numpy()


def adapted_piece(
    trained: TrainedModel,
    data: Interactions,
    generated: Generated,
) -> Piece:
    """What was generated from `data`, with the tasks' own features."""
    task, tasks = generated.task, generated.tasks
    width = feature_width(trained.encoder.specs, task)
    features = {name: values[tasks] for name, values in data.sides[task].items()} if width else {}
    return Piece(
        task,
        [data.ids[task][entry] for entry in tasks.tolist()],
        generated.vectors.float().cpu().numpy(),
        *revisions(generated),
        features=pack_features(features, trained.encoder.specs, task) if width else None,
        factors=None if generated.factors is None else pack_factors(generated.factors.cpu()),
    )


def empty_piece(trained: TrainedModel, task: str, uncertainty: bool) -> Piece:
    """No task at all, in the shapes of `task`."""
    dim, width = trained.model.dims[task] or 0, feature_width(trained.encoder.specs, task)
    return Piece(
        task,
        [],
        np.zeros((0, dim), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        features=np.zeros((0, width), np.float32) if width else None,
        factors=np.zeros((0, factor_width(dim)), np.float32) if uncertainty else None,
    )


def one_piece(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one task type, of tasks that differ, as one. At least one piece."""
    first = pieces[0]

    def joined(parts: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
        there = [part for part in parts if part is not None]
        return np.concatenate(there) if there else None

    return Piece(
        first.task,
        [key for piece in pieces for key in piece.ids],
        np.concatenate([piece.vectors for piece in pieces]),
        np.concatenate([piece.count for piece in pieces]),
        np.concatenate([piece.time for piece in pieces]),
        joined([piece.features for piece in pieces]),
        joined([piece.factors for piece in pieces]),
    )
