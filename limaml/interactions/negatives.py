"""Negatives for implicit feedback: rows that a task could have chosen at that time and did not.

The log of a shop, a player or a search engine often holds positives only. To learn from it, each positive is set
against a few rows (items) drawn from those known at its time. Drawing few makes positives look far more frequent than
they are; the `offset` column says by how much, row by row, so that a model can be trained on the sample and still give
the log-odds of the full population. See `sample_negatives` for the derivation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from limaml.errors import ConfigError, DataError
from limaml.interactions.past import Bools, Floats, Ints, Past, past_of

__all__ = ["NegativeSample", "sample_negatives"]

ROUNDS = 24  # of drawing again what was refused, before the eligible rows are listed one by one
CELLS = 4_000_000  # most entries of a temporary table
EXACT_PAIRS = 20_000_000  # up to here the seen rows' share of the draws is computed for every distinct time
PERIODS = 64  # beyond, for this many periods


@dataclass(frozen=True)
class NegativeSample:
    """Positives and their negatives.

    `frame` has the columns of the positives, the label (1 or 0) and `offset` (natural log, float). It is sorted by
    time, task and row; each positive is followed by its negatives. `counts` has `positives`, `negatives`, `asked`,
    `missing` (asked − negatives), `short` (positives with fewer negatives than asked), `bare` (positives with none)
    and `chosen_later` (negatives that the task does choose later on). `notes` say in sentences what a reader should know.
    """

    frame: pl.DataFrame
    counts: Mapping[str, int]
    notes: tuple[str, ...]


def sample_negatives(
    positives: pl.DataFrame,
    *,
    task: str | Sequence[str],
    row: str,
    time: str | None,
    per_positive: int = 4,
    popularity: float = 0.0,
    seed: int = 0,
    exclude_seen: bool = True,
    row_columns: Sequence[str] | None = None,
    label: str = "label",
    offset: str = "offset",
) -> NegativeSample:
    """Draw up to `per_positive` negatives for each row of `positives`.

    **What may be drawn.** A negative for a positive of task u at time t is a row (item) that was first seen, with any
    task, at or before t, and that u itself has not interacted with at or before t. With `exclude_seen=False` only
    what u interacts with at exactly t is left out. A row that u chooses *later* may be drawn and is counted
    (`chosen_later`): at time t it was a row not chosen, and leaving it out would let the model read the future from
    what is absent. Without a time (`time=None`) all is simultaneous: everything u ever interacts with is left out.

    **How it is drawn.** With N(t) rows known at t, M(t) interactions before t of which c_j(t) with row j,

        q_t(j) = (1 − popularity) / N(t) + popularity · (1 + c_j(t)) / (N(t) + M(t)),

    restricted to the eligible rows E. So 0 is uniform, 1 is proportional to popularity so far (each row has one
    interaction on credit, so that new ones can be drawn), and between them is a mixture. Popularity is counted
    strictly before t: a positive's own interaction must not make it look more popular than its negatives. For
    `popularity=0` the negatives of one positive are distinct; otherwise its draws are independent, and a popular row
    may come twice. Never are more drawn than there are eligible rows: k = min(per_positive, |E|).

    **The offset.** The population meant is: *at the moment of each positive, its task was exposed once to the row it
    chose and once to every eligible row*. The sample keeps every positive and, of the exposure to j, on average
    π_j = k·q_t(j) / Q copies, with Q = Σ_{i∈E} q_t(i) (for uniform draws: k/|E|). By Bayes

        odds of y=1 in the sample, given x  =  (odds of y=1 in the population, given x) / π(x),

    so a model with P(y=1) = σ(logit + offset), offset = −log π, fitted to the sample has as `logit` the log-odds in
    the population. The offset depends on the features (task, row, time) and not on the outcome: a positive carries
    what its row would have carried had it been drawn. Leave the offset out when scoring. A positive without any
    eligible row has offset 0: nothing of its (empty) population was left out.

    The intercept so found is about −log |E| by construction: relative to the assumed exposures. If true exposures are
    known to be a fraction f of the assumed ones, subtract log f from the logit. Rows appear at their first
    interaction, which is therefore always a positive; rows nobody ever chose cannot be drawn. A row that a task
    chooses again stays a positive each time. With popularity the Q of a positive's own row is that of its negatives,
    although it would be among them had it not been chosen: a relative error of at most q_t(row) / Q.

    **What negatives look like.** Columns that belong to the row (item) are taken from the row's latest interaction at
    or before t; all others, such as the task's own columns and the context, are copied from the positive.
    `row_columns` names the former; `None` finds those that are constant for each row and not for each task.

    Same seed, same sample, whatever the order of `positives`. Raises `DataError` if columns are missing, have nulls or
    would be overwritten, and `ConfigError` for a number out of range.
    """
    keys = [task] if isinstance(task, str) else list(task)
    _check(positives, keys, row, time, per_positive, popularity, row_columns, (label, offset))
    by_row = _row_columns(positives, keys, row, time) if row_columns is None else list(row_columns)
    past = past_of(positives, keys, row, time, exclude_seen)
    slots = np.minimum(per_positive, past.eligible)
    owner, items = _draw(past, slots, popularity, np.random.default_rng(seed))

    count = len(past.task)
    owners, chosen = np.concatenate([np.arange(count), owner]), np.concatenate([past.item, items])
    positive = np.arange(len(owners)) < count
    ratios = _log_ratio(past, slots, popularity, owners, chosen)
    order = np.argsort(owners, kind="stable")  # each positive, then its negatives
    owners, chosen, positive, ratios = owners[order], chosen[order], positive[order], ratios[order]
    latest = np.where(positive, owners, past.latest(owners, chosen))
    columns = [past.frame[n].gather(latest if n == row or n in by_row else owners) for n in positives.columns]
    columns += [pl.Series(label, positive.astype(np.int8)), pl.Series(offset, 0.0 - ratios)]
    counts = {
        "positives": count,
        "negatives": len(items),
        "asked": per_positive * count,
        "missing": per_positive * count - len(items),
        "short": int((slots < per_positive).sum()),
        "bare": int((slots == 0).sum()),
        "chosen_later": int(past.chosen_later(owner, items).sum()),
    }
    notes = _notes(counts, per_positive, popularity, past, row, time, by_row)
    return NegativeSample(pl.DataFrame(columns), counts, notes)


def _draw(past: Past, slots: Ints, popularity: float, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """Positions of positives `[negatives]`, ascending, and the item drawn for each."""
    owner = np.repeat(np.arange(len(slots)), slots)
    items = np.full(len(owner), -1, np.int64)
    distinct = popularity == 0
    # drawing by trial is slow where most rows would be drawn anyway
    pending = np.flatnonzero(slots[owner] * 2 <= past.eligible[owner]) if distinct else np.arange(len(owner))
    for _ in range(ROUNDS):
        if not len(pending):
            break
        proposed = _propose(past, owner[pending], popularity, generator)
        refused = past.seen(owner[pending], proposed)
        items[pending] = np.where(refused, -1, proposed)
        if distinct:
            items[_repeats(owner, items, pending, past.items)] = -1
        pending = pending[items[pending] < 0]
    left = np.flatnonzero(items < 0)
    if distinct:  # all of a positive's draws together, else they would not be distinct
        left = np.flatnonzero(_of_owners(owner, owner[left]))
        for part in _parts(np.unique(owner[left]), past.items):
            keys = np.where(past.eligible_table(part), generator.random((len(part), past.items)), np.inf)
            best = np.argsort(keys, axis=1)[:, : slots[part].max()]
            items[_of_owners(owner, part)] = best[np.arange(best.shape[1]) < slots[part][:, None]]
    else:
        for part in _parts(left, past.items):
            who = np.repeat(owner[part], past.items)
            every = np.tile(np.arange(past.items), len(part))
            share = _share(past, who, every, popularity).reshape(len(part), past.items)
            up_to = np.cumsum(np.where(past.eligible_table(owner[part]), share, 0.0), axis=1)
            items[part] = (up_to <= (generator.random(len(part)) * up_to[:, -1])[:, None]).sum(axis=1)
    return owner, items


def _propose(past: Past, owner: Ints, popularity: float, generator: np.random.Generator) -> Ints:
    """One draw from q_t for each of these positives, eligible or not."""
    known, before = past.known[owner], past.before[owner]
    uniform: Ints = generator.integers(0, known)
    if popularity == 0:
        return uniform
    # the item of a random earlier interaction is popular in proportion to its interactions
    ticket: Ints = generator.integers(0, known + before)
    event = np.maximum(ticket - known, 0)
    if not past.timed:
        event = np.minimum(event + (event >= owner), len(past.item) - 1)  # all interactions but the positive's own
    by_popularity = np.where(ticket < known, ticket, past.item[event])
    chosen: Ints = np.where(generator.random(len(owner)) < popularity, by_popularity, uniform)
    return chosen


def _repeats(owner: Ints, items: Ints, pending: Ints, count: int) -> Ints:
    """Positions among `pending` whose item the same positive has already."""
    concerned = np.flatnonzero(_of_owners(owner, owner[pending]) & (items >= 0))
    fresh = np.zeros(len(owner), np.int64)
    fresh[pending] = 1
    keys = (owner[concerned] * count + items[concerned]) * 2 + fresh[concerned]  # what is accepted comes first
    order = np.argsort(keys, kind="stable")
    again: Ints = order[1:][keys[order[1:]] // 2 == keys[order[:-1]] // 2]
    return np.take(concerned, again)


def _of_owners(owner: Ints, some: Ints) -> Bools:
    """`[slots]`: whether the slot belongs to one of these positives."""
    wanted = np.zeros(int(owner[-1]) + 1 if len(owner) else 0, np.bool_)
    wanted[some] = True
    return wanted[owner]


def _parts(positions: Ints, width: int) -> Iterator[Ints]:
    """`positions` cut so that a table with `width` columns and a row for each stays small."""
    step = max(1, CELLS // max(width, 1))
    for start in range(0, len(positions), step):
        yield positions[start : start + step]


def _share(past: Past, owner: Ints, items: Ints, popularity: float) -> Floats:
    """q_t(item) at the times of these positives."""
    known = past.known[owner]
    uniform = (1.0 - popularity) / known
    if popularity == 0:
        return np.asarray(uniform)
    return np.asarray(uniform + popularity * (1 + past.interactions(owner, items)) / (known + past.before[owner]))


def _log_ratio(past: Past, slots: Ints, popularity: float, owner: Ints, items: Ints) -> Floats:
    """log π: of the exposures to this item in the population, how many copies the sample has on average."""
    drawn, eligible = slots[owner], past.eligible[owner]
    some = drawn > 0  # where nothing is eligible nothing is left out
    if popularity == 0:
        return np.log(np.where(some, drawn, 1) / np.where(some, eligible, 1))
    known, before = past.known, past.before
    # Q = 1 − the share of what the task has seen, and at least what the eligible rows have on credit
    rest = (
        1.0 - (1.0 - popularity) * (known - past.eligible) / known - popularity * past.seen_share(EXACT_PAIRS, PERIODS)
    )
    least = past.eligible * ((1.0 - popularity) / known + popularity / (known + before))
    rest = np.maximum(rest, least)
    ratio = drawn * _share(past, owner, items, popularity) / np.where(some, rest[owner], 1.0)
    return np.log(np.where(some, ratio, 1.0))


def _row_columns(positives: pl.DataFrame, keys: list[str], row: str, time: str | None) -> list[str]:
    """Columns with one value for each row (item), and not one for each task."""
    others = [name for name in positives.columns if name not in (*keys, row, time)]
    if not others or positives.is_empty():
        return []

    def constant_in(columns: list[str]) -> set[str]:
        counts = positives.group_by(columns).agg(pl.col(others).n_unique()).select(pl.col(others).max()).row(0)
        return {name for name, count in zip(others, counts, strict=True) if count == 1}

    of_row, of_task = constant_in([row]), constant_in(keys)
    return [name for name in others if name in of_row and name not in of_task]


def _notes(
    counts: Mapping[str, int],
    per_positive: int,
    popularity: float,
    past: Past,
    row: str,
    time: str | None,
    by_row: list[str],
) -> tuple[str, ...]:
    how = "uniformly" if popularity == 0 else f"with popularity {popularity:g}"
    when = f"rows known at the positive's '{time}'" if time else "all rows, as there is no time"
    notes = [
        f"{counts['negatives']:,} negatives were drawn {how} for {counts['positives']:,} positives, among {when}. "
        "Train with the offset added to the logit, score without it."
    ]
    if counts["missing"]:
        notes.append(
            f"{counts['missing']:,} of {counts['asked']:,} negatives could not be drawn: {counts['short']:,} positives "
            f"had fewer than {per_positive} eligible rows, {counts['bare']:,} of them none."
        )
    if counts["chosen_later"]:
        notes.append(f"{counts['chosen_later']:,} negatives are rows that the task chose at a later time.")
    others = [name for name in past.frame.columns if name not in (*by_row, row)]
    notes.append(
        f"A negative has the columns {[row, *by_row]} of the row that was drawn, and {others} of its positive. "
        "Say `row_columns` if that is not right."
    )
    if popularity > 0 and past.exclude_seen and past.pairs_to_count > EXACT_PAIRS:
        notes.append(
            f"In the offset, the popularity of what a task has seen was taken at {PERIODS} points in time, not at each "
            "interaction's own."
        )
    return tuple(notes)


def _check(
    positives: pl.DataFrame,
    keys: list[str],
    row: str,
    time: str | None,
    per_positive: int,
    popularity: float,
    row_columns: Sequence[str] | None,
    new: tuple[str, str],
) -> None:
    if per_positive < 1:
        raise ConfigError(f"`per_positive` is {per_positive}; at least 1 negative is drawn for each positive.")
    if not 0.0 <= popularity <= 1.0:
        raise ConfigError(f"`popularity` is {popularity}; it lies between 0 (uniform) and 1 (as popular as so far).")
    named = [*keys, row, *([time] if time else [])]
    if not keys or len(set(named)) < len(named) or new[0] == new[1]:
        raise ConfigError(
            f"task {keys}, row '{row}', time {time!r}, label '{new[0]}' and offset '{new[1]}' must be different columns."
        )
    problems = [
        f"Column '{name}' is missing from the positives, whose columns are {positives.columns}. Rename it or name another."
        for name in [*named, *(row_columns or ())]
        if name not in positives.columns
    ]
    problems += [
        f"The positives already have a column '{name}', which would be overwritten. Drop it, or name another with "
        f"`{parameter}=`."
        for name, parameter in zip(new, ("label", "offset"), strict=True)
        if name in positives.columns
    ]
    for name in named:
        if name not in positives.columns:
            continue
        series = positives[name]
        if series.dtype.is_nested():
            problems.append(
                f"Column '{name}' is {series.dtype}, which can be no id and no time. Choose a plain column."
            )
            continue
        empty = series.is_null() | series.is_nan() if series.dtype.is_float() else series.is_null()
        if empty.any():
            problems.append(
                f"Column '{name}' of the positives has {empty.sum()} empty values, the first in row "
                f"{empty.arg_max()}. Remove these rows or fill them in."
            )
    if problems:
        raise DataError("\n".join(problems))
