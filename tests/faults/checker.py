"""What must be there against what is there. Raises `AssertionError` with every fault it finds; says what it looked at.

nothing lost          a version that was promised is served, or a newer one; every member that must be in it is
nothing mixed         each vector is the one of its count and time, by the model of its version; counts, times and features fit
no version half visible   what can be read has its record, its mark, its counts and its checksums; the rest cannot be read
counts right          as documented beside the values, as counted here
who was forgotten     is nowhere
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from .raw import COLD, Contents, Tally, Value
from .world import MODEL, TASK, World

TOLERANCE = 1e-6
FEATURES = f"{TASK}.features"


@dataclass(frozen=True)
class Bounds:
    """For each member, how many of its later clicks a version must and may know; and who was forgotten, or is about to be: the
    one is nowhere, of the other anything from `least` to `most` may be there, or nothing."""

    least: Mapping[str, int]
    most: Mapping[str, int]
    gone: Collection[str] = field(default=())
    going: Collection[str] = field(default=())


class Faults(list[str]):
    def expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.append(sentence)


def check(
    contents: Contents,
    world: World,
    *,
    least: Mapping[str, int],
    most: Mapping[str, int],
    promised: str | None,
    settled: bool = False,
    gone: Collection[str] = (),
    going: Collection[str] = (),
) -> int:
    """Compare a store with what it must hold; returns how many values were compared.

    `least`, `most`, `gone` and `going` are the `Bounds` of the served version; others may know less. `promised` is the newest
    version that a publisher said is served. `settled`: nobody was interrupted since the last `gc`, so nothing may lie about.
    """
    faults = Faults()
    current, looked_at = contents.current(MODEL), 0
    faults.expect(promised is None or (current or "") >= promised, f"{promised} was promised, {current} is served")
    pointers = contents.documents.get(f"pointers/{MODEL}", {"stack": []})
    faults.expect(
        (pointers["stack"][-1:] or [None]) == [current],
        f"{current} is served, the history ends with {pointers['stack'][-1:]}",
    )
    known = {}
    for record in contents.records():
        version, state = record["id"], record["state"]
        known[record["number"]] = record
        marked = f"ready/{record['model']}/{version}" in contents.documents
        faults.expect(marked == (state == "ready"), f"{version} is {state}, its mark says {marked}")
        faults.expect(not settled or state == "ready", f"{version} is still {state}")
        faults.expect(record["artifact"] in world.known, f"{version} is of another model")
        if state == "ready" and record["artifact"] in world.known:
            own = least if version == current else dict.fromkeys(least, 0)
            looked_at += _check_version(contents, world, record, Bounds(own, most, gone, going), faults)
    ready = [record["id"] for record in known.values() if record["state"] == "ready"]
    faults.expect(current is None or current in ready, f"{current} is served, ready are {ready}")
    faults.expect(promised is None or bool(ready), "no version can be read")
    for number, place in [*contents.values, *contents.headers]:
        faults.expect(number in known, f"version number {number} has values (place {place}) but no record")
    left_over = contents.left_over + [key for key in contents.documents if key.startswith("erase/")]
    faults.expect(not settled or not left_over, f"nothing explains {left_over}")
    assert not faults, "\n".join(faults)
    return looked_at


def _check_version(
    contents: Contents,
    world: World,
    record: dict[str, Any],
    bounds: Bounds,
    faults: Faults,
) -> int:
    version, known = record["id"], world.known[record["artifact"]]
    faults.expect(list(record["dims"]) == [TASK, FEATURES], f"{version} has task types {list(record['dims'])}")
    by_type = []
    for place, name in enumerate(record["dims"]):
        values = dict(contents.values.get((record["number"], place), {}))
        _check_tally(contents, record, place, name, values, faults)
        faults.expect(COLD in values, f"{version} has no cold embedding of {name}")
        cold = values.pop(COLD, None)
        if name == TASK and cold is not None:
            faults.expect(_same(cold.vector, known.cold), f"the cold embedding of {version} is another one")
        by_type.append(values)
    vectors, features = by_type
    for member in world.members:
        if member in bounds.gone:
            there = member in vectors or member in features
            faults.expect(not there, f"{version} has {member}, who was forgotten")
            continue
        states = known.states[member][bounds.least[member] : bounds.most[member] + 1]
        expected = {(state.count, state.newest): state.vector for state in states if state is not None}
        value = vectors.get(member)
        if value is None:
            faults.expect(None in states or member in bounds.going, f"{version} has lost {member}")
            continue
        vector = expected.get((value.count, value.newest))
        if vector is None:
            faults.append(
                f"{version} knows {member} from {value.count} clicks up to {value.newest}; possible were {sorted(expected)}"
            )
        elif not _same(value.vector, vector):
            off = np.abs(value.vector - vector).max() if len(value.vector) == len(vector) else np.inf
            faults.append(
                f"{version} has for {member} the count of {value.count} clicks and a vector that is off by {off:g}"
            )
        own = features.get(member)
        if own is None:
            faults.expect(member in bounds.going, f"{version} has lost the features of {member}")
        else:
            faults.expect(_same(own.vector, known.features[member]), f"{version} has wrong features for {member}")
            faults.expect(own.count >= value.count, f"{version} has a newer vector than features for {member}")
    strangers = (set(vectors) | set(features)) - set(world.members)
    faults.expect(not strangers, f"{version} has strangers: {sorted(strangers)}")
    return len(vectors) + len(features)


def _check_tally(
    contents: Contents, record: dict[str, Any], place: int, name: str, values: Mapping[str, Value], faults: Faults
) -> None:
    version = record["id"]
    said = contents.headers.get((record["number"], place))
    if said is None:
        totals = contents.documents.get(f"totals/{record['model']}/{version}", {"types": {}})
        said = Tally(**{key: told for key, told in totals["types"].get(name, {}).items() if key != "runs"})
    own = [value for member, value in values.items() if member != COLD]
    cold = values[COLD].check if COLD in values else None
    found = Tally(len(own), sum(value.check for value in own), sum(value.bytes for value in values.values()), cold)
    faults.expect(said == found, f"{version} says {said} of {name}, and has {found}")
    dims = {len(value.vector) for value in values.values()}
    faults.expect(dims <= {record["dims"][name]}, f"{version} has vectors of {dims} numbers in {name}")


def _same(found: Any, expected: Any) -> bool:
    return bool(found.shape == expected.shape and np.allclose(found, expected, rtol=0, atol=TOLERANCE))


def check_log(
    folder: Path,
    world: World,
    sure: pl.DataFrame,
    maybe: pl.DataFrame | None = None,
    *,
    parts: bool = False,
    gone: Collection[str] = (),
    going: Collection[str] = (),
) -> pl.DataFrame:
    """The later clicks in a log, read by its manifest alone: the past and all of `sure`, each once; `maybe` whole or not at all,
    or, with `parts`, any of it. Of members who are `gone`, no row; of those who are `going`, any rows of theirs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    columns = world.past.columns
    frames = [pl.read_parquet(folder / file["path"]).select(columns) for file in manifest["files"]]
    whole = pl.concat(frames)
    away = pl.col(TASK).cast(pl.String).is_in([*gone, *going]) if gone or going else pl.lit(False)
    theirs = whole.filter(away)
    remains = theirs.filter(pl.col(TASK).cast(pl.String).is_in(list(gone))) if gone else theirs.head(0)
    assert remains.is_empty(), f"the log has {len(remains)} rows of who was forgotten, such as {remains.row(0)}"
    sent = pl.concat([frame.select(columns) for frame in (world.past, sure, maybe) if frame is not None])
    extra = list((Counter(theirs.iter_rows()) - Counter(sent.iter_rows())).elements())
    assert not extra, f"the log has {len(extra)} rows that nobody sent, such as {extra[0]}"
    there = _the_others(
        whole.filter(~away),
        world.past.filter(~away),
        sure.filter(~away),
        None if maybe is None else maybe.filter(~away),
        parts,
    )
    return pl.concat([there, theirs.join(world.later, on=columns, how="semi", maintain_order="left")])


def _the_others(
    whole: pl.DataFrame, past: pl.DataFrame, sure: pl.DataFrame, maybe: pl.DataFrame | None, parts: bool
) -> pl.DataFrame:
    columns = past.columns
    found = Counter(whole.iter_rows())
    without = Counter(past.iter_rows()) + Counter(sure.select(columns).iter_rows())
    if found == without:
        return sure
    assert maybe is not None, _difference(found, without)
    more = Counter(maybe.select(columns).iter_rows())
    if parts:
        assert not without - found and not found - without - more, _difference(found, without + more)
        came = [row in found for row in maybe.select(columns).iter_rows()]
        return pl.concat([sure, maybe.filter(pl.Series(came))])
    assert found == without + more, _difference(found, without)
    return pl.concat([sure, maybe])


def _difference(found: Counter[Any], expected: Counter[Any]) -> str:
    lost, extra = list((expected - found).elements()), list((found - expected).elements())
    return f"the log has lost {len(lost)} rows {lost[:3]}, and has {len(extra)} too many {extra[:3]}"
