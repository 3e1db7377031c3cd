"""The Newton solver finds the maximum a posteriori estimate, and the outer loop's gradient goes through it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import DIM, Case, confirm_gradient, model_of, random_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limaml.errors import ConfigError
from limaml.meta.losses import Losses
from limaml.meta.newton import NewtonSolver
from limaml.meta.segments import Segments
from limaml.meta.support import Support
from limaml.tasks import TaskRows
from limaml.types import Features, Interactions


class LinearInZ(nn.Module):
    """logits = W(x) z + b(x): the case in which everything has a closed form."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.heads, self.factors, self.level = heads, nn.Linear(1, heads * DIM), nn.Linear(1, heads)

    def forward(self, features: Features) -> Tensor:
        factors = self.factors(features["r"]).view(-1, self.heads, DIM)
        logits: Tensor = torch.einsum("nhd,nd->nh", factors, features["user_embedding"]) + self.level(features["r"])
        return logits


def objective(solver: NewtonSolver, support: Support, z: Tensor, cold: Tensor) -> Tensor:
    """Negative log posterior of each task up to a constant, `[tasks]`."""
    return support.loss(z) + (torch.exp(solver.log_precision) * (z - cold) ** 2).sum(1) / 2


def problem_of(case: Case, block: nn.Module | None = None) -> tuple[Support, Tensor, Interactions]:
    model, data = model_of(case, "auto"), random_data(case)
    tasks = torch.arange(data.count("user"))
    rows = TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks)
    shared = model.global_block if block is None else block.to(case.dtype)
    support = Support(shared, model.losses, data, "user", tasks, rows, model.held_cold(data, "user"))
    return support, model.cold(data, "user", tasks).detach(), data


@pytest.mark.parametrize("case", [Case(losses=("squared",)), Case(losses=("squared", "squared"), missing=True)])
def test_squared_loss_on_a_linear_block_is_bayesian_regression(case: Case) -> None:
    torch.manual_seed(0)
    heads = len(case.losses)
    block = LinearInZ(heads)
    support, cold, data = problem_of(case, block)
    solver = NewtonSolver(DIM, steps=1, precision=0.7).double()
    z, factor = solver(support, cold)
    variance = torch.exp(support.losses.log_variance)
    x = data.sides["row"]["r"].double()
    w = block.factors(x).view(-1, heads, DIM)
    level = block.level(x) + data.offset[:, None].double()
    for task in range(len(cold)):
        precision, moment = 0.7 * torch.eye(DIM).double(), 0.7 * cold[task]
        for row in (data.index["user"] == task).nonzero().flatten().tolist():
            for head in range(heads):
                if data.labels[row, head].isfinite():
                    weight = data.weights[row].double() / variance[head]
                    precision = precision + weight * torch.outer(w[row, head], w[row, head])
                    moment = moment + weight * w[row, head] * (data.labels[row, head].double() - level[row, head])
        assert torch.allclose(z[task], torch.linalg.solve(precision, moment), rtol=1e-9)
        assert torch.allclose(factor[task] @ factor[task].T, precision, rtol=1e-9)  # H⁻¹: the posterior's covariance
    assert not torch.allclose(z, cold, atol=1e-2)
    again, _ = NewtonSolver(DIM, steps=3, precision=0.7).double()(support, cold)
    assert torch.allclose(again, z, rtol=1e-9)  # one step is enough


@settings(max_examples=8)
@given(
    losses=st.sampled_from([("binary",), ("binary", "squared"), ("binary", "binary")]),
    global_block=st.sampled_from(["interaction", "cross", "plain"]),
    seed=st.integers(0, 100),
    sizes=st.lists(st.sampled_from([0, 1, 3, 20]), min_size=1, max_size=4).filter(any),
    missing=st.booleans(),
    weightless=st.booleans(),
    types=st.sampled_from([("user",), ("user", "item")]),
)
def test_many_steps_reach_the_optimum(
    losses: tuple[str, ...],
    global_block: str,
    seed: int,
    sizes: list[int],
    missing: bool,
    weightless: bool,
    types: tuple[str, ...],
) -> None:
    """The oracle: LBFGS on the posterior, one task at a time, written without the solver's code."""
    case = Case(
        losses=losses,
        global_block=global_block,
        seed=seed,
        sizes=sizes,
        missing=missing,
        weightless=weightless,
        types=types,
    )
    model, data = model_of(case, "auto"), random_data(case)
    support, cold, _ = problem_of(case)
    z, _ = NewtonSolver(DIM, steps=40, precision=2.0, halvings=8).double()(support, cold)
    variance = torch.exp(model.losses.log_variance.detach())
    held = model.cold(data, "item", torch.arange(data.count("item"))).detach() if "item" in types else None
    for task in range(len(cold)):
        mine = (data.index["user"] == task).nonzero().flatten()
        features: Features = {name: v[data.index["user"][mine]] for name, v in data.sides["user"].items()}
        features |= {name: v[data.index["item"][mine]] for name, v in data.sides["item"].items()}
        features |= {"r": data.sides["row"]["r"][mine].double()}
        if held is not None:
            features["item_embedding"] = held[data.index["item"][mine]]
        known = data.labels[mine].isfinite()
        y = data.labels[mine].nan_to_num().double()

        def posterior(
            z: Tensor,
            task: int = task,
            mine: Tensor = mine,
            features: Features = features,
            known: Tensor = known,
            y: Tensor = y,
        ) -> Tensor:
            total = ((z - cold[task]) ** 2).sum()  # precision 2 / 2
            if not len(mine):
                return total
            features = {**features, "user_embedding": z.expand(len(mine), -1)}
            logits = model.global_block(features) + data.offset[mine, None].double()
            for head, kind in enumerate(losses):
                if kind == "binary":
                    row = nn.functional.binary_cross_entropy_with_logits(logits[:, head], y[:, head], reduction="none")
                else:
                    row = ((logits[:, head] - y[:, head]) ** 2 / variance[head] + variance[head].log()) / 2
                total = total + (row * known[:, head] * data.weights[mine].double()).sum()
            return total

        best = z[task].detach().clone().requires_grad_()
        found = float(posterior(best).detach())
        assert float(torch.autograd.grad(posterior(best), best)[0].abs().max()) < 1e-6  # stationary
        start = cold[task].clone().requires_grad_()
        optimiser = torch.optim.LBFGS([start], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(optimiser: torch.optim.LBFGS = optimiser, start: Tensor = start) -> Tensor:
            optimiser.zero_grad()
            value = posterior(start)
            value.backward()
            return value

        optimiser.step(closure)
        assert found <= float(posterior(cold[task]).detach()) + 1e-12
        assert found == pytest.approx(float(posterior(start).detach()), rel=1e-6)


def test_one_step_is_gauss_newton() -> None:
    """Against a Jacobian that torch.func works out, task by task."""
    case = Case(losses=("binary", "squared"), missing=True, sizes=(4, 0, 7, 1), global_block="plain")
    support, cold, _ = problem_of(case)
    solver = NewtonSolver(DIM, steps=1, precision=3.0).double()  # a strong prior: no damping
    z, _ = solver(support, cold)
    for task in range(4):
        mine = (support.segments.owner == task).nonzero().flatten()

        def logits(one: Tensor, task: int = task, mine: Tensor = mine) -> Tensor:
            every = torch.cat([cold[:task], one[None], cold[task + 1 :]])
            return support.shifted(support.scorer.logits(every))[mine]

        jacobian = torch.func.jacrev(logits)(cold[task])  # (rows, heads, dim)
        slope, curvature = support.losses.slope_and_curvature(
            logits(cold[task]), support.labels[mine], support.weights[mine]
        )
        hessian = torch.einsum("nh,nhi,nhj->ij", curvature, jacobian, jacobian) + 3.0 * torch.eye(DIM).double()
        gradient = torch.einsum("nh,nhi->i", slope, jacobian)
        assert torch.allclose(z[task], cold[task] - torch.linalg.solve(hessian, gradient), rtol=1e-9)


@settings(max_examples=20)
@given(
    kinds=st.lists(st.sampled_from(["binary", "squared"]), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_slope_and_curvature_are_derivatives_of_the_loss(kinds: list[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = Losses(kinds).double()
    with torch.no_grad():
        losses.log_variance.copy_(torch.randn(len(kinds), generator=generator))
    logits = 3 * torch.randn(6, len(kinds), generator=generator, dtype=torch.float64)
    labels = (torch.rand(6, len(kinds), generator=generator) < 0.5).double()
    labels[torch.rand(6, len(kinds), generator=generator) < 0.3] = torch.nan
    weights = torch.rand(6, generator=generator)
    logits.requires_grad_()
    first = torch.autograd.grad(losses.loss(logits, labels, weights).sum(), logits, create_graph=True)[0]
    slope, curvature = losses.slope_and_curvature(logits, labels, weights)
    assert torch.allclose(slope, first, atol=1e-12)
    assert torch.allclose(curvature, torch.autograd.grad(first.sum(), logits)[0], atol=1e-12)
    assert (curvature >= 0).all()


@pytest.mark.parametrize("types", [("user",), ("user", "item")])
def test_finite_differences_confirm_the_meta_gradient(types: tuple[str, ...]) -> None:
    case = Case(
        pieces=("residual",),
        losses=("binary", "squared"),
        types=types,
        missing=True,
        sizes=(5, 0, 1, 12),
        adaptation={"solver": "newton", "precision": 3.0},
    )
    model, data = model_of(case, "auto"), random_data(case)
    tasks = torch.arange(4)
    support = TaskRows.of(data.index["user"], 4).of_tasks(tasks)
    slope = torch.sin(torch.arange(1.0, 4 * DIM + 1)).view(4, DIM).double()

    def value() -> Tensor:
        return (model.adapt(data, "user", tasks, support) * slope).sum()

    confirm_gradient(model, value)


class SumOfZ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def forward(self, features: Features) -> Tensor:
        return features["user_embedding"].sum(1, keepdim=True) + self.level


def test_damping_prevents_divergence() -> None:
    """As many likes as dislikes, so the best logit is 0; but where the logit is 4 the curvature is so small that a full
    Newton step leaps to about −23, and from there it never comes back."""
    case = Case(sizes=(8,))
    data = random_data(case)
    data = replace(data, labels=(torch.arange(8) % 2)[:, None].float(), weights=torch.ones(8), offset=None)
    rows = TaskRows.of(data.index["user"], 1).of_tasks(torch.arange(1))
    support = Support(SumOfZ().double(), Losses().double(), data, "user", torch.arange(1), rows)
    cold = torch.full((1, DIM), 4.0 / DIM, dtype=torch.float64)

    def path(solver: NewtonSolver) -> list[float]:
        found = []
        for steps in range(8):
            solver.steps = steps
            z = solver(support, cold)[0].detach()
            found.append(float(objective(solver, support, z, cold).detach()))
        return found

    undamped = NewtonSolver(DIM, precision=1e-3).double()
    undamped._damping = lambda support, z, *rest: torch.ones(len(z), 1).double()  # type: ignore[method-assign]
    leaps = path(undamped)
    assert leaps[-1] > 10 * leaps[0]  # the construction does what it says
    descent = path(NewtonSolver(DIM, precision=1e-3, halvings=6).double())
    assert all(later <= earlier for earlier, later in zip(descent, descent[1:], strict=False))
    assert descent[-1] == pytest.approx(8 * torch.log(torch.tensor(2.0)).item(), rel=1e-2)


@settings(max_examples=15)
@given(seed=st.integers(0, 500), halvings=st.integers(0, 3), scale=st.sampled_from([1.0, 20.0, 500.0]))
def test_no_step_makes_a_task_worse(seed: int, halvings: int, scale: float) -> None:
    case = Case(sizes=(6, 4, 0, 1), seed=seed, losses=("binary", "squared"))
    support, cold, _ = problem_of(case)
    with torch.no_grad():
        for parameter in support.scorer.block.parameters():
            parameter.mul_(scale ** (1 / 3))
    support, cold, _ = problem_of(case, support.scorer.block)
    solver = NewtonSolver(DIM, steps=3, precision=1e-3, halvings=halvings).double()
    z, _ = solver(support, cold)
    before, after = objective(solver, support, cold, cold), objective(solver, support, z, cold)
    assert (after <= before + 1e-9 * (1 + before.abs())).all()


def test_rounding_does_not_break_the_factorisation() -> None:
    """Rows of huge size under a tiny prior, in float32: H is singular but for rounding."""
    case = Case(sizes=(1, 30), dtype=torch.float32, losses=("squared",))
    support, cold, _ = problem_of(case, LinearInZ())
    with torch.no_grad():
        support.scorer.block.factors.weight.mul_(0.0)  # every row pulls in the same direction
        support.scorer.block.factors.bias.fill_(3e3)
    z, factor = NewtonSolver(DIM, steps=2, precision=1e-6)(support, cold)
    assert z.isfinite().all() and factor.isfinite().all()


def test_a_task_that_is_not_a_number_stays_alone() -> None:
    case = Case(sizes=(5, 4, 6))
    support, cold, _ = problem_of(case)
    whole, _ = NewtonSolver(DIM).double()(support, cold)
    broken = cold.clone()
    broken[1] = torch.nan
    z, _ = NewtonSolver(DIM).double()(support, broken)
    assert z[1].isnan().all()
    assert torch.allclose(z[[0, 2]], whole[[0, 2]], rtol=1e-12)


def test_heads_that_ignore_the_embedding_are_fine() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, 1)

        def forward(self, features: Features) -> Tensor:
            return torch.cat([self.layer(features["user_embedding"]), features["r"].to(self.layer.weight)], 1)

    support, cold, _ = problem_of(Case(losses=("binary", "binary")), Half())
    z, _ = NewtonSolver(DIM).double()(support, cold)
    assert z.isfinite().all() and not torch.allclose(z, cold, atol=1e-3)


def test_a_strong_prior_keeps_tasks_at_their_cold_embedding() -> None:
    support, cold, _ = problem_of(Case())
    distances = [
        float((NewtonSolver(DIM, precision=precision).double()(support, cold)[0] - cold).detach().norm())
        for precision in (0.1, 1.0, 10.0, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5 < distances[0]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="precision > 0"):
        NewtonSolver(DIM, precision=0.0)
    with pytest.raises(ConfigError, match="steps ≥ 0"):
        NewtonSolver(DIM, steps=-1)


# ---- sums over tasks ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.just(1), st.integers(2, 40)), min_size=1, max_size=8),
    left=st.integers(1, 4),
    right=st.integers(1, 4),
    tile=st.integers(1, 17),
    seed=st.integers(0, 1000),
)
def test_sums_and_grams_equal_the_naive_ones(sizes: list[int], left: int, right: int, tile: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    a = torch.randn(len(owner), left, generator=generator, dtype=torch.float64).requires_grad_()
    b = torch.randn(len(owner), right, generator=generator, dtype=torch.float64).requires_grad_()
    segments = Segments(owner, len(sizes), tile)
    sums = torch.stack([a[owner == task].sum(0) for task in range(len(sizes))])
    grams = torch.stack([a[owner == task].T @ b[owner == task] for task in range(len(sizes))])
    assert torch.allclose(segments.sum(a), sums, atol=1e-12)
    found = segments.gram(a, b)
    assert torch.allclose(found, grams, atol=1e-12)
    slope = torch.randn(grams.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * slope).sum(), [a, b]),
        torch.autograd.grad((grams * slope).sum(), [a, b]),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_weights_of_zero_are_missing_rows() -> None:
    case = Case(sizes=(6, 4), adaptation={"solver": "newton"})
    model, data = model_of(case, "auto"), random_data(case)
    silent = torch.arange(len(data)) % 3 == 0
    tasks = torch.arange(2)
    weightless = replace(data, weights=torch.where(silent, 0.0, data.weights))
    z = model.adapt(weightless, "user", tasks, TaskRows.of(data.index["user"], 2).of_tasks(tasks))
    fewer = model.adapt(data, "user", tasks, TaskRows.of(data.index["user"], 2, ~silent).of_tasks(tasks))
    assert torch.allclose(z, fewer, rtol=1e-10)
