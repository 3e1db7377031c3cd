"""Ids that a model must no longer know: out of its vocabularies, and out of the tables that hold a vector for each.

Every other id keeps its number, so that the model scores all others as before. The place in the vocabulary is taken by a
value that no table holds, and the id's vectors by those of a value that training has not seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch

from limaml.interactions import Encoder
from limaml.interactions.codecs import RESERVED, Vocabulary
from limaml.interactions.columns import canonical_text
from limaml.meta.blocks import FeatureEmbedding
from limaml.meta.saved import load_model, save_model
from limaml.types import UNSEEN

__all__ = ["Scrubbed", "scrub_model"]


@dataclass(frozen=True)
class Scrubbed:
    """Feature → ids that were taken out; and the digest of the model folder before and after."""

    features: Mapping[str, int] = field(default_factory=dict)
    before: str = ""
    after: str = ""


def scrub_model(folder: Path | str, column: str, keys: Collection[str]) -> Scrubbed:
    """Take the values `keys` (as canonical text) of `column` out of the model in `folder`, which is replaced in one step.

    Nothing is written where no vocabulary holds them. Hashed features share their ids among values, and stay as they are.
    """
    trained = load_model(folder)
    codecs, counts, rows = dict(trained.encoder.codecs), dict[str, int](), dict[str, list[int]]()
    for feature in trained.encoder.schema.features:
        codec = codecs[feature.name]
        if feature.column == column and isinstance(codec, Vocabulary):
            texts = canonical_text(pl.Series(list(codec.values), strict=True)).to_list() if codec.values else []
            found = [place for place, text in enumerate(texts) if text in keys]
            if found:
                codecs[feature.name] = _without(codec, found)
                counts[feature.name], rows[feature.name] = len(found), [RESERVED + place for place in found]
    if not counts:
        return Scrubbed({}, trained.digest, trained.digest)
    with torch.no_grad():
        for module in trained.model.modules():
            if isinstance(module, FeatureEmbedding) and module.table is not None and module.spec.name in rows:
                module.table.weight[rows[module.spec.name]] = module.table.weight[UNSEEN].clone()
    encoder = Encoder(trained.encoder.schema, codecs)
    after = save_model(folder, trained.model, encoder, trained.config, trained.metrics)
    return Scrubbed(counts, trained.digest, after)


def _without(codec: Vocabulary, places: list[int]) -> Vocabulary:
    values, known = list(codec.values), set(codec.values)
    candidates: dict[str, object] = {
        "text": (f"\0forgotten {n}" for n in range(2**62)),
        "integer": range(-(2**63), 0),
        "float": (-1e300 * (1 + n * 1e-9) for n in range(2**62)),
    }
    unused = (value for value in candidates[codec.kind] if value not in known)  # type: ignore[attr-defined]
    for place in places:
        values[place] = next(unused)
    return Vocabulary(codec.kind, tuple(values))  # type: ignore[arg-type]
