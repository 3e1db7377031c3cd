"""Run folders to generate from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from embedding_runs import ROWS, World, trained_run

_TRAINED: dict[tuple[object, ...], Path] = {}


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    """`world(solver, tasks, rows, time)` makes a filled one; equal models are trained once."""
    opened: list[World] = []

    def make(
        solver: str = "newton",
        tasks: tuple[str, ...] = ("user_id",),
        rows: pl.DataFrame = ROWS,
        time: str | None = "timestamp",
        keep: int = 6,
        **adapt: object,
    ) -> World:
        key = (solver, tasks, str(rows.schema), time, keep, str(adapt))
        if key not in _TRAINED:
            _TRAINED[key] = trained_run(tmp_path_factory.mktemp("trained"), solver, tasks, rows, time, keep, adapt)
        folder = Path(shutil.copytree(_TRAINED[key], tmp_path / f"world-{len(opened)}"))
        opened.append(World(folder))
        opened[-1].fill(rows)
        return opened[-1]

    yield make
    for one in opened:
        one.store.close()
