"""Training bucket by bucket: the training in memory where one window holds everything, and resumable at any step where not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest
import torch
from bucketed import BUCKETS, buckets_of, ended_with, made_log, settings
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from limaml.config import Config
from limaml.errors import ConfigError, DataError
from limaml.interactions.buckets import Buckets
from limaml.meta.checkpoint import find_checkpoint, restore
from limaml.meta.optimiser import Optimiser
from limaml.meta.outer import Progress
from limaml.meta.train import Training, train
from limaml.tasks import BucketWindows

SCRIPT = Path(__file__).with_name("bucketed.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bucketed")
    made_log(made)
    return made


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Watched:
    """Buckets that remember which of them were read."""

    inner: Buckets
    read_so_far: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.inner.count

    @property
    def rows(self) -> int:
        return self.inner.rows

    def read(self, number: int) -> pl.DataFrame:
        self.read_so_far.append(number)
        return self.inner.read(number)


class Stop(Exception):
    pass


def trained(
    folder: Path, config: Config, *, checkpoint: Path | None = None, stop: int = 0
) -> tuple[Training | None, list[Progress]]:
    """Train, or stop behind the step number `stop`, counted over both trainings."""
    seen: list[Progress] = []

    def note(_: str, news: Progress) -> None:
        seen.append(news)
        if len(seen) == stop:
            raise Stop

    buckets = buckets_of(folder)
    try:
        return train(buckets, buckets.schema, config, checkpoint=checkpoint, progress=note), seen
    except Stop:
        return None, seen


# --- windows ---------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 40), st.integers(1, 50), st.integers(1, 1000), st.none() | st.integers(1, 1200), st.integers(0, 99)
)
def test_an_epoch_takes_every_bucket_once_or_a_part_that_holds_enough(
    count: int, size: int, tasks: int, most: int | None, seed: int
) -> None:
    plan = BucketWindows.of(count, 10, size)
    generator = torch.Generator().manual_seed(seed)
    before = generator.get_state()
    windows = plan.epoch(generator, tasks, most)
    taken = [bucket for window in windows for bucket in window.buckets]
    assert len(set(taken)) == len(taken) and set(taken) <= set(range(count))
    assert all(len(w.buckets) <= plan.size and list(w.buckets) == sorted(w.buckets) for w in windows)
    assert len(windows) == plan.per_epoch(tasks, most)
    again = plan.epoch(torch.Generator().manual_seed(seed), tasks, most)
    assert again == windows
    if plan.single:
        assert torch.equal(generator.get_state(), before) and len(windows) == 1 and windows[0].seed is None
    if most is None or most >= tasks:
        assert sorted(taken) == list(range(count)) and all(w.tasks is None for w in windows)
    else:
        assert sum(w.tasks or 0 for w in windows) >= most
        assert tasks * len(taken) / count >= most  # as many are in these buckets as are wanted, if all are as full


def test_windows_of_two_million_rows_unless_told_otherwise() -> None:
    assert BucketWindows.of(64, 640_000_000, None).size == 1
    assert BucketWindows.of(64, 64_000_000, None).size == 2
    assert BucketWindows.of(64, 1_000_000, None).single
    assert BucketWindows.of(1, 10**9, None).single


# --- one window is training in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [("user_id",), ("user_id", "item_id")])
def test_one_window_trains_as_the_table_in_memory_does(types: tuple[str, ...], tmp_path: Path) -> None:
    frame, schema = made_log(tmp_path, types=types)
    config = settings()
    table = train(frame, schema, config)
    log = train(buckets_of(tmp_path), schema, config)
    assert log.encoder == table.encoder
    assert same(ended_with(table), ended_with(log))
    assert torch.equal(log.data.time, table.data.time) and torch.equal(log.data.labels, table.data.labels)


# --- several windows ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[str, Tensor], list[Progress]]:
    """What training in windows of two of the five buckets ends with, uninterrupted."""
    training, seen = trained(folder, settings(window_buckets=2))
    assert training is not None
    with pytest.raises(ConfigError, match="never in memory together"):
        training.data  # noqa: B018
    return ended_with(training), seen


def test_windows_learn_from_all_tasks(whole: tuple[dict[str, Tensor], list[Progress]], folder: Path) -> None:
    ended, seen = whole
    memory, in_memory = trained(folder, settings(window_buckets=BUCKETS))
    assert memory is not None
    assert ended.keys() == ended_with(memory).keys()
    assert seen[-1].tasks == in_memory[-1].tasks == 2 * len(memory.data.ids["user_id"])  # cross-fit judges each twice
    assert seen[-1].step == seen[-1].steps
    losses = ended["losses"][:, 0] - ended_with(memory)["losses"][:, 0]
    assert 0 < float(losses.abs().max()) < 0.1  # other batches, the same rows


def test_an_epoch_on_a_part_of_the_tasks_reads_a_part_of_the_buckets(folder: Path) -> None:
    inner = buckets_of(folder)
    watched, seen = Watched(inner), list[Progress]()
    few = settings(window_buckets=1, tasks_per_epoch=15, validation_buckets=2, epochs=1)
    found = train(watched, inner.schema, few, refit=False, progress=lambda _, news: seen.append(news))
    assert watched.read_so_far[:BUCKETS] == list(range(BUCKETS))  # the survey
    epoch, judged = watched.read_so_far[BUCKETS:], BucketWindows(BUCKETS, 1).sample(2, few.train.seed)
    # 15 of 50 tasks are in two buckets, and two are validated on; where the last one trained on is judged first, it is read once
    assert 3 <= len(epoch) <= 4 and set(judged) <= set(epoch)
    assert 10 <= seen[-1].tasks / 2 <= 16  # at most 8 of each bucket
    assert found.history.epochs[0].valid_loss is not None
    with pytest.raises(DataError, match="There are no rows to train on"):
        train(inner.read(0).clear(), inner.schema, few)


@pytest.mark.parametrize("every", [None, 1])
def test_stopped_and_resumed_in_any_window_changes_nothing(
    every: int | None, whole: tuple[dict[str, Tensor], list[Progress]], folder: Path, tmp_path: Path
) -> None:
    config = settings(window_buckets=2, checkpoint_steps=every)
    steps = len(whole[1])
    where: list[tuple[int, int]] = []
    for stop in (2, steps // 4, steps // 4, 0):
        training, seen = trained(folder, config, checkpoint=tmp_path, stop=stop)
        where.append((seen[0].epoch, seen[0].step))
    assert training is not None
    assert same(ended_with(training), whole[0])
    assert any(step > 1 for _, step in where[1:])  # it did go on inside of an epoch
    if every == 1:  # what was reported when it stopped was not saved yet, and nothing else was lost
        assert where[:2] == [(1, 1), (1, 2)]


def test_another_number_of_processes_does_not_go_on_inside_of_a_window(folder: Path, tmp_path: Path) -> None:
    config = settings(window_buckets=2, checkpoint_steps=1)
    trained(folder, config, checkpoint=tmp_path, stop=3)
    found = find_checkpoint(tmp_path / "search")
    assert found is not None
    module = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="made by 1 processes in the middle of a window, and there are 2 now"):
        restore(found, module, Optimiser(module, [], 1.0, config.train), torch.Generator(), config.train, 2)


def test_killed_and_resumed_ends_with_the_same_bits(
    whole: tuple[dict[str, Tensor], list[Progress]], folder: Path, tmp_path: Path
) -> None:
    """`kill -9` in the second window of the first epoch, in a process of its own."""
    linked(folder, tmp_path / "run")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), str(tmp_path / "out"), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    in_epoch = sum(news.epoch == 1 for news in whole[1]) // 2  # of one of the two trainings
    for line in process.stdout:
        if line.split()[2:] == ["1", str(in_epoch - 1)]:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    epoch, step = done.stdout.splitlines()[0].split()[2:]
    assert epoch == "1" and int(step) > 1
    assert same(load_file(tmp_path / "out.0"), whole[0])


# --- several processes --------------------------------------------------------------------------------------------------------


def torchrun(folder: Path, out: Path, restarts: int) -> subprocess.Popen[str]:
    """Two processes that train `folder` in windows of two of its five buckets: one has two windows an epoch, one has one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, *launcher, "--master-addr", "127.0.0.1", "--master-port", port, str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, str(folder), str(out), "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def linked(folder: Path, target: Path) -> Path:
    """Another run on the same rows."""
    target.mkdir()
    for name in ("log", "side", "schema.json"):
        (target / name).symlink_to(folder / name)
    return target


def test_ranks_with_unequal_windows_and_one_killed(folder: Path, tmp_path: Path) -> None:
    """`kill -9` of one rank behind the first window: torchrun starts both again, and they end as if nothing had happened."""
    calm = torchrun(linked(folder, tmp_path / "calm"), tmp_path / "calm.out", 0)
    said, _ = calm.communicate(timeout=300)
    assert calm.returncode == 0, said
    steps = [line.split()[2:] for line in said.splitlines() if line.startswith(("search", "train"))]
    struck = torchrun(linked(folder, tmp_path / "struck"), tmp_path / "struck.out", 1)
    assert struck.stdout is not None
    last = str(sum(step[0] == "1" for step in steps) // 2)  # of the first epoch: each epoch ends in the second window
    killed, after = 0, list[str]()
    for line in struck.stdout:
        told = line.split()
        if told[:1] in (["search"], ["train"]):
            if killed and int(told[1]) != killed:
                after.append(line)
            elif not killed and told[2:] == ["1", last]:
                killed = int(told[1])
                os.kill(killed, signal.SIGKILL)
    struck.stdout.close()
    assert struck.wait(timeout=300) == 0, after
    assert killed and after[0].split()[2] == "1" and int(after[0].split()[3]) > 1  # from behind the first window on
    ended = [load_file(tmp_path / f"{run}.out.{rank}") for run in ("calm", "struck") for rank in (0, 1)]
    assert all(same(ended[0], other) for other in ended[1:])
