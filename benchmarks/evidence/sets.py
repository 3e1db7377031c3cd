"""The data sets: what they are called, what their columns mean, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from limaml.errors import ConfigError
from limaml.interactions import Schema, prepare
from limaml.interactions.digest import content_digest
from limaml.interactions.schema import Task
from limaml.types import ROW

__all__ = ["PARTS", "DataSet", "Table", "describe", "make_table", "registered", "sets_in", "source_of"]

PARTS = ("main", "rivals", "ablations", "replay", "implicit")
OWN = "set.yaml"


@dataclass(frozen=True)
class DataSet:
    """An entry of `sets.yaml`: its comments say what each field means."""

    name: str
    title: str
    label: str
    time: str | None = None
    clock: bool = False
    members: tuple[int | None, int | None] = (None, None)  # full, quick
    exclude: tuple[str, ...] = ()
    task: str = "user_id"
    row: str = "item_id"
    parts: tuple[str, ...] = PARTS

    @staticmethod
    def of(name: str, entry: Any, where: Path) -> DataSet:
        """Raises `ConfigError` for an entry that is no mapping, lacks a field or has an unknown one."""
        known = {f.name for f in fields(DataSet)} - {"name"}
        if not isinstance(entry, Mapping) or not {"title", "label"} <= set(entry) <= known:
            raise ConfigError(
                f"{where} does not describe the set '{name}': it needs title and label, and may have "
                f"{', '.join(sorted(known - {'title', 'label'}))}; found {sorted(entry) if isinstance(entry, Mapping) else entry!r}."
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        if len(values.get("members", (None, None))) != 2:
            raise ConfigError(f"{where}: members of '{name}' must be two numbers, for the full and the quick run.")
        if unknown := set(values.get("parts", ())) - set(PARTS):
            raise ConfigError(f"{where}: the set '{name}' names parts that do not exist: {sorted(unknown)}.")
        return DataSet(name, **values)


def registered() -> dict[str, DataSet]:
    """The sets of `sets.yaml`, in its order."""
    place = Path(__file__).with_name("sets.yaml")
    return {name: DataSet.of(name, entry, place) for name, entry in yaml.safe_load(place.read_text("utf-8")).items()}


def sets_in(data: Path, names: Sequence[str] = ()) -> list[DataSet]:
    """The sets that have a folder in `data`: registered ones first, then folders with a `set.yaml` of their own.

    With `names`, exactly these; raises `ConfigError` where one is not there.
    """
    found = {name: which for name, which in registered().items() if (data / name / "interactions.parquet").exists()}
    for place in sorted(data.glob(f"*/{OWN}")):
        found[place.parent.name] = DataSet.of(place.parent.name, yaml.safe_load(place.read_text("utf-8")), place)
    for name in names:
        if name not in found:
            raise ConfigError(
                f"There is no data set '{name}' in {data}: a folder with interactions.parquet is needed, and an entry in "
                f"benchmarks/evidence/sets.yaml or a {OWN} beside it. There are {sorted(found) or 'none'}."
            )
    return [found[name] for name in names] if names else list(found.values())


@dataclass(frozen=True)
class Table:
    """A set as it is trained on: the joined rows in a Parquet file, the schema, and what was decided on the way."""

    which: DataSet
    path: Path
    schema: Schema
    digest: str  # of the rows and the schema
    rows: int
    members: int
    items: int
    positive: float  # share of rows with a positive label
    capped: bool
    notes: tuple[str, ...]

    def with_item_tasks(self) -> Table:
        """The same rows with items as a second task type; the item's own columns are features of that side."""
        item = self.which.row
        features = tuple(f.model_copy(update={"side": item}) if f.side == ROW else f for f in self.schema.features)
        features = tuple(f for f in features if f.column != item)
        schema = self.schema.model_copy(update={"tasks": (*self.schema.tasks, Task(name=item)), "features": features})
        values = {f.name: getattr(self, f.name) for f in fields(Table)} | {"schema": schema}
        return Table(**values)


def source_of(which: DataSet, data: Path) -> dict[str, Any]:
    """The files of a set, as `prepare` takes them."""
    folder = data / which.name
    users, items = folder / "users.parquet", folder / "items.parquet"
    return {
        "source": folder / "interactions.parquet",
        "task_features": users if users.exists() else None,
        "row_features": items if items.exists() else None,
    }


def make_table(which: DataSet, data: Path, members: int | None, out: Path) -> Table:
    """Read, join and check a set, with at most so many `members`; its table is written to the folder `out`."""
    prepared = prepare(
        **source_of(which, data),
        task=[which.task],
        row=which.row,
        time=which.time,
        label=[which.label],
        exclude=which.exclude,
        max_tasks=members,
    )
    path = out / f"{which.name}{'' if members is None else f'-{members}'}.parquet"
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    prepared.frame.write_parquet(part)
    part.replace(path)
    label = prepared.schema.labels[0]
    positive = prepared.frame.select(_rule(label.column, label.operator, label.value).mean()).item()
    return Table(
        which,
        path,
        prepared.schema,
        content_digest(prepared.frame),
        prepared.frame.height,
        prepared.frame[which.task].n_unique(),
        prepared.frame[which.row].n_unique(),
        float(positive),
        any(note.startswith("A sample of") for note in prepared.notes),
        prepared.notes,
    )


def _rule(column: str, operator: str | None, value: Any) -> pl.Expr:
    sides = {">=": "ge", ">": "gt", "<=": "le", "<": "lt", "==": "eq", "!=": "ne"}
    found = pl.col(column)
    return found if operator is None else getattr(found, sides[operator])(value)


def describe(table: Table) -> dict[str, Any]:
    """What the page says of a set, as JSON."""
    schema = json.loads(table.schema.model_dump_json())
    return {
        "title": table.which.title,
        "label": table.which.label,
        "time": table.which.time,
        "clock": table.which.clock,
        "rows": table.rows,
        "members": table.members,
        "items": table.items,
        "positive": table.positive,
        "capped": table.capped,
        "features": [f"{f['column']} ({f['side']})" for f in schema["features"]],
        "notes": list(table.notes),
    }
