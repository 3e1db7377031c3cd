"""`limaml tune`: settings for every method, found on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from cyclopts import Parameter

from limaml.cli.console import console, heading, say
from limaml.cli.options import DataOptions, read
from limaml.config import Config, load_config
from limaml.evaluate.tune import Trial, tune
from limaml.interactions import Prepared

__all__ = ["search", "tune_command"]


def tune_command(
    file: Path,
    /,
    *overrides: Annotated[str, Parameter(help="Settings, such as compare.methods=[base,limaml_newton].")],
    data: DataOptions,
    out: Annotated[Path, Parameter(help="Folder for tuned.yaml and trials.jsonl.")],
    trials: Annotated[int, Parameter(help="Settings to try for each method.")] = 20,
    config: Annotated[Path | None, Parameter(help="YAML file of settings to start from.")] = None,
    workers: Annotated[int | None, Parameter(help="Processes, one thread each (default: one per core).")] = None,
) -> None:
    """Search settings for every compared method: one space, one budget, the same validation rows.

    Writes `tuned.yaml`, a config with the best setting of each method. Run it again to go on where it stopped.

    `limaml tune ratings.parquet --task user_id --row item_id --time timestamp --label "rating >= 4" --out runs/tuned`

    Next: `limaml compare` with `--config runs/tuned/tuned.yaml`.
    """
    heading("Reading")
    prepared = read(file, data)
    say(prepared.notes)
    search(prepared, load_config(config, overrides), file.stem, out, trials, workers)


def search(
    prepared: Prepared, config: Config, dataset: str, out: Path, trials: int, workers: int | None = None
) -> Config:
    """Search with progress; write `tuned.yaml`; return the config."""
    heading(f"Searching {trials} settings for each of {', '.join(config.compare.methods)}")
    out.mkdir(parents=True, exist_ok=True)
    table = out / ".tuning.parquet"
    prepared.frame.write_parquet(table)

    def tell(done: int, total: int, trial: Trial) -> None:
        shown = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in trial.settings.items()
        }
        loss = f"{trial.loss:.5f}" if trial.loss is not None else f"failed: {trial.error}"
        told = ", ".join(f"{name}={value}" for name, value in shown.items()) or "the config as it is"
        say([f"{done} of {total}: {trial.method} {loss} with {told}"])

    try:
        found = tune(
            table,
            prepared.schema,
            config,
            dataset=dataset,
            trials=trials,
            record=out / "trials.jsonl",
            workers=workers,
            progress=tell,
        )
    finally:
        table.unlink(missing_ok=True)
    for method in config.compare.methods:
        best = found.best(method)
        if best is not None:
            say([f"{method}: validation loss {best.loss:.5f}, epochs {dict(best.epochs)}, {dict(best.settings)}"])
    path = out / "tuned.yaml"
    path.write_text(
        f"# Found by limaml tune: {trials} trials per method on validation rows of seed 0, the same space for all.\n"
        + yaml.safe_dump(found.config.model_dump(mode="json", exclude_unset=True), sort_keys=False),
        encoding="utf-8",
    )
    console.print(str(path), markup=False, highlight=False)
    return found.config
