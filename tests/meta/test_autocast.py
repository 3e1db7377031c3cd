"""Mixed precision: blocks in bfloat16, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import Case, Outcome, model_of, outcome, random_data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import made_config, made_learner

from limaml.config import load_config
from limaml.errors import ConfigError, ModelError
from limaml.meta.outer import fit
from limaml.tasks import TaskRows

BF16 = 2.0**-8
"""Relative rounding error of a bfloat16."""

CASES = {
    "linear": Case(dtype=torch.float32, sizes=(40, 0, 1, 9)),
    "norms, twice, two types": Case(
        pieces=("layer norm", "called twice", "gate"),
        types=("user", "item"),
        losses=("binary", "squared"),
        dtype=torch.float32,
    ),
    "sequence": Case(sequence="layers", table="bag", global_block="cross", dtype=torch.float32),
    "dense deltas": Case(pieces=("free", "linear"), sequence="multihead", dtype=torch.float32),
    "plain block, first order": Case(order=1, global_block="plain", dtype=torch.float32),
}


def rounded() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def distance(one: Outcome, other: Outcome) -> float:
    """Largest difference of the meta-gradients, relative to the largest entry of all of them."""
    largest = max(float(g.abs().max()) for g in one.gradients.values() if g.numel())
    return max(
        float((g - other.gradients[name]).abs().max()) / largest for name, g in one.gradients.items() if g.numel()
    )


@pytest.mark.parametrize("engine", ["loop", "vmap", "lowrank", "newton"])
@pytest.mark.parametrize("name", CASES)
def test_every_engine_is_near_full_precision(engine: str, name: str) -> None:
    """Embeddings and meta-gradients are those of float32 up to the rounding of the blocks; the same to every engine."""
    case = CASES[name]
    if engine == "newton":
        case = replace(case, adaptation={"solver": "newton"})
    exact = outcome(case, "loop" if engine != "newton" else "auto")
    with rounded():
        found = outcome(case, "auto" if engine == "newton" else engine)
    assert found.z.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    error = float((found.z - exact.z).abs().max()) / float(exact.z.abs().max())
    assert BF16 / 100 < error < 8 * BF16, error  # it is rounded, and not by more than a few layers round
    assert distance(exact, found) < 12 * BF16
    for parameter, gradient in exact.gradients.items():  # no gradient is lost
        assert bool(gradient.any()) == bool(found.gradients[parameter].any()), parameter


class Seen(TorchDispatchMode):
    """Every operation, with the types of its floating inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        self.types.setdefault(func._schema.name.removeprefix("aten::"), set()).update(arg.dtype for arg in given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("solver", ["newton", "gradient"])
def test_what_sums_and_solves_never_sees_a_bfloat16(solver: str, grad: bool) -> None:
    case = replace(CASES["linear"], adaptation={"solver": solver}, global_block="cross")
    model, data = model_of(case, "auto"), random_data(case)
    tasks = torch.arange(data.count("user"))
    support = TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks)
    with torch.set_grad_enabled(grad), rounded():
        model.adapt(data, "user", tasks, support)  # proofs, and what is looked at once
        with Seen() as seen:
            z = model.adapt(data, "user", tasks, support)
    with seen:
        if grad:
            z.square().sum().backward()  # type: ignore[no-untyped-call]
    assert torch.bfloat16 in seen.types["mm"] | seen.types["addmm"]  # blocks do
    exact = {
        "_embedding_bag_forward_only",
        "_embedding_bag",
        "index_add",
        "index_add_",
        "softplus",
        "bmm",
        "exp",
        "div",
    }
    exact |= {"linalg_cholesky_ex", "cholesky_solve", "index_select", "index_copy", "baddbmm"}
    if solver == "newton":
        assert {"linalg_cholesky_ex", "cholesky_solve", "bmm"} <= seen.types.keys()
    for name in exact & seen.types.keys():
        assert torch.bfloat16 not in seen.types[name], name


def test_a_pass_without_gradients_takes_none_from_the_next() -> None:
    """Within one autocast older versions of torch keep rounded weights without asking how they were made."""
    case = CASES["linear"]
    with rounded():
        fresh = outcome(case, "lowrank")
        model, data = model_of(case, "lowrank"), random_data(case)
        tasks = torch.arange(data.count("user"))
        support = TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks)
        with torch.no_grad():
            before = model.adapt(data, "user", tasks, support)
        z = model.adapt(data, "user", tasks, support)
    torch.testing.assert_close(before, z.detach(), rtol=8 * BF16, atol=BF16)
    z.sum().backward()  # type: ignore[no-untyped-call]
    found = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {name for name, g in fresh.gradients.items() if bool(g.any()) and "losses" not in name} <= found


@pytest.mark.parametrize("solver", ["gradient", "newton"])
@pytest.mark.parametrize("types", [("user",), ("user", "item")])
def test_training_in_bfloat16_learns_what_float32_learns(solver: str, types: tuple[str, ...]) -> None:
    losses = {}
    for kind in (None, "bf16"):
        config = made_config(6, autocast=kind)
        learner = made_learner(config, solver, types=types)
        history = fit(learner, config)
        losses[kind] = [epoch.train_loss for epoch in history.epochs]
        assert all(
            value.dtype == torch.float32 for value in learner.module.state_dict().values() if value.is_floating_point()
        )
    assert losses["bf16"] != losses[None]
    assert losses["bf16"][-1] < 0.6 * losses["bf16"][0]
    assert losses["bf16"][-1] == pytest.approx(losses[None][-1], rel=0.1)


def test_float16_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"^Setting 'train\.autocast' is 'fp16': float16 has .* train\.autocast=bf16\.$"
    ):
        load_config(None, ["train.autocast=fp16"])
    case = CASES["linear"]
    with torch.autocast("cpu", torch.float16), pytest.raises(ModelError, match=r"inner slopes vanish.*bfloat16"):
        outcome(case, "lowrank")
