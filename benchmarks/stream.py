"""What `limaml stream` takes in: `python -m benchmarks.stream`. Real brokers on loopback, an LMDB store, supports of 32.

The worker is a process on one core (`--core`), where the system allows before everybody else but the broker and whoever publishes. First it drains events
that are waiting, each of another member within a batch: touched tasks a second. Then events come at half that rate: the
time from the broker's stamp on an event to the moment at which a version has it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.refresh import events, many_members, trained_run
from limaml.cli.stream import decoder_for, fresh_of
from limaml.cli.workspace import Workspace
from limaml.stream.dead_letters import DeadLetters
from limaml.stream.observer import BatchDone
from limaml.stream.url import open_source
from limaml.stream.worker import Pace, Worker

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


class Record:
    """Batches and delays, until there were `events` of them."""

    def __init__(self, events: int, stop: threading.Event) -> None:
        self._events, self._stop = events, stop
        self.batches: list[dict[str, float]] = []
        self.delays: list[float] = []

    def batch(self, done: BatchDone) -> None:
        row = {"at": time.perf_counter(), "busy": time.process_time(), "events": done.events, "tasks": done.fresh.tasks}
        self.batches.append({**row, "dead": done.dead, **done.seconds})
        self.delays += done.delays
        self._events -= done.events
        if self._events <= 0:
            self._stop.set()

    def lag(self, source: str, lags: Mapping[str, int | None]) -> None: ...

    def up(self, what: str, is_up: bool) -> None: ...

    def say(self, level: str, sentence: str, **fields: object) -> None:
        print(level, sentence, file=sys.stderr)


def work(run: Path, address: str, count: int, max_batch: int, out: Path, core: int) -> None:
    """The worker's process: what the command line makes, with `Record` to listen."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, PermissionError):
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
    place, stop = Workspace(run), threading.Event()
    record = Record(count, stop)
    with place.store() as store, place.refresher(store) as refresher:
        refresher.run()
        worker = Worker(
            [open_source(address, "bench")],
            decoder_for(place, refresher, max_ahead=300.0, epoch="s"),
            place.log(place.schema),
            DeadLetters(run),
            lambda: fresh_of(refresher.run()),
            record,
            pace=Pace(max_batch=max_batch),
            stop=stop,
        )
        print("ready", flush=True)
        worker.run()
    out.write_text(json.dumps({"batches": record.batches, "delays": record.delays}))


@contextlib.contextmanager
def working(
    run: Path, address: str, count: int, given: argparse.Namespace, out: Path
) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.stream",
        "--work",
        str(run),
        address,
        str(count),
        str(given.batch),
        str(out),
        str(given.core),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        yield process
    finally:
        if process.wait(600):
            raise SystemExit(f"the worker ended with {process.returncode}")


def payloads(members: int, batches: int, batch: int, start: int, rng: np.random.Generator) -> list[bytes]:
    """Events of `batches` times `batch` different members, in order of time."""
    rows = [
        events(rng.choice(members, batch, replace=False), start + number * batch, rng).to_dicts()
        for number in range(batches)
    ]
    return [json.dumps(row).encode() for some in rows for row in some]


def saturated(run: Path, server: Any, waiting: Sequence[bytes], given: argparse.Namespace, out: Path) -> dict[str, Any]:
    server.publish(waiting)
    with working(run, server.address, len(waiting), given, out):
        pass
    batches = json.loads(out.read_text())["batches"]
    first, counted = batches[2], batches[3:]
    tasks, events = (sum(batch[name] for batch in counted) for name in ("tasks", "events"))
    seconds, busy = batches[-1]["at"] - first["at"], batches[-1]["busy"] - first["busy"]
    stages = {name: 1e6 * sum(batch[name] for batch in counted) / events for name in ("append", "refresh", "commit")}
    return {
        "events": events,
        "tasks": tasks,
        "dead": sum(batch["dead"] for batch in batches),
        "tasks_per_second": tasks / seconds,
        "tasks_per_second_of_processor": tasks / busy,
        "microseconds_per_event": {**stages, "fetch and the rest": 1e6 * seconds / events - sum(stages.values())},
    }


def half_loaded(
    run: Path, server: Any, coming: Sequence[bytes], rate: float, given: argparse.Namespace, out: Path
) -> dict[str, Any]:
    with working(run, server.address, len(coming), given, out):
        server.publish(coming[:1])
        begun, sent = time.monotonic(), 1
        while sent < len(coming):
            due = min(len(coming), int((time.monotonic() - begun) * rate) + 1)
            if due > sent:
                server.publish(coming[sent:due])
                sent = due
            time.sleep(0.02)
        published = len(coming) / (time.monotonic() - begun)
    found = json.loads(out.read_text())
    delays = np.array(found["delays"][len(coming) // 10 :])
    return {
        "asked_rate": rate,
        "published_rate": published,
        "events": len(coming),
        "batches": len(found["batches"]),
        "p50_s": float(np.quantile(delays, 0.5)),
        "p99_s": float(np.quantile(delays, 0.99)),
        "longest_s": float(delays.max()),
        "slowest_batch": max(found["batches"], key=lambda batch: batch["append"] + batch["refresh"] + batch["commit"]),
    }


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        run, address, count, max_batch, out, core = sys.argv[2:]
        work(Path(run), address, int(count), int(max_batch), Path(out), int(core))
        return
    from stream.brokers import broker

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=1000, help="events at a time")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the half-loaded part")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="that the worker runs on")
    parser.add_argument("--solver", choices=("newton", "gradient"), default="newton")
    parser.add_argument("--brokers", nargs="+", default=["redis", "kafka", "nats"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stream.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = trained_run(folder, given.solver)
        many_members(place, folder, given.members, rng)
        with place.store() as store, place.refresher(store) as refresher:
            refresher.run()
        with contextlib.suppress(OSError, PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(6))
        start = 10**6
        for kind in given.brokers:
            with broker(kind) as server:
                waiting = payloads(given.members, given.batches, given.batch, start, rng)
                start += len(waiting)
                full = saturated(place.folder, server, waiting, given, folder / "out.json")
                rate = full["tasks_per_second"] / 2
                coming = payloads(
                    given.members, max(1, round(rate * given.seconds / given.batch)), given.batch, start, rng
                )
                start += len(coming)
                half = half_loaded(place.folder, server, coming, rate, given, folder / "out.json")
            results[kind] = {
                "solver": given.solver,
                "members": given.members,
                "batch": given.batch,
                "saturated": full,
                "half_loaded": half,
            }
            stages = ", ".join(f"{name} {took:.0f}" for name, took in full["microseconds_per_event"].items())
            print(
                f"{kind}: {full['tasks_per_second']:,.0f} tasks a second ({full['tasks_per_second_of_processor']:,.0f} of processor "
                f"time); µs an event: {stages}. At {half['published_rate']:,.0f} events a second, event to servable: "
                f"p50 {half['p50_s']:.3f} s, p99 {half['p99_s']:.3f} s, longest {half['longest_s']:.3f} s."
            )
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
