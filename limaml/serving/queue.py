"""What waits to be scored, and when it is: a batch begins when the one before it is done and no more requests are about to come."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from limaml.serving.batches import Batches, Options, Waiting
from limaml.serving.questions import Answer
from limaml.serving.tensors import Refused
from limaml.serving.versions import Loaded

__all__ = ["ROUNDS", "ROUNDS_READ", "Queue"]

logger = logging.getLogger("limaml.serving")

ROUNDS, ROUNDS_READ, GATHERING = 8, 3, 0.003
"""A batch is begun when the event loop has gone round so often without another request, or after so many seconds. gRPC takes
about four rounds, and a turn of its own thread, from one request to the next; what is read off connections (`begin`) comes in one."""


class Queue:
    """Questions in the order in which they came. `done_with` is told of each one's version when it was scored."""

    def __init__(self, batches: Batches, options: Options, done_with: Callable[[Loaded], None]) -> None:
        self._batches, self._most_rows, self._done_with = batches, options.max_batch, done_with
        self._waiting: list[Waiting] = []
        self._rounds = ROUNDS
        self._scheduled = False  # whether what waits will be scored without anybody saying so again
        self._scoring = None if options.inline else ThreadPoolExecutor(1, "limaml-score")

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, waiting: Waiting, rounds: int = ROUNDS) -> None:
        """Have a question scored, not before the event loop has gone round `rounds` times without another one."""
        self._rounds = max(self._rounds, rounds) if self._waiting else rounds
        self._waiting.append(waiting)
        self.score_soon()

    async def close(self) -> None:
        """Wait for a batch that everybody gave up: it may still be scored."""
        if self._scoring is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._scoring.shutdown)
            await asyncio.sleep(0)

    def score_soon(self) -> None:
        """Have what waits scored, once nothing more is about to: requests that arrived together are one batch."""
        if self._waiting and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._gather, 0, 0, time.perf_counter() + GATHERING)

    def _gather(self, seen: int, rounds: int, until: float) -> None:
        waiting = len(self._waiting)
        rounds = rounds + 1 if waiting == seen else 0
        if rounds >= self._rounds or time.perf_counter() > until:
            self._score_next()
        else:
            _let_others_run()
            asyncio.get_running_loop().call_soon(self._gather, waiting, rounds, until)

    def _score_next(self) -> None:
        batch = self._take()
        for one in batch:
            one.loaded.users += 1  # a request that gave up must not close the version under the batch
        if self._scoring is None or not batch:
            self._scored(batch, self._score(batch))
        else:
            found = asyncio.get_running_loop().run_in_executor(self._scoring, self._score, batch)
            found.add_done_callback(lambda done: self._scored(batch, done.result()))

    def _score(self, batch: Sequence[Waiting]) -> Sequence[Answer | Refused] | Refused:
        """The answers to a batch, or why it has none. May run in a thread."""
        try:
            return self._batches.score(batch) if batch else ()
        except Refused as refusal:
            return refusal
        except Exception as error:
            logger.exception("A batch of %d requests failed.", len(batch))
            return Refused(500, f"The rows could not be scored: {error}")

    def _scored(self, batch: Sequence[Waiting], found: Sequence[Answer | Refused] | Refused) -> None:
        for place, one in enumerate(batch):
            self._done_with(one.loaded)
            if not one.answer.done():
                answer = found if isinstance(found, Refused) else found[place]
                if isinstance(answer, Refused):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)
        self._scheduled = False
        self.score_soon()

    def _take(self) -> list[Waiting]:
        """What waits for one version, in the order in which it came, as much as fits in a batch."""
        batch: list[Waiting] = []
        left: list[Waiting] = []
        rows = 0
        for one in self._waiting:
            if one.answer.done():
                continue
            fits = not batch or (one.loaded is batch[0].loaded and rows + one.asked.rows <= self._most_rows)
            (batch if fits else left).append(one)
            rows += one.asked.rows if fits else 0
        self._waiting = left
        return batch


def _let_others_run() -> None:
    """Give threads that share this one's core a turn: gRPC reads requests in one."""
    if sys.platform != "win32":
        os.sched_yield()
