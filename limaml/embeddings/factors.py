"""A task's posterior in a store: the lower Cholesky factor of its precision, row by row, as one vector.

`dim · (dim + 1) / 2` numbers beside the `dim` of the meta embedding, under the task type `<task>.factor`. Always float32:
a draw divides by the factor. With it a request can be answered by Thompson sampling where neither the model's solver nor
the support is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.meta.model import MetaModel
from limaml.meta.newton import NewtonSolver

__all__ = ["factor_dims", "factor_type", "factor_width", "pack_factors", "prior_factor", "unpack_factors"]

FACTOR_SUFFIX = ".factor"


def factor_type(task: str) -> str:
    """The task type under which the factors of `task` are stored."""
    return task + FACTOR_SUFFIX


def factor_width(dim: int) -> int:
    """Length of the vector for a factor `[dim, dim]`."""
    return dim * (dim + 1) // 2


def factor_dims(model: MetaModel) -> Mapping[str, int]:
    """Task type → length of its vectors, for the factors of all task types. `ModelError` without the solver newton."""
    dims = {}
    for task in model.tasks:
        model.newton(task)
        dims[factor_type(task)] = factor_width(model.dims[task] or 0)
    return dims


def pack_factors(factors: Tensor) -> NDArray[np.float32]:
    """Lower triangular `[n, dim, dim]` → `[n, dim · (dim + 1) / 2]`."""
    rows, columns = torch.tril_indices(factors.shape[-1], factors.shape[-1]).unbind(0)
    packed: NDArray[np.float32] = factors[:, rows, columns].float().numpy()
    return packed


def unpack_factors(packed: NDArray[np.float32], dim: int) -> Tensor:
    """The inverse of `pack_factors`: `[n, dim, dim]`."""
    factors = torch.zeros(len(packed), dim, dim)
    rows, columns = torch.tril_indices(dim, dim).unbind(0)
    factors[:, rows, columns] = torch.from_numpy(np.ascontiguousarray(packed, dtype=np.float32))
    return factors


@torch.no_grad()
def prior_factor(model: MetaModel, task: str) -> NDArray[np.float32]:
    """The packed factor `[dim · (dim + 1) / 2]` of a task without interactions: the learned prior's."""
    solver: NewtonSolver = model.newton(task)
    factor: NDArray[np.float32] = pack_factors(solver.prior_factor(torch.zeros(1, model.dims[task] or 0)))[0]
    return factor
