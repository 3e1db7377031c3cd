"""MLflow's scoring server as a peer, in an environment that is made for it: it wants packages of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.serving.workload import Asked

__all__ = ["MLFLOW", "mlflow_command", "mlflow_environment", "mlflow_message"]

MLFLOW = "3.17.2"
ROOT = Path(__file__).resolve().parents[2]


def mlflow_environment(folder: Path) -> Path:
    """Make a virtual environment with MLflow, PyTorch and this package, unless it is there; returns its `bin`."""
    ready, here = folder / "ready", folder / "bin"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(here / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        import torch

        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}", f"mlflow=={MLFLOW}", str(ROOT)], check=True)
        ready.touch()
    return here


def mlflow_command(binary: Path, folder: Path, store: Path, port: int) -> list[str]:
    """Save the model, and say how to serve it."""
    code = Path(__file__).with_name("mlflow_peer.py")
    save = (
        "import sys, mlflow; mlflow.pyfunc.save_model(sys.argv[1], python_model=sys.argv[2], "
        "model_config={'store': sys.argv[3]}, pip_requirements=[])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [str(binary / "python"), "-c", save, str(folder), str(code), str(store)],
        check=True,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    serve = ["models", "serve", "-m", str(folder), "-p", str(port), "--env-manager", "local", "--workers", "1"]
    return [str(binary / "mlflow"), *serve]


def mlflow_message(request: Asked) -> bytes:
    """A whole HTTP request: the columns as a split data frame in JSON, which is what MLflow's server reads."""
    rows = len(next(iter(request.columns.values())))
    columns = {"user_id": [request.member] * rows, **{name: v.tolist() for name, v in request.columns.items()}}
    data = [list(row) for row in zip(*columns.values(), strict=True)]
    body = json.dumps({"dataframe_split": {"columns": list(columns), "data": data}}).encode()
    head = (
        "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
