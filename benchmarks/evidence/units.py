"""The smallest pieces of work: one training each, known by a digest of all that its result depends on, kept in a cache.

A result is a small JSON file, written last; the predictions of a test lie beside it as `.npz`. Files are never changed, so
a run that was killed goes on, and two runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.evidence.sets import Table
from limaml.config import Config, parse_config
from limaml.errors import LimamlError
from limaml.evaluate.compare import Job, job_problem, predictions_of, train_job
from limaml.evaluate.methods import METHODS, Fitted, Problem, config_of
from limaml.evaluate.metrics import log_loss
from limaml.evaluate.predictions import Predictions
from limaml.evaluate.tune import with_settings
from limaml.meta import logit_sd
from limaml.store.packing import pack, unpack
from limaml.tasks import TaskRows

__all__ = [
    "READINGS",
    "VERSIONS",
    "Cache",
    "Runnable",
    "Unit",
    "trained_on",
    "trained_where",
    "trial_unit",
    "unit_of",
    "version_of",
]

VERSIONS: dict[str, int] = {"trial": 4, "test": 3, "replay": 7, "implicit": 7}
VERSIONS |= dict.fromkeys(("limaml_newton", "limaml_gradient", "limaml_history", "set_encoder", "cavia"), 2)
"""Method or part → a number to raise when its code or its defaults change what it predicts; 1 unless named here. Together
with limaml's own version it is a part of each unit's digest, and makes the results of before be measured again."""


def version_of(kind: str) -> int:
    """What a result file says that its results of a kind were measured by: the kind's version, and all methods'."""
    return VERSIONS[kind] + sum(number - 1 for name, number in VERSIONS.items() if name in METHODS)


LIMAML = version("limaml")

READINGS = ("float16", "int8", "averaged")
"""Other ways to read one trained model: embeddings rounded as the store rounds them; σ averaged over the posterior."""


class Runnable(Protocol):
    """What the runner can run: a `Unit`, or another part's."""

    @property
    def key(self) -> str: ...

    @property
    def name(self) -> str: ...

    def run(self, folder: Path, device: str = "cpu") -> dict[str, Any]:
        """Do the work in a worker process, write the result to the cache `folder`, and return it."""
        ...


@dataclass(frozen=True)
class Unit:
    """One training. `epochs` is None for a search: it trains on a part of the training rows and ends by validation."""

    kind: str  # "trial", "test"; other parts name their own
    dataset: str
    table: str
    rows: str  # digest of the table's content
    schema: str
    protocol: str
    method: str
    seed: int
    config: str
    settings: str  # what `methods.<method>` of the config sets beyond the defaults, as JSON
    epochs: int | None = None
    readings: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """The digest: the same for the same rows, schema, settings and versions, on every machine."""
        config = parse_config(json.loads(self.config))
        judged = config.compare.model_dump(mode="json", include={"test_share", "validation_share"})
        if config.compare.implicit.negatives:
            judged |= config.compare.implicit.model_dump(mode="json")
        resolved = config_of(self.method, config).model_dump(mode="json", exclude={"compare", "methods"})
        defaults = Config().model_dump(mode="json")
        changed = {
            f"{section}.{name}": value
            for section, values in resolved.items()
            for name, value in values.items()
            if value != defaults[section][name]
        }
        told = [self.kind, self.rows, json.loads(self.schema), self.protocol, self.method, self.seed, self.epochs]
        told += [
            sorted(changed.items()),
            judged,
            self.readings,
            VERSIONS.get(self.method, 1),
            VERSIONS.get(self.kind, 1),
            LIMAML,
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        what = "finding epochs" if self.epochs is None else f"{self.epochs} epochs"
        return f"{self.dataset} · {self.protocol} · {self.method} · seed {self.seed} · {what} · {self.settings}"

    def run(self, folder: Path, device: str = "cpu") -> dict[str, Any]:
        """Train, write what came of it, and return it. What limaml refuses to train is a result, too: its `error`."""
        config = trained_on(device, self.config)
        job = Job(self.protocol, self.method, self.seed, self.epochs)
        arrays: dict[str, Any] = {}
        found: dict[str, Any] = {}
        try:
            job_problem(job, self.table, self.schema, config)  # read before the clock starts
            started, wall = time.process_time(), time.perf_counter()
            fitted, problem, encoder = train_job(job, self.table, self.schema, config)
            found = {"cpu_seconds": time.process_time() - started, "seconds": time.perf_counter() - wall}
            found["train_loss"] = [epoch.train_loss for epoch in fitted.history.epochs]
            if self.epochs is None:
                found["valid_loss"] = [epoch.valid_loss for epoch in fitted.history.epochs]
                found["epochs"] = max(1, fitted.history.best)
                if not found["valid_loss"]:  # a method that is not trained in epochs
                    (judged,) = predictions_of(job, self.dataset, problem, fitted.rows, fitted.outputs, encoder)
                    found["valid_loss"] = [log_loss(judged.label, judged.logit, judged.row_weight)]
            else:
                found["epochs"] = self.epochs
                outputs = {"logit": fitted.outputs}
                outputs |= {reading: _read_again(reading, problem, fitted) for reading in self.readings}
                for name, values in outputs.items():
                    (judged,) = predictions_of(job, self.dataset, problem, fitted.rows, values, encoder)
                    arrays |= {
                        "task": judged.task,
                        "support": judged.support,
                        "label": judged.label,
                        name: judged.logit,
                    }
        except LimamlError as error:
            found["error"] = str(error)
        of = {"dataset": self.dataset, "protocol": self.protocol, "method": self.method, "seed": self.seed}
        result = {"kind": self.kind, **of, "settings": json.loads(self.settings), **trained_where(device), **found}
        Cache(folder).write(self.key, result, arrays)
        return result


def unit_of(
    table: Table,
    protocol: str,
    method: str,
    seed: int,
    settings: Mapping[str, Any],
    epochs: int | None,
    readings: Sequence[str] = (),
) -> Unit:
    """The unit that tests a method after `epochs`, or, with None, that finds them on validation rows."""
    config = with_settings(Config(), method, settings)
    return Unit(
        "trial" if epochs is None else "test",
        table.which.name,
        str(table.path),
        table.digest,
        table.schema.model_dump_json(),
        protocol,
        method,
        seed,
        config.model_dump_json(exclude_unset=True),
        json.dumps(dict(settings), sort_keys=True),
        epochs,
        tuple(readings),
    )


def trial_unit(table: Table, protocol: str, method: str, settings: Mapping[str, Any]) -> Unit:
    return unit_of(table, protocol, method, 0, settings, None)


def trained_on(device: str, config: str) -> str:
    """A config, as JSON, that trains on `device`. Results differ by rounding alone: no digest depends on it."""
    given = json.loads(config)
    given["train"] = {**given.get("train", {}), "device": device}
    return json.dumps(given)


def trained_where(device: str) -> dict[str, str]:
    """What a result says of a device that is not the processor: `trained_on`."""
    if torch.device(device).type == "cpu":
        return {}
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return {"trained_on": f"{name}, PyTorch {torch.__version__}"}


@torch.no_grad()
def _read_again(reading: str, problem: Problem, fitted: Fitted) -> torch.Tensor:
    """Outputs `[n, heads]` of a trained model whose embeddings, or uncertainty, are read in another way."""
    assert fitted.model is not None and fitted.embeddings is not None
    model, data = fitted.model, problem.data
    if reading == "averaged":
        posteriors = {}
        for task in model.tasks:
            support = TaskRows.of(data.index[task], data.count(task), problem.split.support)
            posteriors[task] = model.embed(data, task, support, uncertainty=True)
        sd = logit_sd(model, data, fitted.rows, posteriors)
        wider: torch.Tensor = fitted.outputs / torch.sqrt(1 + math.pi / 8 * sd**2)  # E σ(ℓ), ℓ ~ N(logit, sd²), nearly
        return wider
    rounded = {}
    for task, z in fitted.embeddings.items():
        zeros = np.zeros(len(z), np.int64)
        packed = pack(z.numpy().astype(np.float32), zeros, zeros, reading)
        rounded[task] = torch.from_numpy(unpack(packed, z.shape[1], reading)[0].copy())
    outputs: torch.Tensor = model.losses.outputs(model.predict(data, fitted.rows, rounded))
    return outputs


class Cache:
    """Results by digest, in a folder. What was read or written once is kept in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def load(self) -> int:
        """Read all results that are there; how many there are."""
        for path in sorted(self.folder.glob("*.json")):
            self._known[path.stem] = json.loads(path.read_text("utf-8"))
        return len(self._known)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a unit; None where it has not been run."""
        return self._known.get(key)

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Remember a result that another process has written."""
        self._known[key] = result

    def write(self, key: str, result: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Keep a result; a reader finds all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if arrays:
            small: dict[str, Any] = {
                name: np.asarray(a).astype(_KEPT.get(name, np.float32)) for name, a in arrays.items()
            }
            part = self.folder / f"{key}.part.npz"
            np.savez_compressed(part, **small)
            part.replace(self.folder / f"{key}.npz")
        text = self.folder / f"{key}.part"
        text.write_text(json.dumps(dict(result), allow_nan=False) + "\n", "utf-8")
        text.replace(self.folder / f"{key}.json")

    def predictions(self, unit: Unit, method: str | None = None, reading: str = "logit") -> Predictions:
        """What a test predicted, under the name `method` (its own unless given)."""
        with np.load(self.folder / f"{unit.key}.npz") as kept:
            return Predictions(
                unit.dataset,
                unit.protocol,
                unit.seed,
                method or unit.method,
                kept["task"],
                kept["support"],
                kept["label"],
                kept[reading],
            )


_KEPT: dict[str, Any] = {"task": np.int32, "support": np.int32, "positives": np.int32, "label": np.uint8}
