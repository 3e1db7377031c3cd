"""A worker's numbers for Prometheus, on a port of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limaml.errors import ConfigError, require
from limaml.stream.observer import BatchDone

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_EVENTS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


class Metrics:
    """All names begin with `limaml_stream_`. `serve` answers at http://127.0.0.1:PORT/metrics."""

    def __init__(self) -> None:
        prometheus: Any = require("prometheus_client", "stream")
        self._prometheus = prometheus
        self.registry: Any = prometheus.CollectorRegistry()
        common: dict[str, Any] = {"namespace": "limaml", "subsystem": "stream", "registry": self.registry}
        self._lag = prometheus.Gauge(
            "lag_events", "Events that the source holds and nobody has fetched.", ["source", "partition"], **common
        )
        self._up = prometheus.Gauge("up", "Whether a source or the store answers.", ["what"], **common)
        self._delay = prometheus.Histogram(
            "event_to_servable_seconds",
            "From the source's time of an event to a version that has it.",
            buckets=_SECONDS,
            **common,
        )
        self._size = prometheus.Histogram("batch_events", "Events in a batch.", buckets=_EVENTS, **common)
        self._events = prometheus.Counter(
            "events", "Events by outcome: taken, already, dead, forgotten.", ["outcome"], **common
        )
        self._embeddings = prometheus.Counter(
            "embeddings", "Embeddings by task type and outcome: applied, stale.", ["task_type", "outcome"], **common
        )
        self._tasks = prometheus.Counter("tasks_refreshed", "Tasks that were adapted again.", **common)
        self._watermark = prometheus.Gauge(
            "watermark", "Event time up to which a version is refreshed, in the log's unit.", ["version"], **common
        )
        self._stages = prometheus.Counter("seconds", "Where the time goes.", ["stage"], **common)
        self._sentences = prometheus.Counter("messages", "Sentences in the log, by level.", ["level"], **common)
        for outcome in ("taken", "already", "dead", "forgotten"):
            self._events.labels(outcome)

    def serve(self, port: int) -> tuple[int, Any]:
        """Answer on this port of the loopback address (0: any free one); returns the port, and what stops it."""
        try:
            server, thread = self._prometheus.start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            raise ConfigError(
                f"Metrics cannot be served on port {port} of this machine: {error.strerror}. Name another --metrics-port."
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return int(server.server_port), stop

    def batch(self, done: BatchDone) -> None:
        self._size.observe(done.events)
        for outcome in ("taken", "already", "dead", "forgotten"):
            self._events.labels(outcome).inc(getattr(done, outcome))
        for outcome in ("applied", "stale"):
            for task_type, count in getattr(done.fresh, outcome).items():
                self._embeddings.labels(task_type, outcome).inc(count)
        self._tasks.inc(done.fresh.tasks)
        for version, watermark in done.fresh.watermarks.items():
            if watermark is not None:
                self._watermark.labels(version).set(watermark)
        for stage, seconds in done.seconds.items():
            self._stages.labels(stage).inc(seconds)
        for delay in done.delays:
            self._delay.observe(delay)

    def lag(self, source: str, lags: Mapping[str, int | None]) -> None:
        for partition, events in lags.items():
            self._lag.labels(source, partition).set(float("nan") if events is None else events)

    def up(self, what: str, is_up: bool) -> None:
        self._up.labels(what).set(is_up)

    def say(self, level: str, sentence: str, **fields: object) -> None:
        self._sentences.labels(level).inc()
