"""`torchrun --no-python limaml train …`: the processes train one model, and one of them speaks and writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from commands import SMALL, Command, Tables

from limaml.meta import load_model


def test_two_processes_train_the_model_of_one(command: Command, tables: Tables, tmp_path: Path) -> None:
    settings = [*SMALL, "train.epochs=2", "train.lr=0.001"]
    alone = command("train", tables.past, *tables.options, *settings, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    limaml = [str(Path(sys.executable).with_name("limaml")), "train", str(tables.past), *tables.options, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, *limaml, "--out", str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reading") == done.stdout.count("is in") == done.stdout.count("Next:") == 1
    one, two = (load_model(tmp_path / which / "model").model.state_dict() for which in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "two" / "checkpoint").exists()
    after = command("embed", tmp_path / "two")
    assert after.code == 0, after.err
