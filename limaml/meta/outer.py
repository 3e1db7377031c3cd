"""The outer loop: epochs, early stopping, checkpoints, exact resume. It trains whatever a `Learner` says to train, the
personalised model and the baselines alike, so that all are treated the same.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from limaml.config import TrainConfig
from limaml.errors import TrainingError
from limaml.meta.checkpoint import Epoch, State, find_checkpoint, restore, save_checkpoint
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.optimiser import Optimiser
from limaml.meta.precision import autocast

__all__ = ["Epoch", "History", "Learner", "Progress", "Window", "fit"]

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class History:
    """What happened. `best` is the epoch whose weights were kept: the last one where nothing was held out."""

    epochs: tuple[Epoch, ...] = ()
    best: int = 0
    stopped_early: bool = False


@dataclass(frozen=True)
class Progress:
    """Reported after every step."""

    epoch: int
    epochs: int
    step: int  # in this epoch, from 1
    steps: int  # of the epoch; as the window at hand lets expect, where there are several
    loss: float  # of this step
    tasks: int  # done in this epoch
    valid_loss: float | None = None  # of the epoch before


class Window(Protocol[Batch]):
    """Rows that are in memory together: their batches and the loss of each."""

    covers: int  # how many windows of the epoch this one is: one for each rank that has one of its own
    steady: bool  # whether `batches` depends on nothing but the generator, and not on the weights

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[Batch]:
        """The batches, in an order drawn from `generator`: the same ones, or as many, on all `ranks`."""
        ...

    def share(self, batch: Batch, ranks: Ranks) -> Batch | None:
        """This rank's part of a batch, or None where nothing falls to it. The parts of all ranks make up the batch."""
        ...

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Sum of the weighted row losses of a batch, and the sum of the weights."""
        ...

    def tasks_in(self, batch: Batch) -> int: ...

    def blame(self, batch: Batch) -> str:
        """Where the loss of a batch is not a number, as a sentence."""
        ...


class Learner(Protocol[Batch]):
    """Something that can be trained, window by window. Where all rows are in memory, it is its only window itself."""

    module: nn.Module
    weight: float  # of all training rows: what a prior on the weights is measured against

    def windows_per_epoch(self) -> int:
        """How many windows an epoch has; with 1, its draws are the window's own."""
        ...

    def windows(self, generator: torch.Generator, ranks: Ranks = ALONE, start: int = 0) -> Iterator[Window[Batch]]:
        """The windows of one epoch, in an order drawn from `generator`, from the one behind `start` others on."""
        ...

    def validate(self, ranks: Ranks = ALONE) -> float | None:
        """Mean validation loss, the same on all `ranks`, or None where nothing is held out."""
        ...

    def finish(self, ranks: Ranks = ALONE) -> None:
        """What is left to do when training has ended, its weights in the module; on all `ranks` alike."""
        ...

    def fast_parameters(self) -> list[nn.Parameter]:
        """Parameters that take the solvers' learning rate."""
        ...


def fit(
    learner: Learner[Batch],
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> History:
    """Train until the validation loss stops falling, or for `config.epochs` where nothing is held out.

    The weights of the best epoch are in the module afterwards. With a `checkpoint` folder, every epoch is saved, every
    window where an epoch has several, and with `train.checkpoint_steps` the middle of a window; a run that was killed goes on
    from there: on one thread it ends with the same bits as if it had not been.

    In a process group of torch.distributed, or under torchrun, the ranks share the work and all end with the same
    weights; `limaml.meta.distributed` says how. Rank 0 reports and writes.
    """
    ranks = Ranks.joined(str(_device(learner.module)))
    optimiser = Optimiser(learner.module, learner.fast_parameters(), learner.weight, config)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    state = State()
    ranks.agree(
        _mark(config.model_dump_json(), learner.weight, [tuple(p.shape) for p in learner.module.parameters()]),
        "The ranks were given different training rows, blocks or settings of train. Give each of them the same.",
    )
    ranks.copy_from_lead([*learner.module.parameters(), *learner.module.buffers()])
    if checkpoint is not None:
        found = find_checkpoint(checkpoint)
        ranks.agree(
            _mark(None if found is None else found.digest),
            f"The ranks do not see the same checkpoint in {checkpoint}. Put it on a file system that all of them share.",
        )
        if found is not None:
            state = restore(found, learner.module, optimiser, generator, config, ranks.world)

    def save() -> None:
        if checkpoint is not None and ranks.leads:
            save_checkpoint(checkpoint, state, learner.module, optimiser, config, ranks.world)

    while state.epoch < config.epochs and not _out_of_patience(state, config):
        started = time.perf_counter() - state.seconds
        _one_epoch(learner, optimiser, generator, config, state, progress, ranks, started, save)
        train_loss = state.loss / max(state.weight, 1e-12)
        with autocast(config.autocast, _device(learner.module)):
            valid_loss = _with_weights(learner, state.average, ranks)
        if valid_loss is not None and not math.isfinite(valid_loss):
            raise TrainingError(
                f"The validation loss is {valid_loss} after epoch {state.epoch + 1}, though the training loss is "
                f"{train_loss:.4g}: look for a feature of extreme size in the validation rows, or lower adapt.rate. The "
                "checkpoint before it is kept."
            )
        state.epoch += 1
        state.history.append(Epoch(state.epoch, train_loss, valid_loss, time.perf_counter() - started))
        if valid_loss is None or valid_loss < state.best_loss:
            state.best = state.epoch
            if valid_loss is not None:
                state.best_loss = valid_loss
                state.best_weights = {name: p.clone() for name, p in state.average.items()}
        state.begin()
        state.drawn = generator.get_state()
        save()
    learner.module.load_state_dict(state.best_weights or state.average)
    learner.module.eval()
    with autocast(config.autocast, _device(learner.module)):
        learner.finish(ranks)
    return History(tuple(state.history), state.best, _out_of_patience(state, config))


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _mark(*what: object) -> int:
    """A number for what all ranks must have alike."""
    return zlib.crc32(repr(what).encode())


def _with_weights(learner: Learner[Batch], weights: dict[str, Tensor], ranks: Ranks) -> float | None:
    """Validation loss with the averaged weights in place of the current ones."""
    current = {name: p.detach().clone() for name, p in learner.module.state_dict().items()}
    learner.module.load_state_dict(weights)
    learner.module.eval()
    loss = learner.validate(ranks)
    learner.module.load_state_dict(current)
    learner.module.train()
    return loss


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, steps: int, horizon: float) -> None:
    """Move the running average of the weights towards them: a plain mean at first, then over `horizon` steps."""
    share = 1 / min(steps, max(horizon, 1.0))
    for name, value in module.state_dict().items():
        if name not in average or not value.is_floating_point():
            average[name] = value.clone()
        else:
            average[name] = average[name].to(value.device).lerp_(value, share)


def _out_of_patience(state: State, config: TrainConfig) -> bool:
    return state.epoch - state.best >= config.patience


def _one_epoch(
    learner: Learner[Batch],
    optimiser: Optimiser,
    generator: torch.Generator,
    config: TrainConfig,
    state: State,
    progress: Callable[[Progress], None] | None,
    ranks: Ranks,
    started: float,
    save: Callable[[], None],
) -> None:
    """Train for the rest of the epoch that `state` is in."""
    rounded = partial(autocast, config.autocast, _device(learner.module))
    if state.drawn is None:
        state.drawn = generator.get_state()
    count = learner.windows_per_epoch()
    previous = state.history[-1].valid_loss if state.history else None
    for window in learner.windows(generator, ranks, state.windows):
        with rounded():
            batches = window.batches(generator, ranks)
        learner.module.train()
        left = math.ceil((count - state.windows) / ranks.world)  # windows of this rank, this one with them
        expected = state.done + len(batches) * left - state.batch
        for batch in batches[state.batch :]:
            state.batch, state.done, state.steps = state.batch + 1, state.done + 1, state.steps + 1
            value, size, tasks = _step(learner.module, window, batch, optimiser, state, ranks, rounded)
            horizon = config.average * (len(batches) * math.ceil(count / ranks.world))
            _average(state.average, learner.module, state.steps, horizon)
            state.loss, state.weight, state.tasks = state.loss + value * size, state.weight + size, state.tasks + tasks
            if progress is not None and ranks.leads:
                told = state.epoch + 1, config.epochs, state.done, expected, value, state.tasks, previous
                progress(Progress(*told))
            state.seconds = time.perf_counter() - started
            if config.checkpoint_steps and window.steady and state.batch % config.checkpoint_steps == 0:
                save()
        if count > 1:  # a single window draws on the epoch's generator: its end is the epoch's
            state.windows, state.batch = state.windows + window.covers, 0
            save()
    if not state.done:
        raise TrainingError("There is no batch to train on: no task has training rows. Look at the split's train mask.")


def _step(
    module: nn.Module,
    window: Window[Batch],
    batch: Batch,
    optimiser: Optimiser,
    state: State,
    ranks: Ranks,
    rounded: Callable[[], AbstractContextManager[object]],
) -> tuple[float, float, int]:
    """One step: the mean loss of the batch, its weight, and its tasks."""
    optimiser.zero_grad()
    value, size, tasks = _backward(module, window, batch, ranks, rounded)
    where = f"in epoch {state.epoch + 1}, step {state.done}"
    if not math.isfinite(value):
        raise TrainingError(
            f"The loss is {value} {where}: {window.blame(batch)} The usual causes are a feature of extreme size, or a learning "
            "rate that is too high (train.lr, train.solver_lr, adapt.rate). The checkpoint before it is kept."
        )
    ranks.sum_gradients(optimiser.parameters)
    if not bool(optimiser.clip().isfinite()):
        raise TrainingError(
            f"The meta-gradient is not finite {where}, though the loss is {value}: an inner step overflowed. Lower adapt.rate "
            "or train.solver_lr. The checkpoint before it is kept."
        )
    optimiser.step()
    ranks.copy_from_lead(list(module.buffers()))
    return value, size, tasks


def _backward(
    module: nn.Module,
    window: Window[Batch],
    batch: Batch,
    ranks: Ranks,
    rounded: Callable[[], AbstractContextManager[object]],
) -> tuple[float, float, int]:
    """Mean loss, weight and tasks of a batch; this rank's part of the gradient is in the parameters.

    Each rank sees its part of the batch alone, but divides by the weight of all of it.
    """
    part = batch if ranks.world == 1 else window.share(batch, ranks)
    loss, own, tasks = None, 0.0, 0
    with ranks.own_randomness(_device(module)), rounded():
        if part is not None:
            loss, own = window.loss(part)
            tasks = window.tasks_in(part)
    total, weight, of_all = ranks.sum(0.0 if loss is None else float(loss.detach()), own, tasks)
    if loss is not None and math.isfinite(total):
        (loss / max(weight, 1e-12)).backward()  # type: ignore[no-untyped-call]
    return total / max(weight, 1e-12), weight, int(of_all)
