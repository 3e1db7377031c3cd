"""What the low-rank engine keeps of the inner steps, for each kind of layer. `README.md` in this folder derives it.

A *delta* is what the steps so far have added to one layer, for every task: a few tensors whose first dimension is the
tasks. It is whichever is smallest: pairs of inputs and slopes, or the change of the parameters themselves.

A new kind of layer is a class like these, in `followed_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from limaml.meta.tables import Table

__all__ = ["Call", "Delta", "Deltas", "Followed", "LinearLayer", "NormLayer", "TableLayer", "followed_layers"]

Delta = dict[str, Tensor]
Deltas = dict[str, Delta]
"""Layer → delta; a layer that has not moved has none, or an empty one."""

Call = tuple[Tensor, Tensor]
"""(input as `read` gives it, slope at the output times −rate) of one call of a layer, first dimension: tasks."""


class Followed(Protocol):
    """A layer whose parameters are known to enter the block through its calls alone."""

    @property
    def module(self) -> nn.Module: ...

    def read(self, module: nn.Module, input: Tensor) -> Tensor:  # noqa: A002
        """What must be known of a call's input."""
        ...

    def moved(self, read: Tensor, out: Tensor, delta: Delta) -> Tensor:
        """The layer's output with `delta`, from its output `out` without."""
        ...

    def step(self, delta: Delta, calls: Sequence[Call], left: int) -> Delta:
        """`delta` and one more inner step, after which `left` steps remain."""
        ...

    def dense(self, delta: Delta, task: int, kind: str) -> Tensor:
        """What `delta` adds to the parameter `kind` (weight, bias) for one task."""
        ...


@dataclass(frozen=True)
class LinearLayer:
    """u = W x + b. Keeps pairs `inputs` `[tasks, pairs, in]`, `slopes` `[tasks, pairs, out]` while they are the fewer
    numbers in the end, else `weight` `[tasks, out, in]`, `bias` `[tasks, out]`."""

    module: nn.Linear

    def read(self, module: nn.Module, input: Tensor) -> Tensor:  # noqa: A002
        return input

    def moved(self, read: Tensor, out: Tensor, delta: Delta) -> Tensor:
        if "weight" in delta:
            x = _calls(read, len(delta["weight"]), 1)
            u = torch.bmm(x, delta["weight"].transpose(1, 2))
            return out + (u + delta["bias"].unsqueeze(1) if "bias" in delta else u).reshape(out.shape)
        x, inputs, slopes = _calls(read, len(delta["inputs"]), 1), delta["inputs"], delta["slopes"]
        if x.shape[1] > 1:
            inner = torch.bmm(x, inputs.transpose(1, 2))  # (tasks, calls, pairs)
            inner = inner if self.module.bias is None else inner + 1
            return out + torch.bmm(inner, slopes).reshape(out.shape)
        inner = (x * inputs).sum(2, keepdim=True)  # (tasks, pairs, 1): a product of matrices this thin is slower
        inner = inner if self.module.bias is None else inner + 1
        return out + (inner * slopes).sum(1).reshape(out.shape)

    def step(self, delta: Delta, calls: Sequence[Call], left: int) -> Delta:
        inputs = [_calls(x, len(x), 1) for x, _ in calls]
        slopes = [_calls(slope, len(slope), 1) for _, slope in calls]
        new = sum(x.shape[1] for x in inputs)
        if len(inputs) == 1 and _same(
            inputs[0], delta.get("inputs")
        ):  # a layer on the task's features: one pair, summed
            return {"inputs": delta["inputs"], "slopes": delta["slopes"] + slopes[0]}
        if "weight" not in delta:
            inputs, slopes = [*_old(delta, "inputs"), *inputs], [*_old(delta, "slopes"), *slopes]
        x, g = _joined(inputs), _joined(slopes)
        bias = 0 if self.module.bias is None else 1
        rows, columns = x.shape[2] + bias, g.shape[2]
        if "weight" not in delta and (x.shape[1] + left * new) * (x.shape[2] + columns) <= rows * columns:
            return {"inputs": x, "slopes": g}
        return _sum(delta, {"weight": torch.bmm(g.transpose(1, 2), x)} | ({"bias": g.sum(1)} if bias else {}))

    def dense(self, delta: Delta, task: int, kind: str) -> Tensor:
        if kind in delta:
            return delta[kind][task]
        g = delta["slopes"][task]  # (pairs, out)
        return g.T @ delta["inputs"][task] if kind == "weight" else g.sum(0)


@dataclass(frozen=True)
class NormLayer:
    """γ ⊙ n + β, with n the normalised input. Keeps the changes of γ and β, `weight` and `bias` `[tasks, *shape]`."""

    module: nn.LayerNorm | nn.RMSNorm

    def read(self, module: nn.Module, input: Tensor) -> Tensor:  # noqa: A002
        if isinstance(self.module, nn.LayerNorm):
            return nn.functional.layer_norm(input, self.module.normalized_shape, None, None, self.module.eps)
        return nn.functional.rms_norm(input, list(self.module.normalized_shape), None, self.module.eps)

    def moved(self, read: Tensor, out: Tensor, delta: Delta) -> Tensor:
        out = out + read * _spread(delta["weight"], out)
        return out + _spread(delta["bias"], out) if "bias" in delta else out

    def step(self, delta: Delta, calls: Sequence[Call], left: int) -> Delta:
        own = len(self.module.normalized_shape)
        n = _joined([_calls(n, len(n), own) for n, _ in calls])
        g = _joined([_calls(slope, len(slope), own) for _, slope in calls])
        has_bias = getattr(self.module, "bias", None) is not None
        return _sum(delta, {"weight": (g * n).sum(1)} | ({"bias": g.sum(1)} if has_bias else {}))

    def dense(self, delta: Delta, task: int, kind: str) -> Tensor:
        return delta[kind][task]


@dataclass(frozen=True)
class TableLayer:
    """Rows of a table, one or several modules' own. Keeps pairs `ids` `[tasks, pairs]`, `slopes` `[tasks, pairs, width]`:
    as inputs are one-hot, their inner product is whether two ids are one. Padding is kept as −1 − id, which is no id."""

    module: Table

    def read(self, module: nn.Module, input: Tensor) -> Tensor:  # noqa: A002
        padding = cast(Table, module).padding_idx
        return input if padding is None else torch.where(input == padding, -1 - input, input)

    def moved(self, read: Tensor, out: Tensor, delta: Delta) -> Tensor:
        kept = delta["ids"]
        ids = _calls(torch.where(read < 0, -1 - read, read), len(kept), 0)
        same = ids.unsqueeze(2) == kept.unsqueeze(1)  # (tasks, look-ups, pairs)
        change = torch.bmm(same.to(out.dtype), delta["slopes"]).reshape(out.shape)
        # What is padding here may be moved by another module of the same table: it is read, and gives no gradient.
        return out + torch.where((read < 0).unsqueeze(-1), change.detach(), change)

    def step(self, delta: Delta, calls: Sequence[Call], left: int) -> Delta:
        return {
            "ids": _joined([*_old(delta, "ids"), *(_calls(ids, len(ids), 0) for ids, _ in calls)]),
            "slopes": _joined([*_old(delta, "slopes"), *(_calls(slope, len(slope), 1) for _, slope in calls)]),
        }

    def dense(self, delta: Delta, task: int, kind: str) -> Tensor:
        ids, slopes = delta["ids"][task], delta["slopes"][task]
        return torch.zeros_like(self.module.weight).index_add(0, ids.clamp(min=0), slopes * (ids >= 0).unsqueeze(-1))


def followed_layers(block: nn.Module, adapted: dict[str, nn.Parameter]) -> dict[str, Followed]:
    """The layers that can be followed by their calls, under the name that `adapted` gives them.

    A layer is left out where a parameter is frozen in part, is used by another module as well, or is not the kind's own;
    tables that share their weight are one layer.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    layer_of = {id(parameter): name.rpartition(".")[0] for name, parameter in adapted.items()}
    found: dict[str, Followed] = {}
    for module in block.modules():
        own = dict(module.named_parameters(recurse=False))
        if (
            "weight" not in own
            or not own.keys() <= {"weight", "bias"}
            or not all(id(p) in layer_of for p in own.values())
        ):
            continue
        layer, among = layer_of[id(own["weight"])], [owner for p in own.values() for owner in owners[id(p)]]
        if all(type(owner) in (nn.Embedding, nn.EmbeddingBag) for owner in among):
            found[layer] = TableLayer(cast(Table, module))
        elif len(among) > len(own):
            continue
        elif type(module) is nn.Linear:
            found[layer] = LinearLayer(module)
        elif type(module) in (nn.LayerNorm, nn.RMSNorm):
            found[layer] = NormLayer(cast(nn.LayerNorm, module))
    return found


def _calls(values: Tensor, tasks: int, own: int) -> Tensor:
    """(tasks, …, *own dimensions) → (tasks, calls, *own dimensions)."""
    return values.reshape(tasks, -1, *values.shape[values.dim() - own :])


def _spread(delta: Tensor, out: Tensor) -> Tensor:
    """(tasks, *shape) → (tasks, 1, …, *shape), to the dimensions of `out`."""
    if out.dim() < delta.dim():  # under vmap, a norm of one vector
        return delta.squeeze(0)
    return delta.view(delta.shape[0], *[1] * (out.dim() - delta.dim()), *delta.shape[1:])


def _sum(delta: Delta, change: Delta) -> Delta:
    return {kind: delta[kind] + value if kind in delta else value for kind, value in change.items()}


def _old(delta: Delta, kind: str) -> list[Tensor]:
    return [delta[kind]] if kind in delta else []


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are surely the same memory, read in the same way."""
    if other is None or one.shape != other.shape or one.stride() != other.stride():
        return False
    return one.data_ptr() == other.data_ptr() != 0  # 0: memory that is elsewhere


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
