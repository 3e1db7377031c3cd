"""From rows to a trained model: survey them, find the number of epochs on validation rows, train on all rows.

    survey    one pass over the buckets: the encoder, totals               (meta/survey.py)
    windows   buckets that are in memory together, the next one read ahead (meta/reader.py, meta/window_learner.py)
    fit       epochs, early stopping, checkpoints                          (meta/outer.py)

A table in memory is one bucket and one window: the same code trains on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch

from limaml.config import Config
from limaml.errors import ConfigError
from limaml.interactions import Encoder, Schema
from limaml.interactions.buckets import Buckets, OneBucket
from limaml.meta.build import build_meta_model
from limaml.meta.distributed import Ranks
from limaml.meta.model import MetaModel
from limaml.meta.outer import History, Progress, fit
from limaml.meta.reader import WindowReader
from limaml.meta.saved import TrainedModel, load_model, save_model
from limaml.meta.survey import Held, Survey, read_survey, survey, write_survey
from limaml.meta.window_learner import WindowLearner
from limaml.tasks import BucketWindows
from limaml.types import Interactions

__all__ = ["Training", "train"]


@dataclass(frozen=True)
class Training:
    """A model that was trained, and the course of its training.

    `search` is the training that found the number of epochs, on a part of the rows; None if there was none. `waited` is how
    many seconds training waited for rows to be read.
    """

    model: MetaModel
    encoder: Encoder
    config: Config
    history: History
    search: History | None
    built_by: str = "config"
    waited: float = 0.0
    time_unit: str = "order"  # of the rows (`Interactions.time_unit`)
    whole: Interactions | None = field(default=None, repr=False)

    @property
    def data(self) -> Interactions:
        """The encoded rows that were trained on, where they were all in memory at once."""
        if self.whole is None:
            raise ConfigError(
                "The rows that were trained on were never in memory together. Encode those you need: "
                "training.encoder.encode(frame); `limaml embed` works bucket by bucket."
            )
        return self.whole

    def save(self, folder: Path | str) -> TrainedModel:
        """Write the model folder and read it back, verified."""
        metrics = {
            "epochs": [epoch.__dict__ for epoch in self.history.epochs],
            "search": None if self.search is None else [epoch.__dict__ for epoch in self.search.epochs],
            "best_epoch": self.history.best if self.search is None else self.search.best,
        }
        save_model(folder, self.model, self.encoder, self.config, metrics, built_by=self.built_by)
        return load_model(folder, None if self.built_by == "config" else lambda _encoder, _config: self.model)


def train(
    rows: pl.DataFrame | Buckets,
    schema: Schema,
    config: Config | None = None,
    *,
    validation_share: float = 0.15,
    refit: bool = True,
    build: Callable[[Encoder, Config], MetaModel] | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[str, Progress], None] | None = None,
    look: Callable[[int, pl.DataFrame], None] | None = None,
) -> Training:
    """Meta-learn a model on all `rows`: a table, or the buckets of a log (`LogBuckets`), a window of them in memory at a time.

    Each task's last `validation_share` of rows is held out first, to find the number of epochs; with `refit` the model
    is then trained again on all rows for that many. With a share of 0 it is trained for `train.epochs` at once.
    `build(encoder, config)` makes a `MetaModel` of your own modules (default: those of the config). With a `checkpoint`
    folder, a run that was killed goes on where it was. `progress` is called with ("search" or "train", where it is), and
    `look` with each bucket's number and rows as they are read for the first time.

    Under torchrun the processes share the work (`limaml.meta.distributed`) and all have the model in the end; save it on
    one of them.
    """
    config = config or Config()
    ranks = Ranks.joined(config.train.device)
    device = ranks.place(config.train.device)
    buckets = OneBucket(rows) if isinstance(rows, pl.DataFrame) else rows
    found, held = _surveyed(buckets, schema, config, validation_share, checkpoint, look, ranks)
    reader = WindowReader(buckets, found.encoder)
    losses = [label.loss for label in schema.labels]

    def fresh() -> MetaModel:
        torch.manual_seed(config.train.seed)
        if build is not None:
            return build(found.encoder, config)
        tasks = [task.name for task in schema.tasks]
        return build_meta_model(found.encoder.specs, tasks, losses, config.model, config.adapt)

    def run(name: str, model: MetaModel, settings: Config, without: Held | None) -> History:
        folder = None if checkpoint is None else Path(checkpoint) / name
        tell = None if progress is None else lambda news: progress(name, news)
        learner = WindowLearner(model, reader, found, settings.train, without)
        return fit(learner, settings.train, checkpoint=folder, progress=tell)

    def done(history: History, search: History | None) -> Training:
        built_by = "config" if build is None else getattr(build, "__qualname__", type(build).__name__)
        whole = reader.open(range(buckets.count)).data if found.windows.single else None
        trained = model.cpu(), found.encoder, config, history, search, built_by
        return Training(*trained, reader.waited, reader.time_unit, whole)

    model, search, settings = fresh().to(device), None, config
    try:
        if held is not None:
            search = run("search", model, config, held)
            if not refit:
                return done(search, search)
            epochs = {"epochs": search.best, "patience": search.best}
            settings = config.model_copy(update={"train": config.train.model_copy(update=epochs)})
            model = fresh().to(device)
        return done(run("train", model, settings, None), search)
    finally:
        reader.close()


def _surveyed(
    buckets: Buckets,
    schema: Schema,
    config: Config,
    share: float,
    checkpoint: Path | str | None,
    look: Callable[[int, pl.DataFrame], None] | None,
    ranks: Ranks,
) -> tuple[Survey, Held | None]:
    """What the first pass tells, or told the run that is gone on with; and what is held out."""
    windows = BucketWindows.of(buckets.count, buckets.rows, config.train.window_buckets)
    folder = None if checkpoint is None or windows.single else Path(checkpoint) / "survey"
    known = None if folder is None else read_survey(folder)
    windows = windows if known is None else known.windows
    sampled = frozenset(windows.sample(config.train.validation_buckets, config.train.seed))
    held = Held(share, sampled) if share > 0 else None
    found = known or survey(buckets, schema, windows, held, look)
    if folder is not None and known is None and ranks.leads:
        write_survey(folder, found)
    return found, held
