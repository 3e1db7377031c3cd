"""`limaml demo`: the whole main job on MovieLens-100K."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from limaml.cli.compare import publish_results, run_comparison
from limaml.cli.console import counting, heading, say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.config import Config, load_config
from limaml.embeddings import publish
from limaml.errors import LimamlError
from limaml.evaluate.compare import Compared
from limaml.interactions import Prepared, catalog, prepare
from limaml.meta import load_model
from limaml.serving import Predictor
from limaml.tasks import TaskRows, split_by_task_order

__all__ = ["demo_command"]

KEPT = "limaml_newton"
TOLERANCE = 1e-5


def demo_command(
    *overrides: Annotated[str, Parameter(help="Settings, such as train.epochs=5.")],
    out: Annotated[Path, Parameter(help="Folder for everything.")] = Path("runs/demo"),
    seeds: Annotated[int, Parameter(help="Number of seeds.")] = 3,
    workers: Annotated[int | None, Parameter(help="Processes, one thread each (default: one per core).")] = None,
) -> None:
    """The whole main job on MovieLens-100K: read, train, embed, publish, score from the store, compare, report.

    Settings are the tuned ones in limaml/cli/demo.yaml, for every method; `limaml tune` is the search that found them.
    """
    heading("MovieLens-100K")
    data = catalog.get("ml-100k", progress=lambda text: say([text]))
    say([data.licence])
    assert data.row is not None
    prepared = prepare(
        data.interactions,
        task=[data.task],
        label=[data.label],
        row=data.row,
        time=data.time,
        task_features=data.task_features,
        row_features=data.row_features,
    )
    say(prepared.notes)
    with as_file(files("limaml.cli") / "demo.yaml") as tuned:
        config = load_config(tuned, [*overrides, f"compare.seeds={seeds}"])
    place = Workspace(out)
    compared, summary = run_comparison(prepared, config, "ml-100k", out, workers=workers, keep=place.model)
    notes = []
    if KEPT in config.compare.methods and "warm" in config.compare.protocols:
        heading("Publishing the embeddings, and scoring the test rows out of the store")
        notes = [_score_from_store(place, prepared, config, compared)]
        say(notes)
    publish_results(out, prepared, config, compared, summary, notes)


def _score_from_store(place: Workspace, prepared: Prepared, config: Config, compared: Compared) -> str:
    """Publish the kept model's embeddings, score the test rows from the store, and hold them against training's."""
    trained = load_model(place.model)
    task = trained.model.tasks[0]
    data = trained.encoder.encode(prepared.frame)
    split = split_by_task_order(data, task, share=config.compare.test_share)
    support = TaskRows.of(data.index[task], data.count(task), split.support)
    place.write_data(prepared)
    with place.store(create=True) as store:
        with counting("embedding") as progress:
            published = publish(
                store, MODEL_NAME, trained, place.model, data, {task: support}, note="demo", progress=progress
            )
        store.expire(MODEL_NAME, keep=2)
        assert data.source_row is not None
        rows = data.source_row[split.test].tolist()
        features = [feature.column for feature in prepared.schema.features if feature.side == task]
        with Predictor(store, MODEL_NAME) as predictor:
            scores = predictor.score(prepared.frame[rows].drop(features))  # the store knows the members' features
    (expected,) = [p for p in compared.predictions if (p.protocol, p.method, p.seed) == ("warm", KEPT, 0)]
    difference = float(np.abs(scores.predictions[:, 0] - expected.predicted).max())
    if not difference <= TOLERANCE:
        raise LimamlError(
            f"Scores out of the store differ from those of training by up to {difference:.2e}; {TOLERANCE} is allowed."
        )
    say([f"Try: limaml recommend {place.folder} --task {data.ids[task][0]}"])
    return (
        f"{published.counts[task]:,} meta embeddings were published as version {published.version}; the {len(rows):,} warm "
        f"test rows of {KEPT}, seed 0, scored out of the store differ from training's own scores by at most {difference:.1e}."
    )
