"""The engine: exact MAML without per-task weights. `README.md` in this folder derives it.

A meta block's input is constant within a task, so the inner gradient of a Linear layer `u = W x + b` is an outer product
`g xᵀ` with `g = ∂loss/∂u`. After K steps the adapted layer is `W x' + b + Σₖ (xₖᵀx' + 1) (−αₖ gₖ)`: the pairs (xₖ, gₖ) are
kept, the adapted weights never exist, and `W x'` is one product shared by all tasks of the batch. `deltas.py` says what is
kept of each kind of layer; this file runs the block.

Any other parameter (a scale, a learned query, the fused weights of an attention module) is given a dense delta per task,
and the block runs under `torch.func.vmap`, which passes through the shared products. A parameter read behind its module's
back would get a wrong gradient, so each block is first tried: on a sample, the gradients the calls give are compared with
autograd's, and layers that disagree are made dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from limaml.meta.adapted import adapted_parameters, call_with, layer_of, places_of, widened
from limaml.meta.deltas import Call, Deltas, Followed, TableLayer, followed_layers
from limaml.meta.engine import Objective, Rate
from limaml.meta.masks import SharedMasks
from limaml.meta.precision import full
from limaml.meta.proof import noisy_copies
from limaml.meta.reasons import Failed, Unsupported, named, naming_module
from limaml.meta.support import Support
from limaml.meta.tables import Lookup, Table, by_task, looked_up, tables_of
from limaml.types import Features

__all__ = ["LowRank", "Unsupported"]


class _NotByTask(Unsupported):
    """A layer is called on something whose first dimension is not the tasks."""


@dataclass
class _Noted:
    """One call of a layer in one forward pass."""

    layer: str
    read: Tensor  # (tasks, …): what the layer reads of its input
    output: Tensor | None  # where the slope is taken; None: a probe stands in for it


@dataclass
class _Pass:
    """One forward pass, and where its slopes are taken: at outputs or at probes, and at dense deltas."""

    z: Tensor  # (tasks, dim)
    calls: list[_Noted]
    outputs: list[Tensor]  # one per call
    dense: dict[str, Tensor]  # parameter → (tasks, *shape), with gradients on


@dataclass
class _State:
    """What the steps so far have added, for every task."""

    followed: Deltas
    dense: dict[str, Tensor]  # parameter that is not followed → (tasks, *shape)


class LowRank:
    """Adapts `block` for many tasks at once, its tables too if `tables`. Raises `Unsupported` where that is not exact."""

    name = "lowrank"

    followed: dict[str, Followed]
    by_task: bool  # every followed layer is called on tensors whose first dimension is the tasks

    def __init__(self, block: nn.Module, sample: Features, tables: bool = False) -> None:
        self._read(block, tables)
        for copied, features, tolerance in noisy_copies(block, sample):
            trial = self.on(copied)
            try:
                with naming_module(copied, "cannot be batched over tasks"):
                    trial._drop_wrong(features, tolerance)
            except Failed as error:
                problem = error
                continue
            self.followed = {name: layer for name, layer in self.followed.items() if name in trial.followed}
            self.by_task = trial.by_task
            return
        raise problem

    def _read(self, block: nn.Module, tables: bool) -> None:
        _refuse(block)
        self.block, self.tables = block, tables
        self.adapted, self.places = adapted_parameters(block, tables), places_of(block, tables)
        self.followed, self.by_task = followed_layers(block, self.adapted), True
        layers = {id(parameter): layer_of(name) for name, parameter in self.adapted.items()}
        self._layer_of_table = {name: layers.get(id(module.weight)) for name, module in tables_of(block).items()}

    def on(self, block: nn.Module) -> LowRank:
        """The same engine for a copy of the block."""
        other = LowRank.__new__(LowRank)
        other._read(block, self.tables)
        other.followed = {name: layer for name, layer in other.followed.items() if name in self.followed}
        other.by_task = self.by_task
        return other

    @property
    def flat(self) -> bool:
        """Whether one plain call of the block serves all tasks, so that nothing needs `vmap`."""
        return self.by_task and not self.dense

    @property
    def dense(self) -> list[str]:
        """Adapted parameters that cannot be followed: they get a dense delta per task."""
        return [name for name in self.adapted if layer_of(name) not in self.followed]

    # ---- the trial --------------------------------------------------------------------------------------------------

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
            if not wrong & self.followed.keys():
                raise Unsupported(f"the parameters of {sorted(wrong)} get another gradient than in plain PyTorch")
            for layer in wrong:
                self.followed.pop(layer, None)
        raise Unsupported(f"{named('', self.block)} does not give the same gradients twice")

    def _wrong(self, features: Features, tolerance: float) -> set[str]:
        """Layers whose parameters get another gradient than from autograd, one task at a time."""
        tasks = next(iter(features.values())).shape[0]
        with torch.enable_grad():
            run = self._forward(features, _State({}, {}), tasks)
            z = run.z
            if z.dim() != 2 or z.shape[0] != tasks:
                raise Unsupported(
                    f"{named('', self.block)} returns a tensor of shape {tuple(z.shape)} for {tasks} tasks, not [tasks, dim]"
                )
            weights = torch.sin(torch.arange(1, z.numel() + 1, dtype=z.dtype, device=z.device)).view_as(z)
            minus = z.new_tensor(-1.0)
            state = self._step(_State({}, {}), run, weights, lambda step, layer: minus, 0, 1, False)
        errors: list[tuple[str, float, float]] = []
        for task in range(tasks):
            one = {name: values[task : task + 1] for name, values in features.items()}
            with torch.enable_grad():
                out = (self.block(one) * weights[task]).sum()
                expected = torch.autograd.grad(out, list(self.adapted.values()), allow_unused=True)
            for (name, parameter), gradient in zip(self.adapted.items(), expected, strict=True):
                truth = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
                error = truth - self._delta_of(name, state, task)
                errors.append((name, float(error.abs().max()), float(truth.abs().max())))
        largest = max(size for _, _, size in errors)  # zeros by symmetry are not zeros in floating point
        return {layer_of(name) for name, error, size in errors if not error <= tolerance * (size + 1e-3 * largest)}

    def _delta_of(self, name: str, state: _State, task: int) -> Tensor:
        layer, kind = layer_of(name), name.rpartition(".")[2]
        if state.followed.get(layer):
            return self.followed[layer].dense(state.followed[layer], task, kind)
        return state.dense[name][task] if name in state.dense else torch.zeros_like(self.adapted[name])

    # ---- the forward pass with deltas -------------------------------------------------------------------------------

    @contextmanager
    def _noting(self, deltas: Deltas, calls: list[_Noted], probes: Sequence[Tensor] | None) -> Iterator[Lookup]:
        """While this is open, followed layers add their deltas and note their calls; tables do if read by its value."""

        def note(layer: str, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
            followed = self.followed[layer]
            with full(out.device.type):  # deltas are exact, also where autocast has the layer itself rounded
                read = followed.read(module, widened(x, module))
                if deltas.get(layer):
                    out = followed.moved(read, widened(out, module), deltas[layer]).to(out.dtype)
            if probes is not None:
                out = out + probes[len(calls)]
                calls.append(_Noted(layer, read, None))
            else:
                out = out if out.requires_grad else out.requires_grad_()
                calls.append(_Noted(layer, read, out))
            return out

        def hook_of(layer: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
                return note(layer, module, args[0] if args else kwargs["input"], out)

            return hook

        look_up = by_task({place for name in self.dense for place in self.places[name]})

        def lookup(name: str, module: Table, ids: Tensor) -> Tensor:
            rows = look_up(name, module, ids)
            layer = self._layer_of_table.get(name)
            return rows if layer not in self.followed else note(layer, module, ids, rows)

        handles = [
            layer.module.register_forward_hook(hook_of(name), with_kwargs=True)
            for name, layer in self.followed.items()
            if not isinstance(layer, TableLayer)
        ]
        try:
            yield lookup
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, features: Features, state: _State, tasks: int) -> _Pass:
        calls: list[_Noted] = []
        if not self.flat:
            return self._forward_vmapped(features, state, tasks)
        with self._noting(state.followed, calls, None) as lookup, looked_up(self.block, lookup):
            z = widened(self.block(features), self.block)
        outputs = [cast(Tensor, call.output) for call in calls]
        for call, output in zip(calls, outputs, strict=True):
            if output.dim() < 2 or output.shape[0] != tasks:
                raise _NotByTask(
                    f"layer '{call.layer}' returns a tensor of shape {tuple(output.shape)} for {tasks} tasks, whose first "
                    "dimension is not the tasks"
                )
        return _Pass(z, calls, outputs, {})

    def _forward_vmapped(self, features: Features, state: _State, tasks: int) -> _Pass:
        traced: list[_Noted] = []
        with torch.no_grad(), self._noting({}, traced, None) as lookup, looked_up(self.block, lookup):
            self.block({name: values[:1] for name, values in features.items()})
        like = next(iter(self.adapted.values()))
        probes = [
            like.new_zeros(
                tasks, *cast(Tensor, call.output).shape, dtype=cast(Tensor, call.output).dtype, requires_grad=True
            )
            for call in traced
        ]
        dense = {
            name: state.dense[name] if name in state.dense else like.new_zeros(tasks, *self.adapted[name].shape)
            for name in self.dense
        }
        dense = {name: delta if delta.requires_grad else delta.requires_grad_() for name, delta in dense.items()}
        layers: list[str] = []

        def one(
            feature: Features, delta: dict[str, Tensor], followed: Deltas, probe: list[Tensor]
        ) -> tuple[Tensor, list[Tensor]]:
            feature, followed = tree_map(lambda value: value.unsqueeze(0), (feature, followed))
            calls: list[_Noted] = []
            weights = {name: self.adapted[name] + delta[name] for name in delta}
            with self._noting(followed, calls, probe) as lookup:
                z = call_with(self.block, self.places, weights, feature, lookup)
            layers[:] = [call.layer for call in calls]
            return z.squeeze(0), [call.read for call in calls]

        z, reads = vmap(one, randomness="different")(features, dense, state.followed, probes)
        return _Pass(z, [_Noted(layer, x, None) for layer, x in zip(layers, reads, strict=True)], probes, dense)

    # ---- one inner step ---------------------------------------------------------------------------------------------

    def _step(
        self, state: _State, run: _Pass, slope: Tensor, rate: Rate, step: int, steps: int, second_order: bool
    ) -> _State:
        """`state` after step number `step` of `steps`, where `slope` `[tasks, dim]` is that of the loss at `run.z`."""
        targets = [*run.outputs, *run.dense.values()]
        if not targets or not run.z.requires_grad:
            return state
        slopes = cast(
            Sequence[Tensor | None],
            torch.autograd.grad(run.z, targets, slope, create_graph=second_order, allow_unused=True),
        )
        calls: dict[str, list[Call]] = {}
        for call, g in zip(run.calls, slopes, strict=False):
            if g is not None:
                read = call.read if second_order else call.read.detach()
                slope_here = widened(g, self.block) * -rate(step, call.layer)
                calls.setdefault(call.layer, []).append((read, slope_here))
        followed = dict(state.followed)
        for layer, own in calls.items():
            followed[layer] = self.followed[layer].step(followed.get(layer, {}), own, steps - step - 1)
        dense = {}
        for (name, delta), g in zip(run.dense.items(), slopes[len(run.outputs) :], strict=True):
            old = delta if second_order else state.dense.get(name, torch.zeros_like(delta))
            dense[name] = old if g is None else old - rate(step, layer_of(name)) * g
        return _State(followed, dense)

    def adapt(
        self,
        features: Features,
        support: Support,
        objective: Objective,
        steps: int,
        rate: Rate,
        order: int,
    ) -> Tensor:
        """Meta embeddings `[tasks, dim]` after `steps` inner steps on `objective`."""
        like = next(iter(features.values()))
        tasks, outer = like.shape[0], torch.is_grad_enabled()
        masks, second_order = SharedMasks(self.block), order == 2 and outer
        state = _State({}, {})
        for step in range(steps):
            with torch.enable_grad():
                with masks.drawn(like):
                    run = self._forward(features, state, tasks)
                slope = objective.slope(support, run.z, second_order)
                state = self._step(state, run, slope, rate, step, steps, second_order)
            if not outer:
                state = _State(*tree_map(torch.Tensor.detach, (state.followed, state.dense)))
        with masks.drawn(like):
            adapted = self._forward(features, state, tasks).z
        return adapted if outer else adapted.detach()


def _refuse(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            raise Unsupported(f"{named(name, module)} is recurrent, and its kernels cannot be batched over tasks")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise Unsupported(
                f"{named(name, module)} normalises over the batch in training mode, which makes one task depend on the "
                "others (use LayerNorm, or keep it in evaluation mode)"
            )
