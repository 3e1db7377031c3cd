"""How a version is asked by requests of one layout: what their names, types and shapes say is found out once.

A plan leaves the values to be checked. What it does not like it does not refuse: the long way says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from limaml.serving.columns import Column, plain_type
from limaml.serving.layouts import Layout, RawInputs
from limaml.serving.questions import Question
from limaml.serving.scoring import Scorer
from limaml.serving.tensors import InferRequest

__all__ = ["Plan", "Plans"]

PLANS_KEPT = 256


class Plan:
    """Made of a layout, and of a question that the long way made of a request laid out so, and the outputs that answer it."""

    def __init__(
        self, layout: Layout, types: Sequence[pl.DataType], scorer: Scorer, question: Question, wanted: Sequence[str]
    ) -> None:
        self.rows, self.parameters, self.wanted = question.rows, question.parameters, wanted
        self._columns = [
            (like.name, dtype, like.data.dtype.kind == "f", like.name in scorer.not_negative)
            for (like, *_), dtype in zip(layout.tensors, types, strict=True)
        ]

    @staticmethod
    def of(layout: Layout, scorer: Scorer, question: Question, wanted: Sequence[str]) -> Plan | None:
        """None where there is more to a column than its values."""
        types = []
        for like, *_ in layout.tensors:
            dtype = plain_type(like.data.dtype)
            names_tasks = like.data.dtype.kind == "f" and like.name in scorer.keys
            if dtype is None or names_tasks or like.name not in scorer.columns:
                return None
            types.append(dtype)
        return Plan(layout, types, scorer, question, wanted) if layout.fields is not None and question.rows else None

    def columns(self, inputs: Mapping[str, Any]) -> dict[str, Column] | None:
        """The columns of a request; None if one holds a number that is not finite, or an id that is negative."""
        assert isinstance(inputs, RawInputs)
        found = {}
        for (name, dtype, is_float, not_negative), array in zip(self._columns, inputs.arrays(), strict=True):
            if is_float:
                if not np.logical_and.reduce(np.isfinite(array)):
                    return None
            elif not_negative and np.minimum.reduce(array) < 0:
                return None
            found[name] = Column(dtype, array=array)
        return found


class Plans:
    """The plans of one version; those of layouts that nobody uses any more make room."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._plans: dict[Layout, Plan | None] = {}

    def find(self, request: InferRequest) -> Plan | None:
        """The plan for a request, if there was one like it."""
        return None if request.layout is None else self._plans.get(request.layout)

    def keep(self, request: InferRequest, question: Question, wanted: Sequence[str]) -> None:
        """Remember how a request was understood."""
        layout = request.layout
        if layout is not None and layout not in self._plans:
            while len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[layout] = Plan.of(layout, self._scorer, question, wanted)
