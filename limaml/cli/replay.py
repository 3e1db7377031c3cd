"""`limaml replay`: what is freshness worth on my data, and what does it cost?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from limaml.cli.console import comparing, console, heading, say
from limaml.cli.environment import command_line, environment
from limaml.cli.options import DataOptions, read
from limaml.cli.times import parsed_time
from limaml.cli.workspace import Workspace
from limaml.config import load_config
from limaml.errors import ConfigError, DataError, MissingExtra
from limaml.evaluate.replay import replay
from limaml.evaluate.replay_pictures import replay_pictures
from limaml.evaluate.replay_results import SLICES
from limaml.evaluate.replay_table import replay_table
from limaml.evaluate.report import render_report
from limaml.interactions.atomic_files import write_atomically

__all__ = ["replay_command"]


def replay_command(
    file: Path,
    /,
    *overrides: Annotated[str, Parameter(help="Settings, such as train.epochs=5 adapt.max_support=200.")],
    data: DataOptions,
    out: Annotated[Path, Parameter(help="Folder for replay.json, report.html, config.yaml and schema.json.")],
    policies: Annotated[
        str | None,
        Parameter(
            help="Names, separated by commas: base_stale, base_retrained, wide_and_deep_stale, wide_and_deep_finetuned, "
            "wide_and_deep_retrained, limaml_never, limaml_refreshed, limaml_streamed, limaml_retrained, limaml_items_never, "
            "limaml_items_refreshed, limaml_items_streamed (default: all but base_retrained and limaml_items_never)."
        ),
    ] = None,
    method: Annotated[
        Literal["limaml_newton", "limaml_gradient"], Parameter(help="How LiMAML adapts.")
    ] = "limaml_newton",
    periods: Annotated[
        int | None,
        Parameter(
            help="Number of periods of equally many rows (default: about 11, of a natural length where one fits)."
        ),
    ] = None,
    period: Annotated[
        str | None, Parameter(help="Length of a period instead: 12h, 1d, 4w, or a number in the time column's unit.")
    ] = None,
    start: Annotated[
        str | None, Parameter(help="Time at which training ends and serving begins (default: after half of the rows).")
    ] = None,
    refreshes: Annotated[int, Parameter(help="How often policies that stream refresh in each period.")] = 15,
    seeds: Annotated[int, Parameter(help="Number of seeds.")] = 1,
    config: Annotated[Path | None, Parameter(help="YAML file of settings.")] = None,
    workers: Annotated[int | None, Parameter(help="Processes, one thread each (default: one per core).")] = None,
    name: Annotated[str | None, Parameter(help="Name of the data set (default: the file's folder or name).")] = None,
) -> None:
    """Walk through time as production does: serve each period with what was known before it, then take it in.

    Trains on the first half of the rows. Then, period by period, the same rows are served by models that stay as they are
    (`…_stale`, `limaml_never`), refresh the embeddings of those who acted (`limaml_refreshed` after each period,
    `limaml_streamed` many times within it; `limaml_items_…`: members and items), go on training on the new rows
    (`…_finetuned`), or are trained again on all rows (`…_retrained`). Members and items that appear meanwhile count.

    Says how well each did, over all rows and over new members and new items, how quality falls with the age of the
    embeddings, and the processor time each took. A replay that was killed goes on where it was.

    `limaml replay ratings.parquet --task user_id --row item_id --time timestamp --label "rating >= 4" --out runs/replay`
    """
    settings = load_config(config, overrides)
    heading("Reading")
    prepared = read(file, data)
    say(prepared.notes)
    time = prepared.schema.time
    if time is None:
        raise DataError("Replay walks through time, but the table has no time column: name one with --time.")
    begin = None if start is None else parsed_time(start, prepared.frame.schema[time])
    chosen = None if policies is None else [policy.strip() for policy in policies.split(",") if policy.strip()]
    dataset = name or (file.parent.name if file.stem == "interactions" and file.parent.name else file.stem)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names a folder.")
    out.mkdir(parents=True, exist_ok=True)
    Workspace(out).write_settings(settings, prepared.schema)
    table = out / ".replaying.parquet"
    prepared.frame.write_parquet(table)
    heading("Replaying")
    try:
        with comparing() as progress:
            replayed = replay(
                table,
                prepared.schema,
                settings,
                dataset=dataset,
                policies=chosen,
                method=method,
                periods=periods,
                period=period,
                start=begin,
                refreshes=refreshes,
                seeds=seeds,
                folder=out / "replayed",
                workers=workers,
                progress=progress,
            )
    finally:
        table.unlink(missing_ok=True)
    say(replayed.notes)
    content = {**replayed.as_json(), "environment": environment(), "command": command_line()}
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(out / "replay.json", text.encode())
    written = [out / "replay.json", out / "config.yaml", out / "schema.json"]
    try:
        page = render_report(
            replayed.summary,
            replay_pictures(replayed),
            notes=[*prepared.notes, *replayed.notes, *(f"{name}: {meaning}." for name, meaning in SLICES.items())],
            config=settings.model_dump(mode="json"),
            environment=environment(),
            command=command_line(),
            title=f"Replay of {dataset}",
        )
        write_atomically(out / "report.html", page.encode())
        written.insert(0, out / "report.html")
    except MissingExtra as missing:
        console.print(f"No report.html: {missing}", style="yellow", markup=False)
    heading("Results")
    console.print(replay_table(replayed))
    console.print()
    for path in written:
        console.print(str(path), markup=False, highlight=False)
