"""Which parameters of a meta block the inner loop adapts, on every engine alike: all, embedding tables if asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limaml.meta.tables import Lookup, looked_up, plain, refuse_unadaptable
from limaml.types import Features

__all__ = ["adapted_parameters", "call_with", "layer_of", "places_of", "structure_of", "widened"]


def adapted_parameters(block: nn.Module, tables: bool = False) -> dict[str, nn.Parameter]:
    """Name → parameter, each shared parameter once. A parameter that needs no gradient is frozen, not adapted.

    `tables`: whether embedding tables are adapted, too; `ModelError` names a table that cannot be.
    """
    if tables:
        refuse_unadaptable(block)
    frozen = {
        id(parameter)
        for module in block.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not tables
        for parameter in module.parameters(recurse=False)
    }
    return {name: p for name, p in block.named_parameters() if id(p) not in frozen and p.requires_grad}


def places_of(block: nn.Module, tables: bool = False) -> dict[str, list[str]]:
    """Name of each adapted parameter → the names of all the places where it sits (several, if weights are tied)."""
    names = {id(parameter): name for name, parameter in adapted_parameters(block, tables).items()}
    places: dict[str, list[str]] = {name: [] for name in names.values()}
    for prefix, module in block.named_modules():  # each module once, also where it has two names
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                places[names[id(parameter)]].append(f"{prefix}.{name}" if prefix else name)
    return places


def call_with(
    block: nn.Module,
    places: Mapping[str, list[str]],
    weights: Mapping[str, Tensor],
    x: Features,
    lookup: Lookup = plain,
) -> Tensor:
    """`block(x)` with `weights` in the place of its own parameters of these names, and its tables read by `lookup`.

    `functional_call` would find tied weights itself, but leaves a module that has two names with the wrong weights.
    """
    spread = {place: weight for name, weight in weights.items() for place in places[name]}
    with looked_up(block, lookup):
        z: Tensor = functional_call(block, spread, (x,), tie_weights=False)
    return widened(z, block)


def widened(values: Tensor, module: nn.Module) -> Tensor:
    """Floating values as exact as the module's parameters, where autocast has rounded them."""
    if values.dtype not in (torch.bfloat16, torch.float16):
        return values
    return values.to(next((p.dtype for p in module.parameters() if p.is_floating_point()), values.dtype))


def layer_of(parameter: str) -> str:
    """The layer a parameter belongs to: the weight and the bias of a module share their inner rate."""
    return parameter.rpartition(".")[0]


def structure_of(block: nn.Module) -> tuple[object, ...]:
    """What an engine has seen of a block when it was made for it; once this changes, the engine is out of date.

    Its modules and their modes, and its parameters by name, identity and whether they are frozen.
    """
    modules = tuple((name, id(module), module.training) for name, module in block.named_modules())
    return modules, tuple((name, id(p), p.requires_grad) for name, p in block.named_parameters())
