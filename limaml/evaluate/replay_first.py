"""The first training of a family: what its settings are, how many epochs, how many passes of fine-tuning."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import polars as pl
import torch

from limaml.config import Config
from limaml.errors import ConfigError, TrainingError
from limaml.evaluate.methods import config_of
from limaml.evaluate.replay_past import Timeline
from limaml.evaluate.replay_periods import equal_parts
from limaml.evaluate.replay_policies import PASSES, Plain, Tell, Trained, make_policy
from limaml.interactions.schema import Feature, Schema, Task
from limaml.tasks import Split
from limaml.types import ROW

__all__ = ["first_training", "of_family"]


def of_family(timeline: Timeline, config: Config, family: str, method: str, rows: int) -> tuple[Timeline, Config]:
    """The timeline and the config of a family: `limaml_items` has the items as a second task type."""
    settings = config_of(method if family.startswith("limaml") else family, config, seed=config.train.seed)
    if family != "limaml_items":
        return timeline, settings
    return Timeline.of(timeline.frame, with_item_tasks(timeline.frame.head(rows), timeline.schema)), settings


def with_item_tasks(frame: pl.DataFrame, schema: Schema) -> Schema:
    """The schema with what is scored (`schema.row`) as a second task type.

    Features that are constant for each item in `frame` (the training rows) go to the items' side: the item's meta block
    reads them, so that a new item begins at what its features say.
    """
    item = schema.row
    if item is None:
        raise ConfigError("Items as tasks need the column that names what is scored: give it with --row.")
    if any(task.name == item for task in schema.tasks):
        return schema
    columns = list(dict.fromkeys(f.column for f in schema.features if f.side == ROW and f.column != item))
    most = frame.group_by(item).agg(pl.col(columns).n_unique()).select(pl.col(columns).max())
    constant = {item, *(column for column in columns if most[column][0] == 1)}

    def moved(feature: Feature) -> Feature:
        own = feature.side == ROW and feature.column in constant
        return feature.model_copy(update={"side": item}) if own else feature

    return schema.model_copy(
        update={
            "tasks": (*schema.tasks, Task.model_validate(item)),
            "features": tuple(moved(feature) for feature in schema.features),
        }
    )


def first_training(
    timeline: Timeline, config: Config, family: str, rows: int, tell: Tell | None
) -> tuple[Trained, float]:
    """Train a family's first model on the first `rows` rows; with it, the processor seconds that took.

    The number of epochs is found by training on the earlier of these rows and judging on their last
    `compare.validation_share`; those seconds are not counted.
    """
    held = max(1, round(rows * config.compare.validation_share))
    cut = int(np.searchsorted(timeline.plain.time.numpy(), int(timeline.plain.time[rows - held])))
    if cut == 0:
        raise TrainingError(
            f"All {rows} training rows of the replay have one time: the number of epochs cannot be found. Start it later."
        )
    policy = make_policy(timeline, config, family, "stale", tell)
    train = torch.arange(rows) < cut
    split = Split("time", timeline.schema.tasks[0].name, train, train, ~train)
    history = policy.train(rows, split=split)
    passes = _passes(policy, timeline, cut, rows) if isinstance(policy, Plain) and policy.with_ids else 0
    policy.watch.read()
    policy.train(rows, epochs=history.best)
    state = {name: value.detach().cpu().contiguous() for name, value in policy.module.state_dict().items()}
    return Trained(state, history.best, passes), policy.watch.read()


def _passes(policy: Plain, timeline: Timeline, cut: int, rows: int) -> int:
    """The number of fine-tuning passes that serves the last training rows best, taken as three periods.

    `policy` was trained on the rows before `cut`.
    """
    periods = equal_parts(timeline.plain.time.numpy()[:rows], cut, 3)
    module, known = policy.module, policy.known
    found = {}
    for policy.passes in PASSES:
        policy.module, policy.known = deepcopy(module), dict(known)
        total = 0.0
        for number, period in enumerate(periods):
            if number:
                policy.finetune(periods[number - 1])
            scored = slice(period.first, period.last)
            labels, weights = timeline.plain.labels[scored], timeline.plain.weights[scored]
            losses = policy.module.losses
            total += float(losses.loss((policy.serve(period) - losses.centre) / losses.scale, labels, weights).sum())
        found[policy.passes] = total
    return min(found, key=lambda passes: found[passes])
