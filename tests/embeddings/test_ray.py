"""Shards made by the actors of a Ray cluster of two nodes are those that are made here, also when an actor is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from embedding_runs import World

from limaml.embeddings.engines import engine
from limaml.embeddings.jobs import Job, Setting
from limaml.embeddings.shards import whole_shards
from limaml.embeddings.spool import Spool, plan_of
from limaml.errors import ConfigError, DataError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'limaml[ray]'")

pytestmark = pytest.mark.filterwarnings("default")  # what Ray itself warns of


@pytest.fixture(scope="module")
def address(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of two nodes with one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield patch


def test_a_cluster_makes_what_is_made_here_also_when_an_actor_is_killed(
    world: Callable[..., World], address: str
) -> None:
    one = world(tasks=("user_id", "item_id"))
    spool = Spool(one.spool)
    with spool.held():
        spool.begin(plan_of(one.log, one.trained.digest, ("user_id", "item_id"), one.folder / "side"))
        setting = Setting(
            one.log.folder,
            one.log.position,
            one.folder / "model",
            one.trained.digest,
            ("user_id", "item_id"),
            one.folder / "side",
            one.spool,
        )
        by = []
        with engine(setting, "ray", workers=2, address=address) as run:
            for made in run([Job(0, number) for number in range(4)], None):
                by.append(made.process)
                if len(by) == 1:
                    os.kill(made.process, signal.SIGKILL)  # in the middle of its next job, or as it takes it
        assert len(by) == 4 and len(set(by)) > 1
        assert len(whole_shards(spool.shards)) == 4
    made = one.publish(engine_name="ray", address=address, workers=1)
    assert made.kept == 4 and len(made.shards) == 8
    one.assert_as_in_memory()


def test_what_a_worker_refuses_is_said_in_its_own_words(world: Callable[..., World], address: str) -> None:
    one = world()
    next((one.log.folder / "data" / "bucket-0001").iterdir()).unlink()
    with pytest.raises(DataError, match=r"file .*bucket-0001.* is missing. Restore it from a copy"):
        one.publish(engine_name="ray", address=address, workers=1)
    with pytest.raises(ConfigError, match=r"No Ray cluster answers at 127\.0\.0\.1:1 "):
        one.publish(engine_name="ray", address="127.0.0.1:1")
