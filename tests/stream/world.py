"""What the tests of the worker share: events of a world that goes on, and what a store must hold after them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

import limaml
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.tasks import TaskRows


@dataclass(frozen=True)
class World:
    run: Path
    past: pl.DataFrame  # what the log has
    later: pl.DataFrame  # what has not happened yet, in order of time

    def payloads(self, start: int = 0, stop: int | None = None) -> list[bytes]:
        """Later interactions as events."""
        rows = self.later[start:stop].with_columns(pl.col("timestamp").dt.strftime("%Y-%m-%dT%H:%M:%S%.fZ"))
        return [json.dumps(row).encode() for row in rows.to_dicts()]

    def rows_after(self, count: int) -> pl.DataFrame:
        return pl.concat([self.past, self.later[:count]])


def kept(
    run: Path, store: str | Path | None = None, version: str | None = None
) -> Mapping[str, tuple[np.ndarray, int]]:
    """Each member's vector and count in the store, by key."""
    with limaml.open_store(store or run / "store") as opened, opened.read(MODEL_NAME, version) as reader:
        ids = list(reader.ids("user_id"))
        found = reader.get("user_id", ids)
    return {key: (found.vectors[place], int(found.count[place])) for place, key in enumerate(ids)}


def regenerated(run: Path, rows: pl.DataFrame) -> Mapping[str, tuple[np.ndarray, int]]:
    """The same, from nothing but the model, the side tables and `rows`."""
    place = Workspace(run)
    trained = place.trained
    frame, _ = place.joined(rows)
    data = trained.encoder.encode(frame)
    among = TaskRows.of(data.index["user_id"], data.count("user_id"))
    vectors = trained.model.embed(data, "user_id", among, torch.arange(data.count("user_id"))).numpy()
    return {key: (vectors[place], int(among.size[place])) for place, key in enumerate(data.ids["user_id"])}


def same(found: Mapping[str, tuple[np.ndarray, int]], expected: Mapping[str, tuple[np.ndarray, int]]) -> None:
    """The same tasks and counts, values to 1e-6."""
    assert {key: count for key, (_, count) in found.items()} == {key: count for key, (_, count) in expected.items()}
    for key, (vector, _) in expected.items():
        np.testing.assert_allclose(found[key][0], vector, atol=1e-6, err_msg=key)
