"""`MetaModel`: any module as the global block, one or several meta blocks, and a solver for each.

    z = model.adapt(data, "user_id", tasks, support)      # (tasks, dim): the meta embeddings
    model.logits(data, rows, {"user_id": table})          # (rows, heads): scores with them

To personalise an existing model `m(features) -> logits`, let it read one more feature, `features["user_id_embedding"]`
`[n, dim]`, and write `MetaModel(m, {"user_id": meta_block})`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from limaml.config import Adaptation
from limaml.errors import ModelError
from limaml.meta.adapted import structure_of, widened
from limaml.meta.age import HalfLife
from limaml.meta.blocks import CONSTANT
from limaml.meta.budget import FREE_SHARE, chunk_rows, free_bytes, kept_bytes, piece_rows
from limaml.meta.engine import Engine
from limaml.meta.gradient import GradientSolver
from limaml.meta.loop import Loop
from limaml.meta.losses import Losses
from limaml.meta.lowrank import LowRank
from limaml.meta.newton import NewtonSolver
from limaml.meta.precision import Precision, between_blocks, precision_of_blocks
from limaml.meta.proof import prove, refuse_unused
from limaml.meta.reasons import Unsupported
from limaml.meta.scorer import Held, RowScorer, calling, take
from limaml.meta.support import Support
from limaml.meta.uncertainty import Posterior
from limaml.meta.vmapped import Vmap
from limaml.tasks import TaskRows
from limaml.types import Features, Interactions, LossKind, Rows

__all__ = ["MetaModel"]

logger = logging.getLogger("limaml")

FEW_ROWS = 2**16
"""So many rows are never cut for the sake of memory."""

FEW_BYTES = 2**24
"""So many are taken without asking how many are free, which takes as long as a small refresh."""

ROW_BYTES = 1024
"""A row of a support, while its task is generated: its place in the tables, its labels, and its features or its share
of the parts."""


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
        self.anybody = nn.ParameterDict({task: torch.zeros(self.dims[task] or 0) for task in meta_blocks})
        start = self.adaptation.half_life
        self.half_lives = nn.ModuleDict({} if start is None else {task: HalfLife(start) for task in meta_blocks})
        self._engines: dict[tuple[str, bool], tuple[tuple[object, ...], Engine]] = {}
        self._read_by_global: set[str] = set()
        self._kept_per_task: dict[str, int] = {}

    def weigh_by_age(self, task: str, half_life: HalfLife | None) -> None:
        """Have `task`'s support rows weigh by age from now on; with None, all alike."""
        if half_life is not None:
            self.half_lives[task] = half_life.to(self.device, self.dtype)
        elif task in self.half_lives:
            del self.half_lives[task]

    def weigh_as(self, state: Mapping[str, object]) -> None:
        """Have a half-life for just those task types that a state dict has one of, where training looks for them; its value
        is loaded with the state. `load_state_dict` does this by itself."""
        for task in self.tasks:
            named = f"half_lives.{task}.log_half_life" in state
            if named and task not in self.half_lives:
                self.weigh_by_age(task, HalfLife(1.0))
            elif not named and self.adaptation.seeks_half_life:
                self.weigh_by_age(task, None)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.weigh_as(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def half_life_values(self) -> dict[str, float]:
        """Task type → the half-life of its support rows, in the unit of `meta.age.ages`. Those without one are not there."""
        return {
            task: math.exp(float(cast(HalfLife, module).log_half_life.detach()))
            for task, module in self.half_lives.items()
        }

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
            adapt_embeddings=settings.adapt_embeddings,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task types, in the order of the meta blocks."""
        return tuple(self.meta_blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def engine(self, task: str, sample: Features) -> Engine:
        """The engine of a task type's meta block: the fastest that is exact for it, or the one that was asked for."""
        block = self.meta_blocks[task]
        key, structure = (task, block.training), structure_of(block)
        made_for, engine = self._engines.get(key, (None, None))
        if engine is None or made_for != structure:
            with _twice_differentiable(), between_blocks(Precision(self.device.type)):
                settings = self.adaptation
                engine = choose_engine(block, sample, settings.engine, task, settings.adapt_embeddings)
            self._engines[key] = (structure, engine)
        return engine

    def features_of(self, data: Interactions, task: str, tasks: Tensor) -> Features:
        """What the meta block of `task` is given for the entries `tasks` `[n]`."""
        return self._input(data.sides.get(task, {}), tasks)

    def _input(self, table: Features, entries: Tensor) -> Features:
        """The entries of a table of task features, with the constant that every meta block is given."""
        constant = torch.ones(len(entries), 1, dtype=self.dtype, device=self.device)
        return {**take(table, entries, self.dtype, self.device), CONSTANT: constant}

    def cold(self, data: Interactions, task: str, tasks: Tensor) -> Tensor:
        """Cold embeddings `[tasks, dim]`: the un-adapted meta block on the tasks' own features."""
        return self.cold_of(task, data.sides.get(task, {}), tasks)

    def cold_of(self, task: str, table: Features, tasks: Tensor) -> Tensor:
        """Cold embeddings `[tasks, dim]` of the entries `tasks` of a table of encoded features."""
        features = self._input(table, tasks)
        block, shape = self.meta_blocks[task], (len(tasks), self.dims[task])
        precision = precision_of_blocks(self.device)
        with calling(f"The meta block {type(block).__name__} of '{task}'", precision, lambda: features):
            z = widened(block(features), block)
        if z.shape != shape:
            raise ModelError(
                f"The meta block {type(block).__name__} of '{task}' gives a tensor of shape {list(z.shape)}; for "
                f"{len(tasks)} tasks and dim={self.dims[task]} it must be {list(shape)}."
            )
        return z

    def anybody_of(self, data: Interactions, task: str, tasks: Tensor) -> Tensor:
        """Embeddings `[tasks, dim]` that say no more of the tasks than their own features do, for training beside the adapted
        ones (`train.anybody`). Nothing is served with them: a task without support is most often one that acts seldom, and so
        not like anybody; the cold embeddings learn that from the tasks themselves."""
        embedding: Tensor = self.cold(data, task, tasks) + self.anybody[task]
        return embedding

    def held_cold(self, data: Interactions, task: str) -> Held:
        """Every task type but `task`, held at its cold embeddings."""
        return {other: partial(self.cold, data, other) for other in self.tasks if other != task}

    @overload
    def adapt(self, data: Interactions, task: str, tasks: Tensor, support: Rows) -> Tensor: ...

    @overload
    def adapt(
        self, data: Interactions, task: str, tasks: Tensor, support: Rows, *, uncertainty: Literal[True]
    ) -> Posterior: ...

    def adapt(
        self, data: Interactions, task: str, tasks: Tensor, support: Rows, *, uncertainty: bool = False
    ) -> Tensor | Posterior:
        """Meta embeddings `[tasks, dim]` of the entries `tasks` of task type `task`, adapted on `support`.

        While a task type adapts, the others stand at their cold embeddings, so that no task's result depends on another
        task's. A task without support rows gets exactly its cold embedding. With gradients on, the result can be
        differentiated by all parameters, through all inner steps.

        With `uncertainty` the result is the `Posterior` around these embeddings (solver newton), the prior's for a task
        without support rows.
        """
        if uncertainty:
            self.newton(task)
        z, factor = self._adapted(data, task, tasks, support)
        return z if not uncertainty or factor is None else Posterior(z, factor)

    def _adapted(
        self,
        data: Interactions,
        task: str,
        tasks: Tensor,
        support: Rows,
        before: Posterior | None = None,
        steps: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Meta embeddings, and their posterior's factor where the solver has one; `before` takes the prior's place, and
        `steps` that of the Newton solver's."""
        solver, factor = self._solver_of(task), None
        half_life = cast(HalfLife, self.half_lives[task]) if task in self.half_lives else None
        with _twice_differentiable(), between_blocks(precision_of_blocks(self.device)):
            if not len(support) or solver.steps == 0:
                if before is not None:
                    return before
                cold = self.cold(data, task, tasks)
                return cold, solver.prior_factor(cold) if isinstance(solver, NewtonSolver) else None
            held = self.held_cold(data, task)
            problem = self.scored(data, task, tasks, support, held, half_life)
            if task not in self._read_by_global:
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # as if never asked
                    problem.refuse_unread(self.cold(data, task, tasks) if before is None else before.mean, task)
                self._read_by_global.add(task)
            moves = problem.weight > 0
            if isinstance(solver, NewtonSolver):
                cold = self.cold(data, task, tasks) if before is None else before.mean
                z, factor = solver(problem, cold, before, steps)
            else:
                features = self.features_of(data, task, tasks)
                z = solver(self.engine(task, features), features, problem)
                if bool(moves.all()):  # no task stays at its cold embedding
                    return z, None
                cold = self.cold(data, task, tasks)
        return torch.where(moves[:, None], z, cold), factor

    def scored(
        self,
        data: Interactions,
        task: str,
        tasks: Tensor,
        rows: Rows,
        held: Held,
        half_life: HalfLife | None = None,
    ) -> Support:
        """Rows of `tasks` to adapt on, or to judge them on, with the other task types `held`; in pieces that fit."""
        each = self._rows_per_piece(data, task, tasks, rows, held)
        block, losses = self.global_block, self.losses
        return Support(block, losses, data, task, tasks, rows, held, half_life=half_life, rows_per_piece=each)

    def _budget(self) -> int:
        """Bytes that adapting may take."""
        limit = self.adaptation.memory_mib
        return int(FREE_SHARE * free_bytes(self.device)) if limit is None else limit * 2**20

    def _rows_per_piece(self, data: Interactions, task: str, tasks: Tensor, rows: Rows, held: Held) -> int | None:
        """Rows that are worked on at once: what fits the cache, or, with gradients, the memory. None: all."""
        if not torch.is_grad_enabled():
            return piece_rows(self.global_block.modules(), self.device)
        if len(rows) <= FEW_ROWS:
            return None
        few = Rows(rows.rows[:256], rows.owner[:256])
        few = Rows(few.rows[few.owner < 64], few.owner[few.owner < 64])
        sample = RowScorer(self.global_block, data, task, tasks[:64], few, held)
        z = torch.zeros(min(64, len(tasks)), self.dims[task] or 0, dtype=self.dtype, device=self.device)
        kept = kept_bytes(lambda: sample.logits(z.requires_grad_()), self.parameters())
        passes = 3 * self.adaptation.steps  # of each step: the pass, its slope, and what that is made of
        return max(FEW_ROWS, self._budget() * len(few) // max(1, kept * passes))

    def _task_bytes(self, data: Interactions, task: str, tasks: Tensor) -> int:
        """Bytes that one more task takes while it is adapted, without its rows; as measured the first time."""
        if task not in self._kept_per_task:
            few = tasks[:8]
            self._kept_per_task[task] = kept_bytes(lambda: self.cold(data, task, few), self.parameters()) // len(few)
        kept = self._kept_per_task[task]
        numbers, steps = (self.dims[task] or 0) ** 2, self.adaptation.steps
        return (2 + 2 * steps) * kept + 16 * numbers  # activations and slopes of each step; H, its factor and theirs

    def _solver_of(self, task: str) -> nn.Module:
        if task not in self.solvers:
            raise ModelError(f"There is no meta block for '{task}'; this model has {list(self.tasks)}.")
        return self.solvers[task]

    def newton(self, task: str) -> NewtonSolver:
        """The solver of a task type, which must be `newton`: `ModelError` if it is another one."""
        solver = self._solver_of(task)
        if not isinstance(solver, NewtonSolver):
            raise ModelError(
                f"The solver of '{task}' is 'gradient', which finds embeddings and no uncertainty of them. Train a model "
                "with adapt.solver=newton to have both."
            )
        return solver

    @overload
    def embed(
        self,
        data: Interactions,
        task: str,
        among: TaskRows,
        tasks: Tensor | None = None,
        *,
        rows_per_chunk: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor: ...

    @overload
    def embed(
        self,
        data: Interactions,
        task: str,
        among: TaskRows,
        tasks: Tensor | None = None,
        *,
        rows_per_chunk: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        uncertainty: Literal[True],
        before: Posterior | None = None,
        steps: int | None = None,
    ) -> Posterior: ...

    @torch.no_grad()
    def embed(
        self,
        data: Interactions,
        task: str,
        among: TaskRows,
        tasks: Tensor | None = None,
        *,
        rows_per_chunk: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        uncertainty: bool = False,
        before: Posterior | None = None,
        steps: int | None = None,
    ) -> Tensor | Posterior:
        """Meta embeddings `[tasks, dim]` of `tasks` (default: every entry), adapted on their most recent rows in `among`.

        Tasks are taken in chunks of about `rows_per_chunk` support rows (default: 65,536, or a million on a GPU), or of as
        many as `adapt.memory_mib` allows, so that
        memory does not grow with their number. `progress` is called with (tasks done, tasks in all).

        With `uncertainty` the result is the `Posterior` around the embeddings (solver newton): `dim²` more numbers a task.
        `before`, the posterior of the same `tasks` after their earlier rows, then stands where the prior does, and
        `among` holds only rows that came since: no earlier row is needed. A task without new rows keeps what it has.
        Of Newton steps there are then `adapt.steps`, or `steps`: after a few rows one is enough, as in an extended Kalman filter.
        """
        if before is not None:
            self._check_before(task, tasks, before)
        tasks = torch.arange(data.count(task)) if tasks is None else tasks
        cap = self.adaptation.max_support
        size = among.size[tasks]
        used = size if cap is None else size.clamp(max=cap)
        # A task weighs its rows and what its own layers take, in bytes: cold tasks cost something too.
        each = self._task_bytes(data, task, tasks) if len(tasks) else 0
        most, taken = (rows_per_chunk or chunk_rows(self.device)) * ROW_BYTES, torch.cumsum(used * ROW_BYTES + each, 0)
        if self.adaptation.memory_mib is not None or int(taken[-1:].sum()) > FEW_BYTES:
            most = min(self._budget(), most)
        chunk = torch.div(taken - 1, max(1, most), rounding_mode="floor")
        solver, dim = self.newton(task) if uncertainty else None, self.dims[task] or 0
        vectors = [torch.zeros(0, dim, dtype=self.dtype, device=self.device)]
        factors = [torch.zeros(0, dim, dim, dtype=self.dtype, device=self.device)]
        done, training = 0, [module for module in self.modules() if module.training]
        if training:
            self.eval()
        try:
            for part in torch.split(tasks, torch.unique_consecutive(chunk, return_counts=True)[1].tolist()):
                start = None if before is None else Posterior(*(each[done : done + len(part)] for each in before))
                z, factor = self._adapted(data, task, part, among.of_tasks(part, cap), start, steps)
                if solver is not None and factor is not None:
                    held = solver.prior_factor(z) if start is None else start.factor
                    factors.append(torch.where(z.isfinite().all(1)[:, None, None], factor, held))
                vectors.append(z if bool(z.isfinite().all()) else self._isolated(data, task, part, z, start))
                done += len(part)
                if progress is not None:
                    progress(done, len(tasks))
        finally:
            for module in training:  # not .train(): a module that was kept in evaluation mode stays there
                module.training = True
        return Posterior(torch.cat(vectors), torch.cat(factors)) if uncertainty else torch.cat(vectors)

    def _check_before(self, task: str, tasks: Tensor | None, before: Posterior) -> None:
        n, dim = len(before.mean) if tasks is None else len(tasks), self.dims[task]
        self.newton(task)
        if before.mean.shape != (n, dim) or before.factor.shape != (n, dim, dim):
            raise ModelError(
                f"The earlier posterior of '{task}' has a mean of shape {list(before.mean.shape)} and a factor of shape "
                f"{list(before.factor.shape)}; for {n} tasks and dim={dim} they must be {[n, dim]} and {[n, dim, dim]}."
            )

    def _isolated(
        self, data: Interactions, task: str, tasks: Tensor, z: Tensor, before: Posterior | None = None
    ) -> Tensor:
        """`z` `[tasks, dim]` with what adaptation began from where it overflowed, which is reported."""
        bad = ~z.isfinite().all(1)
        cold = self.cold(data, task, tasks) if before is None else before.mean
        broken = bad & ~cold.isfinite().all(1)
        if bool(broken.any()):
            key = data.ids[task][int(tasks[int(broken.nonzero()[0, 0])])]
            raise ModelError(
                f"The meta block gives no finite embedding for {int(broken.sum())} tasks, the first of them {task}:{key}, "
                "even without adaptation: look for a NaN or a value of extreme size in its features, or in the weights."
            )
        first = data.ids[task][int(tasks[int(bad.nonzero()[0, 0])])]
        logger.warning(
            "Adaptation overflowed for %d of %d tasks, the first of them %s:%s; they keep their %s embeddings. Look for a "
            "NaN or an extreme value in their rows, or lower adapt.rate.",
            int(bad.sum()),
            len(tasks),
            task,
            first,
            "cold" if before is None else "earlier",
        )
        return torch.where(bad[:, None], cold, z)

    def logits(
        self,
        data: Interactions,
        rows: Tensor,
        embeddings: Mapping[str, Tensor],
    ) -> Tensor:
        """Logits `[n, heads]` of the rows `[n]`, in any order, with the embeddings of every entry of each task type
        `[entries, dim]`; differentiable by these and by the global block."""
        task = self.tasks[0]
        self.refuse_missing(embeddings)
        distinct, owner = torch.unique(data.index[task][rows], return_inverse=True)
        place = None
        if bool((owner[1:] < owner[:-1]).any()):  # a slope sums what lies side by side
            by_owner = torch.argsort(owner, stable=True)
            place = torch.argsort(by_owner)
            rows, owner = rows[by_owner], owner[by_owner]
        held: Held = {name: embeddings[name].__getitem__ for name in self.tasks if name != task}
        scorer = RowScorer(self.global_block, data, task, distinct, Rows(rows, owner), held)
        logits = scorer.logits(embeddings[task][distinct])
        return logits if place is None else logits[place.to(logits.device)]

    def refuse_missing(self, embeddings: Mapping[str, Tensor]) -> None:
        """Raise `ModelError` unless there are embeddings of every task type."""
        missing = [name for name in self.tasks if name not in embeddings]
        if missing:
            raise ModelError(f"Scoring needs the meta embeddings of every task type; {missing} are missing.")

    @torch.no_grad()
    def predict(
        self, data: Interactions, rows: Tensor, embeddings: Mapping[str, Tensor], *, rows_per_chunk: int = 65536
    ) -> Tensor:
        """`logits` without gradients, in chunks of bounded memory."""
        parts = [self.logits(data, part, embeddings) for part in torch.split(rows, rows_per_chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.losses.heads, dtype=self.dtype, device=self.device)


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention by kernels that have a second derivative and can be batched over tasks, in every pass alike."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def choose_engine(
    block: nn.Module,
    sample: Features,
    wanted: Literal["auto", "lowrank", "vmap", "loop"],
    task: str,
    tables: bool = False,
) -> Engine:
    """The fastest engine that is exact for `block`; one sentence in the log where it is not `lowrank`.

    `tables`: whether embedding tables are adapted, too.

    Raises `ModelError` where the engine that was asked for, or every engine, cannot adapt the block, and where a
    parameter of the block is not used.
    """
    refuse_unused(block, sample, task, tables)
    reason: Unsupported | None = None
    for name in ("lowrank", "vmap", "loop") if wanted == "auto" else (wanted,):
        try:
            engine = _proven(name, block, sample, tables)
        except Unsupported as error:
            if wanted != "auto":
                raise ModelError(
                    f"The meta block of '{task}' cannot be adapted by the engine '{name}', because {error}. Leave "
                    "adapt.engine at 'auto' to have the fastest engine that can."
                ) from error
            reason = reason or error
            continue
        if reason is not None:
            logger.warning("The meta block of '%s' is adapted by the engine '%s', because %s.", task, name, reason)
        return engine
    raise ModelError(f"No engine can adapt the meta block of '{task}', because {reason}.") from reason


def _proven(name: str, block: nn.Module, sample: Features, tables: bool) -> Engine:
    if name == "lowrank":
        engine = LowRank(block, sample, tables)
        prove(engine.on, block, sample, tables)
        return engine
    plain = partial(Vmap if name == "vmap" else Loop, tables=tables)
    prove(plain, block, sample, tables)
    return plain(block)
