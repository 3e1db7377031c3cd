"""Activations that are passed through by hand: their value, their slope and how that bends, in place where that is possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Activation", "activation_of"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`forward(u, out)` fills `out`; `backward(slope, u, a)` turns the slope by the output a into that by u, in place;
    `curvature(u, a)` is the second derivative: None where it is 0, or `unknown`."""

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    curvature: Callable[[Tensor, Tensor], Tensor] | None = None
    in_place: bool = True
    """Whether backward and curvature need a alone, so that a may take u's place."""
    unknown: bool = False


def _silu_curvature(u: Tensor, a: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 - s) * (2 + u * (1 - 2 * s))


def _gelu_curvature(u: Tensor, a: Tensor) -> Tensor:
    return torch.exp(-(u**2) / 2) * (2 - u**2) / math.sqrt(2 * math.pi)


def activation_of(module: nn.Module) -> Activation | None:
    """How a module is passed through; None if it is no activation that is known here."""
    kind = type(module)
    if kind is nn.ReLU:
        return Activation(
            lambda u, out: torch.clamp_min(u, 0, out=out),
            lambda slope, u, a: _aten.threshold_backward.grad_input(slope, a, 0, grad_input=slope),
        )
    if kind is nn.Tanh:
        return Activation(
            lambda u, out: torch.tanh(u, out=out),
            lambda slope, u, a: _aten.tanh_backward.grad_input(slope, a, grad_input=slope),
            lambda u, a: 2 * a * (a * a - 1),
        )
    if kind is nn.Sigmoid:
        return Activation(
            lambda u, out: torch.sigmoid(u, out=out),
            lambda slope, u, a: _aten.sigmoid_backward.grad_input(slope, a, grad_input=slope),
            lambda u, a: a * (1 - a) * (1 - 2 * a),
        )
    if kind is nn.SiLU:
        return Activation(
            lambda u, out: _aten.silu.out(u, out=out),
            lambda slope, u, a: _aten.silu_backward.grad_input(slope, u, grad_input=slope),
            _silu_curvature,
            in_place=False,
        )
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        how = module.approximate
        return Activation(
            lambda u, out: _aten.gelu.out(u, approximate=how, out=out),
            lambda slope, u, a: _aten.gelu_backward.grad_input(slope, u, approximate=how, grad_input=slope),
            _gelu_curvature if how == "none" else None,
            in_place=False,
            unknown=how != "none",
        )
    return None
