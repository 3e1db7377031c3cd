"""A new model beside the old one, kept fresh by the same stream, stopped half-way, killed, and in its place at last."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from faults.processes import Nursery

import limaml
from limaml.cli import main
from limaml.cli.workspace import MODEL_NAME, Workspace

from .brokers import broker
from .conftest import trained_model
from .world import World, kept, regenerated, same


@pytest.fixture(scope="session")
def new_model(made: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with another model of the same data."""
    folder = tmp_path_factory.mktemp("new") / "run"
    trained_model(made.run.parent, folder, "model.embedding_dim=6")
    return folder


def versions(world: World) -> tuple[list[str], str | None]:
    with limaml.open_store(world.run / "store") as store:
        return [version.id for version in store.versions(MODEL_NAME)], store.current(MODEL_NAME)


def of(world: World, model: Path, count: int) -> World:
    """The run folder with another model in it, to regenerate with."""
    copy = world.run.parent / f"with-{model.name}-{count}-{time.monotonic_ns()}"
    shutil.copytree(world.run, copy, ignore=shutil.ignore_patterns("model", "store", "windows"))
    shutil.copytree(model / "model", copy / "model")
    return World(copy, world.past, world.later)


def test_a_rollout_half_way_is_a_state_to_stop_in_and_goes_on(
    world: World, new_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old,), served = versions(world)
    digest = Workspace(new_model).trained.digest
    main(["rollout", str(world.run), "--model", str(new_model), "--no-activate"])
    (_, new), served = versions(world)
    assert served == old and Workspace(world.run).trained.digest != digest
    with broker("file") as server:
        server.publish(world.payloads(0, 50))
        main(["stream", str(world.run), "--source", server.address, "--once"])
    rows = world.rows_after(50)
    same(kept(world.run, version=old), regenerated(world.run, rows))
    same(kept(world.run, version=new), regenerated(of(world, new_model, 50).run, rows))
    capsys.readouterr()
    main(["rollout", str(world.run), "--model", str(new_model)])
    assert f"Version {new} of this model is there already" in capsys.readouterr().out
    assert versions(world) == ([old, new], new)
    assert Workspace(world.run).trained.digest == digest
    main(["rollout", str(world.run), "--model", str(new_model)])  # nothing is left to do
    assert versions(world) == ([old, new], new)
    main(["store", "rollback", str(world.run)])
    assert versions(world)[1] == old


def test_a_rollout_that_is_killed_under_a_stream_goes_on_and_misses_nothing(
    world: World, new_model: Path, processes: Nursery
) -> None:
    with broker("redis") as server:
        worker = processes.start("stream", world.run, "--source", server.address, "--max-batch", "10", "--log", "json")
        worker.wait_until("Reading")
        done, total = 0, world.later.height
        for pause in (0.05, 0.2, 0.4):
            rollout = processes.start("rollout", world.run, "--model", new_model, "--no-activate")
            upto = min(total, done + total // 4)
            server.publish(world.payloads(done, upto))
            done = upto
            time.sleep(pause)
            rollout.kill()
        rollout = processes.start("rollout", world.run, "--model", new_model)
        server.publish(world.payloads(done))
        assert rollout.wait().code == 0, rollout.said()
        worker.kill()
        main(["stream", str(world.run), "--source", server.address, "--once"])
    names, served = versions(world)
    assert served == names[-1]
    rows = world.rows_after(world.later.height)
    same(kept(world.run, version=served), regenerated(world.run, rows))


def test_a_rollout_of_what_does_not_fit_is_said(
    world: World, new_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, words in (
        ([str(world.run), "--model", str(tmp_path / "none")], "none"),
        ([str(new_model), "--model", str(world.run)], "has no store yet"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["rollout", *arguments])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
