"""An MLP passed through by hand: forward, back to its input, and the derivative of that, in buffers that are used again.

What autograd does for a row costs as much as the row's matrix products do: it writes every activation and every slope to
fresh memory, and notes how each came about. Where the layers are Linear and a known activation, the same passes are a
dozen calls that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limaml.meta.activations import Activation, activation_of

__all__ = ["Chain", "chain_of"]


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
    activations: list[Activation | None] = []
    linears: list[nn.Linear] = []
    pending: Activation | None = None
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
        found = activation_of(layer)
        if found is None or pending is not None:
            return None
        pending = found
    if not linears or pending is not None:
        return None
    return Chain(activations, linears)


class Chain:
    """`activation, Linear, activation, Linear, …` on rows, without gradients of autograd's.

    One pass `forward`, then any number `backward`; or one `tangent` and one `reverse`; or one `steepest` and one `turn`.
    What a pass gives is a buffer that the next pass of its kind writes over.
    """

    def __init__(self, activations: Sequence[Activation | None], linears: Sequence[nn.Linear]) -> None:
        self._layers = list(zip(activations, linears, strict=True))
        self._kept: list[tuple[Tensor, Tensor]] = []  # u and a of each layer
        self._moved: list[tuple[Tensor, Tensor]] = []  # their tangents
        self._buffers: dict[tuple[int, str], Tensor] = {}

    @property
    def linears(self) -> list[nn.Linear]:
        return [linear for _, linear in self._layers]

    @property
    def heads(self) -> int:
        """Width of the output."""
        return self._layers[-1][1].out_features

    @property
    def twice(self) -> bool:
        """Whether every activation's second derivative is known, so that `reverse` can be used."""
        return not any(activation is not None and activation.unknown for activation, _ in self._layers)

    @property
    def straight(self) -> bool:
        """Whether there is one output and no activation bends, so that `turn` can be used."""
        bends = any(a is not None and (a.unknown or a.curvature is not None) for a, _ in self._layers)
        return self.heads == 1 and not bends

    @property
    def short(self) -> bool:
        """Whether `turn` needs no more of `steepest` than its result, so that this may be kept instead."""
        return self.straight and len(self._layers) <= 2

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and bias of each layer, but for biases that are None."""
        return [p for _, linear in self._layers for p in (linear.weight, linear.bias) if p is not None]

    def _buffer(self, layer: int, use: str, rows: int, width: int, like: Tensor) -> Tensor:
        buffer = self._buffers.get((layer, use))
        if buffer is None or buffer.shape[0] < rows or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[layer, use] = like.new_empty(rows, width)
        return buffer[:rows]

    def room(self, rows: int, like: Tensor) -> list[Tensor]:
        """Memory for what the Linear layers give for so many rows, to be kept by the caller of `forward`."""
        return [like.new_empty(rows, linear.out_features) for _, linear in self._layers]

    def forward(self, h: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """`[n, in]` → `[n, out]`. `h` is written over. With `kept` the layers write there, so that `again` can be used."""
        self._kept.clear()
        for i, (activation, linear) in enumerate(self._layers):
            a = self._activated(i, activation, h, fresh=True)
            h = self._buffer(i, "forward", len(a), linear.out_features, a) if kept is None else kept[i]
            bias: Tensor | None = linear.bias  # (torch says it is always there)
            if bias is None:
                torch.mm(a, linear.weight.t(), out=h)
            else:
                torch.addmm(bias, a, linear.weight.t(), out=h)
        return h

    def again(self, h: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """What `forward(h, kept)` gave and noted, without its products."""
        self._kept.clear()
        for i, (activation, _) in enumerate(self._layers):
            self._activated(i, activation, kept[i - 1] if i else h, fresh=not i)
        return kept[-1]

    def _activated(self, i: int, activation: Activation | None, u: Tensor, *, fresh: bool) -> Tensor:
        """The activation's output for u, noted; if u is not `fresh`, its place is taken by the output already."""
        a = u
        if activation is not None:
            if not activation.in_place:
                a = self._buffer(i, "activation", len(u), u.shape[1], u)
            if fresh or not activation.in_place:
                activation.forward(u, a)
        self._kept.append((u, a))
        return a

    def backward(self, slope: Tensor, out: Tensor | None = None) -> Tensor:
        """Slope by the output `[n, out]` → slope by the input `[n, in]`, in `out` if that is given."""
        for i in reversed(range(len(self._layers))):
            activation = self._layers[i][0]
            slope = self._back(i, slope, "backward", None if i else out)
            if activation is not None:
                activation.backward(slope, *self._kept[i])
        return slope

    def _back(self, i: int, slope: Tensor, use: str, out: Tensor | None = None) -> Tensor:
        linear = self._layers[i][1]
        out = self._buffer(i, use, len(slope), linear.in_features, slope) if out is None else out
        if linear.out_features == 1:
            return torch.mul(slope, linear.weight, out=out)
        return torch.mm(slope, linear.weight, out=out)

    def tangent(self, v: Tensor) -> Tensor:
        """How the output `[n, out]` of the last `forward` moves as its input moves along `v` `[n, in]`, which is kept."""
        self._moved.clear()
        for i, (activation, linear) in enumerate(self._layers):
            u = a = v
            if activation is not None:
                a = self._buffer(i, "moved", len(v), v.shape[1], v).copy_(v)
                activation.backward(a, *self._kept[i])
            self._moved.append((u, a))
            v = torch.mm(a, linear.weight.t(), out=self._buffer(i, "tangent", len(v), linear.out_features, v))
        return v

    def reverse(self, q: Tensor, p: Tensor | None, gradients: Sequence[Tensor | None]) -> Tensor:
        """The derivative by the input, `[n, in]`, of what has the derivative `q` `[n, out]` by the output and `p` by the
        output's last `tangent` (None: it does not read that). Those by `parameters` are added to `gradients`."""
        left = list(gradients)
        for i in reversed(range(len(self._layers))):
            activation, linear = self._layers[i]
            bias = left.pop() if linear.bias is not None else None
            weight = left.pop()
            u, a = self._kept[i]
            if weight is not None:
                weight.addmm_(q.t(), a)
            if bias is not None:
                bias += q.sum(0)
            q = self._back(i, q, "backward")
            if activation is not None:
                activation.backward(q, u, a)
            if p is None:
                continue
            moved_u, moved_a = self._moved[i]
            if weight is not None:
                weight.addmm_(p.t(), moved_a)
            bends = activation is not None and activation.curvature is not None
            if not i and not bends:
                continue  # nothing reads p any more
            p = self._back(i, p, "again")
            if activation is not None and activation.curvature is not None:
                q += activation.curvature(u, a).mul_(moved_u).mul_(p)
            if activation is not None:
                activation.backward(p, u, a)
        return q

    def steepest(self, out: Tensor | None = None) -> Tensor:
        """The one output's derivative by the input of the last `forward`, `[n, in]`, in `out` if that is given."""
        h = self._kept[0][0]
        return self.backward(h.new_ones(len(h), 1), out)

    def along(self, steepest: Tensor, v: Tensor) -> Tensor:
        """`steepest` times `v` `[n, in]`, `[n, 1]`: how the output moves as the input moves along `v`."""
        return self._times(steepest, v).sum(1, keepdim=True)

    def scaled(self, steepest: Tensor, q: Tensor) -> Tensor:
        """`steepest` times `q` `[n, 1]`: the derivative by the input of what has the derivative `q` by the output."""
        return self._times(steepest, q)

    def _times(self, left: Tensor, right: Tensor, i: int = 0) -> Tensor:
        return torch.mul(left, right, out=self._buffer(i, "times", len(left), left.shape[1], left))

    def turn(self, q: Tensor, p: Tensor, v: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """What `reverse(q, p, gradients)` adds to `gradients` after `tangent(v)`, for a chain that is `straight`, after
        `steepest` (if it is not `short`), and the derivative by the input is q times that. `v` is written over."""
        given, last = iter(gradients), len(self._layers) - 1
        places = [(next(given), None if linear.bias is None else next(given)) for _, linear in self._layers]
        for i, (activation, linear) in enumerate(self._layers[: max(1, last)]):
            _, a = self._kept[i]
            if activation is not None:
                activation.backward(v, a, a)
            mixed = self._times(a, q, i).addcmul_(v, p)
            weight, bias = places[i]
            if i == last:  # the only layer
                _add(weight, mixed.sum(0))
                _add(bias, q.sum(0))
            elif i == last - 1:
                self._turn_head(q, mixed, *places[i], *places[last])
            else:
                slope = self._buffer(i + 1, "backward", len(v), linear.out_features, v)
                if weight is not None:
                    weight.addmm_(slope.t(), mixed)
                _add(bias, slope.t() @ q[:, 0])
                v = torch.mm(v, linear.weight.t(), out=self._buffer(i, "tangent", len(v), linear.out_features, v))

    def _turn_head(self, q: Tensor, mixed: Tensor, *gradients: Tensor | None) -> None:
        """`turn` for the last two Linear layers: all their gradients are in one product of what is open with `mixed`."""
        (_, linear), (activation, head) = self._layers[-2:]
        opened = self._buffer(len(self._layers) - 1, "opened", len(q), linear.out_features, q).fill_(1)
        if activation is not None:
            activation.backward(opened, *self._kept[-1])
        sums, counts = opened.t() @ mixed, opened.t() @ q
        weight, bias, of_head, head_bias = gradients
        _add(weight, head.weight.t() * sums)
        _add(bias, (head.weight.t() * counts)[:, 0])
        shift = 0.0 if linear.bias is None else linear.bias * counts[:, 0]
        _add(of_head, (linear.weight * sums).sum(1) + shift)
        _add(head_bias, q.sum(0))


def _add(gradient: Tensor | None, more: Tensor) -> None:
    if gradient is not None:
        gradient += more
