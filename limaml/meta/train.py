"""From a table to a trained model: encode, find the number of epochs on validation rows, train on all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from limaml.config import Config
from limaml.interactions import Encoder, Schema
from limaml.meta.build import build_meta_model
from limaml.meta.distributed import Ranks
from limaml.meta.learn import MetaLearner
from limaml.meta.model import MetaModel
from limaml.meta.outer import History, Progress, fit
from limaml.meta.saved import TrainedModel, load_model, save_model
from limaml.tasks import split_by_task_order
from limaml.types import Interactions

__all__ = ["Training", "train"]


@dataclass(frozen=True)
class Training:
    """A model that was trained, with the encoded rows it was trained on and the course of its training.

    `search` is the training that found the number of epochs, on a part of the rows; None if there was none.
    """

    model: MetaModel
    encoder: Encoder
    config: Config
    data: Interactions
    history: History
    search: History | None
    built_by: str = "config"

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
    frame: pl.DataFrame,
    schema: Schema,
    config: Config | None = None,
    *,
    validation_share: float = 0.15,
    refit: bool = True,
    build: Callable[[Encoder, Config], MetaModel] | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[str, Progress], None] | None = None,
) -> Training:
    """Meta-learn a model on all rows of `frame`.

    Each task's last `validation_share` of rows is held out first, to find the number of epochs; with `refit` the model
    is then trained again on all rows for that many. With a share of 0 it is trained for `train.epochs` at once.
    `build(encoder, config)` makes a `MetaModel` of your own modules (default: those of the config). With a `checkpoint`
    folder, a run that was killed goes on where it was. `progress` is called with ("search" or "train", where it is).

    Under torchrun the processes share each batch's tasks (`limaml.meta.distributed`) and all have the model in the end;
    save it on one of them.
    """
    config = config or Config()
    device = Ranks.joined(config.train.device).place(config.train.device)
    encoder = Encoder.fit(frame, schema)
    data = encoder.encode(frame)
    losses = [label.loss for label in schema.labels]
    everything = torch.ones(len(data), dtype=torch.bool)

    def fresh() -> MetaModel:
        torch.manual_seed(config.train.seed)
        if build is not None:
            return build(encoder, config)
        return build_meta_model(encoder.specs, [task.name for task in schema.tasks], losses, config.model, config.adapt)

    def run(name: str, learner: MetaLearner, final: Config) -> History:
        folder = None if checkpoint is None else Path(checkpoint) / name
        tell = None if progress is None else lambda news: progress(name, news)
        return fit(learner, final.train, checkpoint=folder, progress=tell)

    model, search, settings = fresh().to(device), None, config
    built_by = "config" if build is None else getattr(build, "__qualname__", type(build).__name__)
    if validation_share > 0:
        split = split_by_task_order(data, schema.tasks[0].name, share=validation_share)
        search = run("search", MetaLearner(model, data, split.train, config.train, split), config)
        if not refit:
            return Training(model.cpu(), encoder, config, data, search, search, built_by)
        epochs = {"epochs": search.best, "patience": search.best}
        settings = config.model_copy(update={"train": config.train.model_copy(update=epochs)})
        model = fresh().to(device)
    history = run("train", MetaLearner(model, data, everything, settings.train), settings)
    return Training(model.cpu(), encoder, config, data, history, search, built_by)
