"""A message that has no row is kept once, with the reason, until it is replayed, dropped or forgotten."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import polars as pl
import pytest

from limaml.errors import DataError
from limaml.interactions import InteractionLog
from limaml.interactions.schema import Schema
from limaml.stream.dead_letters import DeadLetter, DeadLetters, mentions
from limaml.stream.decode import Decoder

SCHEMA = Schema.model_validate({"tasks": ["user_id"], "labels": ["click"], "time": "at"})
TYPES = {"user_id": pl.Int64(), "at": pl.Int64(), "click": pl.Int8()}


def letter(position: int, payload: bytes = b"x", source: str = "kafka:clicks") -> DeadLetter:
    return DeadLetter(source, "3", position, payload, "The message is no JSON. Send a JSON object.", 12.5)


def event(user: object, at: object = 5) -> bytes:
    return json.dumps({"user_id": user, "at": at, "click": 1}).encode()


@pytest.fixture
def letters(tmp_path: Path) -> DeadLetters:
    return DeadLetters(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> InteractionLog:
    made = InteractionLog(tmp_path / "log", ["user_id"])
    made.append(pl.DataFrame({"user_id": [1], "at": [1], "click": [0]}, schema=TYPES))
    return made


def test_a_letter_is_there_once_for_a_position(letters: DeadLetters) -> None:
    assert letters.count() == 0 and not letters.list() and not letters.path.exists()
    assert letters.put([letter(1), letter(2)]) == 2
    assert letters.put([letter(2, b"another"), letter(3), letter(2, source="kafka:views")]) == 2
    assert [each.id for each in letters.list()] == [
        "kafka:clicks:3@1",
        "kafka:clicks:3@2",
        "kafka:clicks:3@3",
        "kafka:views:3@2",
    ]
    kept = letters.get("kafka:clicks:3@2")
    assert (kept.payload, kept.time, kept.reason) == (b"x", 12.5, letter(2).reason)
    assert datetime.datetime.fromisoformat(kept.at).tzinfo is not None
    assert [each.position for each in letters.list(source="kafka:clicks", limit=2)] == [1, 2]


def test_positions_of_128_bits_keep_their_order(letters: DeadLetters) -> None:
    positions = [5, 1 << 63, (1 << 127) + 1, 1 << 127]
    letters.put([letter(position) for position in positions])
    assert [each.position for each in letters.list()] == sorted(positions)
    assert letters.get(letter(1 << 127).id).position == 1 << 127


def test_what_has_a_row_now_is_replayed_and_the_rest_stays_with_its_new_reason(
    letters: DeadLetters, log: InteractionLog
) -> None:
    letters.put([letter(1, event(7)), letter(2, b"{"), letter(3, event(8))])
    decoder = Decoder(TYPES, SCHEMA)
    assert letters.replay(decoder, log, ["kafka:clicks:3@1"]).taken == 1
    done = letters.replay(decoder, log)
    assert (done.taken, done.kept) == (1, 1)
    assert sorted(log.read()["user_id"]) == [1, 7, 8]
    (left,) = letters.list()
    assert left.position == 2 and "no JSON (" in left.reason
    assert letters.replay(decoder, log) == type(done)(0, 1)


@pytest.mark.parametrize("moment", ["before the log has them", "after the log has them"])
def test_a_replay_that_was_interrupted_is_completed_once(
    letters: DeadLetters, log: InteractionLog, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters.put([letter(1, event(7)), letter(2, event(8))])
    append = InteractionLog.append

    def interrupted(self: InteractionLog, *given: object, **options: object) -> None:
        if moment.startswith("after"):
            append(self, *given, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InteractionLog, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            letters.replay(Decoder(TYPES, SCHEMA), log)
    letters.put([letter(3, event(9))])
    letters.replay(Decoder(TYPES, SCHEMA), log)
    assert sorted(log.read()["user_id"]) == [1, 7, 8, 9]
    assert letters.count() == 0


def test_letters_of_a_task_are_forgotten_and_leave_no_bytes(letters: DeadLetters) -> None:
    secret = b"a secret of 42 that was sent broken"
    letters.put([letter(1, event(42, at="x")), letter(2, event(421, at="x")), letter(3, secret), letter(4, b"of 420")])
    assert letters.forget(["user_id"], ["42"]) == 2
    assert [each.position for each in letters.list()] == [2, 4]
    assert b"secret" not in letters.path.read_bytes()


@pytest.mark.parametrize(
    ("payload", "columns", "mentioned"),
    [
        (b'{"user_id": 42}', ["user_id"], True),
        (b'{"user_id": "42"}', ["user_id"], True),
        (b'{"user_id": 42.0}', ["user_id"], True),
        (b'{"user_id": 7, "item_id": 42}', ["user_id"], False),
        (b'{"userid": 42}', ["user_id"], True),
        (b'{"user_id": null, "x": "42"}', ["user_id"], True),
        (b"\xff 42 \xff", ["user_id"], True),
        (b"\xff 142 \xff", ["user_id"], False),
        (b'{"site": "a", "user": 42}', ["site", "user"], False),
    ],
)
def test_whose_a_message_is(payload: bytes, columns: list[str], mentioned: bool) -> None:
    keys = ["42"] if len(columns) == 1 else ["b|42"]
    assert mentions(payload, columns, keys) is mentioned


def test_mistakes_are_answered_by_a_sentence(letters: DeadLetters, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dead letter's id"):
        letters.get("nonsense")
    letters.put([letter(1)])
    with pytest.raises(DataError, match="There is no dead letter 'kafka:clicks:3@9'"):
        letters.get("kafka:clicks:3@9")
    letters.path.write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(DataError, match="cannot be read"):
        letters.put([letter(1)])
