"""A trained model as a folder: weights, encoder (schema, vocabularies, scalings), resolved config, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limaml.artifact import Folder, read_folder, write_folder
from limaml.config import Config, parse_config
from limaml.errors import ArtifactError
from limaml.interactions import Encoder
from limaml.meta.build import build_meta_model
from limaml.meta.model import MetaModel

__all__ = ["TrainedModel", "load_model", "save_model"]

KIND = "model"
FORMAT = 1


@dataclass(frozen=True)
class TrainedModel:
    """All that embedding and scoring need. `digest` names the content of the folder it came from."""

    model: MetaModel
    encoder: Encoder
    config: Config
    metrics: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


def save_model(
    folder: Path | str,
    model: MetaModel,
    encoder: Encoder,
    config: Config,
    metrics: Mapping[str, Any] | None = None,
    *,
    built_by: str = "config",
) -> str:
    """Write the model folder in one step and return its digest.

    `built_by` is "config" if `build_meta_model` made the blocks. With blocks of your own, pass any other name: loading
    then asks for a function that makes them.
    """
    documents = {
        "encoder": encoder.to_json(),
        "config": config.model_dump(mode="json"),
        "metrics": dict(metrics or {}),
        "blocks": {"built_by": built_by, "tasks": list(model.tasks), "dims": dict(model.dims)},
    }
    return write_folder(
        folder, tensors={"weights": dict(model.state_dict())}, documents=documents, kind=KIND, format=FORMAT
    )


def load_model(folder: Path | str, build: Callable[[Encoder, Config], MetaModel] | None = None) -> TrainedModel:
    """Read a model folder, verified file by file. `build(encoder, config)` makes the modules if they are your own."""
    saved: Folder = read_folder(folder, kind=KIND, format=FORMAT)
    documents: Any = saved.documents
    encoder = Encoder.from_json(documents["encoder"])
    config = parse_config(documents["config"])
    built_by = documents["blocks"]["built_by"]
    if build is None:
        if built_by != "config":
            raise ArtifactError(
                f"The model in {folder} has blocks of its own ('{built_by}'): pass build=, a function of (encoder, config) "
                "that returns the MetaModel its weights belong to."
            )
        losses = [label.loss for label in encoder.schema.labels]
        model = build_meta_model(encoder.specs, documents["blocks"]["tasks"], losses, config.model, config.adapt)
    else:
        model = build(encoder, config)
    model.weigh_as(saved.tensors["weights"])
    wanted, found = set(model.state_dict()), set(saved.tensors["weights"])
    if wanted != found:
        raise ArtifactError(
            f"The weights in {folder} do not fit the model: {sorted(wanted - found)[:5]} are missing, "
            f"{sorted(found - wanted)[:5]} are not used. Build the blocks as they were when the model was saved."
        )
    model.load_state_dict(dict(saved.tensors["weights"]))
    model.eval()
    return TrainedModel(model, encoder, config, documents["metrics"], saved.digest)
