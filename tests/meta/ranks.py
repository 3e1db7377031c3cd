"""A script for torchrun: `ranks.py FOLDER WORK…`. Every rank writes what each work ended with to `FOLDER/WORK.RANK`, so that
a test can compare the ranks with each other and with one process. Run without torchrun it is that one process.

A work is, separated by colons: task types (`user,item`; with `*` tables are sparse), a solver, and what is done: `gradient` or `wrapped` (by torch's own
wrapper) with the numbers of tasks that the ranks take, or `fit` with the epochs and whether there is a checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import made_config, made_learner

from limaml.meta.distributed import Ranks, TaskLoss
from limaml.meta.learn import MetaBatch, MetaLearner
from limaml.meta.outer import Progress, fit

CONFIG = made_config(1, rows_per_batch=200)


class Dealt(Ranks):
    """Ranks that share a batch by count, from the first task on: as many as each is told."""

    counts: tuple[int, ...]

    def share(self, size: Tensor) -> Tensor:
        start = sum(self.counts[: self.rank])
        stop = len(size) if self.rank + 1 == self.world else start + self.counts[self.rank]
        return (torch.arange(len(size)) >= start) & (torch.arange(len(size)) < stop)


def learner_of(types: str, solver: str) -> MetaLearner:
    learner = made_learner(CONFIG, solver, types=tuple(types.rstrip("*").split(",")), dropout=0.0, dtype=torch.float64)
    for module in learner.module.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = types.endswith("*")
    learner.data.weights.copy_(0.5 + torch.rand(len(learner.data), generator=torch.Generator().manual_seed(1)))
    learner.weight = float(learner.data.weights[learner.train].sum())
    return learner


def gradients(learner: MetaLearner) -> dict[str, Tensor]:
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
        for name, p in learner.module.named_parameters()
        if p.grad is not None
    }


def batches_of(learner: MetaLearner, ranks: Ranks) -> list[MetaBatch]:
    return learner.batches(torch.Generator().manual_seed(0), ranks)


def gradient_of_a_batch(learner: MetaLearner, ranks: Ranks, wrapped: bool) -> dict[str, Tensor]:
    """The meta-gradient of one batch per task type: by hand, or by torch's own wrapper."""
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    for batch in batches_of(learner, ranks):
        if batch.task in seen:
            continue
        seen.add(batch.task)
        learner.module.zero_grad()
        part = learner.share(batch, ranks)
        if wrapped:
            module = DistributedDataParallel(TaskLoss(learner)) if ranks.world > 1 else TaskLoss(learner)
            loss, own = module(part)
            (loss * ranks.world / ranks.sum(own)[0]).backward()
        else:
            loss, own = (None, 0.0) if part is None else learner.loss(part)
            weight = ranks.sum(own)[0]
            if loss is not None:
                (loss / weight).backward()
            ranks.sum_gradients(list(learner.module.parameters()))
        found |= {f"{batch.task}.{name}": g for name, g in gradients(learner).items() if not wrapped or g.any()}
    return found


def run(folder: Path, work: str) -> None:
    types, solver, what, *more = work.split(":")
    ranks = Ranks.joined("cpu")
    learner = learner_of(types, solver)
    if what in ("gradient", "wrapped"):
        if more and ranks.world > 1:
            ranks = Dealt(ranks.rank, ranks.world)
            object.__setattr__(ranks, "counts", tuple(int(count) for count in more))
        made = gradient_of_a_batch(learner, ranks, what == "wrapped")
    else:
        config = CONFIG.model_copy(update={"epochs": int(more[0]), "patience": 2, "average": 0.5})
        checkpoint = folder / "checkpoint" if len(more) > 1 else None

        def say(progress: Progress) -> None:
            print(f"rank {ranks.rank} of {ranks.world}, {os.getpid()}: {progress.epoch} {progress.step}", flush=True)

        history = fit(learner, config, checkpoint=checkpoint, progress=say)
        losses = torch.tensor([(e.train_loss, e.valid_loss or 0.0) for e in history.epochs], dtype=torch.float64)
        after = torch.get_rng_state().double()
        made = {**learner.module.state_dict(), "losses": losses, "best": torch.tensor(history.best), "random": after}
    save_file({name: value.contiguous() for name, value in made.items()}, folder / f"{work}.{ranks.rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(Path(sys.argv[1]), name)
