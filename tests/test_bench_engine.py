"""The engine benchmark at toy size: its workload is what it says, and every peer that is installed agrees with limaml."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from benchmarks.engine import gpu
from benchmarks.engine.blocks import PRIOR, RATE, Blocks, Size, blocks_of
from benchmarks.engine.contender import Contender, Outcome, gradients_of, relative_error, zeroed
from benchmarks.engine.measure import Timing, flops_of, interleaved
from benchmarks.engine.memory import peak_bytes
from benchmarks.engine.ours import Limaml
from benchmarks.engine.peers import contenders
from benchmarks.engine.suite import Case
from benchmarks.engine.table import page
from benchmarks.engine.vmaps import VmapPadded
from benchmarks.engine.workload import LONGEST, Problem, Work, generated_table, movielens_table, problem_of

TOY = Size("toy", (5, 7, 12), (17, 6, 1))  # wide enough for three steps to be kept as pairs


def problem(work: Work, cap: int | None = 6, tasks: int = 8) -> Problem:
    return problem_of(generated_table(tasks), work, cap, TOY.inputs, TOY.row_width)


def by_hand(blocks: Blocks, problem: Problem, steps: int) -> Outcome:
    """Written once more, with the weights of each task as plain tensors."""
    zeroed(blocks)
    w1, b1, w2, b2 = blocks.meta.parameters()
    v1, c1, v2, c2 = blocks.shared.parameters()
    found, total = [], torch.zeros(())
    for task, (support, query) in enumerate(problem.per_task):
        weights = [w1, b1, w2, b2]

        def embed(weights: list[torch.Tensor], x: torch.Tensor = problem.features[task]) -> torch.Tensor:
            return weights[2] @ torch.relu(weights[0] @ x + weights[1]) + weights[3]

        def loss(z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            x = problem.vectors[problem.item[rows]]
            hidden = torch.relu(v1[:, : len(z)] @ z + x @ v1[:, len(z) :].T + c1)
            logits = (hidden @ v2.T + c2).squeeze(1)
            return (torch.nn.functional.softplus(logits) - problem.label[rows] * logits).sum()

        for _ in range(steps):
            inner = loss(embed(weights), support) / (len(support) + PRIOR)
            slopes = torch.autograd.grad(inner, weights, create_graph=True)
            weights = [w - RATE * g for w, g in zip(weights, slopes, strict=True)]
        z = embed(weights)
        found.append(z.detach())
        total = total + loss(z, query)
    if problem.work == "generate":
        return {"z": torch.stack(found)}
    total.backward()  # type: ignore[no-untyped-call]
    return gradients_of(blocks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # higher and torchopt are old
@pytest.mark.parametrize("work", ["generate", "train"])
def test_every_installed_contender_does_the_same_work(work: Work) -> None:
    found, missing = contenders()
    assert len(found) + len(missing) == 9
    blocks, toy = blocks_of(TOY), problem(work)
    truth = {name: tensor.clone() for name, tensor in by_hand(blocks, toy, 2).items()}
    for contender in found:
        for _ in range(2):  # the second run must not see what the first one left behind
            run, _ = contender.prepare(blocks, toy, 2)
            outcome = {name: tensor.clone() for name, tensor in run().items()}
            assert relative_error(truth, outcome) < 1e-4, contender.name


@pytest.mark.parametrize("contender", [Limaml(), VmapPadded()], ids=lambda c: c.name)
def test_inner_steps_change_the_answer(contender: Contender) -> None:
    blocks, toy = blocks_of(TOY), problem("generate")
    one, two = (contender.prepare(blocks, toy, steps)[0]() for steps in (1, 2))
    assert relative_error(one, two) > 1e-3


def test_generated_sizes_are_those_of_movielens() -> None:
    size = generated_table(1000).size.double()
    assert size.min() == 20 and size.max() == LONGEST
    assert float(size.mean()) == pytest.approx(165, rel=0.06)
    quantiles = torch.quantile(size, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    assert quantiles == pytest.approx([27, 96, 400], rel=0.1)
    table = generated_table(8)
    for start, stop in zip(table.offset[:-1].tolist(), table.offset[1:].tolist(), strict=True):
        assert len(table.item[start:stop].unique()) == stop - start  # a member rates an item once


def test_movielens_is_read_in_order_and_evenly_over_sizes(tmp_path: Path) -> None:
    size = [3, 9, 4, 7, 5, 8]
    user = [u for u, n in enumerate(size) for _ in range(n)]
    rows = {"user_id": user, "item_id": range(len(user)), "rating": [5, 3] * 18, "orig_row": range(len(user))}
    pl.DataFrame(rows).reverse().write_parquet(tmp_path / "interactions.parquet")
    table = movielens_table(tmp_path, 3)
    assert sorted(table.size.tolist()) == [4, 7, 9]  # one of each third of the sizes, the longest for the last
    assert all((table.item[a:b].diff() == 1).all() for a, b in zip(table.offset[:-1], table.offset[1:], strict=True))
    assert torch.equal(table.label, (table.item % 2 == 0).float())  # ratings 5 and 3 in turn


@pytest.mark.parametrize("cap", [4, None])
def test_support_and_query_are_apart_and_capped(cap: int | None) -> None:
    table, whole = generated_table(8), problem("train", cap)
    assert not set(whole.support.rows.tolist()) & set(whole.query.rows.tolist())
    for task, (support, query) in enumerate(whole.per_task):
        size = int(table.size[task])
        assert (len(support), len(query)) == (min(size // 2, cap or size), min((size + 1) // 2, cap or size))
        assert int(query.max()) == int(table.offset[task + 1]) - 1
    part = whole.thinned(4)
    assert part.tasks == 2 and part.longest == whole.longest
    rows = {tuple(support.tolist()) for support, _ in whole.per_task}
    assert {tuple(support.tolist()) for support, _ in part.per_task} <= rows


def test_arithmetic_left_is_that_of_the_formula() -> None:
    """Hoisting is what the share of the peak is measured on: rows × x-half once, the rest forwards and backwards."""
    toy, steps = problem("generate"), 3
    n, t = len(toy.support), toy.tasks
    a, h, d = TOY.meta
    _, f, _ = TOY.layers
    encode = n * TOY.row_width * f
    step = t * (a * h + h * d + d * h) + 2 * t * d * f + 2 * n * f
    pairs = sum(t * k * (a + h + h + d) for k in range(1, steps + 1)) + sum(t * k * (d + h) for k in range(1, steps))
    needed = 2 * (encode + steps * step + t * (a * h + h * d) + pairs)
    run, _ = Limaml(distinct=False).prepare(blocks_of(TOY), toy, steps)
    run()  # the first run also proves the engine
    assert flops_of(run) <= needed + 2 * t * (a * h + h * d), "more than the method and one cold embedding need"


def test_rounds_end_at_the_time_that_is_given() -> None:
    calls = {"a": 0, "b": 0}

    def counted(name: str) -> Outcome:
        calls[name] += 1
        return {}

    works = {name: (lambda name=name: counted(name)) for name in calls}
    timings = interleaved(works, repetitions=5, seconds_each=10.0)
    assert calls == {"a": 5, "b": 5} and timings["a"].repetitions == 5
    assert interleaved(works, repetitions=5, seconds_each=0.0)["b"].repetitions == 1
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0, 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peak_memory_sees_what_is_let_go_again() -> None:
    size = 64 * 2**20

    def work() -> None:
        torch.ones(size // 4).sum()

    work()
    assert size * 0.9 < peak_bytes(work) < size * 1.5


def test_the_page_says_what_the_results_say() -> None:
    def entry(name: str, kind: str, seconds: float, peak: int) -> dict[str, object]:
        return {
            "cap": 32,
            "size": "small",
            "work": "generate",
            "steps": 3,
            "contender": name,
            "kind": kind,
            "tasks": 100,
            "tasks_in_flight": 100,
            "seconds": seconds,
            "tasks_per_second": 100 / seconds,
            "flops": 4 * 10**9 if kind == "limaml" else None,
            "peak_bytes": peak,
            "relative_error": 1e-6,
        }

    text = page(
        {
            "command": "python -m benchmarks.engine",
            "date": "2026-01-01",
            "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0},
            "versions": {"torch": "2.13.0"},
            "threads": 1,
            "gemm_peak_flops": 100e9,
            "source": "MovieLens-1M",
            "plan": {"every": 8},
            "missing": [],
            "cases": [
                entry("limaml", "limaml", 0.04, 2**20),
                entry("limaml, rows not shared", "limaml", 0.05, 2**21),
                entry("lean loop", "loop", 1.6, 2**20),
                entry("vmap, padded", "vmap", 0.2, 2**24),
                entry("vmap, buckets", "vmap", 0.12, 2**23),
            ],
            "scaling": [],
        }
    )
    targets = next(line for line in text.splitlines() if line.startswith("| generate, support ≤ 32, small"))
    assert "2,500" in targets
    assert "40.0× (✓ 30), lean loop" in targets and "3.0× (✗ 4), vmap, buckets" in targets
    assert "1/8.0 (✓ 5)" in targets and "80% (✓ 75%)" in targets


def test_the_benchmark_of_a_gpu_measures_and_tells() -> None:
    """On the processor, which is every machine's device: contenders agree, and the page has a line for each case."""
    here = torch.device("cpu")
    entries = []
    for work in ("generate", "train"):
        case = Case(4, "small", work, gpu.STEPS)  # type: ignore[arg-type]
        entries += gpu.compare_on(here, case, 32, every=8, repetitions=1, seconds_each=0.0)
    assert {e["contender"]: e["tasks"] for e in entries} == {
        "limaml": 32,
        "limaml, on the processor": 4,
        "lean loop": 4,
        "vmap, buckets": 32,
    }
    curves = [c for solver in ("gradient", "newton") for c in gpu.curve(here, solver, 16, 4, [32, 64], 1)]
    told = {
        "command": "it",
        "device": "cpu",
        "threads": 1,
        "cores": 2,
        "date": "2026-01-01",
        "versions": {"torch": "2"},
    }
    text = gpu.page({**told, "cases": entries, "curves": curves})
    assert "| generate, support ≤ 4, small | 32 |" in text
    assert text.count("| newton | cpu | 16 |") == 2
