"""Scores from a store and a global block alone: what an online model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from limaml.config import Config
from limaml.errors import DataError
from limaml.interactions import Encoder, split_key
from limaml.meta.model import MetaModel
from limaml.meta.saved import TrainedModel, load_model
from limaml.serving.columns import columns_of
from limaml.serving.scoring import Scorer
from limaml.store.contract import Reader, Store

__all__ = ["Predictor", "Scores"]

ROWS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Scores:
    """Scores of `n` rows, all from version `version`."""

    logits: NDArray[np.float32]  # [n, heads]
    predictions: NDArray[np.float32]  # [n, heads] probabilities (binary) or values (squared)
    known: NDArray[np.bool_]  # [n]: every task of the row was in the store
    version: str


class _Looked:
    """Some rows with the embeddings of their tasks, all from one version."""

    def __init__(self, scorer: Scorer, reader: Reader, frame: pl.DataFrame) -> None:
        self.scorer, self.version = scorer, reader.version
        self.asked = scorer.ask(columns_of(frame, scorer.columns), frame.height)
        self.entries = scorer.look_up(reader, [self.asked])

    def scores(self, personal: bool = True) -> Scores:
        entries = self.entries
        cold = (
            {task: self.scorer.cold(task, one.table, torch.arange(len(one.keys))) for task, one in entries.items()}
            if not personal
            else None
        )
        logits = self.scorer.logits([self.asked], entries, cold)
        predictions = self.scorer.predictions(logits)
        known = np.ones(self.asked.rows, dtype=np.bool_)
        for one in entries.values():
            known &= one.found[one.owner.numpy()]
        return Scores(logits.float().numpy(), predictions.float().numpy(), known, self.version)


class Predictor:
    """Scores rows with the version of `name` that `store` serves, or with a pinned `version`.

    A version holds its global block, so a flip of the pointer takes effect with the next call, as a whole: one call is
    answered from one version. `build` makes the modules of a model whose blocks are your own (see `load_model`).
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        version: str | None = None,
        build: Callable[[Encoder, Config], MetaModel] | None = None,
    ) -> None:
        self.store, self.name, self._pinned, self._build = store, name, version, build
        self._reader: Reader | None = None
        self._scorer: Scorer | None = None
        self._open()

    def _open(self) -> tuple[Reader, Scorer]:
        """The reader and the model of the version to serve; reopened if the pointer has moved."""
        wanted = self._pinned or self.store.current(self.name)
        if self._reader is None or self._scorer is None or self._reader.version != wanted:
            reader = self.store.read(self.name, wanted)
            artifact = self.store.describe(self.name, reader.version).artifact
            if artifact is None:
                reader.close()
                raise DataError(
                    f"Version {reader.version} of '{self.name}' keeps no model; publish it with limaml embed."
                )
            if self._scorer is None or self._scorer.trained.digest != artifact:
                self._scorer = Scorer(load_model(self.store.model_path(artifact), self._build))
            if self._reader is not None:
                self._reader.close()
            self._reader = reader
        return self._reader, self._scorer

    @property
    def trained(self) -> TrainedModel:
        """The model of the version that is served."""
        return self._open()[1].trained

    @torch.no_grad()
    def score(self, frame: pl.DataFrame, *, personal: bool = True) -> Scores:
        """Score the rows of `frame`: task keys and row features by the names the model was trained with.

        Columns of task features may be left out: the store knows those of the tasks it knows. A task that the store does
        not know gets the cold embedding of the features it came with. `personal=False` scores every row that way.
        """
        reader, scorer = self._open()
        found = [
            _Looked(scorer, reader, piece).scores(personal)
            for piece in (frame.iter_slices(ROWS_AT_ONCE) if frame.height > ROWS_AT_ONCE else (frame,))
        ]
        if len(found) == 1:
            return found[0]
        return Scores(
            np.concatenate([one.logits for one in found]),
            np.concatenate([one.predictions for one in found]),
            np.concatenate([one.known for one in found]),
            reader.version,
        )

    @torch.no_grad()
    def recommend(self, key: str | int, candidates: pl.DataFrame, top: int = 10, *, head: int = 0) -> pl.DataFrame:
        """The `top` candidates for one task, with and without personalisation side by side.

        `candidates` has the row features. Returned beside its columns: `score` and `rank` with the task's meta embedding,
        `score_cold` and `rank_cold` without, best first.
        """
        task = self.trained.encoder.schema.tasks[0]
        taken = [name for name in ("score", "rank", "score_cold", "rank_cold") if name in candidates.columns]
        if taken:
            raise DataError(
                f"The candidates have columns of their own called {taken}, as the ranking's are. Rename them."
            )
        parts = split_key(str(key), len(task.columns))
        asked = candidates.with_columns(
            [pl.lit(part).alias(column) for part, column in zip(parts, task.columns, strict=True)]
        )
        reader, scorer = self._open()
        looked = _Looked(scorer, reader, asked)
        personal, cold = looked.scores(), looked.scores(personal=False)

        def rank(scores: NDArray[np.float32]) -> NDArray[np.int64]:
            place = np.empty(len(scores), dtype=np.int64)
            place[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
            return place

        return (
            candidates.with_columns(
                pl.Series("score", personal.predictions[:, head]),
                pl.Series("rank", rank(personal.logits[:, head])),
                pl.Series("score_cold", cold.predictions[:, head]),
                pl.Series("rank_cold", rank(cold.logits[:, head])),
            )
            .sort("rank")
            .head(top)
        )

    def close(self) -> None:
        """Let go of the version that is read."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
