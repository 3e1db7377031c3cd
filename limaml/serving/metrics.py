"""What a server says of itself to Prometheus. Times are in seconds, all names begin with `limaml_`."""

from __future__ import annotations

from typing import Any

from limaml.errors import require

__all__ = ["Metrics"]

QUICK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
AGES = (1, 10, 60, 600, 3600, 6 * 3600, 86400, 3 * 86400, 7 * 86400, 30 * 86400, 365 * 86400)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        client = require("prometheus_client", "serve")
        self._client = client
        registry = self.registry = client.CollectorRegistry()

        def histogram(name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = QUICK) -> Any:
            return client.Histogram(f"limaml_{name}", text, labels, registry=registry, buckets=buckets)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return client.Counter(f"limaml_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return client.Gauge(f"limaml_{name}", text, labels, registry=registry)

        self.requests = counter("requests_total", "Requests answered, by endpoint and status.", ("endpoint", "status"))
        self.seconds = histogram("request_seconds", "From the whole request read to the answer made.", ("endpoint",))
        stage = histogram("stage_seconds", "Where that time goes.", ("stage",))
        self.decode, self.wait = stage.labels("decode"), stage.labels("wait")
        self.look_up, self.forward = stage.labels("look_up"), stage.labels("forward")
        self.batch_requests = histogram("batch_requests", "Requests answered by one forward.", buckets=SIZES)
        self.batch_rows = histogram("batch_rows", "Rows in one forward.", buckets=SIZES)
        self.rows = counter("rows_total", "Rows scored, by version.", ("version",))
        self.tasks = counter("tasks_total", "Tasks looked up: known to the store, or cold.", ("task", "result"))
        self.age = histogram(
            "embedding_age_seconds", "Now minus the newest interaction an embedding was made of.", buckets=AGES
        )
        self.cache_hits = counter("row_cache_hits_total", "Rows whose encoding was kept.")
        self.cache_misses = counter("row_cache_misses_total", "Rows that were encoded anew.")
        self.version = gauge("version_info", "1 for the version that is served by default.", ("model", "version"))
        self.watermark = gauge("version_watermark", "Event time up to which the served version is refreshed.")
        self.flips = counter("version_flips_total", "Times that another version took over.")
        self.reload_failures = counter("reload_failures_total", "Times that a version could not be loaded.")
        self.store_errors = counter("store_errors_total", "Times that the store did not answer, or refused.")
        self.store_up = gauge("store_up", "1 while the store answers.")
        self.in_flight = gauge("in_flight", "Requests that wait or are being scored.")
        self.ready = gauge("ready", "1 while requests are taken.")
        self.rejected = counter("rejected_total", "Requests refused for load or time.", ("reason",))

    def exposition(self) -> tuple[bytes, str]:
        """What /metrics answers, and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST

    def served(self, model: str, version: str, watermark: int | None) -> None:
        """Another version is the default from now on."""
        self.version.clear()
        self.version.labels(model, version).set(1)
        self.watermark.set(float("nan") if watermark is None else watermark)
