"""A small training run out of tensors that are made here. As a script, `training.py FOLDER OUT EPOCHS SOLVER` trains
with checkpoints in FOLDER, prints a line per step, and writes the final weights to OUT: something that can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limaml.config import Adaptation, TrainConfig
from limaml.meta.blocks import InteractionMLP, MetaMLP
from limaml.meta.learn import MetaLearner
from limaml.meta.model import MetaModel
from limaml.meta.outer import Progress, fit
from limaml.tasks import split_by_task_order
from limaml.types import FeatureKind, FeatureSpec, Interactions, embedding_name

USERS, ITEMS, ROWS, DIM = 30, 20, 600, 4


def made_data(seed: int = 0) -> Interactions:
    """Members with tastes of their own: a like where the taste and the item point the same way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    user, item = (torch.randint(0, n, (ROWS,), generator=generator) for n in (USERS, ITEMS))
    taste, kind = normal(USERS, 1), normal(ITEMS, 1)
    logit = (taste[user] * kind[item]).sum(1) + 0.1 * normal(ROWS)
    return Interactions(
        sides={
            "user": {"age": torch.randint(0, 5, (USERS,), generator=generator)},
            "item": {"item": torch.arange(ITEMS)},
        },
        index={"user": user, "item": item, "row": torch.arange(ROWS)},
        ids={"user": [f"u{i}" for i in range(USERS)], "item": [f"i{i}" for i in range(ITEMS)]},
        labels=(logit > 0)[:, None].float(),
        weights=torch.ones(ROWS),
        time=torch.arange(ROWS),
    )


def made_learner(
    config: TrainConfig,
    solver: str = "gradient",
    *,
    types: tuple[str, ...] = ("user",),
    dropout: float = 0.1,
    half_life: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> MetaLearner:
    """A learner with validation rows; its model has dropout, so that torch's generator matters too."""
    torch.manual_seed(3)
    data = made_data()
    age = FeatureSpec("age", FeatureKind.CATEGORICAL, "user", 5)
    item = FeatureSpec("item", FeatureKind.CATEGORICAL, "item", ITEMS)
    embeddings = {embedding_name(task): DIM for task in types}
    shared = InteractionMLP([age, item], embeddings, embedding_dim=4, hidden=(8,), factors=4, dropout=dropout)
    blocks: dict[str, nn.Module] = {
        task: MetaMLP([age if task == "user" else item], DIM, hidden=(8,)) for task in types
    }
    settings = Adaptation.model_validate({"solver": solver, "steps": 2, "max_support": 16, "half_life": half_life})
    model = MetaModel(shared, blocks, adaptation=settings).to(dtype)
    outer = split_by_task_order(data, "user")
    inner = split_by_task_order(data, "user", share=0.2, among=outer.train)
    return MetaLearner(model, data, inner.train, config, inner)


def made_config(epochs: int, **more: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"epochs": epochs, "patience": 100, "rows_per_batch": 100, "lr": 0.01, "table_decay": 0.1, "decay": 0.1, **more}
    )


def run(folder: Path, out: Path, epochs: int, solver: str) -> None:
    learner = made_learner(made_config(epochs), solver, types=("user", "item"))

    def say(progress: Progress) -> None:
        print(progress.epoch, progress.step, flush=True)

    history = fit(learner, made_config(epochs), checkpoint=folder, progress=say)
    losses = [(epoch.train_loss, epoch.valid_loss) for epoch in history.epochs]
    save_file({**learner.module.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
