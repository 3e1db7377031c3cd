"""`limaml compare`: is it worth it on my data?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from limaml.cli.console import comparing, console, heading, say
from limaml.cli.environment import command_line, environment
from limaml.cli.options import DataOptions, read, read_implicit
from limaml.cli.tune import search
from limaml.cli.workspace import Workspace
from limaml.config import Config, load_config
from limaml.errors import ConfigError, MissingExtra
from limaml.evaluate.compare import Compared, compare
from limaml.evaluate.ranking_summary import summarise_ranked
from limaml.evaluate.report import write_report
from limaml.evaluate.summary import Summary, summarise, write_metrics
from limaml.evaluate.table import rich_table
from limaml.interactions import Prepared
from limaml.interactions.implicit import ORDER

__all__ = ["compare_command", "publish_results", "run_comparison"]

NEGATIVES = 4

NO_TIME = (
    'There was no --time: "before" and "after" are those of a seeded shuffle, so these numbers do not say how well the '
    "future is predicted."
)


def compare_command(
    file: Path,
    /,
    *overrides: Annotated[
        str, Parameter(help="Settings, such as train.epochs=5 compare.methods=[base,limaml_newton].")
    ],
    data: DataOptions,
    out: Annotated[Path, Parameter(help="Folder for metrics.json, report.html, config.yaml and schema.json.")],
    config: Annotated[Path | None, Parameter(help="YAML file of settings.")] = None,
    seeds: Annotated[int | None, Parameter(help="Number of seeds (default 3).")] = None,
    workers: Annotated[int | None, Parameter(help="Processes, one thread each (default: one per core).")] = None,
    tune: Annotated[int, Parameter(help="First search so many trials per method, on validation rows.")] = 0,
    name: Annotated[
        str | None, Parameter(help="Name of the data set in tables (default: the file's folder or name).")
    ] = None,
    implicit: Annotated[
        bool,
        Parameter(
            help="The table holds positives only (or --label says which they are): rank all candidates.", negative=()
        ),
    ] = False,
    negatives: Annotated[
        int | None, Parameter(help="With --implicit: negatives sampled for each positive (default 4).")
    ] = None,
    sampling: Annotated[
        Literal["uniform", "popularity"] | None,
        Parameter(help="With --implicit: how they are drawn (default uniform)."),
    ] = None,
) -> None:
    """Compare the model with and without personalisation, and with wide-and-deep ids, on your own table.

    Reads the table, finds types and features by itself and says what it chose, trains every method with several seeds in
    two protocols (`warm`: each task's last rows are the test; `new_tasks`: tasks never trained on), and writes
    `metrics.json` and `report.html`. No config is needed:

    `limaml compare ratings.parquet --task user_id --row item_id --time timestamp --label "rating >= 4" --out runs/look`

    With `--implicit` the rows are what members chose, negatives are sampled to learn from, and each member's later choices
    are looked for among all candidates: NDCG, recall and MRR in place of AUC and log loss.

    Next: `limaml train` with the same options trains the model to keep.
    """
    if not implicit and (negatives is not None or sampling is not None):
        raise ConfigError("--negatives and --sampling say how implicit feedback is learned from: give --implicit, too.")
    sets = [*overrides, *([] if seeds is None else [f"compare.seeds={seeds}"])]
    sets += [] if negatives is None else [f"compare.implicit.negatives={negatives}"]
    sets += [] if sampling is None else [f"compare.implicit.sampling={sampling}"]
    settings = _completed(load_config(config, sets), implicit=implicit)
    ranking = settings.compare.implicit.negatives > 0
    heading("Reading")
    prepared = read_implicit(file, data) if ranking else read(file, data)
    say(prepared.notes)
    dataset = name or (file.parent.name if file.stem == "interactions" and file.parent.name else file.stem)
    if tune:
        settings = search(prepared, settings, dataset, out, tune, workers)
    compared, summary = run_comparison(prepared, settings, dataset, out, workers=workers)
    publish_results(out, prepared, settings, compared, summary)


def _completed(settings: Config, *, implicit: bool) -> Config:
    """The settings with what implicit feedback has by default: negatives, and popularity among the methods."""
    compared = settings.compare
    chosen = "negatives" in compared.implicit.model_fields_set
    if implicit and chosen and not compared.implicit.negatives:
        raise ConfigError("Implicit feedback needs at least 1 negative for each positive: --negatives 4 draws four.")
    if implicit and not chosen:
        drawn = compared.implicit.model_copy(update={"negatives": NEGATIVES})
        compared = compared.model_copy(update={"implicit": drawn})
    if compared.implicit.negatives and "methods" not in compared.model_fields_set:
        compared = compared.model_copy(update={"methods": ("popularity", *compared.methods)})
    return settings.model_copy(update={"compare": compared})


def run_comparison(
    prepared: Prepared, config: Config, dataset: str, out: Path, *, workers: int | None = None, keep: Path | None = None
) -> tuple[Compared, Summary]:
    """Train and judge everything, with progress."""
    out.mkdir(parents=True, exist_ok=True)
    Workspace(out).write_settings(config, prepared.schema)
    heading(f"Comparing {', '.join(config.compare.methods)}")
    table = out / ".comparing.parquet"
    prepared.frame.write_parquet(table)
    try:
        with comparing() as progress:
            compared = compare(
                table, prepared.schema, config, dataset=dataset, keep=keep, workers=workers, progress=progress
            )
    finally:
        table.unlink(missing_ok=True)
    say(compared.notes)
    if config.compare.implicit.negatives:
        return compared, summarise_ranked(compared.ranked, replicates=config.compare.replicates)
    return compared, summarise(compared.predictions, replicates=config.compare.replicates)


def publish_results(
    out: Path, prepared: Prepared, config: Config, compared: Compared, summary: Summary, notes: Sequence[str] = ()
) -> None:
    """Write `metrics.json` and `report.html`, print the table and where the files are."""
    said = [*prepared.notes, *compared.notes, *notes]
    write_metrics(summary, out / "metrics.json", notes=said)
    written = [out / "metrics.json", out / "config.yaml", out / "schema.json"]
    try:
        write_report(
            out / "report.html",
            summary,
            compared.predictions,
            curves=compared.curves,
            embedding_map=compared.embedding_map,
            notes=said,
            config=config.model_dump(mode="json"),
            environment=environment(),
            command=command_line(),
        )
        written.insert(0, out / "report.html")
    except MissingExtra as missing:
        console.print(f"No report.html: {missing}", style="yellow", markup=False)
    heading("Results")
    console.print(rich_table(summary))
    if prepared.schema.time in (None, ORDER):
        console.print(NO_TIME, style="yellow")
    console.print()
    for path in written:
        console.print(str(path), markup=False, highlight=False)
