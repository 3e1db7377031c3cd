"""The peers that take one task after the other, each written as its documentation does.

Second-order training lets each task's graph go before the next task begins, as anyone short of memory does.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from benchmarks.engine.blocks import RATE, Blocks
from benchmarks.engine.contender import Kind, Outcome, gradients_of, zeroed
from benchmarks.engine.workload import Problem

__all__ = ["FuncLoop", "Higher", "LeanLoop", "TorchoptFunctional", "TorchoptModule"]

TaskRun = Callable[[Tensor, Tensor, bool], Tensor]
"""(features `[1, in]`, support rows, second order) → meta embedding `[1, dim]`."""


def _over_tasks(blocks: Blocks, problem: Problem, run: TaskRun) -> Callable[[], Outcome]:
    def tasks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for task, (support, query) in enumerate(problem.per_task):
            yield problem.features[task : task + 1], support, query

    def generate() -> Outcome:
        return {"z": torch.cat([run(x, support, False).detach() for x, support, _ in tasks()])}

    def train() -> Outcome:
        zeroed(blocks)
        for x, support, query in tasks():
            blocks.loss(run(x, support, True), problem, query).backward()  # type: ignore[no-untyped-call]
        return gradients_of(blocks)

    return generate if problem.work == "generate" else train


class LeanLoop:
    """Nothing but `nn.functional.linear` and `torch.autograd.grad`: as little overhead as a Python loop can have."""

    name = "lean loop"
    kind: Kind = "loop"

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        start = list(blocks.meta.parameters())

        def forward(weights: list[Tensor], h: Tensor) -> Tensor:
            for layer in range(0, len(weights), 2):
                h = nn.functional.linear(h, weights[layer], weights[layer + 1])
                h = torch.relu(h) if layer < len(weights) - 2 else h
            return h

        def run(x: Tensor, support: Tensor, second_order: bool) -> Tensor:
            weights: list[Tensor] = list(start)
            for _ in range(steps):
                loss = blocks.scaled_loss(forward(weights, x), problem, support)
                slopes = torch.autograd.grad(loss, weights, create_graph=second_order)
                weights = [w - RATE * g for w, g in zip(weights, slopes, strict=True)]
                if not second_order:
                    weights = [w.detach().requires_grad_() for w in weights]
            return forward(weights, x)

        return _over_tasks(blocks, problem, run), 1


class FuncLoop:
    """`torch.func.functional_call` and `torch.func.grad`."""

    name = "torch.func loop"
    kind: Kind = "loop"

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        start = dict(blocks.meta.named_parameters())

        def run(x: Tensor, support: Tensor, second_order: bool) -> Tensor:
            def loss(weights: dict[str, Tensor]) -> Tensor:
                return blocks.scaled_loss(functional_call(blocks.meta, weights, (x,)), problem, support)

            weights: dict[str, Tensor] = dict(start)
            with torch.set_grad_enabled(second_order):
                for _ in range(steps):
                    slopes = grad(loss)(weights)
                    weights = {name: w - RATE * slopes[name] for name, w in weights.items()}
                z: Tensor = functional_call(blocks.meta, weights, (x,))
            return z

        return _over_tasks(blocks, problem, run), 1


class Higher:
    """`higher.innerloop_ctx` around `torch.optim.SGD`."""

    name = "higher"
    kind: Kind = "loop"

    def __init__(self) -> None:
        self.higher: ModuleType = importlib.import_module("higher")

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        optimiser = torch.optim.SGD(blocks.meta.parameters(), lr=RATE)

        def run(x: Tensor, support: Tensor, second_order: bool) -> Tensor:
            with self.higher.innerloop_ctx(
                blocks.meta, optimiser, copy_initial_weights=not second_order, track_higher_grads=second_order
            ) as (adapted, differentiable):
                for _ in range(steps):
                    differentiable.step(blocks.scaled_loss(adapted(x), problem, support))
                z: Tensor = adapted(x)
            return z

        return _over_tasks(blocks, problem, run), 1


def _torchopt() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torchopt")


class TorchoptFunctional:
    """torchopt's functional API: `FuncOptimizer` where the steps are differentiated, `update` where they are not."""

    name = "torchopt, functional"
    kind: Kind = "loop"

    def __init__(self) -> None:
        self.torchopt = _torchopt()

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        start = dict(blocks.meta.named_parameters())
        sgd = self.torchopt.sgd(lr=RATE)

        def run(x: Tensor, support: Tensor, second_order: bool) -> Tensor:
            weights: dict[str, Tensor] = dict(start)
            optimiser = self.torchopt.FuncOptimizer(sgd)
            state = None if second_order else sgd.init(weights)
            for _ in range(steps):
                loss = blocks.scaled_loss(functional_call(blocks.meta, weights, (x,)), problem, support)
                if second_order:
                    weights = optimiser.step(loss, weights)
                    continue
                slopes = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
                updates, state = sgd.update(slopes, state, inplace=True)
                stepped = self.torchopt.apply_updates(weights, updates, inplace=False)
                weights = {name: w.detach().requires_grad_() for name, w in stepped.items()}
            z: Tensor = functional_call(blocks.meta, weights, (x,))
            return z

        return _over_tasks(blocks, problem, run), 1


class TorchoptModule:
    """torchopt's module API: `MetaSGD`, with the state extracted before each task and recovered after it."""

    name = "torchopt, module"
    kind: Kind = "loop"

    def __init__(self) -> None:
        self.torchopt = _torchopt()

    def prepare(self, blocks: Blocks, problem: Problem, steps: int) -> tuple[Callable[[], Outcome], int]:
        optimiser = self.torchopt.MetaSGD(blocks.meta, lr=RATE)

        def run(x: Tensor, support: Tensor, second_order: bool) -> Tensor:
            weights = self.torchopt.extract_state_dict(blocks.meta, by="reference")
            state = self.torchopt.extract_state_dict(optimiser, by="reference")
            for _ in range(steps):
                optimiser.step(blocks.scaled_loss(blocks.meta(x), problem, support))
                if not second_order:
                    self.torchopt.stop_gradient(blocks.meta)
            z: Tensor = blocks.meta(x)
            self.torchopt.recover_state_dict(blocks.meta, weights)
            self.torchopt.recover_state_dict(optimiser, state)
            return z

        return _over_tasks(blocks, problem, run), 1
