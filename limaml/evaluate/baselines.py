"""The baselines of every comparison: the same global block, the same features, the same outer loop; no adaptation.

`base` is the global block without a meta embedding. `wide_and_deep` is the paper's rival: each task id has a learned
embedding, read by the global block in the place of the meta embedding (deep), and a learned bias (wide).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from limaml.config import TrainConfig
from limaml.meta.blocks import CONSTANT, add_parts
from limaml.meta.distributed import ALONE, Ranks
from limaml.meta.losses import Losses
from limaml.meta.scorer import gather_parts, take
from limaml.tasks import Split
from limaml.types import CutBlock, Features, Interactions, embedding_name

__all__ = ["ConstantBlock", "PlainLearner", "PlainModel"]


class ConstantBlock(nn.Module):
    """What a global block without any input can say: the mean."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, features: Features) -> Tensor:
        """Logits `[n, heads]`."""
        return features[CONSTANT] * self.bias


class PlainModel(nn.Module):
    """A global block without adaptation, with `ids` task types given learned id embeddings (none for `base`).

    `ids` maps a task type to (entries of its table, size of its embedding). Entry 0 of each table stands for ids that
    were not trained on: it is trained on a share `id_dropout` of the rows, so that it means "anybody".
    """

    def __init__(
        self,
        global_block: nn.Module,
        losses: Losses,
        ids: Mapping[str, tuple[int, int]] | None = None,
        *,
        id_dropout: float = 0.05,
    ) -> None:
        super().__init__()
        self.global_block, self.losses, self.id_dropout = global_block, losses, id_dropout
        self.deep = nn.ModuleDict({task: nn.Embedding(n + 1, dim) for task, (n, dim) in (ids or {}).items()})
        self.wide = nn.ModuleDict({task: nn.Embedding(n + 1, losses.heads) for task, (n, _) in (ids or {}).items()})
        for table in [*self.deep.values(), *self.wide.values()]:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.01)

    def logits(self, data: Interactions, rows: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Logits `[n, heads]` of the rows `[n]`. `known` maps a task type to a mask `[entries]` of trained ids."""
        embeddings: Features = {}
        shift: Tensor | float = 0.0
        for task, deep in self.deep.items():
            entry = data.index[task][rows]
            usable = known[task][entry]
            if self.training and self.id_dropout:
                usable = usable & (torch.rand(len(rows)) >= self.id_dropout)
            ids = torch.where(usable, entry + 1, 0).to(self.device)
            embeddings[embedding_name(task)] = deep(ids)
            shift = shift + self.wide[task](ids)
        logits: Tensor = self._global(data, rows, embeddings) + shift
        return logits

    @property
    def device(self) -> torch.device:
        return self.losses.log_variance.device

    def _global(self, data: Interactions, rows: Tensor, embeddings: Features) -> Tensor:
        """The global block; of a cut one, each distinct entry is encoded once, as the personalised model does it."""
        block = self.global_block
        if not isinstance(block, CutBlock):
            features: Features = {**embeddings, CONSTANT: torch.ones(len(rows), 1, device=self.device)}
            for side, table in data.sides.items():
                features |= take(table, data.index[side][rows], device=self.device)
            plain: Tensor = block(features)
            return plain
        parts = block.condition(embeddings)
        for side, table in data.sides.items():
            if table:
                distinct, place = torch.unique(data.index[side][rows], return_inverse=True)
                encoded = block.encode(take(table, distinct, device=self.device))
                parts = add_parts(parts, gather_parts(encoded, place.to(self.device)))
        return block.score(parts)


class PlainLearner:
    """Learns a `PlainModel` on rows in random order."""

    covers, steady = 1, True

    def __init__(
        self, model: PlainModel, data: Interactions, train: Tensor, config: TrainConfig, validation: Split | None = None
    ) -> None:
        self.module: nn.Module = model
        self.model, self.data, self.config, self.validation = model, data, config, validation
        self.rows = train.nonzero().flatten()
        self.weight = float(data.weights[train].sum())
        model.losses.standardise(data.labels[train], data.weights[train])
        self.known = {}
        for task in model.deep:
            self.known[task] = torch.zeros(data.count(task), dtype=torch.bool)
            self.known[task][data.index[task][self.rows]] = True

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.model.losses.parameters())

    def windows_per_epoch(self) -> int:
        return 1

    def windows(self, generator: torch.Generator, ranks: Ranks = ALONE, start: int = 0) -> Iterator[PlainLearner]:
        yield self

    def batches(self, generator: torch.Generator, ranks: Ranks = ALONE) -> list[Tensor]:
        return list(
            torch.split(
                self.rows[torch.randperm(len(self.rows), generator=generator)], self.config.batch_of(len(self.rows))
            )
        )

    def share(self, batch: Tensor, ranks: Ranks) -> Tensor | None:
        part = batch[ranks.share(torch.ones(len(batch)))]
        return part if len(part) else None

    def loss(self, batch: Tensor) -> tuple[Tensor, float]:
        return self._row_losses(batch).sum(), self.data.labelled_weight(batch)

    def _row_losses(self, batch: Tensor) -> Tensor:
        return self.model.losses.of_rows(self.data, batch, self.model.logits(self.data, batch, self.known))

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Nothing is left to do."""

    def tasks_in(self, batch: Tensor) -> int:
        return len(batch)

    @torch.no_grad()
    def blame(self, batch: Tensor) -> str:
        bad = (~self._row_losses(batch).isfinite()).nonzero().flatten().cpu()
        return f"Row {int(batch[bad[0]])} is the first to blame." if len(bad) else "No single row is to blame."

    @torch.no_grad()
    def predict(self, rows: Tensor, rows_per_chunk: int = 65536) -> Tensor:
        """Logits `[n, heads]` of the rows `[n]`, in evaluation mode."""
        self.model.eval()
        parts = [self.model.logits(self.data, part, self.known).cpu() for part in torch.split(rows, rows_per_chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.model.losses.heads)

    @torch.no_grad()
    def validate(self, ranks: Ranks = ALONE) -> float | None:
        if self.validation is None:
            return None
        rows = self.validation.test.nonzero().flatten()
        rows = rows[ranks.share(torch.ones(len(rows)))]
        losses = self.model.losses.of_rows(self.data, rows, self.predict(rows).to(self.model.device))
        total, weight = ranks.sum(float(losses.sum()), self.data.labelled_weight(rows))
        return total / max(weight, 1e-12)
