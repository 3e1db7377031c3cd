"""The folder that verbs share: what was trained, on what, and where its embeddings are.

DIR/config.yaml          the resolved config
DIR/schema.json          what the columns mean
DIR/model/               the model folder
DIR/log/                 all interactions, as they were read, each source once
DIR/side/*.parquet       side tables, as they were read; side/tables.json names their keys
DIR/candidates.parquet   the latest features of every row id: what `recommend` ranks
DIR/store/               the embedded store
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import yaml

from limaml.config import Config
from limaml.errors import ConfigError, DataError
from limaml.interactions import InteractionLog, Prepared, Schema, clean, join_tables
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
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def schema(self) -> Schema:
        path = self.folder / "schema.json"
        if not path.exists():
            raise ConfigError(
                f"{self.folder} is no run folder: it has no schema.json. Make one with: limaml train FILE … --out {self.folder}"
            )
        return Schema.model_validate_json(path.read_text(encoding="utf-8"))

    def write_settings(self, config: Config, schema: Schema) -> None:
        """Keep the resolved config and the schema."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")
        (self.folder / "schema.json").write_text(schema.model_dump_json(indent=1), encoding="utf-8")

    def write_data(self, prepared: Prepared) -> None:
        """Keep the interactions, the side tables and the candidates."""
        schema = prepared.schema
        self.log(schema).append(prepared.interactions)
        side = self.folder / "side"
        side.mkdir(exist_ok=True)
        files = {}
        for number, (key, table) in enumerate(prepared.tables.items()):
            files[key] = f"{number}.parquet"
            table.write_parquet(side / files[key])
        (side / "tables.json").write_text(json.dumps(files), encoding="utf-8")
        if schema.row is not None:
            own = [feature.column for feature in schema.features if feature.side == ROW]
            joined = [
                column
                for column in prepared.tables.get(schema.row, pl.DataFrame()).columns
                if column in prepared.frame.columns
            ]
            columns = list(dict.fromkeys([schema.row, *own, *joined]))
            ordered = prepared.frame if schema.time is None else prepared.frame.sort(schema.time)
            latest = ordered.select(columns).unique(schema.row, keep="last", maintain_order=True)
            latest.write_parquet(self.folder / "candidates.parquet")

    def log(self, schema: Schema) -> InteractionLog:
        """The interaction log, partitioned by the first task."""
        return InteractionLog(self.folder / "log", list(schema.tasks[0].columns))

    def joined(self, interactions: pl.DataFrame) -> pl.DataFrame:
        """Interactions with the kept side tables joined and exact duplicates dropped, as in training."""
        side = self.folder / "side"
        files = json.loads((side / "tables.json").read_text(encoding="utf-8")) if side.exists() else {}
        frame = join_tables(interactions, {key: side / file for key, file in files.items()}).frame
        return clean(frame, self.schema)[0]

    def candidates(self) -> pl.DataFrame:
        """The latest features of every row id seen."""
        path = self.folder / "candidates.parquet"
        if not path.exists():
            raise DataError(
                f"{self.folder} keeps no candidates, as it was trained without --row. Pass --candidates FILE, a table with the "
                "row features."
            )
        return pl.read_parquet(path)

    def store(self, address: str | None = None) -> Store:
        """The store of this workspace, or the one at `address`."""
        return open_store(address or self.folder / "store")
