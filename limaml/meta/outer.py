"""The outer loop: epochs, early stopping, checkpoints, exact resume. It trains whatever a `Learner` says to train, the
personalised model and the baselines alike, so that all are treated the same.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from limaml.artifact import Folder, read_folder, write_folder
from limaml.config import TrainConfig
from limaml.errors import ConfigError, TrainingError
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.optimiser import Optimiser
from limaml.meta.precision import autocast

__all__ = ["Epoch", "History", "Learner", "Progress", "fit"]

Batch = TypeVar("Batch")

CHECKPOINT = "checkpoint"
FORMAT = 1


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows. Losses are means per unit of row weight."""

    epoch: int  # 1, 2, …
    train_loss: float
    valid_loss: float | None
    seconds: float


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
    steps: int
    loss: float  # of this step
    tasks: int  # done in this epoch
    valid_loss: float | None = None  # of the epoch before


class Learner(Protocol[Batch]):
    """Something that can be trained: its batches and their loss."""

    module: nn.Module
    weight: float  # of all training rows: what a prior on the weights is measured against

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[Batch]:
        """The batches of one epoch, in an order drawn from `generator`: the same ones on all `ranks`."""
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

    def validate(self, ranks: Ranks = ALONE) -> float | None:
        """Mean validation loss, the same on all `ranks`, or None where nothing is held out."""
        ...

    def fast_parameters(self) -> list[nn.Parameter]:
        """Parameters that take the solvers' learning rate."""
        ...


@dataclass
class _State(Generic[Batch]):
    epoch: int = 0
    history: list[Epoch] = field(default_factory=list)
    best: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


def fit(
    learner: Learner[Batch],
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> History:
    """Train until the validation loss stops falling, or for `config.epochs` where nothing is held out.

    The weights of the best epoch are in the module afterwards. With a `checkpoint` folder, every epoch is saved, and a
    run that was killed goes on from the last one: on one thread it ends with the same bits as if it had not been.

    In a process group of torch.distributed, or under torchrun, the ranks share the work and all end with the same
    weights; `limaml.meta.distributed` says how. Rank 0 reports and writes.
    """
    ranks = Ranks.joined(str(_device(learner.module)))
    optimiser = Optimiser(learner.module, learner.fast_parameters(), learner.weight, config)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    state: _State[Batch] = _State()
    ranks.agree(
        _mark(config.model_dump_json(), learner.weight, [tuple(p.shape) for p in learner.module.parameters()]),
        "The ranks were given different training rows, blocks or settings of train. Give each of them the same.",
    )
    ranks.copy_from_lead([*learner.module.parameters(), *learner.module.buffers()])
    if checkpoint is not None:
        found = read_folder(checkpoint, kind=CHECKPOINT, format=FORMAT) if checkpoint.exists() else None
        ranks.agree(
            _mark(None if found is None else found.digest),
            f"The ranks do not see the same checkpoint in {checkpoint}. Put it on a file system that all of them share.",
        )
        if found is not None:
            state = _resume(found, learner.module, optimiser, generator, config)
    while state.epoch < config.epochs and not _out_of_patience(state, config):
        started = time.perf_counter()
        train_loss = _one_epoch(learner, optimiser, generator, config, state, progress, ranks)
        with autocast(config.autocast, _device(learner.module)):
            valid_loss = _with_weights(learner, state.average, ranks)
        if valid_loss is not None and not math.isfinite(valid_loss):
            raise TrainingError(
                f"The validation loss is {valid_loss} after epoch {state.epoch + 1}, though the training loss is "
                f"{train_loss:.4g}: look for a feature of extreme size in the validation rows, or lower adapt.rate. The "
                "checkpoint of the epoch before is kept."
            )
        state.epoch += 1
        state.history.append(Epoch(state.epoch, train_loss, valid_loss, time.perf_counter() - started))
        if valid_loss is None or valid_loss < state.best_loss:
            state.best = state.epoch
            if valid_loss is not None:
                state.best_loss = valid_loss
                state.best_weights = {name: p.clone() for name, p in state.average.items()}
        if checkpoint is not None and ranks.leads:
            _save(checkpoint, state, learner.module, optimiser, generator, config)
    learner.module.load_state_dict(state.best_weights or state.average)
    learner.module.eval()
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


def _out_of_patience(state: _State[Batch], config: TrainConfig) -> bool:
    return state.epoch - state.best >= config.patience


def _one_epoch(
    learner: Learner[Batch],
    optimiser: Optimiser,
    generator: torch.Generator,
    config: TrainConfig,
    state: _State[Batch],
    progress: Callable[[Progress], None] | None,
    ranks: Ranks,
) -> float:
    rounded = partial(autocast, config.autocast, _device(learner.module))
    with rounded():
        batches = learner.batches(generator, ranks)
    if not batches:
        raise TrainingError("There is no batch to train on: no task has training rows. Look at the split's train mask.")
    total, weight, tasks = 0.0, 0.0, 0
    learner.module.train()
    previous = state.history[-1].valid_loss if state.history else None
    for step, batch in enumerate(batches, 1):
        optimiser.zero_grad()
        value, size = _backward(learner, batch, ranks, rounded)
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss is {value} in epoch {state.epoch + 1}, step {step}: {learner.blame(batch)} The usual causes are a "
                "feature of extreme size, or a learning rate that is too high (train.lr, train.solver_lr, adapt.rate). The "
                "checkpoint of the last whole epoch is kept."
            )
        ranks.sum_gradients(optimiser.parameters)
        if not bool(optimiser.clip().isfinite()):
            raise TrainingError(
                f"The meta-gradient is not finite in epoch {state.epoch + 1}, step {step}, though the loss is {value}: an "
                "inner step overflowed. Lower adapt.rate or train.solver_lr. The checkpoint of the last whole epoch is kept."
            )
        optimiser.step()
        ranks.copy_from_lead(list(learner.module.buffers()))
        state.steps += 1
        _average(state.average, learner.module, state.steps, config.average * len(batches))
        total, weight, tasks = total + value * size, weight + size, tasks + learner.tasks_in(batch)
        if progress is not None and ranks.leads:
            progress(Progress(state.epoch + 1, config.epochs, step, len(batches), value, tasks, previous))
    return total / max(weight, 1e-12)


def _backward(
    learner: Learner[Batch], batch: Batch, ranks: Ranks, rounded: Callable[[], AbstractContextManager[object]]
) -> tuple[float, float]:
    """Mean loss and weight of a batch; this rank's part of the gradient is in the parameters.

    Each rank sees its part of the batch alone, but divides by the weight of all of it.
    """
    part = batch if ranks.world == 1 else learner.share(batch, ranks)
    loss, own = None, 0.0
    with ranks.own_randomness(_device(learner.module)), rounded():
        if part is not None:
            loss, own = learner.loss(part)
    total, weight = ranks.sum(0.0 if loss is None else float(loss.detach()), own)
    if loss is not None and math.isfinite(total):
        (loss / max(weight, 1e-12)).backward()  # type: ignore[no-untyped-call]
    return total / max(weight, 1e-12), weight


def _save(
    folder: Path,
    state: _State[Batch],
    module: nn.Module,
    optimiser: Optimiser,
    generator: torch.Generator,
    config: TrainConfig,
) -> None:
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": dict(module.state_dict()),
        "optimiser": optimiser.state(),
        "random": {"batches": generator.get_state(), "torch": torch.get_rng_state()},
    }
    tensors["average"] = state.average
    if state.best_weights:
        tensors["best"] = state.best_weights
    progress = {
        "epoch": state.epoch,
        "steps": state.steps,
        "best": state.best,
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "history": [asdict(epoch) for epoch in state.history],
        "train": config.model_dump(mode="json"),
    }
    write_folder(folder, tensors=tensors, documents={"progress": progress}, kind=CHECKPOINT, format=FORMAT)


def _resume(
    saved: Folder,
    module: nn.Module,
    optimiser: Optimiser,
    generator: torch.Generator,
    config: TrainConfig,
) -> _State[Batch]:
    progress: Any = saved.documents["progress"]
    before, now = dict(progress["train"]), config.model_dump(mode="json")
    changed = sorted(name for name in now if name not in ("epochs", "patience") and before.get(name) != now[name])
    if changed:
        raise ConfigError(
            f"The checkpoint {saved.path} was made with other settings of train.{', train.'.join(changed)}. Set them back to "
            f"go on with it ({', '.join(f'{name}={before.get(name)!r}' for name in changed)}), or remove the folder."
        )
    try:
        module.load_state_dict(dict(saved.tensors["model"]))
    except RuntimeError as error:
        raise ConfigError(
            f"The checkpoint {saved.path} is of another model ({str(error).splitlines()[-1].strip()}). Set the model's settings "
            "back to go on with it, or remove the folder."
        ) from error
    optimiser.restore(dict(saved.tensors["optimiser"]))
    generator.set_state(saved.tensors["random"]["batches"])
    torch.set_rng_state(saved.tensors["random"]["torch"])
    return _State(
        epoch=progress["epoch"],
        history=[Epoch(**epoch) for epoch in progress["history"]],
        best=progress["best"],
        best_loss=math.inf if progress["best_loss"] is None else progress["best_loss"],
        best_weights=dict(saved.tensors["best"]) if "best" in saved.tensors else {},
        average=dict(saved.tensors["average"]),
        steps=progress["steps"],
    )
