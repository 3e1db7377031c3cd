"""Blocks from a config: what a user gets who brings data and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from limaml.config import Adaptation, ModelConfig
from limaml.meta.blocks import CrossNetwork, InteractionMLP, MetaMLP
from limaml.meta.model import MetaModel
from limaml.types import FeatureSpec, LossKind, embedding_name

__all__ = ["build_global_block", "build_meta_model"]


def build_global_block(
    specs: Sequence[FeatureSpec], config: ModelConfig, dims: Mapping[str, int], heads: int
) -> nn.Module:
    """The global block over all features and the embeddings of the task types in `dims` (task type → size)."""
    embeddings = {embedding_name(task): dim for task, dim in dims.items()}
    if config.global_block == "interaction":
        return InteractionMLP(
            specs,
            embeddings,
            heads=heads,
            embedding_dim=config.embedding_dim,
            hidden=config.hidden,
            factors=config.factors,
            dropout=config.dropout,
        )
    return CrossNetwork(
        specs,
        embeddings,
        heads=heads,
        embedding_dim=config.embedding_dim,
        layers=config.cross_layers,
        hidden=config.hidden,
        dropout=config.dropout,
    )


def build_meta_model(
    specs: Sequence[FeatureSpec],
    tasks: Sequence[str],
    losses: Sequence[LossKind],
    model: ModelConfig,
    adaptation: Adaptation,
) -> MetaModel:
    """A `MetaModel` with one meta block per task type, each over the features of its side."""
    dims = dict.fromkeys(tasks, model.dim)
    blocks = {
        task: MetaMLP(
            [spec for spec in specs if spec.side == task],
            model.dim,
            embedding_dim=model.meta_embedding_dim,
            hidden=model.meta_hidden,
        )
        for task in tasks
    }
    made = MetaModel(build_global_block(specs, model, dims, len(losses)), blocks, losses=losses, adaptation=adaptation)
    for module in made.modules() if model.sparse else ():
        if isinstance(module, nn.Embedding):
            module.sparse = True
    return made
