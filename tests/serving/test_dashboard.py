"""Every metric and label that the Grafana dashboard names is one that a server or a stream exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from limaml.serving.metrics import Metrics
from limaml.serving.traffic import TrafficMetrics
from limaml.stream.metrics import Metrics as StreamMetrics

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana-dashboard.json"
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
SCRAPED = {"job", "instance", "le"}
"""Labels that Prometheus adds."""


def exported() -> dict[str, set[str]]:
    """Series → its labels, of all that `limaml serve` and `limaml stream` export."""
    serving, stream = Metrics(), StreamMetrics()
    TrafficMetrics(serving.registry)
    registries: list[CollectorRegistry] = [serving.registry, stream.registry]
    found = {}
    for registry in registries:
        for collector in list(registry._collector_to_names):
            for family in collector.describe():
                for ending in ENDINGS[family.type]:
                    found[family.name + ending] = set(collector._labelnames) | SCRAPED
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Title and expression of every query."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
            yield (
                panel["title"] + " (legend)",
                target["expr"] + re.sub(r"{{(\w+)}}", r" by (\1) ", target["legendFormat"]),
            )


def test_every_metric_and_label_of_the_dashboard_is_exported() -> None:
    known, seen = exported(), set()
    for title, query in queries():
        names = set(re.findall(r"\blimaml_\w+", query))
        assert names and names <= set(known), f"{title}: {names - set(known)} is not exported"
        seen |= names
        selected = {label for inside in re.findall(r"{([^}]*)}", query) for label in re.findall(r"(\w+)=", inside)}
        grouped = {label for inside in re.findall(r"by \(([^)]*)\)", query) for label in inside.split(", ")}
        labels = set.union(*(known[name] for name in names))
        assert selected | grouped <= labels, f"{title}: {(selected | grouped) - labels} is no label of {names}"
    left_out = {name for name in known if not name.endswith(("_bucket", "_count", "_sum"))} - seen
    assert not left_out, f"{left_out} is exported and stands on no panel"


def test_panels_have_places_of_their_own_and_what_grafana_needs() -> None:
    board = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith(".") and panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
