"""A member sees one version; a share is what it says; a shadow never delays an answer."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limaml.errors import ConfigError
from limaml.serving.questions import SHADOWED, Answer, Question, Share
from limaml.serving.scoring import Asked
from limaml.serving.tensors import Refused
from limaml.serving.traffic import Shadow, Split, parse_split

KEYS = [str(key) for key in range(20_000)]


def test_shares_are_what_they_say_and_versions_get_different_members() -> None:
    split = parse_split(["v2=0.1", "v3=0.25"])
    seen = [split.of([key]) for key in KEYS]
    for version, share in (("v2", 0.1), ("v3", 0.25), (None, 0.65)):
        off = sum(found == version for found in seen) - share * len(KEYS)
        assert abs(off) < 5 * (len(KEYS) * share * (1 - share)) ** 0.5


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_raising_a_share_moves_members_to_it_alone(one: float, more: float) -> None:
    before, after = Split((("v2", min(one, more)),)), Split((("v2", max(one, more)),))
    for key in KEYS[:300]:
        assert before.of([key]) is None or after.of([key]) == "v2"


def test_members_are_where_they_were_in_an_earlier_release() -> None:
    """The hash is part of what is promised: a new release must not move members."""
    split = parse_split(["v2=0.5"])
    assert "".join("x" if split.of([key]) else "." for key in KEYS[:40]) == PINNED


PINNED = "x.x.xx..x.xx.xxxx.xx...xx..xx.x.xxx..xxx"


@given(st.lists(st.sampled_from(KEYS[:50]), min_size=1, max_size=4))
def test_a_request_for_members_of_both_sides_gets_the_current_version(keys: list[str]) -> None:
    split = parse_split(["v2=0.5"])
    sides = {split.of([key]) for key in keys}
    assert split.of(keys) == (sides.pop() if len(sides) == 1 else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["v2"], "--split v2 is no version and its share"),
        (["=0.1"], "--split =0.1 is no version"),
        (["v2=much"], "Write --split VERSION=0.1"),
        (["v2=0"], "above 0"),
        (["v2=nan"], "above 0"),
        (["v2=1.5"], "at most 1"),
        (["v2=0.1", "v2=0.2"], "twice"),
        (["v2=0.6", "v3=0.6"], "add up to 1.2"),
    ],
)
def test_splits_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_split(options)


def answer(version: str, *logits: float, **more: bool) -> Answer:
    values = np.array(logits, np.float32)[:, None]
    return Answer(version, values, values, Asked(len(logits), {}, {}, {}), Share({}, 0, ()), **more)


QUESTION = Question({}, 1, id="r1", parameters={"mood": "good"})


class Seen:
    """What a shadow reports."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.differences: list[float] = []

    def __call__(self, outcome: str, differences: np.ndarray) -> None:
        self.outcomes.append(outcome)
        self.differences += differences.tolist()


def test_a_shadow_scores_the_same_question_with_the_other_version() -> None:
    asked: list[Question] = []

    async def again(question: Question) -> Answer:
        asked.append(question)
        return answer("v2", 0.5, 0.5)

    async def main() -> None:
        shadow = Shadow("v2", again, seen)
        shadow.after(QUESTION, answer("v1", 0.5, 0.25))
        shadow.after(QUESTION, answer("v2", 0.5, 0.5))  # a request that was pinned to it, or its own
        shadow.after(QUESTION, answer("v1", 0.5, 0.5, sampled=True))  # no two draws are alike
        shadow.after(QUESTION, answer("v1", 0.5, 0.5, store_down=True))
        await asyncio.sleep(0.05)
        await shadow.close()

    seen = Seen()
    asyncio.run(main())
    assert [(one.version, one.id, one.parameters) for one in asked] == [("v2", "r1", {"mood": "good", SHADOWED: True})]
    assert (seen.outcomes, seen.differences) == (["scored"], [0.0, 0.25])


def test_a_shadow_waits_until_nothing_is_busy_and_gives_up_what_waits_too_long() -> None:
    state = {"busy": True}
    started: list[str] = []

    async def again(question: Question) -> Answer:
        started.append("begun")
        return answer("v2", 1.0)

    async def main() -> None:
        shadow = Shadow("v2", again, seen, busy=lambda: state["busy"], most=3, patience=0.3)
        for _ in range(5):
            shadow.after(QUESTION, answer("v1", 1.0))  # returns at once, whatever the other version does
        await asyncio.sleep(0.05)
        assert started == [] and seen.outcomes == ["dropped", "dropped"]
        await asyncio.sleep(0.5)
        assert started == [] and seen.outcomes == ["dropped"] * 5
        state["busy"] = False
        shadow.after(QUESTION, answer("v1", 1.0))
        await asyncio.sleep(0.05)
        await shadow.close()

    seen = Seen()
    asyncio.run(main())
    assert started == ["begun"] and seen.outcomes == ["dropped"] * 5 + ["scored"]


@pytest.mark.parametrize(
    "outcome", [Refused(404, "There is no such version."), RuntimeError("a bug"), answer("v2", 1.0, 2.0)]
)
def test_a_shadow_that_fails_is_counted(outcome: Exception | Answer) -> None:
    async def again(question: Question) -> Answer:
        if isinstance(outcome, Exception):
            raise outcome
        return Answer("v2", np.zeros((1, 2), np.float32), outcome.predictions, outcome.known, outcome.asked, {})

    async def main() -> None:
        shadow = Shadow("v2", again, seen)
        shadow.after(QUESTION, answer("v1", 1.0))
        await asyncio.sleep(0.05)
        await shadow.close()

    seen = Seen()
    asyncio.run(main())
    assert seen.outcomes == ["failed"]
