"""The engine: exact MAML without per-task weights. `README.md` in this folder derives it.

A meta block's input is constant within a task, so the inner gradient of a Linear layer `u = W x + b` is an outer product
`g xᵀ` with `g = ∂loss/∂u`. After K steps the adapted layer is `W x' + b + Σₖ (xₖᵀx' + 1) (−αₖ gₖ)`: the pairs (xₖ, gₖ) are
kept, the adapted weights never exist, and `W x'` is one product shared by all tasks of the batch.

Normalisation layers keep their deltas as vectors. Any other parameter (a scale, a learned query, the fused weights of an
attention module) is given a dense delta per task, and the block runs under `torch.func.vmap`, which passes through the
shared products. A parameter read behind its module's back would get a wrong gradient, so each block is first *proved*: on
a sample, the gradients the pairs give are compared with autograd's, and layers that disagree are made dense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from limaml.errors import ModelError
from limaml.meta.adapted import adapted_parameters, layer_of
from limaml.meta.engine import Objective, Rate
from limaml.meta.support import Support
from limaml.types import Features

__all__ = ["LowRank", "Unsupported"]

_NORMS = (nn.LayerNorm, nn.RMSNorm)


class Unsupported(ModelError):
    """A block has something this engine cannot adapt exactly; the message names the module and the reason."""


@dataclass
class _Deltas:
    """What K steps have added to the layers of every task. First dimension: tasks."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # layer → (tasks, pairs, in)
    slopes: dict[str, Tensor] = field(default_factory=dict)  # layer → (tasks, pairs, out), times −rate
    scale: dict[str, Tensor] = field(default_factory=dict)  # norm → (tasks, *shape)
    shift: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)  # parameter → (tasks, *shape)


@dataclass
class _Call:
    """One call of a layer in one forward pass."""

    layer: str
    input: Tensor  # of a Linear; of a norm: the normalised input
    output: Tensor | None  # where the slope is taken; None: a probe stands in for it


class LowRank:
    """Adapts `block` for many tasks at once. Raises `Unsupported` where that would not be exact."""

    name = "lowrank"

    def __init__(self, block: nn.Module, sample: Features) -> None:
        self._read(block)
        for layer in self._disproved(sample):
            self.linear.pop(layer, None)
            self.norm.pop(layer, None)

    def _read(self, block: nn.Module) -> None:
        self.block = block
        self.adapted = adapted_parameters(block)
        self.linear: dict[str, nn.Linear] = {}
        self.norm: dict[str, nn.Module] = {}
        self._classify()

    def _classify(self) -> None:
        owners: dict[int, int] = {}
        for module in self.block.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        for name, module in self.block.named_modules():
            if isinstance(module, nn.RNNBase | nn.RNNCellBase):
                raise Unsupported(
                    f"Module '{name}' ({type(module).__name__}) is recurrent: its kernels cannot be batched over tasks."
                )
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                raise Unsupported(
                    f"Module '{name}' ({type(module).__name__}) normalises over the batch in training mode, which makes "
                    "one task depend on the others. Use LayerNorm, or call .eval() on it."
                )
            own = list(module.parameters(recurse=False))
            shared = any(owners[id(parameter)] > 1 for parameter in own)
            if not own or shared or not all(parameter.requires_grad for parameter in own):
                continue
            if type(module) is nn.Linear:
                self.linear[name] = module
            elif type(module) in _NORMS:
                self.norm[name] = module

    @property
    def dense(self) -> list[str]:
        """Adapted parameters that get a dense delta per task."""
        return [name for name in self.adapted if layer_of(name) not in self.linear and layer_of(name) not in self.norm]

    def _disproved(self, sample: Features) -> set[str]:
        """Layers whose gradient is not what their calls say, found on a noisy copy of the block: a layer that starts at
        zero would prove nothing about those before it."""
        features = {name: torch.cat([values[:2], values[:1]])[:2] for name, values in sample.items()}
        noise = torch.Generator().manual_seed(0)
        copied = LowRank.__new__(LowRank)
        copied._read(copy.deepcopy(self.block).eval())
        with torch.no_grad():
            for parameter in copied.block.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter), alpha=0.1)
        wrong = copied._wrong(features)
        if wrong:
            for layer in wrong:
                copied.linear.pop(layer, None)
                copied.norm.pop(layer, None)
            still = copied._wrong(features)
            if still:
                raise Unsupported(f"The parameters of {sorted(still)} cannot be followed through the block's forward.")
        return wrong

    def _wrong(self, features: Features) -> set[str]:
        tasks = next(iter(features.values())).shape[0]
        try:
            with torch.enable_grad():
                z, calls, probes, dense = self._forward(features, _Deltas(), tasks)
                if z.dim() != 2 or z.shape[0] != tasks:
                    raise Unsupported(
                        f"The meta block returns a tensor of shape {tuple(z.shape)} for {tasks} tasks; [tasks, dim] is needed."
                    )
                weights = torch.sin(torch.arange(1, z.numel() + 1, dtype=z.dtype)).view_as(z)
                deltas = self._step(
                    _Deltas(),
                    (z * weights).sum(),
                    calls,
                    probes,
                    dense,
                    lambda step, layer: z.new_tensor(-1.0),
                    0,
                    False,
                )
        except Unsupported:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise Unsupported(
                f"The block cannot be batched over tasks: {str(error).strip().splitlines()[0]}"
            ) from error
        wrong: set[str] = set()
        for task in range(tasks):
            one = {name: values[task : task + 1] for name, values in features.items()}
            with torch.enable_grad():
                out = (self.block(one) * weights[task]).sum()
                expected = torch.autograd.grad(out, list(self.adapted.values()), allow_unused=True)
            for (name, parameter), gradient in zip(self.adapted.items(), expected, strict=True):
                found = self._dense_delta(name, deltas, task)
                truth = torch.zeros_like(parameter) if gradient is None else gradient
                size = float(truth.abs().max()) + 1e-6
                if found is None:
                    found = torch.zeros_like(truth)
                if float((found - truth).abs().max()) > 1e-3 * size:
                    wrong.add(layer_of(name))
        return wrong

    def _dense_delta(self, name: str, deltas: _Deltas, task: int) -> Tensor | None:
        layer, kind = layer_of(name), name.rpartition(".")[2]
        if layer in self.linear:
            if layer not in deltas.inputs:
                return None
            x, g = deltas.inputs[layer][task], deltas.slopes[layer][task]
            return g.T @ x if kind == "weight" else g.sum(0)
        if layer in self.norm:
            deltas_of = deltas.scale if kind == "weight" else deltas.shift
            return deltas_of[layer][task] if layer in deltas_of else None
        return deltas.dense[name][task] if name in deltas.dense else None

    # ---- the forward pass with deltas -------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self, deltas: _Deltas, calls: list[_Call], probes: list[Tensor] | None) -> Iterator[None]:
        def finish(layer: str, x: Tensor, out: Tensor) -> Tensor:
            if probes is not None:
                out = out + probes[len(calls)] if len(calls) < len(probes) else out
                calls.append(_Call(layer, x, None))
            else:
                out = out if out.requires_grad else out.requires_grad_()
                calls.append(_Call(layer, x, out))
            return out

        def on_linear(layer: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                x = args[0]
                if layer in deltas.inputs:
                    flat = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (tasks, calls, in)
                    inner = torch.bmm(flat, deltas.inputs[layer].transpose(1, 2))
                    if module.bias is not None:
                        inner = inner + 1
                    out = out + torch.bmm(inner, deltas.slopes[layer]).view_as(out)
                return finish(layer, x, out)

            return hook

        def on_norm(layer: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                x = args[0]
                if isinstance(module, nn.LayerNorm):
                    normal = nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
                else:
                    assert isinstance(module, nn.RMSNorm)
                    normal = nn.functional.rms_norm(x, module.normalized_shape, None, module.eps)
                if layer in deltas.scale:
                    out = out + normal * _spread(deltas.scale[layer], out)
                if layer in deltas.shift:
                    out = out + _spread(deltas.shift[layer], out)
                return finish(layer, normal, out)

            return hook

        handles = [module.register_forward_hook(on_linear(name)) for name, module in self.linear.items()]
        handles += [module.register_forward_hook(on_norm(name)) for name, module in self.norm.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(
        self, features: Features, deltas: _Deltas, tasks: int
    ) -> tuple[Tensor, list[_Call], list[Tensor], dict[str, Tensor]]:
        """`z` `[tasks, dim]`, the calls, and where slopes are taken: probes, and dense deltas with gradients on."""
        calls: list[_Call] = []
        if not self.dense:
            with self._hooks(deltas, calls, None):
                z: Tensor = self.block(features)
            for call in calls:
                if call.input.shape[0] != tasks:
                    raise Unsupported(
                        f"Layer '{call.layer}' is called on {call.input.shape[0]} rows for {tasks} tasks: keep the tasks in the first dimension."
                    )
            return z, calls, [], {}
        return self._forward_vmapped(features, deltas, tasks)

    def _forward_vmapped(
        self, features: Features, deltas: _Deltas, tasks: int
    ) -> tuple[Tensor, list[_Call], list[Tensor], dict[str, Tensor]]:
        shapes: list[tuple[int, ...]] = []

        def shape_of(_module: nn.Module, _args: object, out: Tensor) -> None:
            shapes.append(tuple(out.shape))

        followed = [*self.linear.values(), *self.norm.values()]
        handles = [module.register_forward_hook(shape_of) for module in followed]
        try:
            with torch.no_grad():
                self.block({name: values[:1] for name, values in features.items()})
        finally:
            for handle in handles:
                handle.remove()
        like = next(iter(self.adapted.values()))
        probes = [like.new_zeros(tasks, *shape, requires_grad=True) for shape in shapes]
        dense = {
            name: deltas.dense[name] if name in deltas.dense else like.new_zeros(tasks, *self.adapted[name].shape)
            for name in self.dense
        }
        dense = {name: delta if delta.requires_grad else delta.requires_grad_() for name, delta in dense.items()}
        layers: list[str] = []

        def one(
            feature: Features,
            delta: dict[str, Tensor],
            x: dict[str, Tensor],
            g: dict[str, Tensor],
            scale: dict[str, Tensor],
            shift: dict[str, Tensor],
            probe: list[Tensor],
        ) -> tuple[Tensor, list[Tensor]]:
            def batch(values: dict[str, Tensor]) -> dict[str, Tensor]:
                return {name: value.unsqueeze(0) for name, value in values.items()}

            calls: list[_Call] = []
            own = _Deltas(batch(x), batch(g), batch(scale), batch(shift))
            weights = {name: self.adapted[name] + delta[name] for name in delta}
            with self._hooks(own, calls, probe):
                z = functional_call(self.block, weights, (batch(feature),), tie_weights=True)
            layers[:] = [call.layer for call in calls]
            return z.squeeze(0), [call.input.squeeze(0) for call in calls]

        z, inputs = vmap(one, randomness="different")(
            features, dense, deltas.inputs, deltas.slopes, deltas.scale, deltas.shift, probes
        )
        calls = [_Call(layer, x, None) for layer, x in zip(layers, inputs, strict=True)]
        return z, calls, probes, dense

    # ---- one inner step ---------------------------------------------------------------------------------------------

    def _step(
        self,
        deltas: _Deltas,
        loss: Tensor,
        calls: list[_Call],
        probes: list[Tensor],
        dense: dict[str, Tensor],
        rate: Rate,
        step: int,
        second_order: bool,
    ) -> _Deltas:
        outputs = [call.output for call in calls if call.output is not None] or probes
        targets = [*outputs, *dense.values()]
        slopes = cast(
            Sequence[Tensor | None],
            torch.autograd.grad(loss, targets, create_graph=second_order, allow_unused=True),
        )
        new = _Deltas(dict(deltas.inputs), dict(deltas.slopes), dict(deltas.scale), dict(deltas.shift))
        for call, slope in zip(calls, slopes, strict=False):
            if slope is None:
                continue
            if probes:
                slope = slope.squeeze(1)
            x = call.input if second_order else call.input.detach()
            step_size = -rate(step, call.layer)
            if call.layer in self.linear:
                x = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
                slope = slope.flatten(1, -2) if slope.dim() > 2 else slope.unsqueeze(1)
                _append(new.inputs, call.layer, x)
                _append(new.slopes, call.layer, slope * step_size)
            else:
                module = self.norm[call.layer]
                inner = tuple(range(1, slope.dim() - len(cast(nn.LayerNorm, module).normalized_shape)))
                _add(new.scale, call.layer, (slope * x).sum(inner) * step_size if inner else slope * x * step_size)
                if getattr(module, "bias", None) is not None:
                    _add(new.shift, call.layer, slope.sum(inner) * step_size if inner else slope * step_size)
        for (name, delta), slope in zip(dense.items(), slopes[len(outputs) :], strict=True):
            old = delta if second_order else deltas.dense.get(name, torch.zeros_like(delta))
            new.dense[name] = old if slope is None else old - rate(step, layer_of(name)) * slope
        return new

    def adapt(
        self,
        features: Features,
        support: Support,
        objective: Objective,
        steps: int,
        rate: Rate,
        order: int,
    ) -> Tensor:
        """Meta embeddings `[tasks, dim]` after `steps` inner steps on `objective(support, z)` `[tasks]`."""
        tasks = next(iter(features.values())).shape[0]
        outer = torch.is_grad_enabled()
        deltas = _Deltas()
        for step in range(steps):
            with torch.enable_grad():
                z, calls, probes, dense = self._forward(features, deltas, tasks)
                loss = objective(support, z).sum()
                deltas = self._step(deltas, loss, calls, probes, dense, rate, step, order == 2 and outer)
            if not outer:
                deltas = _detached(deltas)
        if not self.dense:
            with self._hooks(deltas, [], None):
                adapted: Tensor = self.block(features)
        else:
            adapted = self._forward_vmapped(features, deltas, tasks)[0]
        return adapted if outer else adapted.detach()


def _detached(deltas: _Deltas) -> _Deltas:
    def cut(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in values.items()}

    return _Deltas(cut(deltas.inputs), cut(deltas.slopes), cut(deltas.scale), cut(deltas.shift), cut(deltas.dense))


def _spread(delta: Tensor, out: Tensor) -> Tensor:
    """(tasks, *shape) → (tasks, 1, …, *shape), to the dimensions of `out`."""
    return delta.view(delta.shape[0], *[1] * (out.dim() - delta.dim()), *delta.shape[1:])


def _append(store: dict[str, Tensor], key: str, value: Tensor) -> None:
    store[key] = torch.cat([store[key], value], 1) if key in store else value


def _add(store: dict[str, Tensor], key: str, value: Tensor) -> None:
    store[key] = store[key] + value if key in store else value
