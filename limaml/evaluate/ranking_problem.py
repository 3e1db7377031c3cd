"""Implicit feedback as a problem that every compared method can be asked: score all candidates for each judged member.

The positives are split as rows are in any comparison. Negatives are sampled for what is learned from: for the training
positives among the training positives alone, and for the supports of new members among all supports, each from what was
known at that time. The candidates are all items of the supports. One question row for each judged member and candidate is
put behind the interactions, later than all of them and without a label: so a method needs to know nothing of ranking, and
cannot look at the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from limaml.config import ImplicitConfig
from limaml.errors import DataError
from limaml.evaluate.methods import Problem
from limaml.evaluate.ranking import Ranked, rank_tasks
from limaml.interactions import Encoder, Schema, index_interactions, sample_negatives
from limaml.interactions.columns import factorise
from limaml.interactions.implicit import CHOSEN, ORDER
from limaml.tasks import Split
from limaml.types import ROW, Interactions

__all__ = ["OFFSET", "Candidates", "ranked_of", "ranking_problem"]

OFFSET = "sampling_offset"
WEIGHT = "sampling_weight"
TRAIN, SUPPORT, TEST = 0, 1, 2


@dataclass(frozen=True)
class Candidates:
    """Who is judged, on which candidates, and the answers; `split.test` of the problem is these tasks × these candidates."""

    tasks: Tensor  # [tasks] entries of the member's side
    items: Tensor  # [candidates] one interaction of each
    support: Tensor  # [tasks] positives of the support
    chosen: Tensor  # [tasks, candidates] bool: to be found
    masked: Tensor  # [tasks, candidates] bool: positives of the support, which are not shown again
    notes: tuple[str, ...]


def ranking_problem(
    positives: pl.DataFrame, schema: Schema, split: Callable[[Interactions], Split], settings: ImplicitConfig, seed: int
) -> tuple[Problem, Encoder, Candidates]:
    """The problem of one (protocol, seed), from a table that `prepare_implicit` made; `split` divides its positives.

    Raises `DataError` where what describes an item is not the same for all members, or nobody can be judged.
    """
    frame, schema, masks, notes = _with_negatives(positives, schema, split, settings, seed)
    part = frame["part"].to_numpy()
    order = index_interactions(frame, schema).source_row
    assert order is not None
    ordered = torch.from_numpy(part)[order]
    encoder = Encoder.fit(frame, schema, ordered == TRAIN)
    data = encoder.encode(frame)
    if schema.time == ORDER:
        data = replace(data, time_unit="order")
    task = schema.tasks[0].name
    assert schema.row is not None
    codes = torch.from_numpy(factorise(frame[schema.row])[0])[order]
    candidates = _candidates(data, task, codes, ordered, settings, seed)
    notes += candidates.notes
    _refuse_occasions(data, task, codes, schema)
    grown = _with_questions(data, task, candidates)
    pad = torch.zeros(len(grown) - len(data), dtype=torch.bool)
    division = Split(
        masks.protocol,
        task,
        torch.cat([ordered == TRAIN, pad]),
        torch.cat([ordered <= SUPPORT, pad]),
        torch.cat([torch.zeros(len(data), dtype=torch.bool), ~pad]),
        masks.tied,
    )
    losses = tuple(label.loss for label in schema.labels)
    problem = Problem(grown, encoder.specs, losses, tuple(t.name for t in schema.tasks), division)
    return problem, encoder, replace(candidates, notes=tuple(notes))


def ranked_of(dataset: str, protocol: str, seed: int, method: str, candidates: Candidates, outputs: Tensor) -> Ranked:
    """The ranking metrics of one method's `outputs` `[tasks · candidates, 1]` for the tasks and candidates."""
    shape = candidates.chosen.shape
    scores = outputs[:, 0].double().reshape(shape).numpy()
    values = rank_tasks(scores, candidates.chosen.numpy(), candidates.masked.numpy())
    found = candidates.chosen.sum(1)
    return Ranked(
        dataset,
        protocol,
        seed,
        method,
        candidates.tasks.numpy(),
        candidates.support.numpy(),
        found.numpy(),
        values,
    )


def _with_negatives(
    positives: pl.DataFrame, schema: Schema, split: Callable[[Interactions], Split], settings: ImplicitConfig, seed: int
) -> tuple[pl.DataFrame, Schema, Split, list[str]]:
    """Positives and negatives, with the columns `OFFSET` and `part`; the schema that knows the offset; the split of the
    positives; and what should be known."""
    plain = index_interactions(positives, schema)
    masks = split(plain)
    assert plain.source_row is not None
    part = np.full(len(plain), TEST)
    source = plain.source_row.numpy()
    part[source[masks.support.numpy()]] = SUPPORT
    part[source[masks.train.numpy()]] = TRAIN
    columns = positives.drop(CHOSEN).with_columns(pl.Series("part", part))
    train, test = columns.filter(pl.col("part") == TRAIN), columns.filter(pl.col("part") == TEST)
    support = columns.filter(pl.col("part") != TEST)
    drawn, notes = [], []
    for name, base, kept in (("training", train, TRAIN), ("supports of new tasks", support, SUPPORT)):
        if not (base["part"] == kept).any():
            continue
        frame, said = _sample(base, schema, settings, seed)
        drawn.append(frame.filter(pl.col("part") == kept))
        rows = drawn[-1]
        notes.append(
            f"{name.capitalize()}: {int((rows[CHOSEN] == 1).sum()):,} positives and {int((rows[CHOSEN] == 0).sum()):,} "
            f"negatives (seed {seed})."
        )
        notes += said
    test = test.with_columns(pl.lit(1, pl.Int8).alias(CHOSEN), pl.lit(0.0).alias(OFFSET), pl.lit(1.0).alias(WEIGHT))
    frame = pl.concat([*drawn, test.select(drawn[0].columns)])
    return frame, schema.model_copy(update={"offset": OFFSET, "weight": WEIGHT}), masks, notes


def _sample(
    positives: pl.DataFrame, schema: Schema, settings: ImplicitConfig, seed: int
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    assert schema.row is not None
    member = schema.tasks[0]
    of_member = {*member.columns, schema.time, "part", schema.row}
    of_member |= {feature.column for feature in schema.features if feature.side == member.name}
    sample = sample_negatives(
        positives,
        task=member.columns,
        row=schema.row,
        time=None if schema.time == ORDER else schema.time,
        per_positive=settings.negatives,
        popularity=1.0 if settings.sampling == "popularity" else 0.0,
        seed=seed,
        row_columns=[name for name in positives.columns if name not in of_member],
        label=CHOSEN,
        offset=OFFSET,
    )
    notes = [note for note in sample.notes if "has the columns" not in note]
    frame = sample.frame.with_columns(pl.lit(1.0).alias(WEIGHT))
    if schema.time is not None and schema.time != ORDER:
        # an item is known from its first interaction on: that it is a positive says nothing of the item, nor of who chose it
        new = (pl.col(CHOSEN) == 1) & (pl.col(schema.time) == pl.col(schema.time).min().over(schema.row))
        frame = frame.with_columns(pl.when(new).then(0.0).otherwise(1.0).alias(WEIGHT))
        notes.append(
            f"{int((frame[WEIGHT] == 0).sum()):,} positives are the first that is known of their item, and weigh nothing: "
            "no item is known before somebody chose it."
        )
    return frame, tuple(notes)


def _candidates(
    data: Interactions, task: str, codes: Tensor, part: Tensor, settings: ImplicitConfig, seed: int
) -> Candidates:
    """`codes` `[rows]` number the items, `part` `[rows]` says which rows are of training, of a support, or to be found."""
    positive = data.labels[:, 0] == 1
    known = torch.unique(codes[(part <= SUPPORT) & positive])
    place = torch.full((int(codes.max()) + 1,), -1)
    place[known] = torch.arange(len(known))
    owner = data.index[task]
    asked = part == TEST
    found = asked & (place[codes] >= 0)
    notes = [
        f"Candidates: the {len(known):,} items of the supports, without those of the member's own. "
        f"{int(found.sum()):,} test positives are among them; {int(asked.sum() - found.sum()):,} are of items that no "
        "support has, and are not judged."
    ]
    tasks = torch.unique(owner[found])
    if not len(tasks):
        raise DataError("No member has a test positive among the candidates: there are too few interactions to judge.")
    most = max(1, settings.scores // len(known))
    lost = int(torch.unique(owner[asked]).numel()) - len(tasks)
    if lost:
        notes.append(f"{lost:,} tasks have no test positive among the candidates: their metrics are undefined.")
    if len(tasks) > most:
        notes.append(
            f"A sample of {most:,} of the {len(tasks):,} tasks is judged (seed {seed}), each on all candidates, as "
            f"compare.implicit.scores allows {settings.scores:,} scores."
        )
        chosen = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed))[:most]
        tasks = tasks[chosen].sort().values
    row = torch.full((data.count(task),), -1)
    row[tasks] = torch.arange(len(tasks))

    def table(rows: Tensor) -> Tensor:
        here = rows & (row[owner] >= 0) & (place[codes] >= 0)
        marked = torch.zeros(len(tasks), len(known), dtype=torch.bool)
        marked[row[owner[here]], place[codes[here]]] = True
        return marked

    of_support = (part <= SUPPORT) & positive
    items = torch.full((len(known),), len(data))
    first = torch.arange(len(data))
    inside = of_support.nonzero().flatten()
    items = items.scatter_reduce(0, place[codes[inside]], first[inside], "amin")
    size = torch.bincount(owner[of_support], minlength=data.count(task))[tasks]
    return Candidates(tasks, items, size, table(found), table(of_support), tuple(notes))


def _refuse_occasions(data: Interactions, task: str, codes: Tensor, schema: Schema) -> None:
    """Raise `DataError` unless each item has one entry on every side but the member's."""
    for side, index in data.index.items():
        if side == task:
            continue
        first = torch.full((int(codes.max()) + 1,), -1).scatter_reduce(0, codes, index, "amax")
        differs = (first[codes] != index).nonzero().flatten()
        if not len(differs):
            continue
        if side == ROW:
            names = [f.column for f in schema.features if f.side == ROW and f.column != schema.row]
            what = f"row features differ within one '{schema.row}' (among them may be {names})"
        else:
            what = f"the task '{side}' differs within one '{schema.row}'"
        raise DataError(
            f"To rank all candidates, each must be described without the occasion, but {what} in {len(differs):,} of "
            f"{len(data):,} rows. Leave these columns out (--exclude), or judge labels instead of rankings."
        )


def _with_questions(data: Interactions, task: str, candidates: Candidates) -> Interactions:
    """`data`, and behind it a row for each judged task and candidate: later than all others, and without a label."""
    tasks, items = candidates.chosen.shape
    more = tasks * items
    index = {}
    for side, entries in data.index.items():
        new = candidates.tasks.repeat_interleave(items) if side == task else entries[candidates.items].repeat(tasks)
        index[side] = torch.cat([entries, new])
    last = int(data.time[-1]) + 1
    return replace(
        data,
        index=index,
        labels=torch.cat([data.labels, torch.full((more, data.labels.shape[1]), float("nan"))]),
        weights=torch.cat([data.weights, torch.ones(more)]),
        time=torch.cat([data.time, torch.full((more,), last)]),
        offset=None if data.offset is None else torch.cat([data.offset, torch.zeros(more)]),
        source_row=None,
    )
