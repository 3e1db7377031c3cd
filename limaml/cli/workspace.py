"""The folder that verbs share: what was trained, on what, and where its embeddings are.

DIR/config.yaml          the resolved config
DIR/schema.json          what the columns mean, for people; verbs read it from the model
DIR/model/               the model folder
DIR/log/                 all interactions, as they were read, each source once
DIR/side/*.parquet       side tables, as they were read; side/tables.json names their keys
DIR/candidates.parquet   the latest features of every row id: what `recommend` ranks
DIR/store/               the embedded store
DIR/generation/          embeddings that are being made, until they are published
DIR/windows/             each task's last interactions, packed: derived from the log, made again where they are missing
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl
import yaml

from limaml.cli.align import aligned
from limaml.config import Config
from limaml.embeddings.refresher import Refresher
from limaml.embeddings.windows import Layout, Windows
from limaml.errors import ConfigError, DataError, StoreError
from limaml.interactions import InteractionLog, Prepared, Schema, clean, join_tables, read_table
from limaml.interactions.atomic_files import written
from limaml.interactions.digest import content_digest
from limaml.interactions.log import buckets_for
from limaml.interactions.log_manifest import read_manifest
from limaml.interactions.schema import Task
from limaml.interactions.side_parts import forget_parts
from limaml.interactions.side_tables import SideTables
from limaml.interactions.tombstones import Tombstone, named
from limaml.meta import TrainedModel, load_model
from limaml.store import Store, open_store
from limaml.types import ROW

__all__ = ["MODEL_NAME", "Workspace"]

MODEL_NAME = "model"
"""The name under which a workspace publishes."""


@dataclass(frozen=True)
class Workspace:
    """A run folder."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def generation(self) -> Path:
        return self.folder / "generation"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @cached_property
    def trained(self) -> TrainedModel:
        """The model of the run."""
        if not self.folder.is_dir():
            raise ConfigError(
                f"There is no run folder {self.folder}. Make one with: limaml train FILE … --out {self.folder}"
            )
        if not self.model.exists():
            raise ConfigError(
                f"{self.folder} has no model: it is no run folder, or training did not come to its end. Train one with: "
                f"limaml train FILE … --out {self.folder}"
            )
        return load_model(self.model)

    @property
    def schema(self) -> Schema:
        """What the columns mean, as the model has it: schema.json is for people."""
        return self.trained.encoder.schema

    def write_settings(self, config: Config, schema: Schema) -> None:
        """Keep the resolved config and the schema."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")
        (self.folder / "schema.json").write_text(schema.model_dump_json(indent=1), encoding="utf-8")

    def keep_interactions(self, prepared: Prepared) -> None:
        """Put the interactions as they were read into the log; refuse if it holds those of another source.

        Rows of two sources in one log could be the same interactions twice, and a task would be adapted on both. What
        `limaml refresh` has added stays: the model is trained again, and adapts on all that is known.
        """
        known = read_manifest(self.folder / "log" / "manifest.json")
        log = self.log(prepared.schema, None if known is not None else buckets_for(prepared.interactions.height))
        if known is not None and known.appends and known.appends[0].digest != content_digest(prepared.interactions):
            raise ConfigError(
                f"{log.folder} holds {known.appends[0].rows} interactions that are not those given now, and the two cannot "
                f"be mixed. Use another --out, or remove {self.folder}; new interactions for the model that is there are "
                f"taken in by: limaml refresh {self.folder} FILE"
            )
        log.append(prepared.interactions)

    def write_data(self, prepared: Prepared) -> None:
        """Keep the interactions, the side tables and the candidates."""
        schema = prepared.schema
        self.keep_interactions(prepared)
        side = self.folder / "side"
        side.mkdir(exist_ok=True)
        files = {}
        for number, (key, table) in enumerate(prepared.tables.items()):
            files[key] = f"{number}.parquet"
            table.write_parquet(side / files[key])
        (side / "tables.json").write_text(json.dumps(files), encoding="utf-8")
        if schema.row is not None:
            self._write_candidates(prepared.frame, schema)

    def add_candidates(self, joined: pl.DataFrame) -> int:
        """Take the row features of `joined` interactions in; the number of row ids that were not known before."""
        schema = self.schema
        path = self.folder / "candidates.parquet"
        if schema.row is None or not path.exists():
            return 0
        known = pl.read_parquet(path)
        fresh = _latest_rows(joined, schema, known.columns).cast(known.schema)
        old = known.join(fresh.select(schema.row), on=schema.row, how="anti", maintain_order="left")
        _write_parquet(pl.concat([old, fresh]), path)
        return old.height + fresh.height - known.height

    def _write_candidates(self, frame: pl.DataFrame, schema: Schema) -> None:
        """Every row id with its latest features, and what else came in the table of rows (a title, say)."""
        assert schema.row is not None
        own = [feature.column for feature in schema.features if feature.side == ROW]
        side = json.loads((self.folder / "side" / "tables.json").read_text(encoding="utf-8"))
        table = pl.read_parquet_schema(self.folder / "side" / side[schema.row]) if schema.row in side else {}
        columns = dict.fromkeys([schema.row, *own, *(column for column in table if column in frame.columns)])
        _write_parquet(_latest_rows(frame, schema, list(columns)), self.folder / "candidates.parquet")

    def log(self, schema: Schema, buckets: int | None = None) -> InteractionLog:
        """The interaction log, partitioned by the first task; `buckets` of a new one."""
        return InteractionLog(self.folder / "log", list(schema.tasks[0].columns), buckets)

    def add_features(self, key: str | None, table: Path) -> str:
        """Add the rows of a side table whose keys the kept one lacks; what it has stays. Returns a sentence.

        A known key keeps its features until the next training: else tasks that are not touched would no longer have the
        embeddings that all data gives.
        """
        side = self.folder / "side"
        files = json.loads((side / "tables.json").read_text(encoding="utf-8"))
        if key is None or key not in files:
            raise ConfigError(
                f"The model in {self.folder} was trained without a table of features of '{key or 'rows'}', so {table} tells "
                "it nothing. Leave the option out, or train again with that table."
            )
        columns = [key] if key in pl.read_parquet_schema(side / files[key]) else key.split("+")
        kept = pl.read_parquet(side / files[key])
        given, _ = aligned(read_table(table), dict(kept.schema), f"'{table}'")
        if given.select(columns).is_duplicated().any():
            raise DataError(f"'{table}' has several rows for one '{key}'. Keep one row for each.")
        fresh = given.join(kept.select(columns), on=columns, how="anti", maintain_order="left")
        _write_parquet(pl.concat([kept, fresh]), side / files[key])
        known = given.height - fresh.height
        rest = f"; {known:,} known ones keep the features they have until the next training" if known else ""
        return f"Features of {fresh.height:,} new '{key}' were added{rest}."

    def forget_features(self, task: Task, keys: Collection[str]) -> int:
        """Remove tasks from the side table that describes them, and from the candidates; returns how many rows."""
        side = self.folder / "side" / "tables.json"
        files = json.loads(side.read_text(encoding="utf-8")) if side.exists() else {}
        paths = [self.folder / "side" / file for key, file in files.items() if key == "+".join(task.columns)]
        paths += [self.folder / "candidates.parquet"] if (self.schema.row,) == task.columns else []
        removed = 0
        for path in (path for path in paths if path.exists()):
            table = pl.read_parquet(path)
            gone = named(table, {task.name: Tombstone(task.columns, frozenset(keys))})
            if gone.any():
                _write_parquet(table.filter(~gone), path)
                forget_parts(path)
                removed += int(gone.sum())
        return removed

    def joined(self, interactions: pl.DataFrame) -> tuple[pl.DataFrame, str]:
        """Interactions with the kept side tables joined and exact duplicates dropped, as in training; and a sentence
        that counts what was dropped, empty where nothing was."""
        side = self.folder / "side"
        files = json.loads((side / "tables.json").read_text(encoding="utf-8")) if side.exists() else {}
        frame = join_tables(interactions, {key: side / file for key, file in files.items()}).frame
        kept, dropped = clean(frame, self.schema)
        return kept, str(dropped) if dropped.total else ""

    def candidates(self) -> pl.DataFrame:
        """The latest features of every row id seen."""
        path = self.folder / "candidates.parquet"
        if not path.exists():
            raise DataError(
                f"{self.folder} keeps no candidates, as it was trained without --row. Pass --candidates FILE, a table with the "
                "row features."
            )
        return pl.read_parquet(path)

    def store(self, address: str | None = None, *, create: bool = False) -> Store:
        """The store of this workspace, or the one at `address`; with `create`, one is made where there is none."""
        if address is None and not create and not (self.folder / "store").is_dir():
            raise StoreError(
                f"{self.folder} has no store yet: nothing was published from it. Type: limaml embed {self.folder}"
            )
        return open_store(address or self.folder / "store", create=create)

    def windows(self) -> Windows:
        """Each task's recent interactions, as the run's own model needs them. To be closed."""
        layout = Layout.of(self.schema, self.trained.model.adaptation.max_support)
        return Windows(self.folder / "windows", self.log(self.schema), layout)

    def refresher(self, store: Store, address: str | None = None, version: str | None = None) -> Refresher:
        """What keeps the versions in `store`, opened at `address`, fresh from the log. To be closed."""
        side = SideTables(self.folder / "side")
        where = address or str((self.folder / "store").resolve())
        return Refresher(
            store, MODEL_NAME, self.log(self.schema), self.folder / "windows", side, where=where, version=version
        )


def _latest_rows(frame: pl.DataFrame, schema: Schema, columns: list[str]) -> pl.DataFrame:
    """The latest interaction of each row id, reduced to `columns`."""
    assert schema.row is not None
    ordered = frame if schema.time is None else frame.sort(schema.time, maintain_order=True)
    return ordered.select(columns).drop_nulls(schema.row).unique(schema.row, keep="last", maintain_order=True)


def _write_parquet(frame: pl.DataFrame, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    with written(path):
        frame.write_parquet(part)
        part.replace(path)
