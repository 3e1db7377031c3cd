"""`limaml score`: predictions written next to their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter

from limaml.cli.console import console, say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.errors import ConfigError, DataError
from limaml.interactions import Schema, read_table
from limaml.interactions.columns import canonical_text
from limaml.serving import Predictor, Scores
from limaml.types import ROW, LossKind

__all__ = ["score_command", "with_row_features", "write_table"]


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

    The result has all columns of the table, and `logit`, `probability` (a label that is a number: `prediction`; several
    labels: one of each per label), `known` and `version`. Row features that the table lacks are taken from the run
    folder's candidates, task features from the store. A task the store does not know gets the cold embedding, and
    `known` is false in its rows.

    `limaml score runs/mine rows.parquet --out scores.parquet`

    Next: `limaml refresh runs/mine new.parquet` when members have acted.
    """
    _refuse_ending(out)
    place = Workspace(folder)
    given = read_table(rows)
    with place.store(store) as opened, Predictor(opened, MODEL_NAME, version=version) as predictor:
        schema = predictor.trained.encoder.schema
        frame, unseen = with_row_features(given, place, schema)
        scores = predictor.score(frame, personal=personal)
    added = _columns(scores, schema)
    taken = [column.name for column in added if column.name in given.columns]
    if taken:
        raise DataError(
            f"'{rows}' has a column '{taken[0]}' already, which would be overwritten. Rename or drop it first."
        )
    write_table(given.with_columns(added), out)
    cold = int((~scores.known).sum())
    told = f"{given.height:,} rows scored with version {scores.version}"
    say([f"{told}; {cold:,} of them name a task that the store does not know, and got the cold embedding."])
    if not personal:
        say(["All of them got the cold embedding (--no-personal)."])
    if unseen:
        say([f"{unseen:,} rows name a '{schema.row}' that is not among the candidates: its features count as unknown."])
    console.print(str(out), markup=False, highlight=False)


def _columns(scores: Scores, schema: Schema) -> list[pl.Series]:
    columns = []
    for head, label in enumerate(schema.labels):
        suffix = "" if len(schema.labels) == 1 else f"_{label.name}"
        name = "probability" if label.loss is LossKind.BINARY else "prediction"
        columns.append(pl.Series(f"logit{suffix}", scores.logits[:, head]))
        columns.append(pl.Series(f"{name}{suffix}", scores.predictions[:, head]))
    return [*columns, pl.Series("known", scores.known), pl.Series("version", [scores.version] * len(scores.known))]


def with_row_features(frame: pl.DataFrame, place: Workspace, schema: Schema) -> tuple[pl.DataFrame, int]:
    """`frame` with the row features it lacks, looked up by the row id; null (unknown) for a row id never seen, and the
    number of such rows."""
    needed = [feature.column for feature in schema.features if feature.side == ROW]
    missing = [column for column in needed if column not in frame.columns]
    if not missing:
        return frame, 0
    if schema.row is None or schema.row not in frame.columns:
        remedy = "." if schema.row is None else f" without the row id '{schema.row}'."
        raise DataError(f"The rows lack the feature columns {', '.join(missing)}, and cannot be looked up{remedy}")
    known = place.candidates()
    found = pl.DataFrame([canonical_text(known[schema.row]).alias("key"), *(known[name] for name in missing)])
    keys = pl.DataFrame([canonical_text(frame[schema.row]).alias("key")])
    joined = keys.join(found.with_columns(seen=pl.lit(True)), on="key", how="left", maintain_order="left")
    return frame.with_columns(joined[name] for name in missing), int(joined["seen"].null_count())


def write_table(frame: pl.DataFrame, path: Path) -> None:
    """Write a Parquet or CSV file, whole or not at all."""
    _refuse_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if path.suffix.lower() == ".csv":
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        if nested:
            raise DataError(
                f"Column '{nested[0]}' holds lists, which CSV has no place for. Write Parquet: --out {path.stem}.parquet"
            )
        frame.write_csv(part)
    else:
        frame.write_parquet(part)
    part.replace(path)


def _refuse_ending(path: Path) -> None:
    if path.suffix.lower() not in (".parquet", ".pq", ".csv"):
        raise ConfigError(
            f"{path} ends in '{path.suffix}', but .parquet and .csv are what can be written. Name such a file."
        )
