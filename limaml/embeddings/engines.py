"""Where jobs are done: in this process, in several on this machine, or by the actors of a Ray cluster.

    with engine(setting, "local", workers=2) as run:
        for made in run(jobs): ...

Shards come in the order in which they are done. A job whose worker dies is done again by another: it makes the same shard.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from limaml.embeddings.jobs import Job, Setting, Worker
from limaml.embeddings.shards import Made
from limaml.errors import ConfigError, LimamlError, require

__all__ = ["ONE_THREAD", "EngineName", "Run", "engine", "variables"]

EngineName = Literal["local", "ray"]

Run = Callable[[Sequence[Job], Callable[[int, int], None] | None], Iterator[Made]]
"""Does jobs. Where they are done in this process, the function is called with (tasks done, tasks of the job)."""

DEATHS = 3
"""How often workers may die before it is given up: what kills one again and again (a lack of memory) is no accident."""


ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""For processes of which there are as many as cores: each library would else take all cores in each."""

OBJECTS = 100 * 2**20
"""Bytes that a Ray started here keeps for objects: jobs and what is told of shards are small."""


CONNECT_S = 10.0


@contextmanager
def engine(
    setting: Setting, name: EngineName = "local", *, workers: int | None = None, address: str | None = None
) -> Iterator[Run]:
    """A way to do jobs, for as long as the context lasts.

    `workers`: processes on this machine (default: this one alone), or Ray actors (default: one for each GPU where the
    device is one, else for each core). `address` is that of a Ray cluster, `auto` for the one that runs on this machine;
    without it Ray is started here. `ConfigError` for what makes no sense, `MissingExtra` without Ray.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"`workers` is {workers}; set it to 1 or more.")
    if name == "ray":
        with _ray(setting, workers, address) as run:
            yield run
        return
    if address is not None:
        raise ConfigError(f"The address {address} is of a Ray cluster, but the engine is 'local'. Add --engine ray.")
    if workers is None or workers == 1:
        yield _inline(setting)
    else:
        yield _processes(replace(setting, threads=1), workers)


# --- this machine ----------------------------------------------------------------------------------------------------


def _inline(setting: Setting) -> Run:
    held: list[Worker] = []

    def run(jobs: Sequence[Job], told: Callable[[int, int], None] | None = None) -> Iterator[Made]:
        for job in jobs:
            if not held:
                held.append(Worker(setting))
            yield held[0].do(job, told)

    return run


def _processes(setting: Setting, workers: int) -> Run:
    def run(jobs: Sequence[Job], told: Callable[[int, int], None] | None = None) -> Iterator[Made]:
        left, deaths = set(jobs), 0
        while left:
            # spawned, not forked: PyTorch's threads and CUDA do not outlive a fork
            pool = ProcessPoolExecutor(min(workers, len(left)), multiprocessing.get_context("spawn"), _end_with_parent)
            try:
                with variables(ONE_THREAD):  # the processes begin with the first job
                    waited = {pool.submit(_do, setting, job): job for job in jobs if job in left}
                for future in as_completed(waited):
                    made = future.result()
                    left.discard(waited[future])
                    yield made
            except BrokenProcessPool:
                deaths += 1
                if deaths >= DEATHS:
                    raise
            finally:
                pool.shutdown(cancel_futures=True)

    return run


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment for processes that begin meanwhile; one that is set stays as it is."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


_WORKERS: dict[Setting, Worker] = {}


def _do(setting: Setting, job: Job) -> Made:
    if setting not in _WORKERS:
        _WORKERS[setting] = Worker(setting)
    return _WORKERS[setting].do(job)


def _end_with_parent() -> None:
    """A process of the pool waits for its parent for ever, even for one that was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- a Ray cluster ---------------------------------------------------------------------------------------------------


class _Actor:
    """A worker on some machine of a cluster."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._worker: Worker | None = None

    def here(self) -> int:
        return os.getpid()

    def do(self, job: Job) -> Made:
        if self._worker is None:  # not before: what goes wrong is then said of a job, in its own words
            self._worker = Worker(self._setting)
        return self._worker.do(job)


@contextmanager
def _ray(setting: Setting, workers: int | None, address: str | None) -> Iterator[Run]:
    ray: Any = require("ray", "ray")
    on_gpu = setting.device.startswith("cuda")
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"address": address}
        if address is None:
            cores = max(workers or 1, os.cpu_count() or 1)
            options = {"include_dashboard": False, "num_cpus": cores, "object_store_memory": OBJECTS}
        try:
            if address is not None and ":" in address:  # Ray itself would try for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(log_to_driver=False, logging_level="ERROR", namespace="limaml", **options)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No Ray cluster answers at {address} ({error}). Start one (ray start --head), or leave --address out."
            ) from error
    try:
        there = ray.cluster_resources()
        if on_gpu and address is None and not there.get("GPU"):
            raise ConfigError("Ray sees no GPU here. Use --device cpu, or the --address of a cluster that has some.")
        number = workers or max(1, int(there.get("GPU" if on_gpu else "CPU", 1)))
        options = {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0, "max_restarts": DEATHS, "max_task_retries": DEATHS}
        options["runtime_env"] = {"env_vars": ONE_THREAD}
        made = ray.remote(**options)(_Actor)
        actors = [made.remote(replace(setting, threads=1)) for _ in range(number)]

        def run(jobs: Sequence[Job], told: Callable[[int, int], None] | None = None) -> Iterator[Made]:
            yield from _on_actors(ray, actors, jobs)

        yield run
        for actor in actors:
            ray.kill(actor)
    finally:
        if started:
            ray.shutdown()


def _on_actors(ray: Any, actors: Sequence[Any], jobs: Sequence[Job]) -> Iterator[Made]:
    """Each actor has one job at a time, from when the cluster has found a place for it: actors that it has no room for
    yet, while it grows, keep nothing waiting."""
    left = deque(jobs)
    coming = {actor.here.remote(): actor for actor in actors}
    running: dict[Any, tuple[Any, Job]] = {}
    while left or running:
        if not coming and not running:
            raise LimamlError(
                f"All {len(actors)} workers of the Ray cluster died {DEATHS + 1} times, most likely for lack of memory; {len(left)} "
                "shards are left. Use fewer at a time (--workers), then run the same command again: what is made is kept."
            )
        (ref,), _ = ray.wait([*running, *coming], num_returns=1)
        actor, job = (coming.pop(ref), None) if ref in coming else running.pop(ref)
        try:
            found = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from None
        except ray.exceptions.RayActorError:
            left.extend([] if job is None else [job])
            continue
        if job is not None:
            yield found
        if left:
            job = left.popleft()
            running[actor.do.remote(job)] = (actor, job)
