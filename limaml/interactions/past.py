"""What was known, popular and already chosen at the moment of each interaction, for all interactions at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

__all__ = ["Bools", "Floats", "Ints", "Past", "past_of"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CELLS = 4_000_000  # most entries of a temporary table: some 100 MB


@dataclass(frozen=True)
class Past:
    """Interactions as integers, in an order that does not depend on the order they came in.

    Events are sorted by time, task, item. Items are numbered by first appearance, so that what is known at a time are
    the items 0 … known − 1. A *pair* is a distinct (task, item); pairs are sorted by task, first time, item.
    `owner` arguments are positions of events, whose task and time are meant.
    """

    frame: pl.DataFrame  # the interactions, sorted
    timed: bool  # else all events are simultaneous, and each has all others in its past
    exclude_seen: bool  # *seen* is what the task chose at or before the time; else, what it chose at exactly that time
    task: Ints  # [events]
    item: Ints  # [events]
    time: Ints  # [events] dense rank, ascending
    items: int
    known: Ints  # [events] items known at or before the time
    before: Ints  # [events] events before the time

    @property
    def _span(self) -> int:
        return int(self.time[-1]) + 2 if len(self.time) else 1

    # --- items over time ---------------------------------------------------------------------------------------------

    @cached_property
    def _by_item(self) -> tuple[Ints, Ints, Ints]:
        """Keys (item, time) of the events, ascending; the event of each; where each item starts `[items + 1]`."""
        keys = self.item * self._span + self.time
        order = np.argsort(keys, kind="stable")
        return keys[order], order, np.searchsorted(keys[order], np.arange(self.items + 1) * self._span)

    def _interactions_before(self, items: Ints, times: Ints) -> Ints:
        keys, _, starts = self._by_item
        return np.searchsorted(keys, items * self._span + times, "left") - starts[items]

    def interactions(self, owner: Ints, items: Ints) -> Ints:
        """How many events each item has before the owner's time (without times: all events but the owner itself)."""
        if self.timed:
            return self._interactions_before(items, self.time[owner])
        starts = self._by_item[2]
        others: Ints = starts[items + 1] - starts[items] - (items == self.item[owner])
        return others

    def latest(self, owner: Ints, items: Ints) -> Ints:
        """The last event of each item at or before the owner's time; the item must be known then."""
        keys, events, _ = self._by_item
        return events[np.searchsorted(keys, items * self._span + self.time[owner], "right") - 1]

    # --- tasks and their items ---------------------------------------------------------------------------------------

    @cached_property
    def _pairs(self) -> tuple[Ints, Ints, Ints, Ints]:
        """(task, item) keys `[pairs]`, ascending; first and last time of each; the pair of each event."""
        keys, pair = np.unique(self.task * self.items + self.item, return_inverse=True)
        first, last = np.full(len(keys), self._span), np.full(len(keys), -1)
        np.minimum.at(first, pair, self.time)
        np.maximum.at(last, pair, self.time)
        return keys, first, last, pair

    @cached_property
    def _moments(self) -> Ints:
        """Distinct (pair, time) keys, ascending."""
        return np.unique(self._pairs[3] * self._span + self.time)

    def _find_pair(self, owner: Ints, items: Ints) -> tuple[Ints, Bools]:
        keys = self._pairs[0]
        wanted = self.task[owner] * self.items + items
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return place, keys[place] == wanted

    def seen(self, owner: Ints, items: Ints) -> Bools:
        """Whether the owner's task has seen each item."""
        pair, found = self._find_pair(owner, items)
        if self.exclude_seen:
            return found & (self._pairs[1][pair] <= self.time[owner])
        wanted = pair * self._span + self.time[owner]
        place = np.minimum(np.searchsorted(self._moments, wanted), len(self._moments) - 1)
        here: Bools = found & (self._moments[place] == wanted)
        return here

    def chosen_later(self, owner: Ints, items: Ints) -> Bools:
        """Whether the owner's task chooses each item after the owner's time."""
        pair, found = self._find_pair(owner, items)
        return found & (self._pairs[2][pair] > self.time[owner])

    @cached_property
    def _seen_lists(self) -> tuple[Ints, Ints, Ints]:
        """Items in the order their task saw them `[entries]`; where each event's list starts; how long it is.

        With `exclude_seen` the entries are the pairs, and a list is the head of its task's pairs; else the entries are
        the moments, and a list is all of one moment.
        """
        keys, first, _, _ = self._pairs
        if self.exclude_seen:
            entry_item, entry_key = keys % self.items, keys // self.items * self._span + first
        else:
            owner_pair = self._moments // self._span
            entry_item = keys[owner_pair] % self.items
            entry_key = keys[owner_pair] // self.items * self._span + self._moments % self._span
        order = np.argsort(entry_key, kind="stable")
        entry_key = entry_key[order]
        here = self.task * self._span + self.time
        start = np.searchsorted(entry_key, self.task * self._span if self.exclude_seen else here, "left")
        return entry_item[order], start, np.searchsorted(entry_key, here, "right") - start

    @cached_property
    def eligible(self) -> Ints:
        """`[events]`: how many items are known and not seen."""
        return self.known - self._seen_lists[2]

    def eligible_table(self, owner: Ints) -> Bools:
        """`[owners, items]`: what is known and not seen."""
        every = np.tile(np.arange(self.items), len(owner))
        seen = self.seen(np.repeat(owner, self.items), every).reshape(len(owner), self.items)
        return np.logical_and(np.arange(self.items) < self.known[owner][:, None], ~seen)

    @cached_property
    def pairs_to_count(self) -> int:
        """How many (moment of a task, item it has seen) there are: the work of an exact `seen_share`."""
        _, first_of_moment = np.unique(self.task * self._span + self.time, return_index=True)
        return int(self._seen_lists[2][first_of_moment].sum())

    def seen_share(self, exact_pairs: int, periods: int) -> Floats:
        """`[events]`: Σ over what the task has seen of (1 + interactions(item)) / (known + before).

        Exact if that takes at most `exact_pairs` counts; else the interactions are counted as of the middle event of
        each of `periods` equal parts of the events.
        """
        entry_item, start, length = self._seen_lists
        count = len(self.time)
        exact = self.pairs_to_count <= exact_pairs or not self.exclude_seen
        if exact:
            middle = np.arange(count)
            period = self.time
        else:
            edges = np.linspace(0, count, periods + 1).astype(np.int64)
            # all events of one time are in one period
            period = np.searchsorted(edges, np.searchsorted(self.time, self.time, "left"), "right") - 1
            middle = (edges[period] + edges[period + 1]) // 2
        group_key = self.task * (int(period[-1]) + 1 if count else 1) + period
        order = np.argsort(group_key, kind="stable")
        heads = np.flatnonzero(np.r_[True, np.diff(group_key[order]) != 0]) if count else np.zeros(0, np.int64)
        tails = np.r_[heads[1:], count]
        share = np.zeros(count)
        widths = length[order[tails - 1]] if count else heads  # lists grow in time: the last is the longest
        first = 0
        total = np.cumsum(widths)
        while first < len(heads):
            done = total[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(total, done + CELLS, "right")))
            groups = slice(first, last)
            width = widths[groups]
            where = np.r_[0, np.cumsum(width)]
            entry = np.repeat(start[order[heads[groups]]] - where[:-1], width) + np.arange(where[-1])
            as_of = middle[order[heads[groups]]]
            counted = np.r_[0, np.cumsum(self.interactions_at(np.repeat(as_of, width), entry_item[entry]))]
            members = order[heads[first] : tails[last - 1]]
            group = np.repeat(np.arange(last - first), tails[groups] - heads[groups])
            seen_count = counted[where[group] + length[members]] - counted[where[group]]
            base = as_of[group]
            own = 0 if self.timed else 1
            share[members] = (length[members] + seen_count - own) / (self.known[base] + self.before[base])
            first = last
        return share

    def interactions_at(self, owner: Ints, items: Ints) -> Ints:
        """As `interactions`, with the owner's own event where there are no times."""
        return self._interactions_before(items, self.time[owner] if self.timed else self.time[owner] + 1)


def past_of(interactions: pl.DataFrame, task: list[str], item: str, time: str | None, exclude_seen: bool) -> Past:
    """Number the tasks, items and times of `interactions`, which have no empty values in these columns."""
    named = [*([time] if time else []), *task, item]
    ties = [name for name, kind in interactions.schema.items() if name not in named and not kind.is_nested()]
    frame = interactions.sort(*named, *ties, maintain_order=True)
    when = frame[time].rle_id().to_numpy().astype(np.int64) if time else np.zeros(frame.height, np.int64)
    items = _codes(frame.select(item))
    count = int(items.max()) + 1 if len(items) else 0
    # first appearance in the sorted frame is first appearance in time
    first_event = np.unique(items, return_index=True)[1]
    known = np.searchsorted(when[first_event], when, "right")
    before = np.searchsorted(when, when, "left") if time else np.full(len(when), len(when) - 1, np.int64)
    return Past(frame, time is not None, exclude_seen, _codes(frame.select(task)), items, when, count, known, before)


def _codes(keys: pl.DataFrame) -> Ints:
    """`[rows]`: distinct rows numbered by first appearance."""
    distinct = keys.unique(maintain_order=True).with_row_index("\x1fcode")
    joined = keys.join(distinct, on=keys.columns, how="left", maintain_order="left")
    return joined["\x1fcode"].to_numpy().astype(np.int64)
