"""May an engine be trusted with a block? It is asked to prove it, on a copy of the block and two tasks.

The copy is noisy (a layer that starts at zero proves nothing about the layers before it), in float64 where the block
allows it (so that a wrong gradient is told from a rounded one), and without dropout. Two inner steps of second order, and
the meta-gradient through them, must equal those of the engine `loop`, which shares no code with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from limaml.errors import ModelError
from limaml.meta.adapted import adapted_parameters
from limaml.meta.engine import Engine
from limaml.meta.loop import Loop
from limaml.meta.masks import seeded
from limaml.meta.reasons import FAILURES, Failed, Unsupported, named, naming_module, reason_of
from limaml.meta.support import Support
from limaml.types import Features

__all__ = ["noisy_copies", "prove", "refuse_unused"]


def noisy_copies(block: nn.Module, sample: Features) -> list[tuple[nn.Module, Features, float]]:
    """Copies of `block` with features of two tasks and the relative error to allow: in float64, then in its own dtype."""
    found = []
    for dtype, tolerance in ((torch.float64, 1e-7), (None, 2e-3)):
        try:
            copied = copy.deepcopy(block)
        except FAILURES as error:
            raise Unsupported(f"{named('', block)} cannot be copied: {reason_of(error)}") from error
        for module, original in zip(copied.modules(), block.modules(), strict=True):
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            module.training = original.training if batch_norm else False
        noise = torch.Generator().manual_seed(0)

        def perturbed(values: Tensor, dtype: torch.dtype | None = dtype, noise: torch.Generator = noise) -> Tensor:
            if not values.is_floating_point():
                return values
            values = values if dtype is None else values.to(dtype)
            return values + 0.1 * torch.randn(values.shape, generator=noise, dtype=torch.float64).to(values)

        if dtype is not None:
            copied = copied.to(dtype)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.copy_(perturbed(parameter))
        twice = {name: torch.cat([values[:2], values[:1]])[:2] for name, values in sample.items()}
        found.append((copied, {name: perturbed(values) for name, values in twice.items()}, tolerance))
    return found


class _Pull:
    """Stands in for a `Support`: pulls each task's meta embedding towards its own target."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __len__(self) -> int:
        return len(self.target)

    def of(self, task: int) -> _Pull:
        return _Pull(self.target[task : task + 1])


class _Towards:
    """Their objective."""

    def loss(self, support: Support, z: Tensor) -> Tensor:
        target = cast(_Pull, support).target
        return (torch.nn.functional.softplus(z) + (z - target) ** 2 / 2).sum(1)

    def slope(self, support: Support, z: Tensor, create_graph: bool) -> Tensor:
        slope = torch.sigmoid(z) + z - cast(_Pull, support).target
        return slope if create_graph else slope.detach()


def _rehearse(engine: Engine, block: nn.Module, features: Features, target: Tensor) -> list[Tensor]:
    """Meta embeddings after two steps, then the meta-gradient of every parameter that has one."""

    def rate(step: int, layer: str) -> Tensor:
        return target.new_tensor(0.05 * (1 + step))

    parameters = [p for p in block.parameters() if p.requires_grad]
    block.zero_grad()
    with torch.enable_grad():
        z = engine.adapt(features, cast(Support, _Pull(target)), _Towards(), 2, rate, 2)
        # Not autograd.grad, which passes over functions that are marked as differentiable once.
        torch.autograd.backward((z * target).sum())
    return [z.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters)]


def prove(make: Callable[[nn.Module], Engine], block: nn.Module, sample: Features, tables: bool = False) -> None:
    """Raise `Unsupported` unless the engine that `make` makes for a copy of `block` equals `loop` on it."""
    problem: Failed | None = None
    modes = [module.training for module in block.modules()]
    for copied, features, tolerance in noisy_copies(block, sample):
        try:
            with naming_module(copied, "cannot be differentiated twice"):
                with torch.no_grad():
                    shape = copied(features).shape
                target = torch.sin(torch.arange(1, shape.numel() + 1, dtype=torch.float64)).view(shape)
                target = target.to(next((p for p in copied.parameters()), target))
                truth = _rehearse(Loop(copied, tables), copied, features, target)
            with naming_module(copied, "cannot be batched over tasks"):
                found = _rehearse(make(copied), copied, features, target)
                for module, mode in zip(copied.modules(), modes, strict=True):
                    module.training = mode
                with seeded(0, target.device):  # as it will be run: nothing to compare, as dropout may differ
                    _rehearse(make(copied), copied, features, target)
        except Failed as error:
            problem = error
            continue
        wrong = _differing(truth, found, tolerance)
        if not wrong:
            return
        if _differing(truth, _rehearse(Loop(copied, tables), copied, features, target), tolerance):
            raise Unsupported(f"{named('', block)} gives another result each time, even with dropout off")
        names = [
            "its meta embedding",
            *(f"the gradient of '{n}'" for n, p in copied.named_parameters() if p.requires_grad),
        ]
        raise Unsupported(
            f"{named('', block)} does something that cannot be followed for several tasks at once: on a sample of tasks "
            f"{names[wrong[0]]} differs from that of plain PyTorch"
        )
    assert problem is not None
    raise problem


def _differing(truth: list[Tensor], found: list[Tensor], tolerance: float) -> list[int]:
    """Which tensors differ by more than `tolerance`, relative to their largest entry or a thousandth of the largest of all."""
    largest = max(float(tensor.abs().max()) for tensor in truth if tensor.numel())

    def differ(a: Tensor, b: Tensor) -> bool:
        return a.numel() > 0 and not float((a - b).abs().max()) <= tolerance * (float(a.abs().max()) + 1e-3 * largest)

    return [i for i, (a, b) in enumerate(zip(truth, found, strict=True)) if differ(a, b)]


def refuse_unused(block: nn.Module, sample: Features, task: str, tables: bool = False) -> None:
    """Raise `ModelError` that names the adapted parameters which the block's output does not depend on."""
    for copied, features, _ in noisy_copies(block, sample):
        parameters = adapted_parameters(copied, tables)
        try:
            with torch.enable_grad():
                z: Tensor = copied(features)
                gradients = (
                    torch.autograd.grad(z.sum(), list(parameters.values()), allow_unused=True)
                    if z.requires_grad
                    else [None] * len(parameters)
                )
        except FAILURES:
            continue  # the engines will say what is wrong
        unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
        if unused:
            raise ModelError(
                f"The meta block of '{task}' has parameters that its output does not depend on: {', '.join(unused)}. No "
                "inner step can adapt them. Use them in its forward, remove them, or call requires_grad_(False) on them."
            )
        return
