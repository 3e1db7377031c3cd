"""Which parameters of a meta block the inner loop adapts: all but embedding tables, on every engine alike."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from limaml.types import Features

__all__ = ["adapted_parameters", "call_with", "layer_of", "places_of", "structure_of"]


def adapted_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, each shared parameter once. A parameter that needs no gradient is frozen, not adapted."""
    frozen = {
        id(parameter)
        for module in block.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    return {name: p for name, p in block.named_parameters() if id(p) not in frozen and p.requires_grad}


def places_of(block: nn.Module) -> dict[str, list[str]]:
    """Name of each adapted parameter → the names of all the places where it sits (several, if weights are tied)."""
    names = {id(parameter): name for name, parameter in adapted_parameters(block).items()}
    places: dict[str, list[str]] = {name: [] for name in names.values()}
    for prefix, module in block.named_modules():  # each module once, also where it has two names
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                places[names[id(parameter)]].append(f"{prefix}.{name}" if prefix else name)
    return places


def call_with(block: nn.Module, places: Mapping[str, list[str]], weights: Mapping[str, Tensor], x: Features) -> Tensor:
    """`block(x)` with `weights` in the place of its own parameters of these names.

    `functional_call` would find tied weights itself, but leaves a module that has two names with the wrong weights.
    """
    spread = {place: weight for name, weight in weights.items() for place in places[name]}
    z: Tensor = functional_call(block, spread, (x,), tie_weights=False)
    return z


def layer_of(parameter: str) -> str:
    """The layer a parameter belongs to: the weight and the bias of a module share their inner rate."""
    return parameter.rpartition(".")[0]


def structure_of(block: nn.Module) -> tuple[object, ...]:
    """What an engine has seen of a block when it was made for it; once this changes, the engine is out of date.

    Its modules and their modes, and its parameters by name, identity and whether they are frozen.
    """
    modules = tuple((name, id(module), module.training) for name, module in block.named_modules())
    return modules, tuple((name, id(p), p.requires_grad) for name, p in block.named_parameters())
