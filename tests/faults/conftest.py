"""The world and the nursery, made once for all tests of a run, and servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from . import world as worlds
from .processes import Nursery, nursery
from .raw import Contents, read_lmdb, read_redis
from .world import World

FULL = os.environ.get("LIMAML_FAULTS", "short") == "full"


@pytest.fixture(scope="session")
def born(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("nursery")) as opened:
        yield opened


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, born: Nursery) -> World:
    """Trained once, also where several processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "world.lock"):
        if not (shared / "world" / "digests.json").exists():
            worlds.make(shared / "world", born)
    return World(shared / "world")


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A trained run folder to work on, nothing published yet."""
    return world.copy(tmp_path / "run")


def reading(address: str | Path) -> Callable[[], Contents]:
    """How a store at an address is read."""
    text = str(address)
    return (lambda: read_redis(text)) if text.startswith("redis") else (lambda: read_lmdb(Path(text)))
