"""Why an engine cannot adapt a block: what torch raised, in a plain clause that names the module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from limaml.errors import ModelError

__all__ = ["FAILURES", "Failed", "Unsupported", "named", "naming_module", "reason_of"]

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)
"""What torch raises where a block does something that a transform cannot follow."""

_IN_WORDS = (
    (r"data-dependent control flow", "it branches on the values of a tensor"),
    (r"calling \.item\(\)", "it calls .item() on a tensor"),
    (r"Cannot access data pointer|calling \.numpy\(\)", "it leaves PyTorch, as .numpy() does"),
    (r"vmap: (\S+_)\(self.* is not possible", r"it writes into a tensor that all tasks share (\1)"),
    (r"[Bb]atching rule not implemented for ([\w:.]+\w)", r"PyTorch has no batching rule for \1"),
    (
        r"derivative.*_embedding_bag",
        "F.embedding_bag has no second derivative in PyTorch (use the module nn.EmbeddingBag, with ids [tasks, length] "
        "where mode='max', or nn.Embedding and a sum)",
    ),
    (r"differentiate twice a function.*once_differentiable", "one of its functions is marked as @once_differentiable"),
)


class Unsupported(ModelError):
    """A block has something that an engine cannot adapt exactly; the message is a clause with the module and the reason."""


class Failed(Unsupported):
    """Torch raised an error inside a copy of a block; in another dtype it might not."""


def named(name: str, module: nn.Module) -> str:
    """How a message speaks of a module of a block."""
    return f"module '{name}' ({type(module).__name__})" if name else f"the block {type(module).__name__}"


def reason_of(error: BaseException) -> str:
    """The first sentence of an error's message, in our words where we have some, or its class where it has none."""
    message = " ".join(str(error).split())
    for pattern, words in _IN_WORDS:
        found = re.search(pattern, message)
        if found:
            return found.expand(words)
    return re.split(r"\.(?= [A-Z]|$)", message)[0] or type(error).__name__


@contextmanager
def naming_module(block: nn.Module, problem: str) -> Iterator[None]:
    """What torch raises in here, as `Failed`: 'module … `problem`: reason', with the module of `block` that was running."""
    running: list[tuple[str, nn.Module]] = []

    def enter(name: str, module: nn.Module) -> Callable[..., None]:
        return lambda *_: running.append((name, module))

    def leave(*_: object) -> None:
        running.pop()

    handles = [module.register_forward_pre_hook(enter(name, module)) for name, module in block.named_modules()]
    handles += [module.register_forward_hook(leave) for module in block.modules()]
    try:
        yield
    except Unsupported:
        raise
    except FAILURES as error:
        where = named(*(running[-1] if running else ("", block)))
        raise Failed(f"{where} {problem}: {reason_of(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
