"""The service: requests in, scores of one version out. HTTP and gRPC stand on it; it knows neither.

    infer ─► checked against the version that will answer ─► waiting ─► one forward for all that wait ─► answers

Nothing waits for a batch to fill: while a batch is scored others come in, and what waits when it is done is the next one. Before it is
begun the event loop goes round as long as that brings more requests: what has arrived is read, a matter of microseconds.
Where the store is embedded, a batch is scored in the event loop itself: nothing in it waits, and with one core there is
nobody to wait for. Where the store is a server, batches are scored in a thread, so that a store that does not answer
holds up nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from limaml.errors import DataError, LimamlError, StoreDown, StoreError
from limaml.serving.batches import Batches, Options, StoreState, Waiting
from limaml.serving.metrics import Metrics
from limaml.serving.questions import Answer, Question, column_of_tensor, refuse_partial, rows_of
from limaml.serving.queue import ROUNDS, ROUNDS_READ, Queue
from limaml.serving.scoring import Asked
from limaml.serving.tensors import InferRequest, InferResponse, InferTensor, ModelMetadata, Refused
from limaml.serving.thompson import sampling_of
from limaml.serving.versions import Loaded, Versions

__all__ = ["Options", "Service"]

logger = logging.getLogger("limaml.serving")

PLATFORM = "limaml"

SELDOM = 10.0
"""Seconds between tries to load a first version, in the end."""


class Service:
    """Answers requests for one model of a store.

    `route` may choose the version of a question that names none, by its tasks; `observers` are told of every answer.
    """

    def __init__(
        self,
        versions: Versions,
        options: Options | None = None,
        metrics: Metrics | None = None,
        *,
        route: Callable[[Question, Asked], str | None] | None = None,
        observers: Sequence[Callable[[Question, Answer], None]] = (),
    ) -> None:
        self.versions, self.model = versions, versions.model
        self.options, self.metrics = options or Options(), metrics or Metrics()
        self.route, self.observers = route, list(observers)
        self._current: Loaded | None = None
        self.waits_for: str | None = None
        """Why there is no version yet."""
        self._pinned: dict[str, Loaded] = {}
        self._pinning = asyncio.Lock()
        self._in_flight = 0
        self.metrics.in_flight.set_function(lambda: self._in_flight)
        self._draining = False
        self._store = StoreState(self.options, self.metrics)
        self._batches = Batches(self.options, self.metrics, self._store)
        self._queue = Queue(self._batches, self.options, self._done_with)
        self._tasks: list[asyncio.Task[None]] = []
        self._loader = ThreadPoolExecutor(1, "limaml-load")

    # -------------------------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Load and warm the version that is current; `ready` from then on.

        A store that is down is asked again until it answers and has a version: until then the service is live and not
        ready. Whatever else is wrong is raised.
        """
        try:
            await self._begin()
        except StoreDown as error:
            self._wait_for(error)
            self._tasks = [asyncio.create_task(self._begin_late())]

    async def _begin(self) -> None:
        loaded = await self._in_loader(self.versions.load)
        try:
            for version in self.options.kept:
                await self._pin(version)
        except BaseException:
            self._retire(loaded)
            raise
        self.waits_for = None
        self._serve(loaded)
        self._store.answers()
        self._tasks = [asyncio.create_task(self._watch_forever())]
        self.metrics.ready.set(1)

    async def _begin_late(self) -> None:
        pause = self.options.retry
        while self.waits_for is not None:
            await asyncio.sleep(pause)
            try:
                await self._begin()
            except Exception as error:  # whatever stands in the way may be put right
                self._wait_for(error)
                down = isinstance(error, StoreDown)
                pause = min(2 * pause, max(self.options.retry, SELDOM)) if down else self.options.poll

    def _wait_for(self, error: Exception) -> None:
        if str(error) != self.waits_for:
            logger.error("Not ready, and trying again: %s", error)
        self.waits_for = str(error)
        if isinstance(error, StoreDown):
            self._store.failed(error)
        else:
            self._store.answers()

    async def drain(self) -> None:
        """Take nothing new, finish what waits, release the versions."""
        self._draining = True
        self.metrics.ready.set(0)
        while self._in_flight:
            await asyncio.sleep(0.005)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._queue.close()
        for loaded in [*self._pinned.values(), *([self._current] if self._current else [])]:
            self._retire(loaded)
        self._current, self._pinned = None, {}
        await asyncio.get_running_loop().run_in_executor(None, self._loader.shutdown)

    @property
    def live(self) -> bool:
        return True

    @property
    def busy(self) -> bool:
        """Whether requests wait or are being scored."""
        return self._in_flight > 0

    def ready(self, name: str | None = None, version: str | None = None) -> bool:
        """Whether requests are taken; with a name, whether those for that model (and version, if it is loaded) are."""
        if self._current is None or self._draining or name not in (None, self.model):
            return False
        return version in (None, self._current.version) or version in self._pinned

    async def _in_loader(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work, *arguments)

    def _serve(self, loaded: Loaded) -> None:
        before, self._current = self._current, loaded
        self.metrics.served(self.model, loaded.version, loaded.described.watermark)
        logger.info("Version %s of '%s' is served now.", loaded.version, self.model)
        if before is not None:
            if before.version != loaded.version:
                self.metrics.flips.inc()
            self._retire(before)

    def _retire(self, loaded: Loaded) -> None:
        loaded.retired = True
        self._let_go(loaded)

    def _let_go(self, loaded: Loaded) -> None:
        """Close the reader of a version that nobody will be answered from any more."""
        if loaded.retired and not loaded.users:
            loaded.retired = False
            self._loader.submit(_close, loaded)

    async def _watch_forever(self) -> None:
        """Follow the pointer; find out whether the store answers again."""
        failures = 0
        while True:
            pause = (
                min(self.options.poll, self.options.retry)
                if self._store.down
                else self.options.poll * 2 ** min(failures, 5)
            )
            await asyncio.sleep(pause)
            try:
                loaded = await self._in_loader(self._newer)
            except StoreError as error:
                self._store.failed(error)
            except Exception as error:  # whatever a model folder holds, the version that is served stays
                failures += 1
                self.metrics.reload_failures.inc()
                logger.error("The current version could not be loaded; the one before it stays: %s", error)
            else:
                failures = 0
                self._store.answers()
                if loaded is not None:
                    self._serve(loaded)

    def _newer(self) -> Loaded | None:
        """The current version, if it is not the one that is served, or that one's reader has failed."""
        current, served = self.versions.current(), self._current
        if current is None or served is None or (current == served.version and not self._store.reopen):
            return None
        self._store.reopen = False
        return self.versions.load(current)

    # ---------------------------------------------------------------------------------------------------- metadata

    async def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Inputs and outputs of a version, by default of the current one; `Refused` (404) where there is none."""
        loaded = await self._find(name, version)
        try:
            ready = await self._ready_versions()
            return ModelMetadata(self.model, ready, PLATFORM, loaded.tensors.inputs, loaded.tensors.outputs)
        finally:
            self._done_with(loaded)

    async def _ready_versions(self) -> list[str]:
        try:
            found: list[str] = await self._in_loader(self.versions.ready)
        except StoreError as error:
            self._store.failed(error)
            raise Refused(503, f"The store does not answer: {error}", retry_after=self.options.retry) from error
        return found

    async def _find(self, name: str, version: str | None) -> Loaded:
        """A version to answer from, which stays until `_done_with`."""
        if name != self.model:
            raise Refused(404, f"There is no model {name[:100]!r} here; this server has '{self.model}'.")
        if self._draining or self._current is None:
            why = (
                f"The server is not ready yet. {self.waits_for}"
                if self.waits_for
                else "The server is stopping, or not ready yet; ask another one."
            )
            raise Refused(503, why, retry_after=1)
        loaded = self._current if version in (None, self._current.version) else self._pinned.get(str(version))
        if loaded is None:
            loaded = await self._pin(str(version))
        loaded.users += 1
        return loaded

    @asynccontextmanager
    async def using(self, version: str | None) -> AsyncIterator[Loaded]:
        """A version to make a question for: it stays loaded in here."""
        loaded = await self._find(self.model, version)
        try:
            yield loaded
        finally:
            self._done_with(loaded)

    def _done_with(self, loaded: Loaded) -> None:
        loaded.users -= 1
        self._let_go(loaded)

    async def _pin(self, version: str) -> Loaded:
        """Load a version beside the current one; the one asked for longest ago makes room."""
        async with self._pinning:
            if version in self._pinned:
                return self._pinned[version]
            ready = await self._ready_versions()
            if version not in ready:
                raise Refused(
                    404, f"Model '{self.model}' has no version {version[:100]!r}; it has {', '.join(ready[-20:])}."
                )
            try:
                loaded: Loaded = await self._in_loader(self.versions.load, version)
            except (LimamlError, OSError) as error:
                self.metrics.reload_failures.inc()
                raise Refused(503, f"Version {version} could not be loaded: {error}", retry_after=1) from error
            others = [other for other in self._pinned if other not in self.options.kept]
            while version not in self.options.kept and len(others) >= max(1, self.options.pinned):
                self._retire(self._pinned.pop(others.pop(0)))
            self._pinned[version] = loaded
            return loaded

    # ---------------------------------------------------------------------------------------------------- requests

    async def infer(self, request: InferRequest) -> InferResponse:
        """Scores of one version for the rows of a request; `Refused` says why there are none."""
        begun = time.perf_counter()
        loaded = await self._find(request.model, request.version)
        try:
            question, wanted, asked = self._question(request, loaded)
            answer = await self.answer(question, loaded, begun, asked)
            return _response(request, answer, wanted, loaded)
        finally:
            self._done_with(loaded)

    def begin(
        self, request: InferRequest, done: Callable[[InferResponse | BaseException], None]
    ) -> asyncio.Future[Answer] | None:
        """`infer` without a task: `done` is told the response, or what `infer` would raise. Cancelling what is returned gives the
        request up. None, and nothing is begun, where a version must be chosen or loaded first; what is wrong at once is raised."""
        loaded = self._current
        if loaded is None or self._draining or self.route is not None or request.model != self.model:
            return None
        if request.version not in (None, loaded.version):
            return None
        begun = time.perf_counter()
        loaded.users += 1
        try:
            question, wanted, asked = self._question(request, loaded)
            waiting = self._put(question, asked, loaded, begun, ROUNDS_READ)
        except BaseException:
            self._done_with(loaded)
            raise

        def finished(answer: asyncio.Future[Answer]) -> None:
            found: InferResponse | BaseException
            self._ended(waiting)
            try:
                found = _response(request, self._told(question, answer.result()), wanted, loaded)
            except (Exception, asyncio.CancelledError) as error:
                found = error
            self._done_with(loaded)
            done(found)

        waiting.answer.add_done_callback(finished)
        return waiting.answer

    def _question(self, request: InferRequest, loaded: Loaded) -> tuple[Question, Sequence[str], Asked]:
        """A request's question, the names of the outputs that answer it, and what is asked of the version."""
        plan = loaded.plans.find(request)
        if plan is not None and (found := plan.columns(request.inputs)) is not None:
            question = Question(found, plan.rows, request.version, request.id, dict(plan.parameters))
            return question, plan.wanted, loaded.scorer.ask(found, plan.rows, checked=True)
        allowed = request.parameters.get("nan_is_missing") is True
        columns = {name: column_of_tensor(tensor, loaded.scorer, allowed) for name, tensor in request.inputs.items()}
        tensors = loaded.tensors
        wanted = tensors.wanted(request.outputs)
        rows = rows_of(columns, self.options.max_batch)
        parameters = dict(request.parameters)
        if any(name in tensors.deviations for name in wanted):
            parameters["logit_sd"] = True
        elif parameters.get("logit_sd") is True:
            wanted = [*wanted, *tensors.deviations]
        question = Question(columns, rows, request.version, request.id, parameters)
        asked = _asked(question, loaded)
        loaded.plans.keep(request, question, wanted)
        return question, wanted, asked

    async def answer(
        self,
        question: Question,
        loaded: Loaded | None = None,
        begun: float | None = None,
        asked: Asked | None = None,
    ) -> Answer:
        """Scores of a question's rows, from `loaded` if that is the one its columns, and what is `asked`, were made for."""
        if loaded is None:
            async with self.using(question.version) as found:
                return await self.answer(question, found, begun)
        if asked is None:
            asked = _asked(question, loaded)
        if self.route is not None and question.version is None:
            version = self.route(question, asked)
            if version is not None and version != loaded.version:
                return await self._routed(question, version, loaded, begun)
        return await self._enqueue(question, asked, loaded, begun)

    async def _routed(self, question: Question, version: str, loaded: Loaded, begun: float | None) -> Answer:
        """The answer of another version than the current one, if that can be had."""
        try:
            other = await self._find(self.model, version)
        except Refused as refusal:
            logger.warning("Version %s cannot have its share of the traffic: %s", version, refusal.message)
            return await self._enqueue(question, loaded.scorer.ask(question.columns, question.rows), loaded, begun)
        try:
            chosen = other
            if other.tensors.usual != loaded.tensors.usual:
                logger.warning(
                    "Version %s has other outputs than the current one, and gets none of its traffic.", version
                )
                chosen = loaded
            asked = chosen.scorer.ask(question.columns, question.rows)
            return await self._enqueue(question, asked, chosen, begun)
        except DataError as error:
            raise Refused(400, str(error)) from error
        finally:
            self._done_with(other)

    async def _enqueue(self, question: Question, asked: Asked, loaded: Loaded, begun: float | None) -> Answer:
        waiting = self._put(question, asked, loaded, begun)
        try:
            answer = await waiting.answer
        finally:
            self._ended(waiting)
        return self._told(question, answer)

    def _put(
        self, question: Question, asked: Asked, loaded: Loaded, begun: float | None, rounds: int = ROUNDS
    ) -> Waiting:
        """Have a question scored in a batch; `_ended` is called once it was, or is given up."""
        options, metrics, sampling = self.options, self.metrics, sampling_of(question.parameters)
        if len(self._queue) >= options.queue:
            metrics.rejected.labels("queue").inc()
            raise Refused(503, f"{options.queue} requests wait already; ask again in a moment.", retry_after=1)
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        answer = loop.create_future()
        alarm = loop.call_later(options.timeout, self._too_late, answer)
        waiting = Waiting(question, asked, loaded, answer, now, sampling, alarm)
        if begun is not None:
            metrics.decode.observe(now - begun)
        self._in_flight += 1
        self._queue.put(waiting, rounds)
        return waiting

    def _ended(self, waiting: Waiting) -> None:
        waiting.alarm.cancel()
        self._in_flight -= 1

    def _told(self, question: Question, answer: Answer) -> Answer:
        """An answer that all observers were told of."""
        for observe in self.observers:
            observe(question, answer)
        return answer

    def _too_late(self, answer: asyncio.Future[Answer]) -> None:
        if not answer.done():
            self.metrics.rejected.labels("timeout").inc()
            answer.set_exception(
                Refused(
                    504,
                    f"The request was not answered within {self.options.timeout:g} s. Send fewer rows, or ask later.",
                )
            )


def _asked(question: Question, loaded: Loaded) -> Asked:
    refuse_partial(question.columns, loaded.scorer)
    try:
        return loaded.scorer.ask(question.columns, question.rows)
    except DataError as error:
        raise Refused(400, str(error)) from error


def _response(request: InferRequest, answer: Answer, wanted: Sequence[str], loaded: Loaded) -> InferResponse:
    told: dict[str, Any] = {"store": "down"} if answer.store_down else {}
    if answer.sampled:
        told["sampled"] = True
    outputs = tuple(InferTensor.of(name, loaded.tensors.output(name, answer)) for name in wanted)
    return InferResponse(request.model, answer.version, request.id, outputs, told)


def _close(loaded: Loaded) -> None:
    with contextlib.suppress(StoreError):  # a lease in a store that is down ends by itself
        loaded.reader.close()
