"""Two processes under torchrun train as one does: the same gradients, the same weights, on every rank."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from limaml.meta.distributed import Ranks

SCRIPT = Path(__file__).with_name("ranks.py")


GRADIENTS = [
    "user:gradient:gradient",  # shares of about equal size
    "user:newton:gradient:3",  # three tasks against the rest
    "user,item:gradient:gradient:1",
    "user,item:newton:gradient:0",  # a rank without tasks
    "user:gradient:gradient:99",
    "user,item*:newton:gradient:3",
    "user*:gradient:gradient:0",
    "user:newton:wrapped",
    "user,item:gradient:wrapped:0",
]
FITS = ["user:gradient:fit:3", "user,item:newton:fit:4", "user,item*:gradient:fit:2"]


def launched(folder: Path, *works: str) -> subprocess.Popen[str]:
    """Two processes under torchrun, over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0"]
    command = [sys.executable, *launcher, "--master-addr", "127.0.0.1", "--master-port", str(port), str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, str(folder), *works], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders where one process, and two ranks, left what they ended with."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    process = launched(two, *GRADIENTS, *FITS)
    subprocess.run([sys.executable, str(SCRIPT), str(one), *GRADIENTS, *FITS], check=True, timeout=300)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return one, two


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        size = max(1.0, float(one[name].abs().max()))
        assert float((one[name] - other[name]).abs().max()) <= 1e-10 * size, name


@pytest.mark.parametrize("work", GRADIENTS)
def test_gradients_of_two_ranks_are_those_of_one(work: str, finished: tuple[Path, Path]) -> None:
    one = load_file(finished[0] / f"{work}.0")
    assert sum(float(gradient.abs().sum()) for gradient in one.values()) > 0
    for rank in (0, 1):
        assert_close(one, load_file(finished[1] / f"{work}.{rank}"))


@pytest.mark.parametrize("work", FITS)
def test_training_on_two_ranks_is_training_on_one(work: str, finished: tuple[Path, Path]) -> None:
    """Weights, running average, losses, the epoch that is kept and the random state, behind several epochs."""
    one, first, second = (load_file(finished[who] / f"{work}.{rank}") for who, rank in ((0, 0), (1, 0), (1, 1)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    del one["random"], first["random"]  # one process draws otherwise; the ranks draw alike
    assert_close(one, first)


def test_killed_and_resumed_on_two_ranks(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """`kill -9` of one rank in the middle of an epoch takes all down; the next launch goes on from the checkpoint."""
    work = "user,item:newton:fit:4:checkpoint"
    process = launched(tmp_path, work)
    assert process.stdout is not None
    for line in process.stdout:
        told = re.match(r"rank (\d) of 2, (\d+): (\d+) (\d+)", line)
        if told:
            assert told[1] == "0"  # the other one is silent
            if (told[3], told[4]) == ("3", "2"):
                os.kill(int(told[2]), signal.SIGKILL)
                break
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (tmp_path / f"{work}.0").exists()
    process = launched(tmp_path, work)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.findall(r": (\d+) (\d+)", said)[0] == ("3", "1")
    for rank in (0, 1):
        whole = load_file(finished[1] / f"user,item:newton:fit:4.{rank}")
        result = load_file(tmp_path / f"{work}.{rank}")
        assert all(torch.equal(whole[name], result[name]) for name in whole)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 5))
def test_shares_are_all_of_it_and_about_equal(sizes: list[int], world: int) -> None:
    size = torch.tensor(sizes)
    masks = [Ranks(rank, world).share(size) for rank in range(world)]
    assert (sum(mask.long() for mask in masks) == 1).all()
    for mask in masks:
        assert float(size[mask].sum()) <= float(size.sum()) / world + float(size.max()) + 1e-6
