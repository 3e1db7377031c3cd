"""Thompson sampling out of a store: meta embeddings drawn from what was published of each task's posterior."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from limaml.embeddings.factors import factor_type, unpack_factors
from limaml.errors import StoreError
from limaml.meta.uncertainty import Posterior
from limaml.store.contract import Reader

__all__ = ["TRIES", "draw", "posterior_of"]

TRIES = 3
"""How often mean and factor are read anew if a refresh came between the two."""


def posterior_of(reader: Reader, task: str, keys: Sequence[str]) -> tuple[Posterior, NDArray[np.bool_]]:
    """The posteriors of the tasks `keys` `[n]`, and which of them the store knows `[n]`.

    An unknown task has the prior's factor, and a mean of zeros: the caller puts its cold embedding there. `StoreError` if
    the version was published without factors.
    """
    kind = factor_type(task)
    if kind not in reader.dims:
        raise StoreError(
            f"Version {reader.version} of '{reader.model}' was published without the posteriors of '{task}', so scores "
            "cannot be sampled from it. Publish one with them: limaml embed RUN --uncertainty (solver newton)."
        )
    for _ in range(TRIES):
        factors, means = reader.get(kind, keys, fill=True), reader.get(task, keys)
        if np.array_equal(factors.count, means.count) and np.array_equal(factors.event_time, means.event_time):
            break  # else the factor is of some interactions earlier than the mean: good enough for a draw
    factor = unpack_factors(factors.vectors, reader.dims[task])
    return Posterior(torch.from_numpy(np.array(means.vectors)), factor), np.asarray(means.found)


def draw(
    posterior: Posterior, task: str, keys: Sequence[str], seed: int | None = None, scale: float = 1.0
) -> NDArray[np.float32]:
    """One draw of each task's meta embedding, `[n, dim]`, its standard deviation multiplied by `scale`.

    With a seed the draw of a task depends on the seed and the task alone, not on what else is asked for; without one it is
    a new one each time.
    """
    dim = posterior.mean.shape[1]
    entropy = secrets.token_bytes(16) if seed is None else str(seed).encode()
    noise = np.empty((len(keys), dim), dtype=np.float32)
    for i, key in enumerate(keys):
        digest = hashlib.blake2b(f"{task}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16, key=entropy[:64])
        source = np.random.Philox(key=int.from_bytes(digest.digest(), "little"))
        noise[i] = np.random.Generator(source).standard_normal(dim, dtype=np.float32)
    spread = torch.linalg.solve_triangular(posterior.factor.mT, torch.from_numpy(noise).unsqueeze(-1), upper=True)
    drawn: NDArray[np.float32] = (posterior.mean + scale * spread.squeeze(-1)).numpy()
    return drawn
