"""`limaml recommend`: the best rows for one task, with and without personalisation side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter
from rich.table import Table

from limaml.cli.console import console, say
from limaml.cli.score import with_row_features
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.errors import DataError
from limaml.interactions import read_table
from limaml.serving import Predictor

__all__ = ["recommend_command"]


def recommend_command(
    folder: Path,
    /,
    *,
    task: Annotated[str, Parameter(help="Key of the task, such as 42.")],
    top: Annotated[int, Parameter(help="How many to show.")] = 10,
    candidates: Annotated[
        Path | None, Parameter(help="Table of rows to rank (default: every row id seen in training).")
    ] = None,
    exclude_seen: Annotated[bool, Parameter(help="Leave out what the task has interacted with.")] = True,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    out: Annotated[Path | None, Parameter(help="Also write the ranking to this Parquet or CSV file.")] = None,
) -> None:
    """Rank candidates for one task, with its meta embedding and without.

    `limaml recommend runs/mine --task 42 --top 10`
    """
    place = Workspace(folder)
    schema = place.schema
    if schema.row is None and candidates is None:
        raise DataError("The model was trained without --row, so there is nothing to rank: pass --candidates FILE.")
    ranked = place.candidates() if candidates is None else with_row_features(read_table(candidates), place, schema)
    seen = 0
    if exclude_seen and schema.row is not None:
        had = place.log(schema).read([task])
        if had.height:
            key = pl.col(schema.row).cast(pl.String)
            before = ranked.height
            ranked = ranked.filter(~key.is_in(had[schema.row].cast(pl.String).unique().implode()))
            seen = before - ranked.height
    with place.store(store) as opened, Predictor(opened, MODEL_NAME) as predictor:
        found = opened.get(MODEL_NAME, schema.tasks[0].name, [task])
        result = predictor.recommend(task, ranked, top)
    name = schema.tasks[0].name
    if bool(found.found[0]):
        say([f"{name} {task}: adapted on {int(found.count[0]):,} interactions; version {found.version}."])
    else:
        say([f"{name} {task} is not in the store: the ranking is that of the cold embedding; version {found.version}."])
    if seen:
        say([f"{seen:,} rows the task has interacted with are left out."])
    console.print(_table(result, schema.row))
    if out is not None:
        result.write_csv(out) if out.suffix == ".csv" else result.write_parquet(out)
        console.print(str(out), highlight=False)


def _table(result: pl.DataFrame, row: str | None) -> Table:
    """Rank, id, what can be read, and both scores."""
    scores = ("score", "rank", "score_cold", "rank_cold")
    shown = [column for column in result.columns if column not in scores]
    if row is not None:
        shown = [row, *[column for column in shown if column != row][:2]]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("rank", justify="right")
    for column in shown:
        table.add_column(column, max_width=40, no_wrap=True)
    for column in ("personalised", "without", "rank without"):
        table.add_column(column, justify="right")
    for values in result.iter_rows(named=True):
        table.add_row(
            str(values["rank"]),
            *[", ".join(map(str, v)) if isinstance(v := values[c], list) else str(v) for c in shown],
            f"{values['score']:.3f}",
            f"{values['score_cold']:.3f}",
            str(values["rank_cold"]),
        )
    return table
