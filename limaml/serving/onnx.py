"""The global block as an ONNX file, and as a module that runs one: `--runtime onnx`.

    encoded features of the rows, one meta embedding per row and task type  →  logits [rows, heads]

What leaves `export_onnx` has been compared with torch on random rows, and a file that differs is not written. Looking
embeddings up, encoding and σ stay outside: they are the same for both runtimes.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limaml.errors import ArtifactError, ModelError, require
from limaml.meta.saved import TrainedModel
from limaml.types import FeatureKind, Features, FeatureSpec, embedding_name

__all__ = ["Exported", "OnnxBlock", "export_block", "export_onnx", "random_inputs", "run_with_onnx"]

TOLERANCE = 1e-5
"""Largest difference from torch that is let through, as a share of 1 + |logit|."""

SINGLE_FILE = 2**31 - 2**26
"""Bytes of weights that fit: one ONNX file ends at 2 GiB."""

CHECKED_ROWS = (1, 2, 7, 100, 257)


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from torch at the most (absolute, in logits) on `rows` random rows."""

    path: Path
    inputs: Mapping[str, tuple[int, ...]]  # name → shape of one row
    difference: float
    rows: int


class _Positional(nn.Module):
    """A block that is given its features one by one, as an ONNX graph is."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.block, self.names = block, tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        logits: Tensor = self.block(dict(zip(self.names, values, strict=True)))
        return logits.unsqueeze(1) if logits.dim() == 1 else logits


class OnnxBlock(nn.Module):
    """The global block in an ONNX file, run by onnxruntime on the CPU; it stands where the torch one stood.

    May be called from several threads; each call runs on `threads` of its own making.
    """

    differentiable = False

    def __init__(self, path: Path | str, threads: int = 1) -> None:
        super().__init__()
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen kinds, all of them derived from RuntimeError or nothing
            raise ArtifactError(f"{path} cannot be run by onnxruntime: {_first_line(error)}") from error
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self._dtypes = {given.name: _DTYPES[given.type] for given in self._session.get_inputs()}

    def forward(self, features: Features) -> Tensor:
        """Logits `[n, heads]` of features `[n, …]`."""
        given = {name: features[name].to(dtype).numpy() for name, dtype in self._dtypes.items()}
        return torch.from_numpy(self._session.run(None, given)[0])


_DTYPES = {"tensor(int64)": torch.int64, "tensor(float)": torch.float32, "tensor(double)": torch.float64}


def random_inputs(
    specs: Sequence[FeatureSpec], dims: Mapping[str, int], rows: int, dtype: torch.dtype, seed: int = 0
) -> Features:
    """Encoded features and meta embeddings of `rows` made-up rows: every id may occur, token lists have any length."""
    generator = torch.Generator().manual_seed(seed)
    features: Features = {}
    for spec in specs:
        if not spec.is_id:
            features[spec.name] = torch.randn(rows, spec.size, generator=generator).to(dtype)
        elif spec.kind is FeatureKind.CATEGORICAL:
            features[spec.name] = torch.randint(spec.size, (rows,), generator=generator)
        else:
            ids = torch.randint(spec.size, (rows, spec.length), generator=generator)
            lengths = torch.randint(spec.length + 1, (rows, 1), generator=generator)
            features[spec.name] = ids * (torch.arange(spec.length) < lengths)
    for task, dim in dims.items():
        features[embedding_name(task)] = torch.randn(rows, dim, generator=generator).to(dtype)
    return features


def export_onnx(trained: TrainedModel, path: Path | str) -> Exported:
    """Write the global block of a trained model; the file names its inputs, and the model that it came from.

    Raises `ModelError` where the block cannot be exported, or the result differs from torch: nothing is written then.
    """
    model, encoder = trained.model, trained.encoder
    metadata = {
        "limaml.model": trained.digest,
        "limaml.features": json.dumps([asdict(spec) for spec in encoder.specs]),
        "limaml.embeddings": json.dumps({embedding_name(task): dim for task, dim in model.dims.items()}),
        "limaml.labels": json.dumps([{"name": label.name, "loss": label.loss} for label in encoder.schema.labels]),
    }
    dims = {task: dim or 0 for task, dim in model.dims.items()}
    return export_block(model.global_block, encoder.specs, dims, path, metadata, dtype=model.dtype)


def export_block(
    block: nn.Module,
    specs: Sequence[FeatureSpec],
    dims: Mapping[str, int],
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """`export_onnx` for a block that reads the features `specs` and the meta embeddings `dims` (task type → size)."""
    path, name = Path(path), type(block).__name__
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    sample = random_inputs(specs, dims, 3, dtype)
    if not sample:
        raise ModelError(f"The global block {name} has no inputs, so there is nothing to export.")
    was_training = block.training
    block.eval()
    part = path.with_name(f".{path.stem}.part{os.getpid()}.onnx")
    try:
        size = sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
        if size > SINGLE_FILE:
            raise ModelError(
                f"The global block {name} has {size / 2**30:.1f} GiB of weights; an ONNX file ends at 2 GiB. Hash its "
                "largest tables to fewer ids, or serve it with --runtime torch."
            )
        program = _program(block, sample)
        program.model.metadata_props.update(metadata or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(part), external_data=False)
        difference, rows = _compare(block, OnnxBlock(part), specs, dims, dtype)
        part.replace(path)
    finally:
        block.train(was_training)
        part.unlink(missing_ok=True)
    return Exported(path, {key: tuple(values.shape[1:]) for key, values in sample.items()}, difference, rows)


def _program(block: nn.Module, sample: Features) -> Any:
    rows = torch.export.Dim("rows", min=1)
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(
                _Positional(block, tuple(sample)),
                tuple(sample.values()),
                dynamic_shapes=(tuple({0: rows} for _ in sample),),
            )
            return torch.onnx.export(
                exported,
                dynamo=True,
                input_names=list(sample),
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the block is the user's, and torch.export raises what it meets there
        raise ModelError(
            f"The global block {type(block).__name__} cannot be exported to ONNX: {_first_line(error)} It must be traceable "
            "by torch.export with any number of rows (no Python branches on values, no fixed batch size); until it is, "
            "serve it with --runtime torch."
        ) from error


@torch.no_grad()
def _compare(
    block: nn.Module,
    exported: OnnxBlock,
    specs: Sequence[FeatureSpec],
    dims: Mapping[str, int],
    dtype: torch.dtype,
) -> tuple[float, int]:
    """The largest difference on random rows, and how many there were; `ModelError` above the tolerance."""
    worst = 0.0
    plain = _Positional(block, tuple(random_inputs(specs, dims, 1, dtype)))
    for seed, rows in enumerate(CHECKED_ROWS, start=1):
        inputs = random_inputs(specs, dims, rows, dtype, seed)
        wanted, found = plain(*inputs.values()), exported(inputs)
        if found.shape != wanted.shape:
            raise ModelError(
                f"The exported {type(block).__name__} gives logits of shape {list(found.shape)} for {rows} rows where torch "
                f"gives {list(wanted.shape)}; it was not written."
            )
        off = (found - wanted).abs()
        bad = ~(off <= TOLERANCE * (1 + wanted.abs())) & ~(found.isnan() & wanted.isnan())
        if bool(bad.any()):
            row, head = divmod(int(torch.where(bad, off.nan_to_num(torch.inf), -1.0).argmax()), off.shape[1])
            values = ", ".join(f"{name}={value[row].tolist()}" for name, value in inputs.items())
            raise ModelError(
                f"The exported {type(block).__name__} differs from torch by {float(off[row, head]):.2e} in logit {head} "
                f"(torch {float(wanted[row, head]):.6f}, ONNX {float(found[row, head]):.6f}), above {TOLERANCE:g} of "
                f"1 + |logit|; it was not written. The input was {values}. Serve it with --runtime torch."
            )
        worst = max(worst, float(off.nan_to_num(0.0).max()))
    return worst, sum(CHECKED_ROWS)


def run_with_onnx(trained: TrainedModel, folder: Path, threads: int = 1) -> None:
    """Put an `OnnxBlock` in the place of the model's global block, from a file in `folder` that is made if it is not
    there. The model is then good for scoring alone: nothing can be differentiated through the block."""
    path = folder / f"{trained.digest or 'unsaved'}.onnx"
    block = OnnxBlock(path, threads) if path.exists() and trained.digest else None
    if block is None or block.metadata.get("limaml.model") != trained.digest:
        block = OnnxBlock(export_onnx(trained, path).path, threads)
    trained.model.global_block = block


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells its developers: packages it has no use for, its own deprecations."""
    talker = logging.getLogger("torch.onnx")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(level)


def _first_line(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:  # torch.onnx wraps what went wrong in advice on how to debug it
        cause = cause.__cause__
    line = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")
    return f"{type(cause).__name__}: {line[:300].rstrip('.')}."
