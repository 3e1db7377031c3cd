"""Members who click one after the other, and what must be known of each after any number of their clicks.

What must be there is worked out beside the product's chain: counts and times from the tables alone, vectors by one call of
`MetaModel.embed` for each number of clicks, on the rows as they were made, never by way of a log, a window or a store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

import limaml
from limaml.tasks import TaskRows

from .processes import Nursery

SMALL = ["model.embedding_dim=4", "model.hidden=[8]", "model.dim=4", "model.factors=4", "train.epochs=1"]
MODEL = "model"
TASK = "user_id"
LATE = 3  # members who are not in the past


@dataclass(frozen=True)
class State:
    """What is known of one member after some clicks."""

    count: int
    newest: int
    vector: NDArray[np.float32]


class World:
    """A trained run folder (never written to: `copy` it), its past, and `later` clicks in order of time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.past = pl.read_parquet(folder / "past.parquet")
        self.later = pl.read_parquet(folder / "later.parquet")
        self.digest = json.loads((folder / "digest.json").read_text())
        self._states = _states(self)
        self.members = sorted(self._states)
        self.cold, self.features = _cold(self)

    def copy(self, run: Path) -> Path:
        return Path(shutil.copytree(self.folder / "run", run))

    def pieces(self, folder: Path, number: int) -> list[Path]:
        """The later clicks as `number` files, of unequal sizes."""
        folder.mkdir(parents=True, exist_ok=True)
        bounds = [round(len(self.later) * (place / number) ** 1.3) for place in range(number + 1)]
        files = []
        for place, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            files.append(folder / f"piece-{place:02d}.parquet")
            self.later[start:end].write_parquet(files[-1])
        return files

    def state(self, member: str, clicks: int) -> State | None:
        """What is known of a member after so many of its later clicks; None if it was never seen."""
        return self._states[member][clicks]

    def clicks(self, rows: pl.DataFrame) -> dict[str, int]:
        """Member → how many of its later clicks are among `rows`. They must be its first ones."""
        found = dict.fromkeys(self.members, 0)
        for key, own in rows.unique().group_by(TASK):
            member = str(key[0])
            theirs = self.later.filter(pl.col(TASK) == key[0])
            expected = theirs.head(len(own))
            assert own.sort("timestamp", "item_id").equals(expected.sort("timestamp", "item_id")), member
            found[member] = len(own)
        return found

    @property
    def all(self) -> dict[str, int]:
        return self.clicks(self.later)


def make(folder: Path, nursery: Nursery) -> None:
    """Write the tables of a world and train its model."""
    folder.mkdir()
    made = limaml.make_interactions(tasks=40, items=25, mean_rows=14, seed=3)
    whole = made.interactions.unique(["user_id", "item_id", "timestamp"], maintain_order=True).sort("timestamp")
    # no two clicks of a member at one time: then its clicks have one order, however they arrive
    whole = whole.unique(["user_id", "timestamp"], keep="first", maintain_order=True)
    past = pl.int_range(pl.len()) < 0.6 * len(whole)
    whole = whole.with_columns(past=past & (pl.col("user_id") >= LATE))
    whole.filter("past").drop("past").write_parquet(folder / "past.parquet")
    whole.filter(~pl.col("past")).drop("past").write_parquet(folder / "later.parquet")
    made.users.write_parquet(folder / "users.parquet")
    made.items.write_parquet(folder / "items.parquet")
    options = ["--task", TASK, "--row", "item_id", "--time", "timestamp", "--label", "click"]
    options += ["--task-features", folder / "users.parquet", "--row-features", folder / "items.parquet"]
    nursery.do("train", folder / "past.parquet", *options, "--out", folder / "run", *SMALL)
    digest = limaml.load_model(folder / "run" / "model").digest
    (folder / "digest.json").write_text(json.dumps(digest))


def _joined(world: World, rows: pl.DataFrame) -> pl.DataFrame:
    tables = {TASK: world.folder / "users.parquet", "item_id": world.folder / "items.parquet"}
    return limaml.join_tables(rows, tables).frame


def _states(world: World) -> dict[str, list[State | None]]:
    trained = limaml.load_model(world.folder / "run" / "model")
    later = world.later.with_columns(place=pl.int_range(pl.len()).over(TASK))
    keys = pl.concat([world.past[TASK], world.later[TASK]]).unique().sort().to_list()
    states: dict[str, list[State | None]] = {str(key): [] for key in keys}
    most: dict[int, int] = dict(later.group_by(TASK).len().iter_rows())
    for clicks in range(max(most.values()) + 1):
        rows = pl.concat([world.past, later.filter(pl.col("place") < clicks).drop("place")])
        data = trained.encoder.encode(_joined(world, rows))
        vectors = trained.model.embed(data, TASK, TaskRows.of(data.index[TASK], data.count(TASK))).numpy()
        own = {key: (len(part), int(part["timestamp"].max())) for (key,), part in rows.group_by(TASK)}  # type: ignore[arg-type]
        for key in keys:
            if clicks > most.get(key, 0):
                continue
            entry = data.ids[TASK].index(str(key)) if key in own else None
            states[str(key)].append(None if entry is None else State(*own[key], vectors[entry]))
    return states


def _cold(world: World) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """The cold embedding of an unknown member, and each member's own features as numbers."""
    import torch

    trained = limaml.load_model(world.folder / "run" / "model")
    unknown = trained.encoder.unknown_features(TASK)
    with torch.no_grad():
        cold = trained.model.cold_of(TASK, unknown, torch.arange(1))[0].numpy()
    data = trained.encoder.encode(_joined(world, pl.concat([world.past, world.later])))
    side = data.sides[TASK]
    own = {
        member: np.concatenate(
            [
                side[spec.name][data.ids[TASK].index(member)].reshape(-1).float().numpy()
                for spec in trained.encoder.specs
                if spec.side == TASK
            ]
        )
        for member in world.members
    }
    return cold, own


def counted(world: World, pieces: Iterable[Path]) -> dict[str, int]:
    """`World.clicks` of files."""
    files: Sequence[Path] = list(pieces)
    return world.clicks(pl.concat([world.later.head(0), *map(pl.read_parquet, files)]))
