"""`MetaModel`: any module as the global block, one or several meta blocks, and a solver for each.

    z = model.adapt(data, "user_id", tasks, support)      # (tasks, dim): the meta embeddings
    model.logits(data, rows, {"user_id": table})          # (rows, heads): scores with them

To personalise an existing model `m(features) -> logits`, let it read one more feature, `features["user_id_embedding"]`
`[n, dim]`, and write `MetaModel(m, {"user_id": meta_block})`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from limaml.config import Adaptation
from limaml.errors import ModelError
from limaml.meta.engine import Engine
from limaml.meta.gradient import GradientSolver
from limaml.meta.loop import Loop
from limaml.meta.losses import Losses
from limaml.meta.lowrank import LowRank, Unsupported
from limaml.meta.newton import NewtonSolver
from limaml.meta.support import Held, RowScorer, Support, side_features
from limaml.meta.vmapped import Vmap
from limaml.tasks import TaskRows
from limaml.types import Features, Interactions, LossKind, Rows

__all__ = ["MetaModel"]

logger = logging.getLogger("limaml")


class MetaModel(nn.Module):
    """A global block, and per task type a meta block and the solver that adapts it.

    `meta_blocks` maps a task type to a module `forward(features) -> [tasks, dim]`; the global block finds the result in
    its features under `embedding_name(task)`. `dims` gives the sizes of the meta embeddings where a block has no
    attribute `dim`.
    """

    def __init__(
        self,
        global_block: nn.Module,
        meta_blocks: Mapping[str, nn.Module],
        *,
        losses: Sequence[LossKind | str] = (LossKind.BINARY,),
        adaptation: Adaptation | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not meta_blocks:
            raise ModelError("A MetaModel needs at least one meta block: pass meta_blocks={'user_id': block}.")
        for name, module in global_block.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ModelError(
                    f"Module '{name}' of the global block is a {type(module).__name__}: in training it makes the loss of "
                    "one task depend on the others. Replace it with LayerNorm, or fold it into the layer before it."
                )
        self.adaptation = adaptation or Adaptation()
        self.global_block = global_block
        self.meta_blocks = nn.ModuleDict(meta_blocks)
        self.losses = Losses(losses)
        self.dims = {task: (dims or {}).get(task, getattr(block, "dim", None)) for task, block in meta_blocks.items()}
        for task, dim in self.dims.items():
            if not isinstance(dim, int):
                raise ModelError(
                    f"The size of the meta embedding of task '{task}' is not known: give its block an attribute 'dim', or "
                    f"pass dims={{'{task}': …}}."
                )
        self.solvers = nn.ModuleDict({task: self._solver(task) for task in meta_blocks})
        self._engines: dict[tuple[str, bool], Engine] = {}

    def _solver(self, task: str) -> nn.Module:
        settings = self.adaptation
        if settings.solver == "newton":
            dim = self.dims[task]
            assert dim is not None
            return NewtonSolver(dim, steps=settings.steps, precision=settings.precision)
        return GradientSolver(
            self.meta_blocks[task],
            steps=settings.steps,
            order=settings.order,
            rate=settings.rate,
            learn_rate=settings.learn_rate,
            prior_count=settings.prior_count,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task types, in the order of the meta blocks."""
        return tuple(self.meta_blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def engine(self, task: str, sample: Features) -> Engine:
        """The engine of a task type's meta block: the fastest that is exact for it, or the one that was asked for."""
        block = self.meta_blocks[task]
        key = (task, block.training)
        if key not in self._engines:
            self._engines[key] = choose_engine(block, sample, self.adaptation.engine, task)
        return self._engines[key]

    def features_of(self, data: Interactions, task: str, tasks: Tensor) -> Features:
        """What the meta block of `task` is given for the entries `tasks` `[n]`."""
        return side_features(data, task, tasks, self.dtype)

    def cold(self, data: Interactions, task: str, tasks: Tensor) -> Tensor:
        """Cold embeddings `[tasks, dim]`: the un-adapted meta block on the tasks' own features."""
        z: Tensor = self.meta_blocks[task](self.features_of(data, task, tasks))
        return z

    def held_cold(self, data: Interactions, task: str) -> Held:
        """Every task type but `task`, held at its cold embeddings."""
        return {other: partial(self.cold, data, other) for other in self.tasks if other != task}

    def adapt(self, data: Interactions, task: str, tasks: Tensor, support: Rows) -> Tensor:
        """Meta embeddings `[tasks, dim]` of the entries `tasks` of task type `task`, adapted on `support`.

        While a task type adapts, the others stand at their cold embeddings, so that no task's result depends on another
        task's. A task without support rows gets exactly its cold embedding. With gradients on, the result can be
        differentiated by all parameters, through all inner steps.
        """
        cold = self.cold(data, task, tasks)
        problem = Support(self.global_block, self.losses, data, task, tasks, support, self.held_cold(data, task))
        solver = self.solvers[task]
        if isinstance(solver, NewtonSolver):
            z, _ = solver(problem, cold)
        else:
            features = self.features_of(data, task, tasks)
            with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with a second derivative
                z = solver(self.engine(task, features), features, problem)
        return torch.where((problem.weight > 0)[:, None], z, cold)

    @torch.no_grad()
    def embed(
        self,
        data: Interactions,
        task: str,
        among: TaskRows,
        tasks: Tensor | None = None,
        *,
        rows_per_chunk: int = 65536,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Meta embeddings `[tasks, dim]` of `tasks` (default: every entry), adapted on their most recent rows in `among`.

        Tasks are taken in chunks of about `rows_per_chunk` support rows, so that memory does not grow with their
        number. `progress` is called with (tasks done, tasks in all).
        """
        tasks = torch.arange(data.count(task)) if tasks is None else tasks
        cap = self.adaptation.max_support
        size = among.size[tasks]
        used = size if cap is None else size.clamp(max=cap)
        # A task weighs its rows, plus one: cold tasks cost something too.
        chunk = torch.div(torch.cumsum(used + 1, 0) - 1, rows_per_chunk, rounding_mode="floor")
        vectors = [torch.zeros(0, self.dims[task] or 0, dtype=self.dtype)]
        was_training, done = self.training, 0
        self.eval()
        try:
            for part in torch.split(tasks, torch.unique_consecutive(chunk, return_counts=True)[1].tolist()):
                vectors.append(self.adapt(data, task, part, among.of_tasks(part, cap)))
                done += len(part)
                if progress is not None:
                    progress(done, len(tasks))
        finally:
            self.train(was_training)
        return torch.cat(vectors)

    def logits(
        self,
        data: Interactions,
        rows: Tensor,
        embeddings: Mapping[str, Tensor],
        *,
        of: Tensor | None = None,
    ) -> Tensor:
        """Logits `[n, heads]` of the rows `[n]`, with the embeddings of every entry of each task type `[entries, dim]`.

        `of` replaces the rows' own entries of the first task type: whose embedding each row is scored with.
        """
        task = self.tasks[0]
        missing = [name for name in self.tasks if name not in embeddings]
        if missing:
            raise ModelError(f"Scoring needs the meta embeddings of every task type; {missing} are missing.")
        distinct, owner = torch.unique(data.index[task][rows] if of is None else of, return_inverse=True)
        held: Held = {name: embeddings[name].__getitem__ for name in self.tasks if name != task}
        scorer = RowScorer(self.global_block, data, task, distinct, Rows(rows, owner), held)
        return scorer.logits(embeddings[task][distinct])


def choose_engine(
    block: nn.Module, sample: Features, wanted: Literal["auto", "lowrank", "vmap", "loop"], task: str
) -> Engine:
    """The fastest engine that is exact for `block`; one sentence in the log where it is not `lowrank`."""
    if wanted == "loop":
        return Loop(block)
    if wanted == "vmap":
        return Vmap(block)
    try:
        return LowRank(block, sample)
    except Unsupported as reason:
        if wanted == "lowrank":
            raise
        why = str(reason)
    try:
        engine = Vmap(block)
        with torch.no_grad():
            weights = {name: p.unsqueeze(0) for name, p in engine.adapted.items()}
            engine._forward(weights, {name: values[:1] for name, values in sample.items()})
        chosen: Engine = engine
    except (RuntimeError, ValueError, NotImplementedError):
        chosen = Loop(block)
    logger.warning("The meta block of '%s' is adapted by the engine '%s': %s", task, chosen.name, why)
    return chosen
