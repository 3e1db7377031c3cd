"""kill -9 of whatever writes, at random points: by time, and at the n-th call that changes a file or speaks to a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from store.servers import cluster, valkey

from .campaign import Campaign
from .conftest import FULL, reading
from .processes import Nursery
from .world import World

# publisher, refresher, stream worker, server, roll-out and forgetting are killed about as often: 200 times the first four
KILLS = {"lmdb": 135 if FULL else 7, "valkey": 105 if FULL else 5, "cluster": 60 if FULL else 3}


@contextmanager
def address_of(kind: str, run: Path) -> Iterator[str | Path]:
    """A store of each kind; a lease that is short, as one waits for those of the dead."""
    with ExitStack() as stack:
        if kind == "lmdb":
            yield run / "store"
            return
        server = stack.enter_context(valkey()) if kind == "valkey" else stack.enter_context(cluster())[0]
        more = "&cluster=true" if kind == "cluster" else ""
        yield f"redis://127.0.0.1:{server.port}?prefix=faults&lease=2&timeout=20&cache={run / 'cache'}{more}"


@pytest.mark.parametrize("kind", KILLS)
def test_nothing_is_lost_mixed_or_half_visible(
    kind: str, world: World, run: Path, born: Nursery, record_property: Callable[[str, object], None]
) -> None:
    with address_of(kind, run) as address:
        broker = f"redis://{urlsplit(str(address)).netloc}/clicks" if kind == "valkey" else None
        pieces = 24 if FULL else 4
        campaign = Campaign(world, run, born, address, reading(address), pieces=pieces, seed=11, broker=broker)
        campaign.play(KILLS[kind])
        campaign.finish()
    record_property("kills", campaign.kills)
    print(f"\n{kind}: killed {campaign.kills}, {campaign.compared} values compared")
