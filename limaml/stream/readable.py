"""Whether a model can read rows: the last question before they enter the log, where they stay."""

from __future__ import annotations

import polars as pl

from limaml.errors import DataError
from limaml.interactions.check_features import check_feature
from limaml.interactions.encode import Encoder
from limaml.interactions.side_tables import SideTables
from limaml.types import FeatureKind

__all__ = ["Readable"]

_PLAIN = (FeatureKind.CATEGORICAL, FeatureKind.NUMERIC)


class Readable:
    """Called with rows of the log; raises `DataError` if a value in them is one that the encoder refuses.

    Where the log brings lists, the rows are encoded, with the side tables joined: a vector of another width, say, would
    otherwise stop every later refresh. Of plain values the column's type leaves only infinity to look for.
    """

    def __init__(self, encoder: Encoder, side: SideTables) -> None:
        self._encoder, self._side = encoder, side

    def __call__(self, frame: pl.DataFrame) -> None:
        schema = self._encoder.schema
        own = [feature for feature in schema.features if feature.column in frame.columns]
        problems = []
        for feature in own:
            values = frame[feature.column]
            if feature.kind is FeatureKind.NUMERIC and not values.dtype.is_float():
                continue
            if values.null_count() < len(values) and feature.kind is not FeatureKind.CATEGORICAL:
                problems += [finding.text for finding in check_feature(frame, schema, feature)[0]]
        if problems:
            raise DataError("\n".join(problems))
        if any(feature.kind not in _PLAIN for feature in own):
            self._encoder.encode(self._side.join(frame, {feature.column for feature in schema.features}))
