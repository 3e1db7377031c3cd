"""`python -m benchmarks.long_task`: one task with a million interactions, beside a thousand small ones.

Peak memory above what data and model take, and time, of generating and of a second-order training step, with
`adapt.memory_mib` small and large, each in a process of its own. The global block is once a plain module, which autograd does,
and once a stack of layers, which is passed through by hand. Linux only.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import Tensor, nn

from benchmarks.engine.memory import peak_bytes
from limaml.config import Adaptation, TrainConfig
from limaml.meta import CONSTANT, ConcatMLP, MetaLearner, MetaModel
from limaml.meta.learn import MetaBatch
from limaml.tasks import TaskBatch, TaskRows
from limaml.types import Features, Interactions, Rows

ITEMS, DIM = 3000, 16


class _Meta(nn.Module):
    dim = DIM

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, DIM))

    def forward(self, features: Features) -> Tensor:
        z: Tensor = self.layers(features[CONSTANT])
        return z


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 16)
        self.mlp = nn.Sequential(nn.Linear(16 + DIM, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.mlp(torch.cat([self.item(features["item"]), features["member_embedding"]], 1))
        return logits


def _data(rows: int, others: int) -> Interactions:
    generator = torch.Generator().manual_seed(0)
    owner = torch.cat([torch.zeros(rows, dtype=torch.int64), torch.arange(1, others + 1).repeat_interleave(20)])
    n = len(owner)
    return Interactions(
        sides={"member": {}, "item": {"item": torch.arange(ITEMS)}},
        index={"member": owner, "item": torch.randint(0, ITEMS, (n,), generator=generator)},
        ids={"member": [str(i) for i in range(others + 1)]},
        labels=torch.randint(0, 2, (n, 1), generator=generator).float(),
        weights=torch.ones(n),
        time=torch.arange(n),
    )


def _run(block: str, work: str, solver: str, memory: int, data: Interactions) -> tuple[int, float]:
    torch.manual_seed(0)
    plain = _Plain()
    shared = plain if block == "plain" else ConcatMLP({"item": plain.item, "member_embedding": DIM}, plain.mlp)
    settings = Adaptation.model_validate({"solver": solver, "max_support": None, "memory_mib": memory})
    model = MetaModel(shared, {"member": _Meta()}, adaptation=settings)
    tasks = data.count("member")
    half = torch.arange(len(data)) % 2 == 0
    grouped = TaskRows.of(data.index["member"], tasks)
    support, query = (
        TaskRows.of(data.index["member"], tasks, side).of_tasks(torch.arange(tasks)) for side in (half, ~half)
    )
    learner = MetaLearner(model, data, half | ~half, TrainConfig(anybody=0))

    def generate() -> None:
        model.embed(data, "member", grouped)

    def train() -> None:
        model.zero_grad()
        learner.loss(MetaBatch("member", TaskBatch(torch.arange(tasks), support, query), None))[0].backward()  # type: ignore[no-untyped-call]

    few = Rows(support.rows[:10], support.owner[:10] * 0)  # so that libraries are loaded and the engine is made
    model.adapt(data, "member", torch.arange(1), few).sum().backward()  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    peak = peak_bytes(generate if work == "generate" else train)
    return peak, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_task", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory", type=int, nargs="+", default=[256, 16384], help="adapt.memory_mib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = _data(arguments.rows, 1000)
    print(f"One task of {arguments.rows:,} rows, 1,000 of 20; one thread.\n")
    print("| block | work | solver | memory_mib | peak, MiB | seconds |\n|---|---|---|---|---|---|")
    for block in ("plain", "layered"):
        for work in ("generate", "train"):
            for solver in ("gradient", "newton"):
                for memory in arguments.memory:
                    child = os.fork()
                    if child == 0:
                        peak, seconds = _run(block, work, solver, memory, data)
                        print(
                            f"| {block} | {work} | {solver} | {memory} | {peak / 2**20:,.0f} | {seconds:.1f} |",
                            flush=True,
                        )
                        os._exit(0)
                    _, status = os.waitpid(child, 0)
                    if status:
                        print(f"| {block} | {work} | {solver} | {memory} | out of memory | – |", flush=True)


if __name__ == "__main__":
    main()
