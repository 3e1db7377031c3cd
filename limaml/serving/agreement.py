"""Do serving and training agree? Recorded requests, scored again by the code that training uses.

Offline nothing of the serving path is used but the store: columns go through the `Encoder` as a table does, and rows
through `MetaModel.predict`, with the embeddings that the version has of their tasks. A row whose embedding was refreshed
after it was answered cannot be compared, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.config import Config
from limaml.embeddings.features import feature_width, features_type, unpack_features
from limaml.errors import StoreError
from limaml.interactions import Encoder
from limaml.interactions.keys import task_keys
from limaml.meta.model import MetaModel
from limaml.meta.saved import TrainedModel, load_model
from limaml.serving.record import Served, read_served
from limaml.store.contract import Reader, Store
from limaml.types import ROW, Features, Interactions

__all__ = ["Agreement", "agreement_lines", "check_served"]


@dataclass
class Agreement:
    """What came out of scoring recorded requests again."""

    requests: int = 0
    compared: int = 0  # rows
    refreshed: int = 0  # rows whose embedding, or whose task's features, are newer now
    gone: int = 0  # rows of versions that the store has no more
    worst: float = 0.0
    worst_where: str = ""
    versions: dict[str, int] = field(default_factory=dict)  # version → rows compared
    _differences: list[NDArray[np.float64]] = field(default_factory=list, repr=False)

    def percentile(self, percent: float) -> float:
        """The difference that so many percent of the compared rows stay below; 0 if there are none."""
        return float(np.percentile(np.concatenate(self._differences), percent)) if self._differences else 0.0

    def _take(self, served: Served, differences: NDArray[np.float64]) -> None:
        self.compared += len(differences)
        self.versions[served.version] = self.versions.get(served.version, 0) + len(differences)
        if not len(differences):
            return
        self._differences.append(differences)
        row = int(differences.argmax())
        if differences[row] > self.worst or not self.worst_where:
            self.worst, self.worst_where = float(differences[row]), f"request {served.id}, version {served.version}"


@dataclass(frozen=True)
class _Version:
    reader: Reader
    trained: TrainedModel


@torch.no_grad()
def check_served(
    folder: Path, store: Store, *, build: Callable[[Encoder, Config], MetaModel] | None = None
) -> Agreement:
    """Score the requests recorded in `folder` again, and compare the scores: absolute differences, one per row (the
    largest over labels), infinite where a logit is not finite. `build` makes blocks of your own (`load_model`).

    Scores, not logits: float32 rounds the logits of a model with large weights by more than 1e-5 in either path."""
    found = Agreement()
    models: dict[str, TrainedModel] = {}
    versions: dict[tuple[str, str], _Version | None] = {}
    try:
        for served in read_served(folder):
            found.requests += 1
            key = (served.model, served.version)
            if key not in versions:
                versions[key] = _open(store, *key, models, build)
            version = versions[key]
            if version is None:
                found.gone += len(served.logits)
                continue
            logits, same = _again(served, version)
            found.refreshed += int((~same).sum())
            now, then = logits[same], served.logits[same]
            predictions = version.trained.model.losses.predictions
            off = (predictions(torch.from_numpy(now).double()) - predictions(torch.from_numpy(then).double())).abs()
            finite = np.isfinite(now) & np.isfinite(then)
            found._take(served, np.where(finite, off.numpy(), np.inf).max(1, initial=0.0))
    finally:
        for version in versions.values():
            if version is not None:
                version.reader.close()
    return found


def _open(
    store: Store,
    model: str,
    version: str,
    models: dict[str, TrainedModel],
    build: Callable[[Encoder, Config], MetaModel] | None,
) -> _Version | None:
    try:
        reader = store.read(model, version)
    except StoreError:
        return None
    artifact = store.describe(model, version).artifact
    if artifact is None:
        reader.close()
        raise StoreError(f"Version {version} of '{model}' keeps no model, so its scores cannot be computed again.")
    if artifact not in models:
        models[artifact] = load_model(store.model_path(artifact), build)
    return _Version(reader, models[artifact])


def _again(served: Served, version: _Version) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Logits `[n, heads]` of a recorded request, and which rows have the embeddings that they were answered with `[n]`."""
    encoder, model, reader = version.trained.encoder, version.trained.model, version.reader
    frame, n = served.columns, len(served.logits)
    sides: dict[str, Features] = {ROW: encoder.encode_features(frame, ROW)}
    index: dict[str, Tensor] = {ROW: torch.arange(n)}
    ids: dict[str, list[str]] = {}
    embeddings: dict[str, Tensor] = {}
    same = np.ones(n, np.bool_)
    for task in encoder.schema.tasks:
        keys, codes = task_keys(frame, task)
        ids[task.name], index[task.name] = keys, torch.from_numpy(codes)
        sides[task.name] = _features(frame, encoder, reader, task.name, keys, codes)
        stored = reader.get(task.name, keys)
        cold = model.cold_of(task.name, sides[task.name], torch.arange(len(keys)))
        known = torch.from_numpy(np.array(stored.found))[:, None]
        embeddings[task.name] = torch.where(known, torch.from_numpy(np.array(stored.vectors)).to(cold), cold)
        now = list(zip(stored.found.tolist(), stored.count.tolist(), stored.event_time.tolist(), strict=True))
        then = served.tasks[task.name]
        revisions = zip(then.found.tolist(), then.count.tolist(), then.event_time.tolist(), strict=True)
        was = dict(zip(then.keys, revisions, strict=True))
        unchanged = np.array([was.get(key) == revision for key, revision in zip(keys, now, strict=True)], np.bool_)
        same &= unchanged[codes]
    heads = model.losses.heads
    data = Interactions(sides, index, ids, torch.zeros(n, heads), torch.ones(n), torch.zeros(n, dtype=torch.int64))
    return model.predict(data, torch.arange(n), embeddings).float().numpy(), same


def _features(
    frame: pl.DataFrame,
    encoder: Encoder,
    reader: Reader,
    task: str,
    keys: list[str],
    codes: NDArray[np.int64],
) -> Features:
    """A task's features: those that came with the request, all of them or none; else those that were published."""
    columns = {feature.column for feature in encoder.schema.features if feature.side == task}
    if columns <= set(frame.columns):
        first = np.unique(codes, return_index=True)[1]
        return encoder.encode_features(frame[first.tolist()], task)
    if not feature_width(encoder.specs, task):
        return {}
    return unpack_features(reader.get(features_type(task), keys, fill=True).vectors, encoder.specs, task)


def agreement_lines(found: Agreement) -> list[str]:
    """What to tell of a comparison, as sentences."""
    lines = [f"{found.requests:,} requests; {found.compared:,} of their rows were scored again."]
    if found.compared:
        told = ", ".join(f"p{percent:g} {found.percentile(percent):.1e}" for percent in (50, 99, 99.9))
        lines.append(f"Largest difference of a score {found.worst:.1e} ({found.worst_where}); {told}.")
    if found.refreshed:
        lines.append(f"{found.refreshed:,} rows have an embedding that was refreshed since, and were not compared.")
    if found.gone:
        lines.append(f"{found.gone:,} rows were answered from versions that the store has no more.")
    return lines
