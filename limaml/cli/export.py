"""`limaml export`: the global block for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from limaml.cli.console import amount, console, say
from limaml.cli.workspace import Workspace
from limaml.serving.onnx import export_onnx

__all__ = ["export_command"]


def export_command(
    folder: Path, /, *, onnx: Annotated[Path, Parameter(help="ONNX file to write, any number of rows at a time.")]
) -> None:
    """Write the global block of a run as an ONNX file, after comparing it with torch on random rows.

    Its inputs are encoded features, a row each, and the meta embeddings of each row's tasks; its output is `logits`
    `[rows, labels]`. The file's metadata name the model and the vocabularies' sizes. Needs the extra `onnx`.

    `limaml export runs/mine --onnx runs/mine/global.onnx`

    Next: `limaml serve runs/mine --runtime onnx`, which needs no such file.
    """
    done = export_onnx(Workspace(folder).trained, onnx)
    inputs = ", ".join(f"{name} {['rows', *shape]}".replace("'", "") for name, shape in done.inputs.items())
    say([f"{inputs} → logits; {amount(done.path.stat().st_size)}."])
    say([f"At most {done.difference:.1e} from torch on {done.rows} random rows."])
    console.print(str(done.path), markup=False, highlight=False)
