"""The outer loop's checkpoint: where it is, and all that a run needs to go on from there as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limaml.artifact import Folder, read_folder, write_folder
from limaml.config import TrainConfig
from limaml.errors import ConfigError
from limaml.meta.optimiser import Optimiser

__all__ = ["Epoch", "State", "find_checkpoint", "restore", "save_checkpoint"]

CHECKPOINT = "checkpoint"
FORMAT = 2
FREE = ("epochs", "patience", "checkpoint_steps")
"""Settings that may be others when a run goes on."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows. Losses are means per unit of row weight."""

    epoch: int  # 1, 2, …
    train_loss: float
    valid_loss: float | None
    seconds: float


@dataclass
class State:
    """Where a run is: behind `batch` batches of the window after `windows` others, in the epoch after `epoch` others."""

    epoch: int = 0
    history: list[Epoch] = field(default_factory=list)
    best: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    drawn: Tensor | None = None  # state of the generator at the epoch's start: what is drawn in it is drawn again
    # --- of the epoch that is not over
    windows: int = 0
    batch: int = 0
    done: int = 0  # steps
    loss: float = 0.0  # summed over rows
    weight: float = 0.0
    tasks: int = 0
    seconds: float = 0.0

    def begin(self) -> None:
        """A new epoch."""
        self.windows = self.batch = self.done = self.tasks = 0
        self.loss = self.weight = self.seconds = 0.0


_NUMBERS = ("epoch", "best", "steps", "windows", "batch", "done", "loss", "weight", "tasks", "seconds")


def find_checkpoint(folder: Path) -> Folder | None:
    """The checkpoint in a folder, verified, if there is one."""
    return read_folder(folder, kind=CHECKPOINT, format=FORMAT) if folder.exists() else None


def save_checkpoint(
    folder: Path, state: State, module: nn.Module, optimiser: Optimiser, config: TrainConfig, world: int
) -> None:
    """Write what `restore` reads, in one step. `world` is the number of ranks."""
    assert state.drawn is not None
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": dict(module.state_dict()),
        "optimiser": optimiser.state(),
        "random": {"batches": state.drawn, "torch": torch.get_rng_state()},
    }
    tensors["average"] = state.average
    if state.best_weights:
        tensors["best"] = state.best_weights
    progress = {
        **{name: getattr(state, name) for name in _NUMBERS},
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "history": [asdict(epoch) for epoch in state.history],
        "train": config.model_dump(mode="json"),
        "world": world,
    }
    write_folder(folder, tensors=tensors, documents={"progress": progress}, kind=CHECKPOINT, format=FORMAT)


def restore(
    saved: Folder,
    module: nn.Module,
    optimiser: Optimiser,
    generator: torch.Generator,
    config: TrainConfig,
    world: int,
) -> State:
    """Put everything back to where the checkpoint was saved."""
    progress: Any = saved.documents["progress"]
    before, now = dict(progress["train"]), config.model_dump(mode="json")
    changed = sorted(name for name in now if name not in FREE and before.get(name) != now[name])
    if changed:
        raise ConfigError(
            f"The checkpoint {saved.path} was made with other settings of train.{', train.'.join(changed)}. Set them back to "
            f"go on with it ({', '.join(f'{name}={before.get(name)!r}' for name in changed)}), or remove the folder."
        )
    if progress["batch"] and progress["world"] != world:
        raise ConfigError(
            f"The checkpoint {saved.path} was made by {progress['world']} processes in the middle of a window, and there are "
            f"{world} now. Start {progress['world']} to go on with it, or remove the folder."
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
    return State(
        **{name: progress[name] for name in _NUMBERS},
        history=[Epoch(**epoch) for epoch in progress["history"]],
        best_loss=math.inf if progress["best_loss"] is None else progress["best_loss"],
        best_weights=dict(saved.tensors["best"]) if "best" in saved.tensors else {},
        average=dict(saved.tensors["average"]),
        drawn=saved.tensors["random"]["batches"],
    )
