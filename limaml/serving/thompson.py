"""How sure a score is, out of a store: draws of the meta embeddings (Thompson sampling), and the logits' deviations.

A request asks with parameters: `sample` (true), `seed` (an integer: the same draw again), `scale` (a factor on the
standard deviation, as `limaml.meta.calibrate` finds it; 1 unless given), `logit_sd` (true: the deviations too). The version must have been published with its
tasks' posteriors.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.embeddings.factors import factor_type, unpack_factors
from limaml.meta.uncertainty import Posterior
from limaml.serving.scoring import Asked, Entries, Scorer
from limaml.serving.tensors import Refused
from limaml.store.contract import Reader

__all__ = ["Sampling", "deviations", "draw", "posteriors_of", "sampled", "sampling_of"]

TRIES = 3
"""How often mean and factor are read anew if a refresh came between the two."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks for: a draw (or not), its seed, the factor on the standard deviation, the deviations (or not)."""

    sample: bool = False
    seed: int | None = None
    scale: float = 1.0
    deviations: bool = False


_NOTHING = Sampling()


def sampling_of(parameters: Mapping[str, Any]) -> Sampling:
    """What the parameters of a request ask for; `Refused` names the one that makes no sense."""
    if not parameters:  # as most have none
        return _NOTHING
    sample, seed, scale, sd = (parameters.get(name) for name in ("sample", "seed", "scale", "logit_sd"))
    for name, value in (("sample", sample), ("logit_sd", sd)):
        if value is not None and not isinstance(value, bool):
            raise Refused(400, f"Parameter '{name}' is {value!r:.80}; it must be true or false.")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise Refused(400, f"Parameter 'seed' is {seed!r:.80}; it must be an integer.")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf
    ):
        raise Refused(400, f"Parameter 'scale' is {scale!r:.80}; it must be a number of at least 0.")
    return Sampling(bool(sample), seed, 1.0 if scale is None else float(scale), bool(sd))


def posteriors_of(reader: Reader, entries: Mapping[str, Entries]) -> dict[str, Posterior]:
    """The posteriors of the tasks in a batch. A task that the store does not know has the prior's, around its cold
    embedding. `Refused` (400) if the version was published without them."""
    return {task: _posterior(reader, task, one) for task, one in entries.items()}


def _posterior(reader: Reader, task: str, entries: Entries) -> Posterior:
    kind, keys = factor_type(task), entries.keys
    if kind not in reader.dims:
        raise Refused(
            400,
            f"Version {reader.version} was published without the posteriors of '{task}', so there is nothing to sample from. "
            "Publish one with them: limaml embed RUN --uncertainty (solver newton).",
        )
    mean, count, event_time = entries.z, entries.count, entries.event_time
    factors = reader.get(kind, keys, fill=True)
    for _ in range(TRIES):
        if np.array_equal(factors.count, count) and np.array_equal(factors.event_time, event_time):
            break  # else one of the two is of some interactions earlier than the other: good enough for a draw, in the end
        means, factors = reader.get(task, keys), reader.get(kind, keys, fill=True)
        known = torch.from_numpy(np.array(means.found))[:, None]
        mean = torch.where(known, torch.from_numpy(np.array(means.vectors)).to(mean), mean)
        count, event_time = np.asarray(means.count), np.asarray(means.event_time)
    return Posterior(mean, unpack_factors(factors.vectors, mean.shape[1]).to(mean))


def draw(posterior: Posterior, task: str, keys: Sequence[str], sampling: Sampling) -> Tensor:
    """One draw of each task's meta embedding, `[k, dim]`.

    With a seed the draw of a task depends on the seed and the task alone, not on what else is asked for; without one it is
    a new one each time.
    """
    noise = np.empty(tuple(posterior.mean.shape), dtype=np.float32)
    entropy = secrets.token_bytes(16) if sampling.seed is None else str(sampling.seed).encode()
    secret = hashlib.blake2b(entropy).digest()
    for i, key in enumerate(keys):
        name = f"{task}\0{key}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(name, digest_size=16, key=secret).digest()
        source = np.random.Philox(key=int.from_bytes(digest, "little"))
        noise[i] = np.random.Generator(source).standard_normal(noise.shape[1], dtype=np.float32)
    spread = torch.linalg.solve_triangular(
        posterior.factor.mT, torch.from_numpy(noise).to(posterior.mean).unsqueeze(-1), upper=True
    )
    drawn: Tensor = posterior.mean + sampling.scale * spread.squeeze(-1)
    return drawn


@torch.no_grad()
def sampled(
    scorer: Scorer,
    posteriors: Mapping[str, Posterior],
    asked: Asked,
    entries: Mapping[str, Entries],
    sampling: Sampling,
) -> Tensor:
    """Logits `[n, heads]` of a request's rows under one draw of each of its tasks."""
    drawn = {task: draw(posteriors[task], task, one.keys, sampling) for task, one in entries.items()}
    return scorer.logits([asked], entries, drawn)


def deviations(
    scorer: Scorer,
    posteriors: Mapping[str, Posterior],
    asked: Asked,
    entries: Mapping[str, Entries],
    scale: float = 1.0,
) -> NDArray[np.float32]:
    """Standard deviations `[n, heads]` of the logits of a request's rows, as `limaml.meta.logit_sd` has them, times `scale`.

    `Refused` (400) where the runtime has no derivatives.
    """
    block = scorer.model.global_block
    if not getattr(block, "differentiable", True):
        raise Refused(
            400, "This server runs ONNX, which has no derivatives to compute 'logit_sd' from: --runtime torch has."
        )
    rows = {
        task: replace(
            one,
            owner=torch.arange(asked.rows),
            z=posteriors[task].mean[one.owner].detach().requires_grad_(),
            table={name: values[one.owner] for name, values in one.table.items()},
        )
        for task, one in entries.items()
    }
    variance = torch.zeros(asked.rows, scorer.model.losses.heads, dtype=scorer.model.dtype)
    if not asked.rows:
        return variance.numpy()
    leaves = [one.z for one in rows.values()]
    with torch.enable_grad():
        logits = scorer.differentiable([asked], rows)
        for head in range(logits.shape[1]):
            slopes = torch.autograd.grad(
                logits[:, head].sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for (task, one), slope in zip(entries.items(), slopes, strict=True):
                factor = posteriors[task].factor[one.owner]
                half = torch.linalg.solve_triangular(factor, slope.unsqueeze(-1), upper=False)
                variance[:, head] += half.squeeze(-1).square().sum(1)
    found: NDArray[np.float32] = (scale * variance.sqrt()).float().numpy()
    return found
