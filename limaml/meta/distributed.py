"""Several processes that train one model, each on its share of the tasks of every batch.

    torchrun --nproc-per-node 2 --no-python limaml train ratings.parquet … --out runs/mine
    torchrun --nproc-per-node 2 mine.py              # a script that calls limaml.train, or fit

`fit` notices that it was launched so. Every process (*rank*) draws the same batches and takes its share of the tasks of
each; a loss is divided by the weight of the *whole* batch, and gradients are summed over the ranks. So two ranks take the
very steps of one, however unequal their shares: a rank without a task adds nothing and waits for the others. All that is
decided (validation loss, early stopping, the checkpoint's state) is decided on sums that every rank has. Only rank 0 reports
and writes; all ranks read, so the checkpoint must lie where all of them see it.

Where an epoch has several windows of rows (meta/window_learner.py), each rank takes windows of its own instead, and a step is a
batch of every rank that has one left.

torch's own `DistributedDataParallel` does as well, if you write the outer loop yourself: see `TaskLoss`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limaml.errors import ConfigError
from limaml.meta.masks import seeded

__all__ = ["ALONE", "Ranks", "TaskLoss"]

_NONE, _SPARSE, _DENSE = 0, 1, 2  # what a rank has as a parameter's gradient; the largest of all ranks counts


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that train together this one is. Every method but `joined`, `share` and `place` is a meeting:
    all ranks must call it, in the same order."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def joined(device: str) -> Ranks:
        """The process group that is there; or, where torchrun has launched this process, a new one: NCCL between GPUs,
        gloo between CPUs."""
        if not dist.is_available():
            return ALONE
        if not dist.is_initialized():
            launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
            # A worker of a process pool inherits torchrun's environment, and is no rank.
            if not launched or int(os.environ["WORLD_SIZE"]) < 2 or parent_process() is not None:
                return ALONE
            from torch.distributed.rendezvous import rendezvous  # not there in a build without torch.distributed

            on_gpu = torch.device(device).type == "cuda"
            if on_gpu:
                torch.cuda.set_device(torch.device(_own(device)))
            store, rank, world = next(rendezvous("env://"))
            # torchrun's store outlives processes that it starts again, and they would look for each other's old addresses in it
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"limaml/{again}", store)  # type: ignore[attr-defined]
            dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
            atexit.register(_leave)
        return Ranks(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this rank reports and writes."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """The device of this rank: `cuda` becomes one GPU for each rank of a machine."""
        return _own(device) if self.world > 1 else device

    def share(self, size: Tensor) -> Tensor:
        """Which of the entries `[n]` with these sizes this rank takes: a mask `[n]`.

        Neighbours stay together. Shares are about equal by size; an entry larger than a share leaves other ranks with less, or nothing.
        """
        size = size.double() + 1e-9  # entries of no size are dealt out, too
        middle = torch.cumsum(size, 0) - size / 2
        owner = torch.floor(middle * self.world / size.sum()).clamp(max=self.world - 1)
        return owner == self.rank

    def sum(self, *values: float) -> list[float]:
        """The sum over ranks of each value, in float64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_meeting_place())
        dist.all_reduce(total)
        return total.tolist()

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor([number], device=_meeting_place())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def joint(self, table: Tensor) -> Tensor:
        """The sum over ranks of a table `[…]`, of which each rank has filled its share and left the rest at zero. The
        table itself is used up."""
        if self.world == 1:
            return table
        total = table.detach().to(_meeting_place(table)).contiguous()
        dist.all_reduce(total)
        return total.to(table.device)

    @torch.no_grad()
    def copy_from_lead(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values that rank 0 has, in place."""
        for tensor in tensors if self.world > 1 else ():
            sent = tensor.detach().to(_meeting_place(tensor)).contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)

    def agree(self, number: int, sentence: str) -> None:
        """Raise `ConfigError(sentence)` on every rank unless all ranks have the same number, below 2⁶²."""
        if self.world == 1:
            return
        # max(n) = −max(−n): one meeting tells the largest and the smallest
        ends = torch.tensor([number, -number], device=_meeting_place())
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise ConfigError(sentence)

    @contextmanager
    def own_randomness(self, device: torch.device) -> Iterator[None]:
        """Random draws in here are this rank's own; behind it all ranks' generators are in the same state again."""
        if self.world == 1:
            yield
            return
        seed = int(torch.randint(2**62, ())) + self.rank
        with seeded(seed, device):
            yield

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter the sum over ranks of its gradient; a parameter that no rank has a gradient of keeps none.

        Dense gradients of one type travel in one piece. Of sparse ones the rows travel that are there.
        """
        if self.world == 1:
            return
        own = [_NONE if p.grad is None else _SPARSE if p.grad.is_sparse else _DENSE for p in parameters]
        kinds = torch.tensor(own, device=_meeting_place())
        dist.all_reduce(kinds, dist.ReduceOp.MAX)
        dense: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter, kind in zip(parameters, kinds.tolist(), strict=True):
            if kind == _DENSE:
                dense.setdefault((parameter.dtype, parameter.device), []).append(parameter)
            elif kind == _SPARSE:
                self._sum_sparse(parameter)
        for some in dense.values():
            flat = self.joint(torch.cat([_dense_gradient(p).flatten() for p in some]))
            for parameter, gradient in zip(some, torch.split(flat, [p.numel() for p in some]), strict=True):
                parameter.grad = gradient.view_as(parameter)

    def _sum_sparse(self, table: nn.Parameter) -> None:
        rows = torch.zeros(0, dtype=torch.int64, device=table.device)
        values = table.new_zeros(0, *table.shape[1:])
        if table.grad is not None:
            own = table.grad.coalesce()
            rows, values = own.indices()[0], own.values()
        counts = self._of_all_ranks(torch.tensor([len(rows)], device=_meeting_place(table)))
        longest = max(int(count) for count in counts)
        wide = table.new_zeros(longest, *table.shape[1:])
        wide[: len(values)] = values
        padded = rows.new_zeros(longest)
        padded[: len(rows)] = rows
        all_rows, all_values = self._of_all_ranks(padded), self._of_all_ranks(wide)
        found = [int(count) for count in counts]
        index = torch.cat([part[:n] for part, n in zip(all_rows, found, strict=True)])
        entries = torch.cat([part[:n] for part, n in zip(all_values, found, strict=True)])
        table.grad = torch.sparse_coo_tensor(index[None], entries, table.shape, check_invariants=False).coalesce()

    def _of_all_ranks(self, tensor: Tensor) -> list[Tensor]:
        sent = tensor.to(_meeting_place(tensor)).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(received, sent)
        return [part.to(tensor.device) for part in received]


ALONE = Ranks()
"""One process, as usual: every meeting gives back what it was given."""


class TaskLoss(nn.Module):
    """A learner's loss as a module's `forward`, for an outer loop of your own under `DistributedDataParallel`.

        ranks = Ranks.joined("cpu")
        ddp = DistributedDataParallel(TaskLoss(learner))
        loss, weight = ddp(learner.share(batch, ranks))
        (loss * ranks.world / ranks.sum(weight)[0]).backward()

    That class averages gradients over ranks, where the loss of a batch is a sum divided by the weight of the whole batch:
    hence the factor. `forward(None)`, of a rank without tasks, is 0. Every parameter takes part in every loss, with a
    gradient of zero where it is not used, as that class asks for; so tables with sparse gradients need `fit` instead.
    """

    def __init__(self, learner: Any) -> None:
        super().__init__()
        self.module: nn.Module = learner.module
        self._loss = learner.loss

    def forward(self, batch: Any) -> tuple[Tensor, float]:
        """Sum of the weighted row losses of a batch, and the sum of the weights."""
        nothing = torch.stack([p.sum() * 0 for p in self.module.parameters() if p.requires_grad]).sum()
        if batch is None:
            return nothing, 0.0
        loss, weight = self._loss(batch)
        return loss + nothing, weight


def _own(device: str) -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def _meeting_place(tensor: Tensor | None = None) -> torch.device:
    """Where tensors must lie to meet: NCCL joins GPUs, gloo takes what lies on the CPU."""
    if dist.get_backend() == "nccl":
        return (
            tensor.device
            if tensor is not None and tensor.is_cuda
            else torch.device("cuda", torch.cuda.current_device())
        )
    return torch.device("cpu")


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
