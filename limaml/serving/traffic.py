"""A second version on live traffic: a share of the members (split), or all of it unseen (shadow).

A split is sticky: which version a member sees depends on the member's key and the shares alone, on every server and after
every restart. Raising a share moves members to the version whose share was raised, and no others.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import ConfigError, require
from limaml.serving.questions import SHADOWED, Answer, Question
from limaml.serving.record import Recorder
from limaml.serving.scoring import Asked
from limaml.serving.tensors import Refused

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Shadow", "Split", "TrafficMetrics", "parse_split", "routed"]

DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

logger = logging.getLogger("limaml.serving.traffic")


@dataclass(frozen=True)
class Split:
    """Version → share of the members, in the order given; the rest see the version that is current."""

    shares: tuple[tuple[str, float], ...] = ()

    def of(self, keys: Sequence[str]) -> str | None:
        """The version for a request that names the tasks `keys`; None: the current one.

        All rows of a request are answered from one version. One that names members of several sides gets the current
        version: it would show some of them another than the one they see.
        """
        found = {self._of(key) for key in keys}
        return found.pop() if len(found) == 1 else None

    def _of(self, key: str) -> str | None:
        place = _place(key)
        for version, share in self.shares:
            if place < share:
                return version
            place -= share
        return None


def _place(key: str) -> float:
    """A number in [0, 1) that a key has everywhere."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=b"limaml split").digest()
    return int.from_bytes(digest, "little") / 2**64


def parse_split(options: Sequence[str]) -> Split:
    """`VERSION=SHARE` of each option; `ConfigError` names what is wrong with one."""
    shares: dict[str, float] = {}
    for option in options:
        version, equals, text = option.rpartition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not equals or not version or not 0 < share <= 1:
            raise ConfigError(
                f"--split {option} is no version and its share of the members. Write --split VERSION=0.1, the share above 0 "
                "and at most 1; limaml store list names the versions."
            )
        if version in shares:
            raise ConfigError(f"--split names the version {version} twice; give it one share.")
        shares[version] = share
    if sum(shares.values()) > 1 + 1e-9:
        raise ConfigError(f"The shares of --split add up to {sum(shares.values()):g}; they may be 1 together at most.")
    return Split(tuple(shares.items()))


class Shadow:
    """Scores questions with a second version after they were answered, and reports how far off it is.

    No answer waits for it: a question is scored again when nothing else is (`busy` says whether something is), `most` of
    them wait at the most, and one that has waited `patience` seconds is given up. `observe` is called with what became of
    each: "scored" and the absolute differences of the logits, or "dropped" or "failed" and nothing.
    """

    def __init__(
        self,
        version: str,
        answer: Callable[[Question], Awaitable[Answer]],
        observe: Callable[[str, NDArray[np.float64]], None],
        *,
        busy: Callable[[], bool] = lambda: False,
        most: int = 16,
        patience: float = 5.0,
    ) -> None:
        self.version, self._answer, self._observe, self._busy = version, answer, observe, busy
        self._most, self._patience = most, patience
        self._running: set[asyncio.Task[None]] = set()

    def after(self, question: Question, answer: Answer) -> None:
        """Take note of an answered question; returns at once."""
        if answer.version == self.version or answer.sampled or answer.store_down:
            return
        if len(self._running) >= self._most:
            self._observe("dropped", np.zeros(0))
            return
        task = asyncio.get_running_loop().create_task(self._score(question, answer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _score(self, question: Question, answer: Answer) -> None:
        again = replace(question, version=self.version, parameters={**question.parameters, SHADOWED: True})
        try:
            async with asyncio.timeout(self._patience):
                while self._busy():
                    await asyncio.sleep(0.001)
                other = await self._answer(again)
            if other.logits.shape != answer.logits.shape:
                raise Refused(400, f"It scores {other.logits.shape[1]} labels, and not {answer.logits.shape[1]}.")
        except TimeoutError:
            self._observe("dropped", np.zeros(0))
        except Refused as refusal:
            if refusal.status == 503:  # the server is stopping, or has too much to do
                self._observe("dropped", np.zeros(0))
                return
            logger.warning("Version %s refuses a request in the shadow: %s", self.version, refusal.message)
            self._observe("failed", np.zeros(0))
        except Exception:
            logger.exception("Version %s failed in the shadow.", self.version)
            self._observe("failed", np.zeros(0))
        else:
            off = np.abs(other.logits.astype(np.float64) - answer.logits).reshape(-1)
            self._observe("scored", off)

    async def close(self) -> None:
        """Give up what waits."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class TrafficMetrics:
    """What stands beside a service adds this to its metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        client = require("prometheus_client", "serve")
        self._answers = client.Counter(
            "limaml_version_answers_total", "Requests answered, by version.", ("version",), registry=registry
        )
        self._by_version: dict[str, Any] = {}
        self._shadows = client.Counter(
            "limaml_shadow_total",
            "Requests scored in the shadow, by version and outcome: scored, dropped, failed.",
            ("version", "outcome"),
            registry=registry,
        )
        self._kept = client.Gauge("limaml_recorded", "Requests that were recorded.", registry=registry)
        self._lost = client.Gauge("limaml_record_lost", "Requests that could not be recorded.", registry=registry)
        self._off = client.Histogram(
            "limaml_shadow_logit_difference",
            "|logit of the version in the shadow − the one that was answered|.",
            ("version",),
            registry=registry,
            buckets=DIFFERENCES,
        )

    def records(self, recorder: Recorder) -> None:
        """Export how many requests a recorder has kept, and how many it could not."""
        self._kept.set_function(lambda: recorder.kept)
        self._lost.set_function(lambda: recorder.lost)

    def answered(self, question: Question, answer: Answer) -> None:
        """An observer for `Service`."""
        if SHADOWED not in question.parameters:
            counted = self._by_version.get(answer.version)
            if counted is None:
                counted = self._by_version[answer.version] = self._answers.labels(answer.version)
            counted.inc()

    def shadowed(self, version: str) -> Callable[[str, NDArray[np.float64]], None]:
        """An observer for `Shadow`."""

        def observe(outcome: str, differences: NDArray[np.float64]) -> None:
            self._shadows.labels(version, outcome).inc()
            histogram = self._off.labels(version)
            for difference in differences.tolist():
                histogram.observe(difference)

        return observe


def routed(split: Split) -> Callable[[Question, Asked], str | None]:
    """A split as `Service` wants it: by the tasks of the first type."""

    def route(_: Question, asked: Asked) -> str | None:
        return split.of(next(iter(asked.tasks.values())).keys)

    return route
