"""`limaml recommend`: the best rows for one task, with and without personalisation side by side."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.table import Table

from limaml.cli.console import console, say
from limaml.cli.score import with_row_features, write_table
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.errors import ConfigError, DataError
from limaml.interactions import Schema, read_table, split_key
from limaml.interactions.columns import canonical_text
from limaml.serving import Predictor

__all__ = ["recommend_command"]

_TITLE = re.compile(r"title|name|headline|subject", re.I)


def recommend_command(
    folder: Path,
    /,
    *,
    task: Annotated[str, Parameter(help="Key of the task, such as 42.")],
    top: Annotated[int, Parameter(help="How many to show.", validator=Number(gte=1))] = 10,
    candidates: Annotated[
        Path | None, Parameter(help="Table of rows to rank (default: every row id seen in training).")
    ] = None,
    exclude_seen: Annotated[bool, Parameter(help="Leave out what the task has interacted with.")] = True,
    label: Annotated[
        str | None, Parameter(help="Which label to rank by, if there are several (default: the first).")
    ] = None,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    out: Annotated[Path | None, Parameter(help="Also write the ranking to this Parquet or CSV file.")] = None,
) -> None:
    """Rank candidates for one task, with its meta embedding and without, side by side.

    `change` says how many places the meta embedding moved a row up (+) or down (−). A task that the store does not know
    is ranked by the cold embedding.

    `limaml recommend runs/mine --task 42 --top 10`

    Next: `limaml score` for many tasks at once.
    """
    place = Workspace(folder)
    schema = place.schema
    if schema.row is None and candidates is None:
        raise DataError("The model was trained without --row, so there is nothing to rank: pass --candidates FILE.")
    head = _head(schema, label)
    if candidates is None:
        ranked, unseen = place.candidates(), 0
    else:
        ranked, unseen = with_row_features(read_table(candidates), place, schema)
    ranked, seen = _without_seen(ranked, place, schema, task) if exclude_seen else (ranked, 0)
    name = schema.tasks[0].name
    with place.store(store) as opened, Predictor(opened, MODEL_NAME) as predictor:
        found = opened.get(MODEL_NAME, name, [task])
        result = predictor.recommend(task, ranked, top, head=head)
    if bool(found.found[0]):
        say([f"{name} {task}: adapted on {int(found.count[0]):,} interactions; version {found.version}."])
    else:
        say([f"{name} {task} is not in the store: the ranking is that of the cold embedding; version {found.version}."])
    if seen:
        say([f"{seen:,} rows the task has interacted with are left out."])
    if unseen:
        say([f"{unseen:,} candidates are rows never seen: the features that the table lacks count as unknown."])
    console.print(_table(result, schema.row))
    if out is not None:
        write_table(result, out)
        console.print(str(out), markup=False, highlight=False)


def _head(schema: Schema, label: str | None) -> int:
    names = [known.name for known in schema.labels]
    if label is None:
        return 0
    if label not in names:
        (near,) = difflib.get_close_matches(label, names, n=1, cutoff=0.0)
        raise ConfigError(f"The model has no label '{label}'. Did you mean '{near}'?")
    return names.index(label)


def _without_seen(ranked: pl.DataFrame, place: Workspace, schema: Schema, task: str) -> tuple[pl.DataFrame, int]:
    """The candidates that the task has no interaction with in the log, and how many it has one with."""
    if schema.row is None or schema.row not in ranked.columns:
        return ranked, 0
    had = place.log(schema).read([split_key(task, len(schema.tasks[0].columns))])
    fresh = ranked.filter(~canonical_text(ranked[schema.row]).is_in(canonical_text(had[schema.row]).unique().to_list()))
    return fresh, ranked.height - fresh.height


def _table(result: pl.DataFrame, row: str | None) -> Table:
    """Rank, id, what a person can read, and both scores."""
    scores = ("score", "rank", "score_cold", "rank_cold")
    others = [column for column in result.columns if column not in (*scores, row)]
    shown = [*([] if row is None or row not in result.columns else [row])]
    shown += sorted(others, key=lambda column: _TITLE.search(column) is None)[:2]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("rank", justify="right")
    for column in shown:
        table.add_column(column, max_width=40, no_wrap=True)
    for column in ("personalised", "without", "rank without", "change"):
        table.add_column(column, justify="right")
    for values in result.iter_rows(named=True):
        change = values["rank_cold"] - values["rank"]
        table.add_row(
            str(values["rank"]),
            *[escape(_text(values[column])) for column in shown],
            f"{values['score']:.3f}",
            f"{values['score_cold']:.3f}",
            str(values["rank_cold"]),
            f"{change:+d}".replace("-", "−") if change else "=",
        )
    return table


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_text(entry) for entry in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
