"""The engine: exact MAML without per-task weights. `README.md` in this folder derives it.

A meta block's input is constant within a task, so the inner gradient of a Linear layer `u = W x + b` is an outer product
`g xᵀ` with `g = ∂loss/∂u`. After K steps the adapted layer is `W x' + b + Σₖ (xₖᵀx' + 1) (−αₖ gₖ)`: the pairs (xₖ, gₖ) are
kept, the adapted weights never exist, and `W x'` is one product shared by all tasks of the batch.

Normalisation layers keep their deltas as vectors. Any other parameter (a scale, a learned query, the fused weights of an
attention module) is given a dense delta per task, and the block runs under `torch.func.vmap`, which passes through the
shared products. A parameter read behind its module's back would get a wrong gradient, so each block is first tried: on a
sample, the gradients the pairs give are compared with autograd's, and layers that disagree are made dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import vmap

from limaml.meta.adapted import adapted_parameters, call_with, layer_of, places_of
from limaml.meta.engine import Objective, Rate
from limaml.meta.masks import SharedMasks
from limaml.meta.proof import FAILURES, Unsupported, first_line, noisy_copies
from limaml.meta.support import Support
from limaml.types import Features

__all__ = ["LowRank", "Unsupported"]

_NORMS = (nn.LayerNorm, nn.RMSNorm)


class _NotByTask(Unsupported):
    """A layer is called on something whose first dimension is not the tasks."""


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
    input: Tensor  # (tasks, …, in) of a Linear; of a norm: the normalised input
    output: Tensor | None  # where the slope is taken; None: a probe stands in for it


class LowRank:
    """Adapts `block` for many tasks at once. Raises `Unsupported` where that would not be exact."""

    name = "lowrank"

    linear: dict[str, nn.Linear]
    norm: dict[str, nn.Module]
    by_task: bool  # every followed layer is called on tensors whose first dimension is the tasks

    def __init__(self, block: nn.Module, sample: Features) -> None:
        self._read(block)
        for copied, features, tolerance in noisy_copies(block, sample):
            trial = self.on(copied)
            try:
                trial._drop_wrong(features, tolerance)
            except Unsupported:
                raise
            except FAILURES as error:
                problem = first_line(error)
                continue
            self.linear = {name: module for name, module in self.linear.items() if name in trial.linear}
            self.norm = {name: module for name, module in self.norm.items() if name in trial.norm}
            self.by_task = trial.by_task
            return
        raise Unsupported(f"The block cannot be batched over tasks: {problem}.")

    def _read(self, block: nn.Module) -> None:
        self.block = block
        self.adapted, self.places = adapted_parameters(block), places_of(block)
        self.linear, self.norm, self.by_task = {}, {}, True
        self._classify()

    def on(self, block: nn.Module) -> LowRank:
        """The same engine for a copy of the block."""
        other = LowRank.__new__(LowRank)
        other._read(block)
        other.linear = {name: module for name, module in other.linear.items() if name in self.linear}
        other.norm = {name: module for name, module in other.norm.items() if name in self.norm}
        other.by_task = self.by_task
        return other

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
                    "one task depend on the others. Use LayerNorm, or keep it in evaluation mode."
                )
            own = dict(module.named_parameters(recurse=False))
            shared = any(owners[id(parameter)] > 1 for parameter in own.values())
            plain = "weight" in own and own.keys() <= {"weight", "bias"}
            if not plain or shared or not all(parameter.requires_grad for parameter in own.values()):
                continue
            if type(module) is nn.Linear:
                self.linear[name] = module
            elif type(module) in _NORMS:
                self.norm[name] = module

    @property
    def flat(self) -> bool:
        """Whether one plain call of the block serves all tasks, so that nothing needs `vmap`."""
        return self.by_task and not self.dense

    @property
    def dense(self) -> list[str]:
        """Adapted parameters that get a dense delta per task."""
        return [name for name in self.adapted if layer_of(name) not in self.linear and layer_of(name) not in self.norm]

    def _drop_wrong(self, features: Features, tolerance: float) -> None:
        """Make those layers dense whose gradient is not what their calls say."""
        for _ in range(3):
            try:
                wrong = self._wrong(features, tolerance)
            except _NotByTask:
                if not self.by_task:
                    raise
                self.by_task = False
                continue
            if not wrong:
                return
            if not wrong & {*self.linear, *self.norm}:
                raise Unsupported(f"The parameters of {sorted(wrong)} cannot be followed through the block's forward.")
            for layer in wrong:
                self.linear.pop(layer, None)
                self.norm.pop(layer, None)
        raise Unsupported("The block's layers do not give the same gradients twice.")

    def _wrong(self, features: Features, tolerance: float) -> set[str]:
        """Layers whose parameters get another gradient than from autograd, one task at a time."""
        tasks = next(iter(features.values())).shape[0]
        with torch.enable_grad():
            z, calls, probes, dense = self._forward(features, _Deltas(), tasks)
            if z.dim() != 2 or z.shape[0] != tasks:
                raise Unsupported(
                    f"The meta block returns a tensor of shape {tuple(z.shape)} for {tasks} tasks; [tasks, dim] is needed."
                )
            weights = torch.sin(torch.arange(1, z.numel() + 1, dtype=z.dtype, device=z.device)).view_as(z)
            minus = z.new_tensor(-1.0)
            loss = (z * weights).sum()
            deltas = self._step(_Deltas(), loss, calls, probes, dense, lambda step, layer: minus, 0, False)
        errors: list[tuple[str, float, float]] = []
        for task in range(tasks):
            one = {name: values[task : task + 1] for name, values in features.items()}
            with torch.enable_grad():
                out = (self.block(one) * weights[task]).sum()
                expected = torch.autograd.grad(out, list(self.adapted.values()), allow_unused=True)
            for (name, parameter), gradient in zip(self.adapted.items(), expected, strict=True):
                truth = torch.zeros_like(parameter) if gradient is None else gradient
                found = self._dense_delta(name, deltas, task)
                error = truth if found is None else found - truth
                errors.append((name, float(error.abs().max()), float(truth.abs().max())))
        largest = max(size for _, _, size in errors)  # zeros by symmetry are not zeros in floating point
        return {layer_of(name) for name, error, size in errors if not error <= tolerance * (size + 1e-3 * largest)}

    def _dense_delta(self, name: str, deltas: _Deltas, task: int) -> Tensor | None:
        layer, kind = layer_of(name), name.rpartition(".")[2]
        if layer in self.linear:
            if layer not in deltas.inputs:
                return None
            x, g = deltas.inputs[layer][task], deltas.slopes[layer][task]  # (pairs, in), (pairs, out)
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

        def input_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
            return args[0] if args else kwargs["input"]

        def on_linear(layer: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
                x = input_of(args, kwargs)
                if layer in deltas.inputs:
                    inputs, slopes = deltas.inputs[layer], deltas.slopes[layer]
                    inner = torch.bmm(_pairs(x, len(inputs), 1), inputs.transpose(1, 2))  # (tasks, calls, pairs)
                    if module.bias is not None:
                        inner = inner + 1
                    out = out + torch.bmm(inner, slopes).reshape(out.shape)
                return finish(layer, x, out)

            return hook

        def on_norm(layer: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
                x = input_of(args, kwargs)
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

        handles = [m.register_forward_hook(on_linear(name), with_kwargs=True) for name, m in self.linear.items()]
        handles += [m.register_forward_hook(on_norm(name), with_kwargs=True) for name, m in self.norm.items()]
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
        if self.flat:
            with self._hooks(deltas, calls, None):
                z: Tensor = self.block(features)
            for call in calls:
                if call.input.dim() < 2 or call.input.shape[0] != tasks:
                    raise _NotByTask(
                        f"Layer '{call.layer}' is called on a tensor of shape {tuple(call.input.shape)} for {tasks} "
                        "tasks: keep the tasks in the first dimension."
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
                z = call_with(self.block, self.places, weights, batch(feature))
            layers[:] = [call.layer for call in calls]
            return z.squeeze(0), [call.input for call in calls]

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
        if not targets or not loss.requires_grad:
            return deltas
        slopes = cast(
            Sequence[Tensor | None],
            torch.autograd.grad(loss, targets, create_graph=second_order, allow_unused=True),
        )
        new = _Deltas(dict(deltas.inputs), dict(deltas.slopes), dict(deltas.scale), dict(deltas.shift))
        for call, slope in zip(calls, slopes, strict=False):
            if slope is None:
                continue
            tasks = slope.shape[0]
            x = call.input if second_order else call.input.detach()
            step_size = -rate(step, call.layer)
            if call.layer in self.linear:
                _append(new.inputs, call.layer, _pairs(x, tasks, 1))
                _append(new.slopes, call.layer, _pairs(slope, tasks, 1) * step_size)
            else:
                module = self.norm[call.layer]
                own = len(cast(nn.LayerNorm, module).normalized_shape)
                slope = _pairs(slope, tasks, own)
                _add(new.scale, call.layer, (slope * _pairs(x, tasks, own)).sum(1) * step_size)
                if getattr(module, "bias", None) is not None:
                    _add(new.shift, call.layer, slope.sum(1) * step_size)
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
        like = next(iter(features.values()))
        tasks, outer = like.shape[0], torch.is_grad_enabled()
        masks = SharedMasks(self.block)
        deltas = _Deltas()
        for step in range(steps):
            with torch.enable_grad():
                with masks.drawn(like):
                    z, calls, probes, dense = self._forward(features, deltas, tasks)
                loss = objective(support, z).sum()
                deltas = self._step(deltas, loss, calls, probes, dense, rate, step, order == 2 and outer)
            if not outer:
                deltas = _detached(deltas)
        with masks.drawn(like):
            adapted = self._forward(features, deltas, tasks)[0]
        return adapted if outer else adapted.detach()


def _detached(deltas: _Deltas) -> _Deltas:
    def cut(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in values.items()}

    return _Deltas(cut(deltas.inputs), cut(deltas.slopes), cut(deltas.scale), cut(deltas.shift), cut(deltas.dense))


def _pairs(values: Tensor, tasks: int, own: int) -> Tensor:
    """(tasks, …, *own dimensions) → (tasks, calls, *own dimensions)."""
    return values.reshape(tasks, -1, *values.shape[values.dim() - own :])


def _spread(delta: Tensor, out: Tensor) -> Tensor:
    """(tasks, *shape) → (tasks, 1, …, *shape), to the dimensions of `out`."""
    if out.dim() < delta.dim():  # under vmap, a norm of one vector
        return delta.squeeze(0)
    return delta.view(delta.shape[0], *[1] * (out.dim() - delta.dim()), *delta.shape[1:])


def _append(store: dict[str, Tensor], key: str, value: Tensor) -> None:
    store[key] = torch.cat([store[key], value], 1) if key in store else value


def _add(store: dict[str, Tensor], key: str, value: Tensor) -> None:
    store[key] = store[key] + value if key in store else value
