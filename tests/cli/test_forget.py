"""A member who asks to be forgotten leaves every place, and no replay brings the member back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from commands import SMALL, Command, Tables

import limaml
from limaml.cli import main
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.stream.dead_letters import DeadLetter, DeadLetters

MEMBER = 12


@pytest.fixture(scope="module")
def trained(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model also knows members by their id, published, and refreshed once."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    options = ["train", str(tables.past), *tables.options, "--out", str(folder), *SMALL, "train.epochs=1", "--no-refit"]
    main(options)
    schema = json.loads((folder / "schema.json").read_text())
    schema["features"].append({"name": "who", "kind": "categorical", "column": "user_id", "side": "row"})
    (folder.parent / "schema.json").write_text(json.dumps(schema))
    shutil.rmtree(folder)
    main([*options, "--schema", str(folder.parent / "schema.json")])
    main(["embed", str(folder)])
    main(["refresh", str(folder), str(tables.new), "--task-features", str(tables.folder / "new_users.csv")])
    place = DeadLetters(folder)
    place.put(
        [
            DeadLetter("file", "0", number, json.dumps({"user_id": user, "item_id": "?"}).encode(), "It is refused.")
            for number, user in enumerate([MEMBER, MEMBER + 1])
        ]
    )
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def places(run: Path, key: str) -> dict[str, int]:
    """How much each place knows of a member."""
    place = Workspace(run)
    number = pl.col("user_id").cast(pl.String) == key
    with place.store() as store:
        versions = [version.id for version in store.versions(MODEL_NAME) if version.state == "ready"]
        vectors = 0
        for version in versions:
            with store.read(MODEL_NAME, version) as reader:
                vectors += sum(int(reader.get(kind, [key]).found[0]) for kind in reader.dims)
    with place.windows() as windows:
        windows.catch_up()
        held = int(windows.read("user_id", [key]).count[0])
    codec = place.trained.encoder.codecs["who"]
    return {
        "vectors": vectors,
        "window": held,
        "log": place.log(place.schema).read().filter(number).height,
        "letters": sum(key in letter.payload.decode() for letter in DeadLetters(run).list()),
        "side": pl.concat([pl.read_parquet(p).select("user_id").filter(number) for p in _user_tables(run)]).height,
        "vocabulary": sum(str(value) == key for value in codec.values),  # type: ignore[union-attr]
    }


def _user_tables(run: Path) -> list[Path]:
    files = json.loads((run / "side" / "tables.json").read_text())
    return [run / "side" / files["user_id"]]


def test_a_forgotten_member_leaves_every_place(run: Path, tables: Tables, command: Command, tmp_path: Path) -> None:
    before, others = places(run, str(MEMBER)), places(run, str(MEMBER + 1))
    assert all(before.values()), before
    weights = limaml.load_model(run / "model").model.state_dict()
    done = command("store", "forget", run, "--task", f"user_id:{MEMBER}")
    assert done.code == 0, done.err
    assert not any(places(run, str(MEMBER)).values())
    assert places(run, str(MEMBER + 1)) == others
    assert "2 vectors left version v000001" in done.out
    for sentence in (
        "1 window was removed",
        f"{before['log']} interactions left the log",
        "1 dead letter was removed",
        "1 row left the side tables",
        "1 id left the vocabulary and the tables of feature 'who'",
        "Publish the new one",
    ):
        assert sentence in done.out, done.out
    model = limaml.load_model(run / "model")
    changed = {n: int((v != weights[n]).any(-1).sum()) for n, v in model.model.state_dict().items()}
    assert sum(changed.values()) == sum(n.endswith("table.weight") and c > 0 for n, c in changed.items()) > 0

    again = command("store", "forget", run, "--task", str(MEMBER))
    assert again.code == 0
    assert "No version held a vector" in again.out and "0 interactions left the log" in again.out

    # neither the same file, nor another one with the member's rows, nor publishing anew brings the member back
    assert command("refresh", run, tables.new).code == 0
    rows = pl.read_csv(tables.new).filter(pl.col("user_id") != 11).tail(3)
    rows.with_columns(user_id=pl.lit(MEMBER, pl.Int64), timestamp=pl.col("timestamp") + 500).vstack(
        rows.with_columns(timestamp=pl.col("timestamp") + 500)
    ).write_csv(tmp_path / "more.csv")
    replayed = command("refresh", run, tmp_path / "more.csv")
    assert replayed.code == 0, replayed.err
    assert "3 of the interactions are of forgotten tasks" in replayed.out
    assert command("embed", run, "--keep", 1).code == 0
    assert not any(places(run, str(MEMBER)).values())

    back = command("store", "recall", run, "--task", str(MEMBER))
    assert "1 of 1 'user_id' were forgotten" in back.out
    rows.with_columns(user_id=pl.lit(MEMBER, pl.Int64), timestamp=pl.col("timestamp") + 900).write_csv(
        tmp_path / "back.csv"
    )
    assert command("refresh", run, tmp_path / "back.csv").code == 0
    found = places(run, str(MEMBER))
    assert (found["vectors"], found["window"], found["log"]) == (2, 3, 3)


@pytest.mark.parametrize(
    "step",
    [
        "limaml.store.lmdb.LmdbStore.forget",
        "limaml.embeddings.windows.Windows.forget",
        "limaml.interactions.log.InteractionLog.forget",
        "limaml.stream.dead_letters.DeadLetters.forget",
        "limaml.cli.workspace.Workspace.forget_features",
        "limaml.cli.forget.scrub_model",
    ],
)
def test_forgetting_that_was_interrupted_is_completed(
    run: Path, tables: Tables, command: Command, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        assert command("store", "forget", run, "--task", str(MEMBER)).code == 130
    new = (
        pl.read_csv(tables.new)
        .tail(1)
        .with_columns(user_id=pl.lit(MEMBER, pl.Int64), timestamp=pl.col("timestamp") + 77)
    )
    new.write_csv(run / "between.csv")
    assert "are of forgotten tasks" in command("refresh", run, run / "between.csv").out  # as the tombstones came first
    assert command("store", "forget", run, "--task", str(MEMBER)).code == 0
    assert not any(places(run, str(MEMBER)).values())
