"""`limaml train`: a personalised model out of a table, or out of an interaction log that need not fit into memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import polars as pl
from cyclopts import Parameter

from limaml.cli.console import console, heading, say, training
from limaml.cli.options import DataOptions, read
from limaml.cli.train_log import LogSource, log_in
from limaml.cli.workspace import Workspace
from limaml.config import Config, load_config
from limaml.errors import ConfigError
from limaml.evaluate.methods import config_of
from limaml.interactions import Schema
from limaml.interactions.buckets import LogBuckets
from limaml.interactions.digest import content_digest
from limaml.meta import train
from limaml.meta.age import AGE_UNITS
from limaml.meta.distributed import Ranks

__all__ = ["train_command"]


def train_command(
    file: Annotated[Path, Parameter(help="A table of interactions, or the folder of a log.")],
    /,
    *overrides: Annotated[str, Parameter(help="Settings, such as train.epochs=5 model.dim=32.")],
    data: DataOptions,
    out: Annotated[Path, Parameter(help="Run folder; the other verbs take it.")],
    config: Annotated[Path | None, Parameter(help="YAML file of settings.")] = None,
    solver: Annotated[
        Literal["newton", "gradient"] | None,
        Parameter(help="How the meta block is adapted (default: adapt.solver of the config, else newton)."),
    ] = None,
    validation: Annotated[float, Parameter(help="Share of each task's last rows held out to find the epochs.")] = 0.15,
    refit: Annotated[bool, Parameter(help="Train again on all rows for as many epochs as were found.")] = True,
) -> None:
    """Meta-train a model on your table, or on an interaction log, and keep it in a run folder.

    Holds out each task's last rows to find the number of epochs, then trains on all rows. Every epoch is a checkpoint: the
    same command goes on where a killed run was. Writes the model folder, the interaction log, the side tables and the
    resolved config. Under `torchrun --no-python` the processes share the tasks of every batch.

    A log folder (`limaml log append`) is trained on bucket by bucket, in the memory of two windows of `train.window_buckets`
    each, with a checkpoint behind every window; the run folder then has a link to it.

    `limaml train ratings.parquet --task user_id --row item_id --time timestamp --label "rating >= 4" --out runs/mine`

    Next: `limaml embed runs/mine` publishes every task's meta embedding.
    """
    given = load_config(config, [*overrides, *([] if solver is None else [f"adapt.solver={solver}"])])
    settings = config_of(f"limaml_{given.adapt.solver}", given)
    ranks = Ranks.joined(settings.train.device)
    console.quiet = not ranks.leads  # one rank reports and writes
    heading("Reading")
    place, log = Workspace(out), log_in(file)
    if log is None:
        table = read(file, data)
        rows: pl.DataFrame | LogBuckets = table.frame
        schema, notes, digest, look = table.schema, table.notes, content_digest(table.frame), None
    else:
        table, source = None, LogSource.of(log, data, place, ranks)
        rows, schema, notes, digest, look = source.buckets, source.schema, source.notes, source.digest, source.look
    say(notes)
    if ranks.leads:
        if table is not None:
            place.keep_interactions(table)
        _refuse_other_run(place, schema, digest, settings, validation, refit)
    heading(f"Training ({settings.adapt.solver})")
    with training() as progress:
        done = train(
            rows,
            schema,
            settings,
            validation_share=validation,
            refit=refit,
            checkpoint=place.checkpoint,
            progress=progress,
            look=look,
        )
    if not ranks.leads:
        return
    if table is not None:
        place.write_data(table)
    else:
        source.write_candidates(place.folder / "candidates.parquet")
    trained = done.save(place.model)
    place.write_settings(settings, schema)
    shutil.rmtree(place.checkpoint, ignore_errors=True)
    best = done.search or done.history
    valid = best.epochs[best.best - 1].valid_loss if best.epochs else None
    said = "" if valid is None else f", validation loss {valid:.4f} at its best epoch {best.best}"
    aged = [
        f"Old rows of {task} say less: half as much for every {value:,.4g} {AGE_UNITS[done.time_unit]} behind the newest one."
        for task, value in done.model.half_life_values().items()
    ]
    say([f"Trained for {len(done.history.epochs)} epochs{said}.", *aged])
    say([f"Model {trained.digest[:12]} is in {place.model}."])
    console.print(f"\nNext: limaml embed {out}", markup=False, highlight=False)


def _refuse_other_run(
    place: Workspace, schema: Schema, digest: str, config: Config, validation: float, refit: bool
) -> None:
    """A checkpoint goes on only with the data and settings it was made with."""
    told: dict[str, object] = {
        "schema": schema.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
    }
    told |= {"data": digest, "validation": validation, "refit": refit}
    mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    path = place.checkpoint / "run.sha256"
    begun = path.exists() and any(entry.is_dir() for entry in place.checkpoint.iterdir())
    if begun and path.read_text(encoding="utf-8") != mark:
        raise ConfigError(
            f"{place.checkpoint} holds the checkpoint of a run with other data or settings. Remove that folder to start "
            "anew, or use another --out."
        )
    if begun:
        say(["Going on from the checkpoint of a run that was interrupted."])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(mark, encoding="utf-8")
