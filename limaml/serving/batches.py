"""One batch: requests of one version, looked up together, one forward, each given its share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from limaml.errors import DataError, ModelError, StoreError
from limaml.serving.metrics import Metrics
from limaml.serving.questions import Answer, Question, Share
from limaml.serving.scoring import Asked, Entries
from limaml.serving.tensors import Refused
from limaml.serving.thompson import Sampling, deviations, posteriors_of, sampled
from limaml.serving.versions import Loaded

__all__ = ["Batches", "Options", "StoreState", "Waiting"]

logger = logging.getLogger("limaml.serving")


@dataclass(frozen=True)
class Options:
    """How a service behaves. Times are in seconds."""

    max_batch: int = 4096  # rows in one forward, and in one request
    queue: int = 1024  # requests that wait at the most
    timeout: float = 1.0  # for one request, from when it was read
    poll: float = 1.0  # between looks at the pointer
    retry: float = 1.0  # between looks at a store that did not answer
    on_store_error: Literal["cold", "fail"] = "cold"
    pinned: int = 2  # versions beside the current one that stay loaded for those who ask for them
    kept: tuple[str, ...] = ()  # versions that are loaded at the start and stay, whoever asks for others
    inline: bool = True  # score in the event loop


@dataclass(slots=True, eq=False)
class Waiting:
    """A checked question, the version that will answer it, and where the answer goes."""

    question: Question
    asked: Asked
    loaded: Loaded
    answer: asyncio.Future[Answer]
    since: float
    sampling: Sampling
    alarm: asyncio.TimerHandle


class StoreState:
    """Whether the store answers. One that did not is not asked by requests, only looked for, until it does."""

    def __init__(self, options: Options, metrics: Metrics) -> None:
        self._options, self._metrics = options, metrics
        self.down = False
        self.reopen = False  # a reader has failed, and may be of no use when the store is back

    def failed(self, error: StoreError) -> None:
        self._metrics.store_errors.inc()
        if not self.down:
            logger.error("Until the store answers, %s. %s", _WITHOUT[self._options.on_store_error], error)
            self._metrics.store_up.set(0)
        self.down = self.reopen = True

    def answers(self) -> None:
        if self.down:
            logger.info("The store answers again.")
        self._metrics.store_up.set(1)
        self.down = False


_WITHOUT = {"cold": "every task gets its cold embedding", "fail": "requests are refused (503)"}


class Batches:
    """Scores batches. May be called in a thread of its own, by one at a time."""

    def __init__(self, options: Options, metrics: Metrics, store: StoreState) -> None:
        self.options, self.metrics, self.store = options, metrics, store

    def score(self, batch: Sequence[Waiting]) -> list[Answer | Refused]:
        """The answers to a batch, all from one version. One request's mistake is not told to the others."""
        try:
            return self._together(batch)
        except (DataError, ModelError) as error:
            if len(batch) > 1:
                return [answer for one in batch for answer in self.score([one])]
            if isinstance(error, DataError):  # what only encoding finds: an entry of a vector that is no number
                return [Refused(400, str(error))]
            raise

    def _together(self, batch: Sequence[Waiting]) -> list[Answer | Refused]:
        metrics, loaded, started = self.metrics, batch[0].loaded, time.perf_counter()
        scorer, asked = loaded.scorer, [one.asked for one in batch]
        entries, down = self._look_up(loaded, asked)
        looked = time.perf_counter()
        logits = scorer.logits(asked, entries)
        predictions = scorer.predictions(logits).float().cpu().numpy()
        answers: list[Answer | Refused] = []
        answers += _split(loaded.version, logits.float().cpu().numpy(), predictions, asked, entries, down)
        for place, (one, answer) in enumerate(zip(batch, answers, strict=True)):
            metrics.wait.observe(started - one.since)
            if isinstance(answer, Answer) and (one.sampling.sample or one.sampling.deviations):
                answers[place] = self._explored(loaded, one, answer)
        metrics.look_up.observe(looked - started)
        metrics.forward.observe(time.perf_counter() - looked)
        metrics.batch_requests.observe(len(batch))
        metrics.batch_rows.observe(len(logits))
        metrics.rows.labels(loaded.version).inc(len(logits))
        self._count(loaded, entries)
        return answers

    def _explored(self, loaded: Loaded, one: Waiting, answer: Answer) -> Answer | Refused:
        """An answer with what its question asks for beside the scores: a draw in their place, or their deviations."""
        scorer, sampling, asked, entries = loaded.scorer, one.sampling, one.asked, answer.entries
        try:
            if answer.store_down:
                raise Refused(503, "The store does not answer, and has what sampling needs.", retry_after=1)
            posteriors = posteriors_of(loaded.reader, entries)
            if sampling.deviations:
                sd = deviations(scorer, posteriors, asked, entries, sampling.scale)
                answer = replace(answer, deviations=sd)
            if sampling.sample:
                logits = sampled(scorer, posteriors, asked, entries, sampling)
                predictions = scorer.predictions(logits).float().cpu().numpy()
                answer = replace(answer, logits=logits.float().cpu().numpy(), predictions=predictions, sampled=True)
        except Refused as refusal:
            return refusal
        except StoreError as error:
            self.store.failed(error)
            return Refused(503, f"The store does not answer: {error}", retry_after=self.options.retry)
        return answer

    def _look_up(self, loaded: Loaded, asked: Sequence[Asked]) -> tuple[dict[str, Entries], bool]:
        """The tasks of a batch, and whether they had to do without the store."""
        failure: StoreError | None = None
        if not self.store.down:
            try:
                return loaded.scorer.look_up(loaded.reader, asked), False
            except StoreError as error:
                failure = error
                self.store.failed(error)
        if self.options.on_store_error == "fail":
            why = f": {failure}" if failure else " at the moment."
            raise Refused(503, f"The store does not answer{why}", retry_after=self.options.retry)
        return loaded.scorer.look_up(None, asked), True

    def _count(self, loaded: Loaded, entries: dict[str, Entries]) -> None:
        metrics, cache = self.metrics, loaded.scorer.cache
        for task, one in entries.items():
            known = int(one.found.sum())
            if known:
                metrics.tasks.labels(task, "known").inc(known)
            if known < len(one.found):
                metrics.tasks.labels(task, "cold").inc(len(one.found) - known)
            if loaded.on_a_clock:
                for newest in one.event_time[one.found & (one.count > 0)].tolist():
                    metrics.age.observe(max(0.0, time.time() - newest / 1e6))
        hits, misses = cache.hits, cache.misses
        metrics.cache_hits.inc(hits - misses)
        metrics.cache_misses.inc(misses)
        cache.hits = cache.misses = 0


def _split(
    version: str,
    logits: np.ndarray[Any, Any],
    predictions: np.ndarray[Any, Any],
    asked: Sequence[Asked],
    entries: dict[str, Entries],
    down: bool,
) -> list[Answer]:
    """Each request's share of a batch."""
    answers, row, first = [], 0, [0] * len(entries)
    for one in asked:
        stop = row + one.rows
        share = Share(entries, row, tuple(first))
        answers.append(Answer(version, logits[row:stop], predictions[row:stop], one, share, down))
        row = stop
        first = [place + len(named.keys) for place, named in zip(first, one.tasks.values(), strict=True)]
    return answers
