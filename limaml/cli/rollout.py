"""`limaml rollout`: a new model beside the old one, and then in its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from limaml.cli.console import console, say
from limaml.cli.embed import Address, Device, Engine, Workers, caught_up, generated
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.durable import clear_leftovers, put_in_place, scratch_beside
from limaml.embeddings.engines import EngineName
from limaml.embeddings.refresher import live_versions
from limaml.errors import ConfigError
from limaml.meta import TrainedModel, load_model
from limaml.store import Store
from limaml.store.contract import Version

__all__ = ["rollout_command"]


def rollout_command(
    folder: Path,
    /,
    *,
    model: Annotated[Path, Parameter(help="The new model folder, or the run folder that it was trained in.")],
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    activate: Annotated[
        bool, Parameter(help="Serve the new version; --no-activate leaves it ready beside the old one.")
    ] = True,
    note: Annotated[str, Parameter(help="A remark kept with the version.")] = "",
    engine: Engine = "local",
    workers: Workers = None,
    address: Address = None,
    device: Device = "cpu",
) -> None:
    """Publish every task with a new model beside the version that is served, from the same log; verify it; then serve it.

    A stream that runs meanwhile keeps both versions fresh. Stopped or killed anywhere, the old version is served on, and the
    same command goes on where it was. `limaml store rollback` goes back at once.

    `limaml rollout runs/mine --model runs/new`

    Next: `limaml store list runs/mine`.
    """
    place = Workspace(folder)
    source = model / "model" if (model / "model").is_dir() else model
    trained = load_model(source)
    if trained.encoder.schema.tasks[0].columns != place.schema.tasks[0].columns:
        raise ConfigError(
            f"The model in {source} is adapted to '{trained.encoder.schema.tasks[0].name}' first, but the log in {folder} is that of "
            f"'{place.schema.tasks[0].name}'. Train the new model with the same --task."
        )
    with place.store(store) as opened:
        if opened.current(MODEL_NAME) is None:
            raise ConfigError(
                f"Nothing of {folder} is served yet, so there is nothing to replace. Type: limaml embed {folder}"
            )
        version = _published(place, opened, trained, source, note, engine, workers, address, device)
        with place.refresher(opened, store) as refresher:
            caught_up(refresher, version)
        counts = opened.verify(MODEL_NAME, version)
        say([f"Version {version} is verified: {', '.join(f'{count:,} {name}' for name, count in counts.items())}."])
        if not activate:
            say([f"It is not served; {opened.current(MODEL_NAME)} is. Both are kept fresh by refresh and stream."])
            console.print(f"\nNext: limaml rollout {folder} --model {model}", markup=False, highlight=False)
            return
        if opened.current(MODEL_NAME) != version:
            opened.activate(MODEL_NAME, version)
        _take_over(place, source, trained)
    say(
        [
            f"Version {version} is served, and {place.model} is the new model. Back at once: limaml store rollback {folder}"
        ]
    )


def _published(
    place: Workspace,
    store: Store,
    trained: TrainedModel,
    source: Path,
    note: str,
    engine: EngineName,
    workers: int | None,
    address: str | None,
    device: str,
) -> str:
    """The live version of this model; published if there is none, gone on with if it is half written."""
    ready = [version for version in live_versions(store, MODEL_NAME) if _is_of(version, trained)]
    if ready:
        say([f"Version {ready[-1].id} of this model is there already."])
        return ready[-1].id
    with generated(place, trained, source, engine=engine, workers=workers, address=address, device=device) as made:
        published = made.publish(store, MODEL_NAME, note=note, resume=True, activate=False)
        made.clear()
    return published.version


def _is_of(version: Version, trained: TrainedModel) -> bool:
    return version.state == "ready" and version.artifact == trained.digest


def _take_over(place: Workspace, source: Path, trained: TrainedModel) -> None:
    """The new model becomes that of the run folder, in one step: what is trained on the log from now on, and published."""
    if place.trained.digest == trained.digest:
        return
    clear_leftovers(place.model)
    beside = scratch_beside(place.model)
    shutil.copytree(source, beside)
    put_in_place(beside, place.model)
    shutil.rmtree(beside, ignore_errors=True)
