"""Members who click one after the other, and what must be known of each after any number of their clicks.

What must be there is worked out beside the product's chain: counts and times from the tables alone, vectors by one call of
`MetaModel.embed` for each number of clicks, on the rows as they were made, never by way of a log, a window or a store. There are
two models, so that one can be rolled out where the other is served.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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


class Known:
    """What one model makes of a world."""

    def __init__(self, world: World, model: Path) -> None:
        self._world, self.model = world, model

    @cached_property
    def states(self) -> dict[str, list[State | None]]:
        """Member → what is known of it after 0, 1, … of its later clicks; None while it was never seen."""
        return _states(self._world, self.model)

    @cached_property
    def cold(self) -> NDArray[np.float32]:
        return _cold(self.model)

    @cached_property
    def features(self) -> dict[str, NDArray[np.float32]]:
        """Each member's own features as numbers."""
        return _features(self._world, self.model)


class World:
    """A trained run folder (never written to: `copy` it), its past, and `later` clicks in order of time; in `other`, another model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.past = pl.read_parquet(folder / "past.parquet")
        self.later = pl.read_parquet(folder / "later.parquet")
        self.digest, self.other_digest = json.loads((folder / "digests.json").read_text())
        models = {self.digest: folder / "run" / "model", self.other_digest: self.other / "model"}
        self.known = {digest: Known(self, model) for digest, model in models.items()}
        keys = pl.concat([self.past[TASK], self.later[TASK]]).unique()
        self.members = sorted(map(str, keys))

    @property
    def other(self) -> Path:
        return self.folder / "other"

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
    digests = []
    for run, more in (("run", []), ("other", ["model.dim=6"])):
        nursery.do("train", folder / "past.parquet", *options, "--out", folder / run, *SMALL, *more)
        digests.append(limaml.load_model(folder / run / "model").digest)
    (folder / "digests.json").write_text(json.dumps(digests))


def joined(world: World, rows: pl.DataFrame) -> pl.DataFrame:
    """Clicks with the features of their members and items."""
    tables = {TASK: world.folder / "users.parquet", "item_id": world.folder / "items.parquet"}
    return limaml.join_tables(rows, tables).frame


def _states(world: World, model: Path) -> dict[str, list[State | None]]:
    trained = limaml.load_model(model)
    later = world.later.with_columns(place=pl.int_range(pl.len()).over(TASK))
    keys = pl.concat([world.past[TASK], world.later[TASK]]).unique().sort().to_list()
    states: dict[str, list[State | None]] = {str(key): [] for key in keys}
    most: dict[int, int] = dict(later.group_by(TASK).len().iter_rows())
    for clicks in range(max(most.values()) + 1):
        rows = pl.concat([world.past, later.filter(pl.col("place") < clicks).drop("place")])
        data = trained.encoder.encode(joined(world, rows))
        vectors = trained.model.embed(data, TASK, TaskRows.of(data.index[TASK], data.count(TASK))).numpy()
        own = {key: (len(part), int(part["timestamp"].max())) for (key,), part in rows.group_by(TASK)}  # type: ignore[arg-type]
        for key in keys:
            if clicks > most.get(key, 0):
                continue
            entry = data.ids[TASK].index(str(key)) if key in own else None
            states[str(key)].append(None if entry is None else State(*own[key], vectors[entry]))
    return states


def _cold(model: Path) -> NDArray[np.float32]:
    """The cold embedding of an unknown member."""
    import torch

    trained = limaml.load_model(model)
    unknown = trained.encoder.unknown_features(TASK)
    with torch.no_grad():
        found: NDArray[np.float32] = trained.model.cold_of(TASK, unknown, torch.arange(1))[0].numpy()
    return found


def _features(world: World, model: Path) -> dict[str, NDArray[np.float32]]:
    trained = limaml.load_model(model)
    data = trained.encoder.encode(joined(world, pl.concat([world.past, world.later])))
    side = data.sides[TASK]
    return {
        member: np.concatenate(
            [
                side[spec.name][data.ids[TASK].index(member)].reshape(-1).float().numpy()
                for spec in trained.encoder.specs
                if spec.side == TASK
            ]
        )
        for member in world.members
    }


def counted(world: World, pieces: Iterable[Path]) -> dict[str, int]:
    """`World.clicks` of files."""
    files: Sequence[Path] = list(pieces)
    return world.clicks(pl.concat([world.later.head(0), *map(pl.read_parquet, files)]))
