"""Versions in memory: loaded and warmed beside each other, each let go of when its last request is answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import polars as pl

from limaml.config import Config
from limaml.errors import DataError
from limaml.interactions import Encoder
from limaml.meta.model import MetaModel
from limaml.meta.saved import load_model
from limaml.serving.columns import Column
from limaml.serving.described import Described
from limaml.serving.plans import Plans
from limaml.serving.scoring import DEFAULT_CACHE_BYTES, Scorer
from limaml.store.contract import Reader, Store, Version
from limaml.types import ROW

__all__ = ["Loaded", "Runtime", "Versions"]

Runtime = Literal["torch", "onnx"]

MODELS_KEPT = 3
"""Models that stay in memory after their version went, so that a flip back costs a look-up and no loading."""

WARMED_ROWS = (1, 100, 1)


class Loaded:
    """One version that can answer. `users`: requests that will be answered from it; counted by one thread alone."""

    def __init__(self, described: Version, reader: Reader, scorer: Scorer) -> None:
        self.described, self.reader, self.scorer = described, reader, scorer
        self.version = described.id
        self.tensors = Described(scorer, reader)
        self.plans = Plans(scorer)
        self.on_a_clock = described.extra.get("time_unit") == "us"
        self.users = 0
        self.retired = False


class Versions:
    """Loads versions of one model. Every method may take as long as the store does.

    `store` may be what opens it: it is called when the store is first needed, and again as long as it raises.
    """

    def __init__(
        self,
        store: Store | Callable[[], Store],
        model: str,
        *,
        build: Callable[[Encoder, Config], MetaModel] | None = None,
        runtime: Runtime = "torch",
        threads: int = 1,
        onnx_folder: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._open = store if callable(store) else lambda: store
        self._opened: Store | None = None
        self.model, self._build, self._cache_bytes = model, build, cache_bytes
        self._runtime, self._threads, self._onnx_folder = runtime, threads, onnx_folder
        self._scorers: dict[str, Scorer] = {}

    @property
    def store(self) -> Store:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def current(self) -> str | None:
        return self.store.current(self.model)

    def ready(self) -> list[str]:
        """All versions that can be asked for, oldest first."""
        return [version.id for version in self.store.versions(self.model) if version.state == "ready"]

    def load(self, version: str | None = None) -> Loaded:
        """Open, load and warm a version, by default the current one."""
        reader = self.store.read(self.model, version)
        try:
            described = self.store.describe(self.model, reader.version)
            if described.artifact is None:
                raise DataError(
                    f"Version {reader.version} of '{self.model}' keeps no model; publish it with limaml embed."
                )
            loaded = Loaded(described, reader, self._scorer(described.artifact))
            warm(loaded)
        except BaseException:
            reader.close()
            raise
        return loaded

    def _scorer(self, artifact: str) -> Scorer:
        scorer = self._scorers.pop(artifact, None)
        if scorer is None:
            trained = load_model(self.store.model_path(artifact), self._build)
            if self._runtime == "onnx":
                from limaml.serving.onnx import run_with_onnx

                assert self._onnx_folder is not None
                run_with_onnx(trained, self._onnx_folder, self._threads)
            scorer = Scorer(trained, cache_bytes=self._cache_bytes)
        self._scorers[artifact] = scorer  # now the newest
        while len(self._scorers) > MODELS_KEPT:
            self._scorers.pop(next(iter(self._scorers)))
        return scorer


def warm(loaded: Loaded) -> None:
    """Score made-up rows of a task that nobody is, so that the first request finds all code and pages in memory."""
    scorer = loaded.scorer
    names = {lookup.feature.column for lookup in scorer.lookups.on(ROW)}
    keys = {column for task in scorer.schema.tasks for column in task.columns}
    for rows in WARMED_ROWS:
        columns = {name: Column(pl.Null(), [None] * rows) for name in names - keys}
        columns |= {name: Column(pl.String(), [" "]) for name in keys}
        asked = [scorer.ask(columns, rows)]
        scorer.logits(asked, scorer.look_up(loaded.reader, asked))
