"""A second device that every machine has: tensors that say they lie on `meta`, and compute on the CPU.

An operation that is given such a tensor and one of the CPU fails, as it would on a GPU. So code that forgets to move a tensor
is found without one. What CUDA allows is allowed: numbers in zero dimensions, indexing by CPU indices, and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ELSEWHERE", "Elsewhere", "moved", "second_device"]

ELSEWHERE = torch.device("meta")
_MOVES = {"aten::_to_copy", "aten::copy_"}
_INDEXES = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor on the second device; `here` is where its numbers are."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
        )
        made.here = here
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _carry_out(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """What makes a tensor on the second device out of nothing, or out of a tensor of the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _carry_out(func, args, dict(kwargs or {}))


@cache
def _known(func: Any) -> tuple[str, bool]:
    """The name of an operation, and whether its result is its first tensor."""
    schema = func._schema
    return schema.name, schema.name == "aten::copy_" or (schema.is_mutable and len(schema.returns) == 1)


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with each tensor in it changed; torch's own `tree_map` takes most of the time of a small operation."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_changed(part, change) for part in value])
    return value


def _carry_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (name, returns_first), wanted = _known(func), kwargs.get("device")
    given: list[Tensor] = []
    _changed((args, tuple(kwargs.values())), given.append)
    if any(arg.is_meta and not isinstance(arg, Elsewhere) for arg in given):
        raise RuntimeError(f"{name} is given a tensor without numbers: the second device has not made it.")
    some = [arg for arg in given if isinstance(arg, Elsewhere)]
    strangers = [arg for arg in given if not isinstance(arg, Elsewhere) and arg.dim() > 0]
    if name in _INDEXES and isinstance(args[0], Elsewhere):
        strangers = [arg for arg in strangers if any(arg is value for value in args[2:3])]
    if some and strangers and name not in _MOVES:
        shapes = [list(arg.shape) for arg in strangers]
        raise RuntimeError(f"{name} is given tensors of two devices: {shapes} are on the CPU.")
    there = bool(some) if wanted is None else torch.device(wanted) == ELSEWHERE
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")

    def here(tensor: Tensor) -> Tensor:
        return tensor.here if isinstance(tensor, Elsewhere) else tensor

    found = func(*_changed(args, here), **{key: _changed(value, here) for key, value in kwargs.items()})
    if returns_first:
        return given[0]
    return _changed(found, Elsewhere) if there else found


@contextmanager
def second_device() -> Iterator[None]:
    """In here the second device makes tensors, too: `torch.arange(…, device="meta")`, `.to("meta")`."""

    def placed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def factory(*args: Any, **kwargs: Any) -> Tensor:  # these two make a tensor without asking a mode
            own = args[0].here if isinstance(args[0], Elsewhere) else None
            if own is not None:
                return Elsewhere(make(own, *args[1:], **kwargs))
            device = kwargs.pop("device", None)
            made = make(*args, **kwargs)
            return made if device is None else made.to(device)

        return factory

    makes = torch.tensor, Tensor.new_tensor
    torch.tensor, Tensor.new_tensor = (placed(make) for make in makes)
    try:
        with _Factories():
            yield
    finally:
        torch.tensor, Tensor.new_tensor = makes


def moved(module: nn.Module) -> nn.Module:
    """The module, with its parameters and buffers on the second device."""
    there: dict[int, nn.Parameter] = {}  # a parameter may sit in several places
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = nn.Parameter(Elsewhere(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = there.setdefault(id(parameter), made)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
    return module
