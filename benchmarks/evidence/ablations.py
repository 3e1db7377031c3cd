"""One thing changed at a time: variants of the two solvers, upon the settings that validation chose for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence.sets import Table
from benchmarks.evidence.units import READINGS

__all__ = ["Variant", "variants_of"]


@dataclass(frozen=True)
class Variant:
    """A changed setting. Its results are compared with those of the unchanged method, on the same seeds."""

    topic: str
    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    item_tasks: bool = False
    readings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.topic}: {self.label}"


NEWTON, GRADIENT = "limaml_newton", "limaml_gradient"

_SETTINGS: tuple[tuple[str, str, str, tuple[Any, ...]], ...] = (
    ("inner steps", NEWTON, "adapt.steps", (0, 1, 2, 3, 5)),
    ("inner steps", GRADIENT, "adapt.steps", (0, 1, 2, 3, 5)),
    ("order", GRADIENT, "adapt.order", (1, 2)),
    ("rates", GRADIENT, "adapt.learn_rate", ("fixed", "scalar", "layer", "step", "layer_step")),
    ("adapted layers", GRADIENT, "model.meta_hidden", ((), (32,))),
    ("adapted layers", GRADIENT, "adapt.adapt_embeddings", (False, True)),
    ("embedding size", NEWTON, "model.dim", (4, 8, 16, 32, 64)),
    ("most support rows", NEWTON, "adapt.max_support", (8, 32, 128, 512, None)),
    ("query", NEWTON, "train.query", ("cross_fit", "time_cut")),
    ("training in", NEWTON, "train.autocast", (None, "bf16")),
)

_READ = {
    "float16": ("stored as", "float16"),
    "int8": ("stored as", "int8"),
    "averaged": ("uncertainty", "σ averaged over it"),
}
"""What a reading of the unchanged model is called."""


def variants_of(table: Table) -> list[Variant]:
    """The variants that make sense on a set: age needs a time column, tables in the meta block need member features."""
    found = [Variant("stored as", "float32", NEWTON, readings=READINGS)]
    features = any(f.side == table.which.task for f in table.schema.features)
    for topic, method, setting, values in _SETTINGS:
        if setting == "adapt.adapt_embeddings" and not features:
            continue
        for value in values:
            shown = "all" if value is None and setting == "adapt.max_support" else value
            name = setting.partition(".")[2]
            found.append(Variant(topic, f"{name} = {_text(shown)}", method, {setting: value}))
    if table.which.time is not None:
        start = 90 * 86_400.0 if table.which.clock else 50.0
        found.append(Variant("support age", f"half-life learned from {start:g}", NEWTON, {"adapt.half_life": start}))
    for method in (NEWTON, GRADIENT):
        found.append(Variant("tasks", "members and items", method, item_tasks=True))
    return found


def reading_name(reading: str) -> tuple[str, str]:
    """Topic and label of a reading."""
    return _READ[reading]


def _text(value: Any) -> str:
    if value == ():
        return "none (linear)"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
