"""What a version takes and gives, by name: worked out once, when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.embeddings.factors import factor_type
from limaml.serving.questions import Answer
from limaml.serving.scoring import Scorer
from limaml.serving.tensors import Refused, TensorMetadata
from limaml.store.contract import Reader
from limaml.types import ROW, FeatureKind

__all__ = ["Described"]


class Described:
    """Inputs and outputs of one version.

    Outputs are `score` and `logit`, of each label where there are several (`score.LABEL`), `known` and `version`;
    `logit_sd`, where the version has its tasks' posteriors, is given where it is asked for.
    """

    def __init__(self, scorer: Scorer, reader: Reader) -> None:
        labels, tasks = scorer.schema.labels, scorer.schema.tasks
        ends = [""] if len(labels) == 1 else [f".{label.name}" for label in labels]
        sure = all(factor_type(task.name) in reader.dims for task in tasks)
        self.deviations = tuple(f"logit_sd{end}" for end in ends) if sure else ()
        self.usual = (*(f"{what}{end}" for end in ends for what in ("score", "logit")), "known", "version")
        self._heads = {f"{what}{end}": head for head, end in enumerate(ends) for what in ("score", "logit", "logit_sd")}
        self.inputs = _inputs(scorer)

    @property
    def outputs(self) -> list[TensorMetadata]:
        other = {"known": ("BOOL", (-1,)), "version": ("BYTES", (1,))}
        return [TensorMetadata(name, *other.get(name, ("FP32", (-1,)))) for name in (*self.usual, *self.deviations)]

    def wanted(self, outputs: Sequence[str]) -> Sequence[str]:
        """The outputs asked for; if none is named, all but deviations."""
        for name in outputs:
            if name not in self.usual and name not in self.deviations:
                sure = name.startswith("logit_sd")
                hint = " (limaml embed --uncertainty publishes what logit_sd needs)" if sure else ""
                raise Refused(
                    400,
                    f"There is no output {name[:80]!r}; this model has {', '.join([*self.usual, *self.deviations])}{hint}.",
                )
        return outputs or self.usual

    def output(self, name: str, answer: Answer) -> NDArray[Any]:
        """One output of an answer, `[rows]`, or `[1]` for the version."""
        if name == "known":
            return answer.known
        if name == "version":
            version = np.empty(1, dtype=np.object_)
            version[0] = answer.version.encode()
            return version
        head = self._heads[name]
        if name in self.deviations and answer.deviations is not None:
            return answer.deviations[:, head]
        return (answer.predictions if name.startswith("score") else answer.logits)[:, head]


def _inputs(scorer: Scorer) -> list[TensorMetadata]:
    """Task columns and feature columns, each with the datatype that fits best; others that fit are taken as well."""
    found = {column: TensorMetadata(column, "BYTES", (-1,)) for task in scorer.schema.tasks for column in task.columns}
    widths = {spec.name: spec.size for spec in scorer.trained.encoder.specs}
    for side in [ROW, *(task.name for task in scorer.schema.tasks)]:
        for lookup in scorer.lookups.on(side):
            feature = lookup.feature
            if feature.kind is FeatureKind.NUMERIC:
                tensor = TensorMetadata(feature.column, "FP32", (-1,))
            elif feature.kind is FeatureKind.VECTOR:
                tensor = TensorMetadata(feature.column, "FP32", (-1, widths[feature.name]))
            else:
                tensor = TensorMetadata(feature.column, lookup.datatype, (-1,))
            found.setdefault(feature.column, tensor)
    return list(found.values())
