"""`limaml score`: predictions written next to their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter

from limaml.cli.console import console, say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.errors import DataError
from limaml.interactions import read_table
from limaml.interactions.schema import Schema
from limaml.serving import Predictor
from limaml.types import ROW

__all__ = ["score_command", "with_row_features"]


def score_command(
    folder: Path,
    rows: Path,
    /,
    *,
    out: Annotated[Path, Parameter(help="Parquet or CSV file to write.")],
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    version: Annotated[str | None, Parameter(help="Version to score with (default: the one that is served).")] = None,
    personal: Annotated[bool, Parameter(help="Use the tasks' meta embeddings (else the cold ones).")] = True,
) -> None:
    """Score a table of (task, row) pairs out of the store, and write the predictions next to their ids.

    Row features that the table lacks are taken from the run folder's candidates, task features from the store. A task the
    store does not know gets the cold embedding, and `known` is false in its rows.

    `limaml score runs/mine rows.parquet --out scores.parquet`
    """
    place = Workspace(folder)
    schema = place.schema
    frame = with_row_features(read_table(rows), place, schema)
    with place.store(store) as opened, Predictor(opened, MODEL_NAME, version=version) as predictor:
        scores = predictor.score(frame, personal=personal)
    columns = []
    for head, label in enumerate(schema.labels):
        suffix = "" if len(schema.labels) == 1 else f"_{label.name}"
        columns += [
            pl.Series(f"logit{suffix}", scores.logits[:, head]),
            pl.Series(f"prediction{suffix}", scores.predictions[:, head]),
        ]
    result = read_table(rows).with_columns(
        *columns, pl.Series("known", scores.known), pl.lit(scores.version).alias("version")
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        result.write_csv(out)
    else:
        result.write_parquet(out)
    unknown = int((~scores.known).sum())
    say(
        [
            f"{result.height:,} rows scored with version {scores.version}; {unknown:,} of them name a task that the store "
            "does not know, and got the cold embedding."
        ]
    )
    console.print(str(out), highlight=False)


def with_row_features(frame: pl.DataFrame, place: Workspace, schema: Schema) -> pl.DataFrame:
    """`frame` with the row features it lacks, looked up by the row id; null (unknown) for a row id never seen."""
    needed = [feature.column for feature in schema.features if feature.side == ROW]
    missing = [column for column in needed if column not in frame.columns]
    if not missing:
        return frame
    if schema.row is None or schema.row not in frame.columns:
        raise DataError(
            f"The rows lack the feature columns {missing}, and cannot be looked up"
            + ("." if schema.row is None else f" without the row id '{schema.row}'.")
        )
    known = place.candidates().select(schema.row, *missing)
    key = pl.col(schema.row).cast(pl.String)
    return (
        frame.with_columns(key.alias("_row_key"))
        .join(
            known.with_columns(key.alias("_row_key")).drop(schema.row), on="_row_key", how="left", maintain_order="left"
        )
        .drop("_row_key")
    )
