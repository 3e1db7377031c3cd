"""Commands on one run folder and one store, killed again and again, with the checker after each: a story told by a seed."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl

from .checker import check, check_log
from .processes import KILL, Ended, Nursery
from .raw import Contents
from .world import World

# A lease in Redis outlives its holder for a while; a process that waits too long for its share of a busy machine loses its own.
LATER = ("Another publisher of model", "its lease ended")


class Campaign:
    """What was promised so far, and what may have happened beyond it."""

    def __init__(
        self,
        world: World,
        run: Path,
        nursery: Nursery,
        address: str | Path,
        read: Callable[[], Contents],
        *,
        pieces: int,
        seed: int,
    ) -> None:
        self.world, self.run, self.nursery, self.address, self.read = world, run, nursery, address, read
        self.choose = random.Random(seed)
        self.pieces = world.pieces(run / "pieces", pieces)
        self.done = 0  # pieces whose refresh came to its end
        self.kills = dict.fromkeys(("embed", "refresh"), 0)
        self.compared = 0
        self._promised: str | None = None
        self._least = dict.fromkeys(world.members, 0)
        self._usual: dict[str, tuple[int, float]] = {}  # act → calls and seconds of the last one that ended
        for name in self.kills:
            self.whole(name)

    # ------------------------------------------------------------------------------------------------------- acts

    def command(self, name: str) -> list[object]:
        if name == "embed":
            return ["embed", self.run, "--store", self.address, "--keep", 2]
        return ["refresh", self.run, self.pieces[min(self.done, len(self.pieces) - 1)], "--store", self.address]

    def whole(self, name: str) -> Ended:
        """An act from its beginning to its end, waiting for leases of the dead."""
        until = time.monotonic() + 60
        while True:
            began = time.monotonic()
            ended = self.nursery.run(*self.command(name))
            if not any(sentence in ended.said for sentence in LATER):
                break
            assert time.monotonic() < until, ended
            time.sleep(0.1)
        assert ended.code == 0, ended
        self._usual[name] = ended.seen, time.monotonic() - began
        self._look(name, ended)
        return ended

    def killed(self, name: str) -> bool:
        """An act that is killed, if it lives that long."""
        calls, seconds = self._usual[name]
        if calls > 0 and self.choose.random() < 0.7:
            ended = self.nursery.run(*self.command(name), at=self.choose.randint(1, calls), how=KILL)
        else:
            running = self.nursery.start(*self.command(name))
            time.sleep(self.choose.uniform(0, seconds))
            ended = running.kill()
        assert ended.killed or ended.code == 0 or any(sentence in ended.said for sentence in LATER), ended
        self._look(name, ended)
        self.kills[name] += ended.killed
        return ended.killed

    def play(self, kills: int) -> None:
        """Until so many were killed; about every second act is done again at once, the others wait for their turn."""
        names = list(self.kills)
        target = sum(self.kills.values()) + kills
        while sum(self.kills.values()) < target:
            name = min(names, key=self.kills.__getitem__) if self.choose.random() < 0.7 else self.choose.choice(names)
            if self.killed(name) and self.choose.random() < 0.5:
                self.whole(name)

    def finish(self) -> None:
        """All that is left, then a full regeneration: the store must not be able to tell the difference."""
        while self.done < len(self.pieces):
            self.whole("refresh")
        for settled in (False, True):
            everything = self.world.all
            check(self.read(), self.world, least=everything, most=everything, promised=self._promised, settled=settled)
            if not settled:
                self.whole("embed")

    # ----------------------------------------------------------------------------------------------------- looking

    def _look(self, name: str, ended: Ended) -> None:
        sure = pl.concat([self.world.later.head(0), *map(pl.read_parquet, self.pieces[: self.done])])
        maybe = pl.read_parquet(self.pieces[self.done]) if self.done < len(self.pieces) else None
        there = check_log(self.run / "log", self.world, sure, maybe)
        known = self.world.clicks(there)
        for version in re.findall(r"Version (v\d{6}-[0-9a-f]{8}) is served", ended.said):
            self._promised = max(self._promised or "", version)
        if ended.code == 0:
            if name == "refresh" and self.done < len(self.pieces):
                assert len(there) > len(sure), "a refresh that came to its end left no rows in the log"
                self.done += 1
            self._least = known
        self.compared += check(self.read(), self.world, least=self._least, most=known, promised=self._promised)
