"""What takes the outer loop's steps: Adam, and for embedding tables with sparse gradients SparseAdam or row-wise Adagrad.

Weights have a normal prior, which enters as weight decay in the gradient (coupled, so that it means a precision whatever
the learning rate is). A table made with `sparse=True` is stepped in the rows that a batch has looked up, and in no other: a
step costs what the batch looks up, not what the table holds. A row that every batch looks up moves exactly as under Adam; one
that is looked up seldom keeps its moments meanwhile, and feels its decay only when it is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limaml.config import TrainConfig
from limaml.meta.rowwise import RowwiseAdagrad

__all__ = ["Optimiser"]

EPS = 1e-8
"""Adam's ε."""


class Optimiser:
    """Steps all parameters of `module` that need a gradient.

    `fast` parameters take `train.solver_lr` and no decay. `weight` is the total weight of the training rows: decay is a
    prior precision, measured against the loss summed over them.
    """

    def __init__(self, module: nn.Module, fast: Sequence[nn.Parameter], weight: float, config: TrainConfig) -> None:
        layers = [m for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        tables = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        sparse = {id(layer.weight) for layer in layers if layer.sparse}
        quick = {id(p) for p in fast}
        groups: dict[str, list[nn.Parameter]] = {"sparse": [], "tables": [], "fast": [], "rest": []}
        for parameter in module.parameters():
            if parameter.requires_grad:
                at = id(parameter)
                kind = "fast" if at in quick else "sparse" if at in sparse else "tables" if at in tables else "rest"
                groups[kind].append(parameter)
        settings: dict[str, dict[str, Any]] = {
            "tables": {"lr": config.lr, "weight_decay": config.table_decay / weight},
            "fast": {"lr": config.solver_lr, "weight_decay": 0.0},
            "rest": {"lr": config.lr, "weight_decay": config.decay / weight},
        }
        self.sparse, self._decay, self._clip = groups.pop("sparse"), config.table_decay / weight, config.clip
        dense = [{"params": some, **settings[name]} for name, some in groups.items() if some]
        self.parameters = [p for some in (*groups.values(), self.sparse) for p in some]
        self._parts: list[torch.optim.Optimizer] = []
        if dense:
            self._parts.append(torch.optim.Adam(dense, eps=EPS))
        if self.sparse:
            self._parts.append(
                RowwiseAdagrad(self.sparse, config.table_lr, EPS)
                if config.sparse_tables == "rowwise_adagrad"
                else torch.optim.SparseAdam([{"params": [table]} for table in self.sparse], lr=config.lr)
            )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale all gradients down to a norm of `train.clip` together, if it is larger; the norm as it was, `[]`."""
        clipped: list[Tensor] = []
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                values = parameter.grad.values()
                entries = torch.empty_like(values)  # stands in for the parameter: its gradient are the table's rows
                entries.grad = values
                clipped.append(entries)
            else:
                clipped.append(parameter)
        return nn.utils.clip_grad_norm_(clipped, self._clip)

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for table in self.sparse:
            if table.grad is None:
                continue
            self._as_adam(table)
            # A table that is also read as a whole, as one that is tied to an output layer, has a dense gradient.
            gradient = (table.grad if table.grad.is_sparse else table.grad.to_sparse(1)).coalesce()
            if self._decay:
                rows = gradient.indices()[0]
                gradient.values().add_(table[rows], alpha=self._decay)
            table.grad = gradient
        for part in self._parts:
            part.step()

    def _as_adam(self, table: nn.Parameter) -> None:
        """SparseAdam adds its ε to a root that Adam has divided by √(1 − β₂ᵗ) first; with ε so scaled they step alike."""
        part = self._parts[-1]
        if not isinstance(part, torch.optim.SparseAdam):
            return
        group = next(group for group in part.param_groups if group["params"][0] is table)
        group["eps"] = EPS * math.sqrt(1 - group["betas"][1] ** (part.state[table].get("step", 0) + 1))

    def state(self) -> dict[str, Tensor]:
        """The moments, by `<number of the parameter>.<name>`: what `restore` takes."""
        moments: dict[str, Tensor] = {}
        start = 0
        for part in self._parts:
            saved = part.state_dict()
            for index, values in saved["state"].items():
                for name, value in values.items():
                    moments[f"{start + index}.{name}"] = torch.as_tensor(value)
            start += sum(len(group["params"]) for group in saved["param_groups"])
        return moments

    def restore(self, moments: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        by_parameter: dict[int, dict[str, Any]] = {}
        for key, value in moments.items():
            index, _, name = key.partition(".")
            by_parameter.setdefault(int(index), {})[name] = value
        start = 0
        for part in self._parts:
            saved = part.state_dict()
            count = sum(len(group["params"]) for group in saved["param_groups"])
            own = {i: by_parameter[start + i] for i in range(count) if start + i in by_parameter}
            if isinstance(part, torch.optim.SparseAdam):  # counts its steps in a Python number
                own = {i: {**values, "step": int(values["step"])} for i, values in own.items()}
            part.load_state_dict({**saved, "state": own})
            start += count
