"""A shard: the embeddings of the tasks of one bucket as a file, and what making them took.

    <task type>-<number>-<digest>.safetensors    tensors of a `Piece`, the keys as UTF-8; what was made, as JSON

Task types are numbered. The digest is of the file's own bytes, so that a file that is not what was written is known by its
name alone, on whatever machine it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from limaml.embeddings.piece import Piece
from limaml.errors import StoreError
from limaml.interactions.atomic_files import file_sha256, write_atomically

__all__ = ["Made", "read_shard", "whole_shards", "write_shard"]

_DIGEST = 16  # hexadecimal digits


@dataclass(frozen=True)
class Made:
    """What a job made. `rows` and `dropped` are of the rows that it read; `newest` is 0 where no task has a row."""

    task: int  # which of the model's task types
    number: int  # of the bucket
    tasks: int
    rows: int = 0
    newest: int = 0
    time_unit: str = ""  # empty where there is no row
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason → rows
    seconds: Mapping[str, float] = field(default_factory=dict)  # "read", "encode", "adapt" → time spent
    process: int = 0
    file: str = ""


def write_shard(folder: Path, piece: Piece, made: Made) -> Made:
    """Write a shard whole or not at all; `made` with the name of its file."""
    keys = [key.encode() for key in piece.ids]
    tensors: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "vectors": piece.vectors,
        "count": piece.count,
        "time": piece.time,
    }
    tensors |= {} if piece.features is None else {"features": piece.features}
    tensors |= {} if piece.factors is None else {"factors": piece.factors}
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    content = save(tensors, {"made": json.dumps(asdict(made)), "type": piece.task})
    digest = hashlib.sha256(content).hexdigest()[:_DIGEST]
    name = f"{made.task}-{made.number:05d}-{digest}.safetensors"
    write_atomically(folder / name, content)
    return Made(**{**asdict(made), "file": name})


def read_shard(path: Path) -> Piece:
    """The tasks of a shard. `StoreError` if the file is not what was written."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:_DIGEST] != path.stem.rpartition("-")[2]:
            raise ValueError("its digest differs")
        tensors = load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"The shard {path} is not what was written ({error}). Run the same command again: it is made anew, the others are "
            "kept."
        ) from error
    raw, ends = tensors["keys"].tobytes(), [0, *tensors["ends"].tolist()]
    return Piece(
        _metadata(path)["type"],
        [raw[start:end].decode() for start, end in zip(ends, ends[1:], strict=False)],
        tensors["vectors"],
        tensors["count"],
        tensors["time"],
        tensors.get("features"),
        tensors.get("factors"),
    )


def whole_shards(folder: Path) -> list[Made]:
    """The shards of a folder that are what was written, each once; any other file there is removed."""
    found: dict[tuple[int, int], Made] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        made = None
        if path.suffix == ".safetensors" and file_sha256(path)[:_DIGEST] == path.stem.rpartition("-")[2]:
            made = Made(**{**json.loads(_metadata(path)["made"]), "file": path.name})
        if made is None or (made.task, made.number) in found:
            path.unlink()
        else:
            found[made.task, made.number] = made
    return list(found.values())


def _metadata(path: Path) -> dict[str, str]:
    """The text beside the tensors: 8 bytes that say how long the header is, then the header, as JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
