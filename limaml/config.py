"""Every setting, with its default and its reason to exist: small frozen objects, saved beside what they produced.

A config is YAML plus dotted overrides (`train.epochs=20`). Unknown keys are refused with the nearest known name; all
problems are reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from limaml.errors import ConfigError

__all__ = [
    "Adaptation",
    "CompareConfig",
    "Config",
    "ImplicitConfig",
    "ModelConfig",
    "RivalConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(_Frozen):
    """The blocks that ship. Your own modules need none of this."""

    global_block: Literal["interaction", "cross"] = "interaction"
    embedding_dim: int = Field(default=16, ge=1, description="Width of each feature's embedding.")
    hidden: tuple[int, ...] = Field(default=(64, 32), min_length=1, description="Hidden layers of the global block.")
    factors: int = Field(default=16, ge=1, description="Width of the bilinear term (interaction).")
    cross_layers: int = Field(default=2, ge=0, description="Cross layers (cross).")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    dim: int = Field(default=16, ge=1, description="Size of the meta embedding.")
    meta_hidden: tuple[int, ...] = Field(default=(32,), description="Hidden layers of the meta block.")
    meta_embedding_dim: int = Field(default=8, ge=1, description="Width of each task feature's embedding.")
    sparse: bool = Field(
        default=False,
        description="Embedding tables with sparse gradients: a step costs what its batch looks up, not what the table holds.",
    )


class Adaptation(_Frozen):
    """The inner loop."""

    solver: Literal["gradient", "newton"] = "newton"
    steps: int = Field(default=2, ge=0, description="Inner steps K; 0 serves cold embeddings.")
    order: Literal[1, 2] = Field(default=2, description="First or second order (gradient).")
    rate: float = Field(default=0.3, gt=0, description="Where the inner learning rates start (gradient).")
    learn_rate: Literal["fixed", "scalar", "layer", "step", "layer_step"] = "layer_step"
    prior_count: float = Field(
        default=5.0, gt=0, description="Where the learned prior count starts, in rows (gradient)."
    )
    precision: float = Field(default=1.0, gt=0, description="Where the prior precision starts (newton).")
    half_life: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Where the learned half-life of support rows starts: days, where the time column holds dates; the "
        "column's own unit, where it holds numbers; else rows. None: see find_half_life.",
    )
    find_half_life: bool = Field(
        default=True,
        description="Whether training ends with the question if old rows deserve less weight, where half_life is not given. The "
        "half-life that is found is kept; most often it is none. False: old rows weigh as much as new ones.",
    )
    adapt_embeddings: bool = Field(
        default=False,
        description="Whether inner steps move the rows of a meta block's embedding tables, too (gradient).",
    )
    max_support: int | None = Field(default=512, ge=1, description="Most recent interactions a task is adapted on.")
    engine: Literal["auto", "lowrank", "vmap", "loop"] = "auto"
    memory_mib: int | None = Field(
        default=None,
        ge=1,
        description="Memory that adapting may take, beside model and data, in MiB. None: half of what is free.",
    )

    @property
    def seeks_half_life(self) -> bool:
        """Whether training ends with the question if old rows deserve less weight."""
        return self.half_life is None and self.find_half_life and self.steps > 0


class TrainConfig(_Frozen):
    """The outer loop."""

    epochs: int = Field(default=30, ge=1)
    lr: float = Field(default=0.005, gt=0, description="Of the blocks.")
    solver_lr: float = Field(
        default=0.03, gt=0, description="Of learned rates, prior count, prior precision, half-life."
    )
    sparse_tables: Literal["adam", "rowwise_adagrad"] = Field(
        default="adam",
        description="What steps embedding tables with sparse gradients: Adam's moments, two numbers for each weight, or one for "
        "each row.",
    )
    table_lr: float = Field(default=0.05, gt=0, description="Of tables that rowwise_adagrad steps.")
    table_decay: float = Field(
        default=100.0, ge=0, description="Prior precision of embedding tables: λ|w|²/2 per data set."
    )
    decay: float = Field(default=5.0, ge=0, description="Prior precision of all other weights.")
    rows_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="Interactions per batch; tasks are never cut. None: a 32nd of the training rows, from 256 to 8192.",
    )
    query: Literal["cross_fit", "time_cut"] = "cross_fit"
    anybody: float = Field(
        default=0.3,
        ge=0,
        description="Weight of the loss of the query rows with one learned embedding for all tasks, beside that with the "
        "adapted ones: what the global block knows of members in general.",
    )
    patience: int = Field(default=5, ge=1, description="Epochs without a better validation loss before stopping.")
    average: float = Field(default=3.0, ge=0, description="Epochs that the running average of the weights looks back.")
    clip: float = Field(default=5.0, gt=0, description="Largest norm of the meta-gradient.")
    seed: int = 0
    window_buckets: int | None = Field(
        default=None,
        ge=1,
        description="Buckets of a log that are in memory together, of each process; as many are read ahead. None: as many as "
        "hold two million rows.",
    )
    tasks_per_epoch: int | None = Field(
        default=None, ge=1, description="About so many tasks, drawn anew, make an epoch. None: all of them."
    )
    validation_buckets: int | None = Field(
        default=None, ge=1, description="Buckets of a log whose tasks are validated on. None: all."
    )
    checkpoint_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints inside of a window. None: one at the end of each window and epoch.",
    )
    device: str = Field(default="cpu", description="Where the blocks are trained: cpu, cuda, cuda:1, … .")

    autocast: Literal["bf16"] | None = Field(
        default=None,
        description="bf16: blocks compute in bfloat16 while they are trained; sums over supports, solvers and losses stay "
        "in float32. float16 is not offered: inner slopes vanish in it, and a loss scale does not reach them.",
    )

    @field_validator("autocast", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value in ("fp16", "float16", "half"):
            raise ValueError(
                "float16 has no number between 0 and 6e-8, so that inner slopes vanish, and a loss scale does not reach "
                "them; set train.autocast=bf16"
            )
        return value

    def batch_of(self, rows: int) -> int:
        """Interactions per batch, when there are `rows` to train on."""
        return self.rows_per_batch or max(256, min(8192, rows // 32))


class RivalConfig(_Frozen):
    """The compared methods that are known from elsewhere (`limaml.evaluate.rivals`)."""

    history: int = Field(default=50, ge=1, description="Most recent rows that history_mean and history_attention read.")
    look_back: Literal["past", "cross_fit"] = Field(
        default="past",
        description="What a training row's history is drawn from: the task's rows before it, or those on the other side "
        "of a coin that falls anew in each epoch. Rows without an order in time always take the latter.",
    )
    hidden: int = Field(default=32, ge=1, description="Hidden units of attention and of the set encoder.")
    ids: bool = Field(default=False, description="A learned embedding of each task id beside the history.")
    penalty: float | None = Field(
        default=None, gt=0, description="Of random_effects; None: chosen on training rows that were held out."
    )
    steps: int = Field(default=8, ge=0, description="Most steps of fine_tuned; how many is chosen on held-out rows.")


class ImplicitConfig(_Frozen):
    """Implicit feedback: the table holds positives only, and all candidates are ranked for each member."""

    negatives: int = Field(
        default=0,
        ge=0,
        description="Negatives sampled for each positive; 0: the table has labels, and they are judged.",
    )
    sampling: Literal["uniform", "popularity"] = Field(default="uniform", description="How negatives are drawn.")
    scores: int = Field(
        default=8_000_000,
        ge=1,
        description="Most scores of one method: with more members than that, a sample is judged.",
    )


class CompareConfig(_Frozen):
    """What is compared, and how it is judged."""

    methods: tuple[str, ...] = ("base", "wide_and_deep", "limaml_gradient", "limaml_newton")
    protocols: tuple[Literal["warm", "new_tasks"], ...] = ("warm", "new_tasks")
    seeds: int = Field(default=3, ge=1)
    test_share: float = Field(default=0.2, gt=0, lt=1)
    validation_share: float = Field(default=0.15, gt=0, lt=1)
    replicates: int = Field(default=500, ge=10, description="Bootstrap replicates.")
    implicit: ImplicitConfig = ImplicitConfig()


class Config(_Frozen):
    """A whole run. `methods` holds overrides of `model`, `adapt`, `train` and `rival` per compared method."""

    model: ModelConfig = ModelConfig()
    adapt: Adaptation = Adaptation()
    train: TrainConfig = TrainConfig()
    rival: RivalConfig = RivalConfig()
    compare: CompareConfig = CompareConfig()
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def of_method(self, method: str) -> Config:
        """This config with the overrides of one method applied."""
        values = self.model_dump(exclude_unset=True)
        for section, changes in self.methods.get(method, {}).items():
            if section not in ("model", "adapt", "train", "rival"):
                raise ConfigError(
                    f"methods.{method}.{section} is no section; a method may override model, adapt, train and rival."
                )
            values[section] = {**values.get(section, {}), **changes}
        return parse_config({**values, "methods": {}})


def parse_config(values: Mapping[str, Any]) -> Config:
    """A mapping → `Config`, or a `ConfigError` that lists every problem."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(problem) for problem in error.errors())) from error
    for method in config.methods:
        config.of_method(method)  # its overrides are checked here, not when its turn comes
    return config


def _sentence(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model: Any = Config
        for part in problem["loc"][:-1]:
            model = model.model_fields[part].annotation
        near = difflib.get_close_matches(str(problem["loc"][-1]), model.model_fields, n=1, cutoff=0.0)
        return f"Setting '{path}' is unknown; did you mean '{'.'.join([*map(str, problem['loc'][:-1]), near[0]])}'?"
    message = problem["msg"].removeprefix("Value error, ")
    return f"Setting '{path}' is {problem['input']!r}: {message}."


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or start from the defaults) and apply overrides such as `train.epochs=20`."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"There is no config file at {path}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, but holds a {type(loaded).__name__}.")
        values = loaded or {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"Override '{override}' has no '='. Write it as section.setting=value.")
        place: Any = values
        *sections, last = name.strip().split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"Override '{override}' goes into '{section}', which is a value and no section.")
        place[last] = yaml.safe_load(text)
    return parse_config(values)
