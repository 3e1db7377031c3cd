"""The outer loop: repeatable, stoppable at any moment, careful with what is not a number, and flat in memory."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training import made_config, made_learner, run

from limaml.errors import ArtifactError, ConfigError, TrainingError
from limaml.meta.learn import MetaLearner, mean_loss
from limaml.meta.outer import Progress, fit
from limaml.tasks import TaskRows, split_by_task_order

SCRIPT = Path(__file__).with_name("training.py")


def weights_of(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_training_learns_and_is_repeatable(solver: str) -> None:
    runs = []
    for seed in (0, 0, 1):
        config = made_config(6, seed=seed)
        learner = made_learner(config, solver)
        history = fit(learner, config)
        runs.append((weights_of(learner), history))
    (first, history), (second, _), (third, _) = runs
    assert same(first, second)
    assert not same(first, third)
    losses = [epoch.train_loss for epoch in history.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert history.best == 1 + min(range(6), key=lambda i: history.epochs[i].valid_loss or 0.0)
    assert not learner.module.training


def test_the_best_weights_are_kept() -> None:
    config = made_config(8, lr=0.1)
    learner = made_learner(config, dropout=0.0)
    history = fit(learner, config)
    best = min(epoch.valid_loss or 9.9 for epoch in history.epochs)
    assert learner.validate() == pytest.approx(best, rel=1e-6)
    assert history.epochs[history.best - 1].valid_loss == best


def test_early_stopping() -> None:
    config = made_config(200, lr=0.1, patience=2)
    history = fit(made_learner(config), config)
    assert history.stopped_early
    assert len(history.epochs) == history.best + 2 < 200


def test_progress_is_reported_after_every_step() -> None:
    seen: list[Progress] = []
    config = made_config(2)
    learner = made_learner(config)
    fit(learner, config, progress=seen.append)
    for epoch in (1, 2):
        steps = [p for p in seen if p.epoch == epoch]
        assert [p.step for p in steps] == list(range(1, steps[0].steps + 1))
        assert sum(p.loss for p in steps) > 0
        present = int((learner.grouped["user"].size > 0).sum())
        assert steps[-1].tasks == 2 * present  # cross-fit judges every task twice


# ---- killed and resumed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [1, 2, 4])
def test_resuming_between_epochs_changes_nothing(killed_after: int, tmp_path: Path) -> None:
    config = made_config(5, average=2.0)
    whole = made_learner(config)
    history = fit(whole, config)
    fit(made_learner(config), config.model_copy(update={"epochs": killed_after}), checkpoint=tmp_path / "c")
    resumed = made_learner(config)
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.zero_()  # everything must come out of the checkpoint
    torch.manual_seed(99)
    again = fit(resumed, config, checkpoint=tmp_path / "c")
    assert same(weights_of(whole), weights_of(resumed))
    assert [(e.train_loss, e.valid_loss) for e in again.epochs] == [
        (e.train_loss, e.valid_loss) for e in history.epochs
    ]
    assert again.best == history.best
    finished = made_learner(config)
    fit(finished, config, checkpoint=tmp_path / "c")  # nothing is left to do
    assert same(weights_of(whole), weights_of(finished))


def test_resuming_without_validation_rows_changes_nothing(tmp_path: Path) -> None:
    config = made_config(4)

    def learner() -> MetaLearner:
        made = made_learner(config)
        made.validation = None
        return made

    whole, first, resumed = learner(), learner(), learner()
    fit(whole, config)
    fit(first, config.model_copy(update={"epochs": 2}), checkpoint=tmp_path / "c")
    history = fit(resumed, config, checkpoint=tmp_path / "c")
    assert same(weights_of(whole), weights_of(resumed))
    assert history.best == 4 and history.epochs[-1].valid_loss is None


def test_killed_at_any_moment_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """`kill -9` in a process of its own, twice, in the middle of an epoch; the third process is left to finish."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(tmp_path / "whole", tmp_path / "whole.safetensors", 4, "newton")
    finally:
        torch.set_num_threads(threads)
    out = tmp_path / "killed.safetensors"
    command = [sys.executable, str(SCRIPT), str(tmp_path / "killed"), str(out), "4", "newton"]
    firsts = []
    for lines in (25, 30):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for count, line in enumerate(process.stdout, 1):
            if count == 1:
                firsts.append(line.strip())
            if count == lines:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert firsts[0] == "1 1" and firsts[1] == "2 1"  # it did go on where it was, at an epoch's start
    assert finished.stdout.startswith("3 1\n")
    assert same(load_file(tmp_path / "whole.safetensors"), load_file(out))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = made_config(1)
    fit(made_learner(config), config, checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"train\.lr.*lr=0\.01"):
        fit(made_learner(config), config.model_copy(update={"lr": 0.02}), checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match="of another model"):
        fit(made_learner(config, types=("user", "item")), config, checkpoint=tmp_path / "c")
    weights = tmp_path / "c" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        fit(made_learner(config), config, checkpoint=tmp_path / "c")


# ---- what is not a number --------------------------------------------------------------------------------------------------


def broken_learner(row_of: str = "train") -> tuple[MetaLearner, int]:
    """One row of one member has a feature that is not a number."""
    learner = made_learner(made_config(3), dropout=0.0)
    data = learner.data
    learner.validation = None
    row = int(learner.grouped["user"].rows[learner.grouped["user"].offset[7]])
    learner.data = replace(data, offset=torch.zeros(len(data)))
    learner.data.offset[row] = torch.nan
    return learner, row


def test_a_loss_that_is_not_a_number_names_step_and_task_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    config = made_config(3)
    good, folder = made_learner(config, dropout=0.0), tmp_path / "c"
    fit(good, config.model_copy(update={"epochs": 1}), checkpoint=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    learner, _ = broken_learner()
    with pytest.raises(
        TrainingError, match=r"loss is nan in epoch 2, step \d+: Task user:u7 is the first to blame, at row"
    ):
        fit(learner, config, checkpoint=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_validation_loss_that_is_not_a_number_stops_training() -> None:
    config = made_config(3)
    learner = made_learner(config)
    assert learner.validation is not None
    learner.data = replace(learner.data, offset=torch.zeros(len(learner.data)))
    learner.validate = lambda ranks: float("nan")  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="validation loss is nan after epoch 1"):
        fit(learner, config)


def test_rates_that_explode_stop_training_or_are_bounded() -> None:
    config = made_config(3, lr=1e12)
    with pytest.raises(TrainingError, match=r"epoch \d+, step \d+"):
        fit(made_learner(config), config)


def test_nothing_to_train_on_is_said() -> None:
    config = made_config(1)
    learner = made_learner(config)
    nothing = torch.zeros(len(learner.data), dtype=torch.bool)
    learner.grouped = {"user": TaskRows.of(learner.data.index["user"], 30, nothing)}
    with pytest.raises(TrainingError, match="no task has training rows"):
        fit(learner, config)


# ---- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_memory_stays_flat_over_200_meta_steps(solver: str) -> None:
    config = made_config(20, rows_per_batch=75)
    counts: list[int] = []
    learner = made_learner(config, solver)

    def count(progress: Progress) -> None:
        if progress.step == progress.steps:
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        steps.append(progress.step)

    steps: list[int] = []
    gc.collect()
    gc.disable()  # so that a reference cycle counts as a leak
    try:
        fit(learner, config, progress=count)
    finally:
        gc.enable()
    assert len(steps) >= 200
    assert max(counts[2:]) <= counts[1] + 5, counts


# ---- what the learner learns from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["cross_fit", "time_cut"])
@pytest.mark.parametrize("types", [("user",), ("user", "item")])
def test_batches_judge_only_training_rows(query: str, types: tuple[str, ...]) -> None:
    learner = made_learner(made_config(1, query=query), types=types)
    batches = learner.batches(torch.Generator().manual_seed(0))
    train = {task: set(grouped.rows.tolist()) for task, grouped in learner.grouped.items()}
    for task in types:
        judged = [row for b in batches if b.task == task for row in b.batch.query.rows.tolist()]
        assert len(judged) == len(set(judged))
        assert set(judged) == train[task] if query == "cross_fit" else set(judged) < train[task]
        for b in batches:
            assert len(b.batch.query)
            if b.task == task:
                assert not set(b.batch.query.rows.tolist()) & set(b.batch.support.rows.tolist())
                assert set(b.batch.support.rows.tolist()) <= train[task]
    if (
        len(types) == 2 and query == "cross_fit"
    ):  # what a query is scored with was adapted on the other part of the rows
        coin_of = {row: b.side for b in batches for row in b.batch.support.rows.tolist()}
        for b in batches:
            assert all(coin_of.get(row) in (None, not b.side) for row in b.batch.query.rows.tolist())
    loss, size = learner.loss(batches[0])
    assert size == len(batches[0].batch.query)
    assert float(loss.detach()) > 0


@pytest.mark.parametrize("solver", ["gradient", "newton"])
def test_anybody_has_a_share_of_the_gradient(solver: str) -> None:
    alone, both = (made_learner(made_config(1, anybody=share), solver, dropout=0.0) for share in (0.0, 0.7))
    with torch.no_grad():
        for learner in (alone, both):
            learner.model.anybody["user"].fill_(0.5)
    batch = alone.batches(torch.Generator().manual_seed(3))[0]
    plain, told = alone.loss(batch)[0], both.loss(batch)[0]
    assert float(told.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)  # that of adapted tasks alone
    rows, every = batch.batch.query.rows, torch.arange(alone.data.count("user"))
    logits = alone.model.logits(alone.data, rows, {"user": alone.model.anybody_of(alone.data, "user", every)})
    of_anybody = alone.model.losses.of_rows(alone.data, rows, logits).sum()

    def slopes(learner: MetaLearner, loss: Tensor) -> Sequence[Tensor]:
        wanted = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    for one, more, found in zip(slopes(alone, plain), slopes(alone, of_anybody), slopes(both, told), strict=True):
        assert torch.allclose(found, one + 0.7 * more, rtol=1e-4, atol=1e-5)


def test_rows_in_any_order_have_the_slopes_of_rows_by_task() -> None:
    learner = made_learner(made_config(1), dropout=0.0)
    model, data = learner.model, learner.data
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:150]
    sought = torch.arange(1.0, 151.0)  # every row is of another weight
    grouped = torch.argsort(data.index["user"][rows], stable=True)
    found = []
    for order in (torch.arange(150), grouped):
        table = model.cold(data, "user", torch.arange(data.count("user"))).detach().requires_grad_()
        logits = model.logits(data, rows[order], {"user": table}).squeeze(-1)
        found.append((logits[torch.argsort(order)], *torch.autograd.grad(logits @ sought[order], table)))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampled", [False, True], ids=["all rows", "sampled rows"])
def test_validation_is_the_loss_of_adapted_models(sampled: bool) -> None:
    learner = made_learner(made_config(1), dropout=0.0)
    if sampled:  # as the training loss has it: else the best model would be one that knows nothing yet
        learner.data = replace(learner.data, offset=torch.linspace(0.5, 4, len(learner.data)))
    model, data, split = learner.model, learner.data, learner.validation
    assert split is not None
    learner.module.eval()
    total, weight = 0.0, 0
    for task in range(data.count("user")):
        mine = (data.index["user"] == task) & split.test
        if not mine.any():
            continue
        past = TaskRows.of(data.index["user"], 30, split.support)
        one = torch.tensor([task])
        z = model.adapt(data, "user", one, past.of_tasks(one, model.adaptation.max_support)).detach()
        table = torch.zeros(30, z.shape[1])
        table[task] = z
        logits = model.logits(data, mine.nonzero().flatten(), {"user": table}).detach()
        if data.offset is not None:
            logits = logits + data.offset[mine, None]
        total += float(torch.nn.functional.binary_cross_entropy_with_logits(logits, data.labels[mine], reduction="sum"))
        weight += int(mine.sum())
    assert mean_loss(model, data, split) == pytest.approx(total / weight, rel=1e-5)
    assert learner.validate() == pytest.approx(total / weight, rel=1e-5)
    assert split_by_task_order(data, "user").test.sum() > 0
