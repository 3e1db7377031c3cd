"""Scores from a store and a global block alone: what an online model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.config import Config
from limaml.embeddings.features import feature_width, features_type, unpack_features
from limaml.errors import DataError
from limaml.interactions import Encoder, split_key, task_keys
from limaml.meta.model import MetaModel
from limaml.meta.saved import TrainedModel, load_model
from limaml.store.contract import Reader, Store
from limaml.types import ROW, Features, Interactions

__all__ = ["Predictor", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Scores of `n` rows, all from version `version`."""

    logits: NDArray[np.float32]  # [n, heads]
    predictions: NDArray[np.float32]  # [n, heads] probabilities (binary) or values (squared)
    known: NDArray[np.bool_]  # [n]: every task of the row was in the store
    version: str


@dataclass(frozen=True)
class _Asked:
    """Rows ready to be scored, with the embeddings of their tasks: all from one version."""

    model: MetaModel
    data: Interactions
    personal: Mapping[str, Tensor]  # task type → [tasks, dim]; cold where the store does not know the task
    cold: Mapping[str, Tensor]
    known: NDArray[np.bool_]
    version: str

    def scores(self, embeddings: Mapping[str, Tensor]) -> Scores:
        logits = self.model.predict(self.data, torch.arange(len(self.data)), embeddings)
        predictions = self.model.losses.predictions(logits)
        return Scores(logits.float().numpy(), predictions.float().numpy(), self.known, self.version)


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
        self._trained: TrainedModel | None = None
        self._open()

    def _open(self) -> tuple[Reader, TrainedModel]:
        """The reader and the model of the version to serve; reopened if the pointer has moved."""
        wanted = self._pinned or self.store.current(self.name)
        if self._reader is None or self._trained is None or self._reader.version != wanted:
            reader = self.store.read(self.name, wanted)
            artifact = self.store.describe(self.name, reader.version).artifact
            if artifact is None:
                reader.close()
                raise DataError(
                    f"Version {reader.version} of '{self.name}' keeps no model; publish it with limaml embed."
                )
            if self._trained is None or self._trained.digest != artifact:
                self._trained = load_model(self.store.model_path(artifact), self._build)
            if self._reader is not None:
                self._reader.close()
            self._reader = reader
        return self._reader, self._trained

    @property
    def trained(self) -> TrainedModel:
        """The model of the version that is served."""
        return self._open()[1]

    @torch.no_grad()
    def score(self, frame: pl.DataFrame, *, personal: bool = True) -> Scores:
        """Score the rows of `frame`: task keys and row features by the names the model was trained with.

        Columns of task features may be left out: the store knows those of the tasks it knows. A task that the store does
        not know gets the cold embedding of the features it came with. `personal=False` scores every row that way.
        """
        asked = self._ask(frame)
        return asked.scores(asked.personal if personal else asked.cold)

    def _ask(self, frame: pl.DataFrame) -> _Asked:
        """Encode the rows and look their tasks up, once, in one version."""
        reader, trained = self._open()
        encoder, model, n = trained.encoder, trained.model, frame.height
        sides: dict[str, Features] = {ROW: encoder.encode_features(frame, ROW)}
        index: dict[str, Tensor] = {ROW: torch.arange(n)}
        ids: dict[str, list[str]] = {}
        stored: dict[str, tuple[Tensor, NDArray[np.bool_]]] = {}
        known = np.ones(n, dtype=np.bool_)
        for task in encoder.schema.tasks:
            keys, codes = task_keys(frame, task)
            ids[task.name], index[task.name] = keys, torch.from_numpy(codes)
            sides[task.name], z, found = self._look_up(reader, trained, task.name, keys, codes, frame)
            stored[task.name] = z, found
            known &= found[codes]
        heads = model.losses.heads
        data = Interactions(sides, index, ids, torch.zeros(n, heads), torch.ones(n), torch.zeros(n, dtype=torch.int64))
        cold = {task: model.cold(data, task, torch.arange(len(keys))) for task, keys in ids.items()}
        personal = {
            task: torch.where(torch.from_numpy(found)[:, None], z.to(cold[task].dtype), cold[task])
            for task, (z, found) in stored.items()
        }
        return _Asked(model, data, personal, cold, known, reader.version)

    def _look_up(
        self,
        reader: Reader,
        trained: TrainedModel,
        task: str,
        keys: list[str],
        codes: NDArray[np.int64],
        frame: pl.DataFrame,
    ) -> tuple[Features, Tensor, NDArray[np.bool_]]:
        """Features, embeddings `[keys, dim]` and whether the store knows them `[keys]`."""
        found = reader.get(task, keys)
        encoder = trained.encoder
        columns = {feature.column for feature in encoder.schema.features if feature.side == task}
        if not columns:
            features: Features = {}
        elif columns <= set(frame.columns):
            first = np.full(len(keys), -1, dtype=np.int64)
            first[codes[::-1]] = np.arange(len(codes))[::-1]
            features = encoder.encode_features(frame[first.tolist()], task)
        else:
            features = self._stored_features(reader, encoder, task, keys)
        return features, torch.from_numpy(np.array(found.vectors)), np.asarray(found.found)

    @staticmethod
    def _stored_features(reader: Reader, encoder: Encoder, task: str, keys: list[str]) -> Features:
        """The features that were published with the tasks; "unknown" ones for a task that was not."""
        if not feature_width(encoder.specs, task):
            return {}
        stored = reader.get(features_type(task), keys, fill=True)
        return unpack_features(stored.vectors, encoder.specs, task)

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
        answer = self._ask(asked)
        personal, cold = answer.scores(answer.personal), answer.scores(answer.cold)

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
