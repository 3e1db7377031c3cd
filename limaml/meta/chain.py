"""An MLP passed through by hand: forward, and back to its input, in buffers that are used again.

What autograd does for a row costs as much as the row's matrix products do: it writes every activation and every slope to
fresh memory, and notes how each came about. Where nothing will be differentiated twice, and the layers are Linear and a
known activation, the same passes are a dozen calls that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Chain", "chain_of"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Activation:
    """`forward(u, out)` fills `out`; `backward(slope, u, a)` turns the slope by the output a into that by u, in place."""

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    in_place: bool = True
    """Whether backward needs a alone, so that a may take u's place."""


def _activation(module: nn.Module) -> _Activation | None:
    kind = type(module)
    if kind is nn.ReLU:
        return _Activation(
            lambda u, out: torch.clamp_min(u, 0, out=out),
            lambda slope, u, a: _aten.threshold_backward.grad_input(slope, a, 0, grad_input=slope),
        )
    if kind is nn.Tanh:
        return _Activation(
            lambda u, out: torch.tanh(u, out=out),
            lambda slope, u, a: _aten.tanh_backward.grad_input(slope, a, grad_input=slope),
        )
    if kind is nn.Sigmoid:
        return _Activation(
            lambda u, out: torch.sigmoid(u, out=out),
            lambda slope, u, a: _aten.sigmoid_backward.grad_input(slope, a, grad_input=slope),
        )
    if kind is nn.SiLU:
        return _Activation(
            lambda u, out: _aten.silu.out(u, out=out),
            lambda slope, u, a: _aten.silu_backward.grad_input(slope, u, grad_input=slope),
            in_place=False,
        )
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        how = module.approximate
        return _Activation(
            lambda u, out: _aten.gelu.out(u, approximate=how, out=out),
            lambda slope, u, a: _aten.gelu_backward.grad_input(slope, u, approximate=how, grad_input=slope),
            in_place=False,
        )
    return None


def _passes(module: nn.Module) -> bool:
    """Whether a module hands its input on unchanged."""
    return type(module) is nn.Identity or (
        isinstance(module, nn.Dropout) and type(module) is nn.Dropout and (not module.training or module.p == 0)
    )


def _watched(module: nn.Module) -> bool:
    """Whether somebody hooked into a module, so that it must be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def chain_of(layers: Sequence[nn.Module]) -> Chain | None:
    """The chain of an alternation of activations and Linear layers that ends with a Linear; None for anything else."""
    activations: list[_Activation | None] = []
    linears: list[nn.Linear] = []
    pending: _Activation | None = None
    for layer in layers:
        if _watched(layer):
            return None
        if _passes(layer):
            continue
        if type(layer) is nn.Linear:
            activations.append(pending)
            linears.append(layer)
            pending = None
            continue
        found = _activation(layer)
        if found is None or pending is not None:
            return None
        pending = found
    if not linears or pending is not None:
        return None
    return Chain(activations, linears)


class Chain:
    """`activation, Linear, activation, Linear, …` on rows, without gradients. One pass forward, then any number back."""

    def __init__(self, activations: Sequence[_Activation | None], linears: Sequence[nn.Linear]) -> None:
        self._layers = list(zip(activations, linears, strict=True))
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def _buffer(self, layer: int, use: str, rows: int, width: int, like: Tensor) -> Tensor:
        buffer = self._buffers.get((layer, use))
        if buffer is None or buffer.shape[0] < rows or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[layer, use] = like.new_empty(rows, width)
        return buffer[:rows]

    def forward(self, h: Tensor) -> Tensor:
        """`[n, in]` → `[n, out]`, a buffer that the next pass writes over. `h` is written over, too."""
        self._kept.clear()
        rows = len(h)
        for i, (activation, linear) in enumerate(self._layers):
            u, a = h, h
            if activation is not None:
                a = h if activation.in_place else self._buffer(i, "activation", rows, h.shape[1], h)
                activation.forward(u, a)
            self._kept.append((u, a))
            h = self._buffer(i, "forward", rows, linear.out_features, h)
            bias: Tensor | None = linear.bias  # (torch says it is always there)
            if bias is None:
                torch.mm(a, linear.weight.t(), out=h)
            else:
                torch.addmm(bias, a, linear.weight.t(), out=h)
        return h

    def backward(self, slope: Tensor) -> Tensor:
        """Slope by the output `[n, out]` → slope by the input `[n, in]`, a buffer that the next pass back writes over."""
        for i in reversed(range(len(self._layers))):
            activation, linear = self._layers[i]
            out = self._buffer(i, "backward", len(slope), linear.in_features, slope)
            if linear.out_features == 1:
                torch.mul(slope, linear.weight, out=out)
            else:
                torch.mm(slope, linear.weight, out=out)
            if activation is not None:
                activation.backward(out, *self._kept[i])
            slope = out
        return slope
