"""No tensor of the CPU meets one of the model's device: adaptation, training, scoring and generation, on a second device
that stands in for a GPU (`elsewhere.py`)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere, moved, second_device
from engines import Case, model_of, random_data
from torch import Tensor
from training import made_config, made_learner

from limaml.config import TrainConfig
from limaml.evaluate.baselines import PlainLearner, PlainModel
from limaml.meta.blocks import InteractionMLP
from limaml.meta.losses import Losses
from limaml.meta.outer import fit
from limaml.meta.support import Support
from limaml.tasks import TaskRows, split_by_task_order
from limaml.types import FeatureKind, FeatureSpec, embedding_name

HERE = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no CUDA device on this machine.")

CASES = {
    "one type": Case(),
    "two types, missing labels": Case(
        types=("user", "item"), losses=("binary", "squared"), missing=True, global_block="cross"
    ),
    "sequence, tables": Case(sequence="own attention", table="bag", adapt_tables=True, pieces=("gate", "prelu")),
    "norms": Case(sequence="layers", pieces=("layer norm", "rms norm")),
    "attention, tied, plain block": Case(sequence="multihead", pieces=("tied", "free"), global_block="plain"),
}


def answers(case: Case, engine: str, device: torch.device = HERE) -> dict[str, Tensor]:
    """Everything that a model is asked for: embeddings, their meta-gradient, generated embeddings, logits."""
    model, data = model_of(case, engine), random_data(case)
    data = replace(data, offset=torch.linspace(-1, 1, len(data)))
    if device == ELSEWHERE:
        moved(model)
    else:
        model.to(device)
    assert model.device.type == device.type
    tasks = torch.arange(data.count("user"))
    first = TaskRows.of(data.index["user"], len(tasks), torch.arange(len(data)) % 2 == 0)
    z = model.adapt(data, "user", tasks, first.of_tasks(tasks))
    rows = TaskRows.of(data.index["user"], len(tasks)).of_tasks(tasks)
    query = Support(model.global_block, model.losses, data, "user", tasks, rows, model.held_cold(data, "user"))
    query.loss(z).sum().backward()  # type: ignore[no-untyped-call]
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found["adapted"] = z.detach()
    tables = {task: model.embed(data, task, TaskRows.of(data.index[task], data.count(task))) for task in model.tasks}
    found |= {f"generated {task}": table for task, table in tables.items()}
    found["logits"] = model.predict(data, torch.arange(len(data)), tables, rows_per_chunk=3)
    return found


def _chosen(name: str, engine: str) -> tuple[Case, str]:
    if engine == "newton":
        return replace(CASES[name], adaptation={"solver": "newton"}), "auto"
    return CASES[name], "auto" if name.startswith("attention") and engine == "vmap" else engine


@pytest.mark.parametrize("engine", ["lowrank", "vmap", "loop", "newton"])
@pytest.mark.parametrize("name", CASES)
def test_adaptation_stays_on_the_device(name: str, engine: str) -> None:
    case = CASES[name]
    case, engine = _chosen(name, engine)
    here = answers(case, engine)
    with second_device():
        there = answers(case, engine, ELSEWHERE)
    assert here.keys() == there.keys()
    for what, values in there.items():
        assert isinstance(values, Elsewhere), what
        torch.testing.assert_close(values.here, here[what], rtol=1e-12, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("engine", ["lowrank", "vmap", "loop", "newton"])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_says_what_the_cpu_says(name: str, engine: str) -> None:
    here, there = (answers(*_chosen(name, engine), torch.device(place)) for place in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for what, values in there.items():
        torch.testing.assert_close(
            values.cpu(), here[what], rtol=1e-9, atol=1e-10, msg=lambda text, w=what: f"{w}: {text}"
        )


@needs_gpu
@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_training_on_a_gpu_ends_where_it_does_on_the_cpu(solver: str) -> None:
    config = made_config(2)
    results = []
    for place in ("cpu", "cuda"):
        learner = made_learner(config, solver, types=("user", "item"), dropout=0.0)
        learner.module.to(place)
        fit(learner, config)
        results.append(learner.module.state_dict())
    for name, value in results[1].items():
        torch.testing.assert_close(value.cpu(), results[0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_training_stays_on_the_device(solver: str) -> None:
    """Two epochs with validation and running average."""
    config = made_config(2, rows_per_batch=300)  # few steps: each operation goes through Python here
    results = []
    for elsewhere in (False, True):
        learner = made_learner(config, solver, types=("user", "item"), dropout=0.0)
        with second_device() if elsewhere else nullcontext():
            if elsewhere:
                moved(learner.module)
            fit(learner, config)
        results.append(learner.module.state_dict())
    for name, value in results[1].items():
        assert isinstance(value, Elsewhere), name
        torch.testing.assert_close(value.here, results[0][name], rtol=1e-4, atol=1e-5)


def test_baselines_stay_on_the_device() -> None:
    config = TrainConfig(epochs=2, rows_per_batch=100)
    results = []
    for elsewhere in (False, True):
        made = made_learner(config)
        torch.manual_seed(0)
        item = FeatureSpec("item", FeatureKind.CATEGORICAL, "item", 20)
        block = InteractionMLP([item], {embedding_name("user"): 4}, embedding_dim=4, hidden=(8,), factors=4)
        plain = PlainModel(block, Losses(), {"user": (30, 4)})
        with second_device():
            if elsewhere:
                moved(plain)
            split = split_by_task_order(made.data, "user")
            fit(PlainLearner(plain, made.data, split.train, config, split), config)
        results.append(plain.state_dict())
    for name, value in results[1].items():
        assert isinstance(value, Elsewhere), name
        torch.testing.assert_close(value.here, results[0][name], rtol=1e-5, atol=1e-6)


def test_the_second_device_tells_what_meets() -> None:
    there = Elsewhere(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="two devices"):
        there + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3)[Elsewhere(torch.tensor([0]))]
    with pytest.raises(RuntimeError, match="two devices"):
        there.index_select(0, torch.tensor([1]))
    with second_device():
        assert isinstance(torch.arange(2, device=ELSEWHERE) + 1.5, Elsewhere)
    assert type(there.cpu()) is Tensor
