"""Commands on one run folder and one store, killed again and again, with the checker after each: a story told by a seed."""

from __future__ import annotations

import json
import random
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import redis

from .checker import check, check_log
from .processes import KILL, Ended, Nursery, Running
from .raw import Contents
from .world import MODEL, TASK, World

# A lease in Redis outlives its holder for a while; a process that waits too long for its share of a busy machine loses its own.
WEIGHTS = "weights.safetensors"
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
        broker: str | None = None,
    ) -> None:
        self.world, self.run, self.nursery, self.address, self.read = world, run, nursery, address, read
        self.choose = random.Random(seed)
        self.pieces = world.pieces(run / "pieces", pieces)
        self.done = 0  # pieces that are in: every other one by a file, the others by events
        self.kills = dict.fromkeys(("embed", "refresh", "stream", "serve", "rollout", "forget"), 0)
        self.gone: set[str] = set()  # members who were forgotten, to the end
        self._going: dict[str, int] = {}  # of who is being forgotten: most clicks that may be known
        self._leaving = self.choose.sample(world.members, len(world.members) // 2)
        self._target: str | None = None  # the model that is being rolled out
        self._served: str | None = None
        self._broker, self._sent = broker, 0  # address of a Redis stream; events come from a file of lines without one
        self.compared = 0
        self._promised: str | None = None
        self._least = self._known = dict.fromkeys(world.members, 0)
        self._usual: dict[str, tuple[int, float]] = {}  # act → calls and seconds of the last one that ended
        for name in self.kills:  # in this order: each has what it needs
            self.whole(name)

    # ------------------------------------------------------------------------------------------------------- acts

    @property
    def ingesting(self) -> str:
        """How the next piece comes in."""
        return "refresh" if self.done % 2 == 0 else "stream"

    def command(self, name: str) -> list[object]:
        at = ["--store", self.address]
        if name == "embed":
            return ["embed", self.run, "--keep", 2, *at]
        if name == "serve":
            return ["serve", self.run, "--port", 0, "--poll", 0.05, "--timeout", 60, *at]
        if name == "stream":
            source = self._broker or self.run / "events.jsonl"
            return ["stream", self.run, "--source", source, "--once", "--max-batch", 4, "--log", "text", *at]
        if name == "rollout":
            self._target = self._target or next(digest for digest in self.world.known if digest != self._model())
            return ["rollout", self.run, "--model", self.world.known[self._target].model, *at]
        if name == "forget":
            return ["store", "forget", self.run, "--task", f"{TASK}:{self._next_to_go()}", *at]
        last = (len(self.pieces) - 1) // 2 * 2  # of those that come by a file; again and again once all are in
        return ["refresh", self.run, self.pieces[min(self.done, last)], *at]

    def _model(self) -> str:
        """Digest of the model that the run folder has."""
        (own,) = (
            digest
            for digest, known in self.world.known.items()
            if (known.model / WEIGHTS).read_bytes() == (self.run / "model" / WEIGHTS).read_bytes()
        )
        return own

    def _next_to_go(self) -> str:
        """Who is being forgotten, else the next one; once half of all are gone, one of them again."""
        if self._going:
            return next(iter(self._going))
        return next((member for member in self._leaving if member not in self.gone), self._leaving[0])

    def whole(self, name: str) -> Ended:
        """An act from its beginning to its end, waiting for leases of the dead."""
        self._send(name)
        until = time.monotonic() + 300
        while True:
            began = time.monotonic()
            running = self.nursery.start(*self.command(name))
            if name == "serve":
                self._ask(running)
                running.signal(signal.SIGTERM)
            ended = running.wait()
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
        self._send(name)
        calls, seconds = self._usual[name]
        if calls > 0 and name != "serve" and self.choose.random() < 0.7:
            ended = self.nursery.run(*self.command(name), at=self.choose.randint(1, calls), how=KILL)
        else:
            running = self.nursery.start(*self.command(name))
            if name == "serve" and self.choose.random() < 0.5:
                self._ask(running)
            else:
                time.sleep(self.choose.uniform(0, seconds))
            ended = running.kill()
        assert ended.killed or ended.code == 0 or any(sentence in ended.said for sentence in LATER), ended
        self._look(name, ended)
        self.kills[name] += ended.killed
        return ended.killed

    def _send(self, name: str) -> None:
        """The events of the piece that is next, once."""
        if name != "stream" or self.ingesting != "stream" or self.done < self._sent or self.done >= len(self.pieces):
            return
        self._sent = self.done + 1
        events = [json.dumps(row) for row in pl.read_parquet(self.pieces[self.done]).iter_rows(named=True)]
        if self._broker is None:
            with (self.run / "events.jsonl").open("a") as file:
                file.writelines(f"{event}\n" for event in events)
            return
        parts = urlsplit(self._broker)
        with redis.Redis(parts.hostname or "", parts.port or 0) as client:
            for event in events:
                client.xadd(parts.path.strip("/"), {"event": event})

    def _ask(self, running: Running) -> None:
        """A server answers out of the version that is served, for members it knows and for one that nobody knows."""
        running.wait_until("http://")
        port = re.findall(r"http://[\d.]+:(\d+)", running.said())[0]
        item = pl.read_parquet(self.world.folder / "items.parquet").row(0, named=True)
        rows = [{TASK: member, **item} for member in [*map(int, self.world.members[:5]), 10**9]]
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/score",
            json.dumps({"rows": rows}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            said = json.loads(answer.read())
        assert said["version"] == self._served, said
        known = dict(zip([*self.world.members[:5], ""], said["known"], strict=True))
        assert not any(known[member] for member in {"", *self.gone} & known.keys()), said

    def play(self, kills: int) -> None:
        """Until so many were killed; about every second act is done again at once, the others wait for their turn."""
        names = list(self.kills)
        target = sum(self.kills.values()) + kills
        while sum(self.kills.values()) < target:
            name = min(names, key=self.kills.__getitem__) if self.choose.random() < 0.7 else self.choose.choice(names)
            if name in ("refresh", "stream") and self.done < len(self.pieces):
                name = self.ingesting
            if self.killed(name) and self.choose.random() < 0.5:
                self.whole(name)

    def finish(self) -> None:
        """All that is left, then a full regeneration: the store must not be able to tell the difference."""
        while self.done < len(self.pieces):
            self.whole(self.ingesting)
        for name in ("forget", "rollout"):
            self.whole(name)
        everything, known = self.world.all, {"promised": self._promised, "gone": self.gone}
        check(self.read(), self.world, least=everything, most=everything, **known)
        self.whole("embed")
        known["promised"] = self._promised
        check(self.read(), self.world, least=everything, most=everything, settled=True, **known)

    # ----------------------------------------------------------------------------------------------------- looking

    def _look(self, name: str, ended: Ended) -> None:
        sure = pl.concat([self.world.later.head(0), *map(pl.read_parquet, self.pieces[: self.done])])
        maybe = pl.read_parquet(self.pieces[self.done]) if self.done < len(self.pieces) else None
        parts = self.done < len(self.pieces) and self.ingesting == "stream"  # events come in batches, files whole
        if name == "forget" and not self._going and (going := self._next_to_go()) not in self.gone:
            self._going = {going: self._known[going]}
        if name == "forget" and ended.code == 0:
            self.gone |= self._going.keys()
            self._going = {}
        away = {"gone": self.gone, "going": self._going.keys()}
        there = check_log(self.run / "log", self.world, sure, maybe, parts=parts, **away)
        self._known = known = self.world.clicks(there)
        for version in re.findall(r"Version (v\d{6}-[0-9a-f]{8}) is served", ended.said):
            self._promised = max(self._promised or "", version)
        if ended.code == 0:
            if name == self.ingesting and self.done < len(self.pieces):
                assert maybe is not None
                others = ~pl.col(TASK).cast(pl.String).is_in([*self.gone, *self._going, ""])
                came, sent = there.filter(others), pl.concat([sure, maybe]).filter(others)
                assert len(came) == len(sent), f"{name} left rows out of the log"
                self.done += 1
            if name not in ("serve", "forget"):
                self._least = known
        least = self._least | dict.fromkeys(self._going, 0)
        most = known | {member: max(clicks, known[member]) for member, clicks in self._going.items()}
        contents = self.read()
        self.compared += check(contents, self.world, least=least, most=most, promised=self._promised, **away)
        self._served = contents.current(MODEL)
        if ended.code == 0 and name in ("embed", "rollout"):
            (artifact,) = (record["artifact"] for record in contents.records() if record["id"] == self._served)
            assert artifact == self._model(), f"{name} ended, and the run folder has another model than what is served"
            assert name == "embed" or artifact == self._target, "another model was rolled out"
        if ended.code == 0 and name == "rollout":
            self._target = None
