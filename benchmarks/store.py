"""The stores beside the bare writes and reads of the same bytes, and beside Feast, in one run:

    python -m benchmarks.store [--tasks 1000000] [--dim 32] [--repeats 5] [--calls 2000] [--redis-tasks 1000000]
                               [--feast-tasks 100000] [--out benchmarks/results/store.json] [--page docs/store-benchmark.md]

Bare LMDB is `putmulti(append=True)` of the same keys and values, sorted and made beforehand, in one transaction that is synced, the
faster of two (the first one has its memory still to get from the system); ours
is `put`, read back and verified, committed and flipped. Bare Redis is `SET` and `MGET` of the same, pipelined. Feast runs in an
environment of its own that this makes (`--feast-tasks 0` leaves it out).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from limaml.evaluate.machine import processor_name
from limaml.store import Store, open_store
from limaml.store.batch import Layout, prepare
from tests.store.servers import cluster, redis, valkey

ROOT = Path(__file__).parent.parent
ASKED = (1, 100)


class Data:
    def __init__(self, tasks: int, dim: int) -> None:
        rng = np.random.default_rng(0)
        self.ids = [f"member-{number:09d}" for number in range(tasks)]
        self.vectors = rng.normal(size=(tasks, dim)).astype(np.float32)
        self.one = np.ones(tasks, np.int64)
        self.dim = dim

    def pairs(self, dtype: str) -> list[tuple[bytes, bytes]]:
        """Keys and values as the store packs them, sorted, and in the order in which they lie in memory."""
        layout = Layout("m", "v", "member", self.dim, dtype, b"\0\0\0\1\0\0")
        batch = prepare(layout, self.ids, self.vectors, self.one, self.one)
        return [
            (key[:1] + key[1:], value[:1] + value[1:])
            for key, value in sorted(zip(batch.names, batch.values, strict=True))
        ]


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    finally:
        gc.enable()


def latency(ids: list[str], calls: int, look_up: Callable[[list[str]], Any]) -> dict[str, float]:
    rng, found = np.random.default_rng(1), {}
    for asked in ASKED:
        times = []
        for _ in range(calls):
            some = [ids[row] for row in rng.integers(0, len(ids), asked)]
            begun = time.perf_counter()
            look_up(some)
            times.append(time.perf_counter() - begun)
        found |= {
            f"get{asked}_{name}": float(np.quantile(times, share)) for name, share in (("p50", 0.5), ("p99", 0.99))
        }
    return found


def publish(store: Store, data: Data, dtype: str = "float32") -> str:
    with store.publish("m", dims={"member": data.dim}, dtype=dtype) as publication:
        publication.put("member", data.ids, data.vectors, data.one, data.one)
        return publication.commit(expected={"member": len(data.ids)}).version


def upserts(store: Store, version: str, data: Data, calls: int) -> float:
    rng, times = np.random.default_rng(2), []
    for call in range(calls):
        some = [data.ids[row] for row in rng.choice(len(data.ids), 100, replace=False)]
        begun = time.perf_counter()
        store.upsert("m", version, "member", some, data.vectors[:100], data.one[:100] + call + 1, data.one[:100])
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def on_lmdb(data: Data, dtype: str, repeats: int, calls: int) -> dict[str, Any]:
    pairs = data.pairs(dtype)
    bare, ours, ratios = [], [], []
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bare"
            with lmdb.open(str(path), map_size=2**40) as environment:

                def write(environment: Any = environment) -> None:
                    with environment.begin(write=True) as txn, txn.cursor() as cursor:
                        cursor.putmulti(pairs, append=True)

                bare.append(seconds(write))
                with lmdb.open(
                    str(path) + "again", map_size=2**40
                ) as other:  # with memory that the process has already
                    bare.append(seconds(lambda other=other: write(other)))
                with open_store(Path(folder) / "store") as store:
                    ours.append(seconds(lambda store=store: publish(store, data, dtype)))
                    ratios.append(min(bare[-2:]) / ours[-1])
                    if number < repeats - 1:
                        continue
                    keys = dict(zip(sorted(data.ids), (key for key, _ in pairs), strict=True))

                    def read(some: list[str], environment: Any = environment) -> None:
                        with environment.begin() as txn:
                            [txn.get(keys[each]) for each in some]  # noqa: B023

                    found = {
                        "bare": latency(data.ids, calls, read),
                        "ours": latency(data.ids, calls, lambda some: store.get("m", "member", some)),
                    }
                    estimate = store.estimate({"member": len(data.ids)}, {"member": data.dim}, dtype).bytes
                    found["ours"]["estimate"] = estimate / store.size().bytes
                    found["ours"]["upsert100"] = upserts(store, store.current("m") or "", data, min(calls, 200))
                    after = latency(data.ids, calls, lambda some: store.get("m", "member", some))
                    found["ours"] |= {f"upserted_{name}": value for name, value in after.items()}
    n = len(data.ids)
    found["bare"]["publish_rate"], found["ours"]["publish_rate"] = (
        n / float(np.median(bare)),
        n / float(np.median(ours)),
    )
    best = min(bare) / min(ours)
    return found | {"publish_ratio": float(np.median(ratios)), "publish_ratios": sorted(ratios), "best_ratio": best}


def on_redis(data: Data, where: str, port: int | None, repeats: int, calls: int) -> dict[str, Any]:
    """`port`: of one server, to compare with the bare commands."""
    bare: dict[str, float] = {}
    ours, ratios = [], []
    with open_store(where) as store:
        for number in range(repeats):
            if port is not None:
                with redis.Redis(port=port) as client:
                    bare_seconds = _bare_redis(client, data, bare, calls if number == repeats - 1 else 0)
                    ours.append(seconds(lambda: publish(store, data)))
                    ratios.append(bare_seconds / ours[-1])
            else:
                ours.append(seconds(lambda: publish(store, data)))
            store.expire("m", keep=1)
        found = latency(data.ids, calls, lambda some: store.get("m", "member", some))
        found["publish_rate"] = len(data.ids) / float(np.median(ours))
        found["upsert100"] = upserts(store, store.current("m") or "", data, min(calls, 200))
    result: dict[str, Any] = {"ours": found}
    return result | ({"bare": bare, "publish_ratio": float(np.median(ratios))} if ratios else {})


def _bare_redis(client: Any, data: Data, found: dict[str, float], calls: int) -> float:
    """Seconds of pipelined `SET`; fills `found`; leaves the server as it was."""
    pairs = data.pairs("float32")
    parts = [pairs[start : start + 4096] for start in range(0, len(pairs), 4096)]

    def write() -> None:
        for part in parts:
            pipeline = client.pipeline(transaction=False)
            for key, value in part:
                pipeline.set(key, value)
            pipeline.execute()

    taken = seconds(write)
    found["publish_rate"] = max(found.get("publish_rate", 0.0), len(data.ids) / taken)
    if calls:
        keys = dict(zip(data.ids, (key for key, _ in pairs), strict=True))
        found |= latency(data.ids, calls, lambda some: client.mget([keys[each] for each in some]))
    for part in parts:
        client.unlink(*(key for key, _ in part))
    return taken


def with_feast(tasks: int, dim: int, calls: int) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = folder / "environment" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "feast[redis]"], check=True)
        script = [str(python), str(ROOT / "benchmarks" / "store_feast.py")]
        quiet = {**os.environ, "FEAST_USAGE": "False", "PYTHONWARNINGS": "ignore"}
        with valkey("--appendonly", "no") as server:
            for name, more in (("sqlite", []), ("redis", [str(server.port)])):
                command = [*script, str(folder / name), str(tasks), str(dim), str(calls), *more]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
                found[name] = json.loads(done.stdout.splitlines()[-1])
        listed = subprocess.run(
            [str(python), "-c", "from importlib.metadata import version as v; print(v('feast'))"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found["version"] = listed.stdout.strip()
    return found


def page(found: dict[str, Any]) -> str:
    def microseconds(row: dict[str, Any], name: str) -> str:
        return f"{row[name] * 1e6:,.0f}" if name in row else ""

    lines = [
        "# The store beside bare writes, bare reads and Feast",
        "",
        f"`{found['command']}`, {found['machine']}. Vectors of {found['dim']} numbers. Times in µs. A ratio compares two things of",
        "the same run, one after the other; the machine was shared, so compare nothing else.",
        "",
        "| | embeddings | written a second | against bare | 1 id p50 | p99 | 100 ids p50 | p99 | upsert of 100 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, tasks: int, each: dict[str, Any], ratio: float | None = None) -> None:
        rate = each.get("publish_rate", each.get("rate"))
        cells = [microseconds(each, cell) for cell in ("get1_p50", "get1_p99", "get100_p50", "get100_p99", "upsert100")]
        ratio_cell = "" if ratio is None else f"{ratio:.0%}"
        lines.append(f"| {name} | {tasks:,} | {rate:,.0f} | {ratio_cell} | {' | '.join(cells)} |")

    for dtype, each in found["lmdb"].items():
        row(f"bare LMDB, {dtype} values", found["tasks"], each["bare"])
        row(f"**limaml on LMDB, {dtype}**", found["tasks"], each["ours"], each["publish_ratio"])
    for name, each in found["redis"].items():
        if "bare" in each:
            row("bare `SET`, `MGET`", found["redis_tasks"], each["bare"])
        row(f"**limaml on {name}**", found["redis_tasks"], each["ours"], each.get("publish_ratio"))
    for name in ("sqlite", "redis"):
        if name in found.get("feast", {}):
            row(f"Feast {found['feast']['version']}, {name}", found["feast_tasks"], found["feast"][name])
    ours = found["lmdb"]["float32"]["ours"]
    lines += [
        "",
        "Written a second: of the bare rows, put and synced; of ours, put, read back, verified, committed and flipped (all "
        "publications of the run, the median). A look-up is decoded to an array where it is ours or Feast's; bare reads are bytes.",
        "",
        f"After {found['upserts']:,} upserts into it, LMDB answers 1 id in {microseconds(ours, 'upserted_get1_p50')} µs and 100 in "
        f"{microseconds(ours, 'upserted_get100_p50')} µs (p50): ids that may have an upsert are then looked for among the upserts first.",
    ]
    if "feast" in found:
        redis_ours = found["redis"]["one server"]["ours"]
        lines += [
            "",
            "Feast's time over ours, p50: "
            + "; ".join(
                f"{name} {found['feast'][name]['get1_p50'] / mine['get1_p50']:,.0f}× for 1 id, "
                f"{found['feast'][name]['get100_p50'] / mine['get100_p50']:,.0f}× for 100"
                for name, mine in (("sqlite", ours), ("redis", redis_ours))
            )
            + f" (SQLite against LMDB, Redis against Redis; Feast holds {found['feast_tasks']:,} members only, as it writes them slowly).",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tasks", 10**6), ("dim", 32), ("repeats", 5), ("calls", 2000), ("redis-tasks", 10**6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--redis-repeats", type=int, default=3)
    parser.add_argument("--feast-tasks", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "store.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "store-benchmark.md")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "command": "python -m benchmarks.store " + " ".join(sys.argv[1:]),
        "machine": f"{processor_name()}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} core(s) for the client",
        "tasks": given.tasks,
        "redis_tasks": given.redis_tasks,
        "feast_tasks": given.feast_tasks,
        "dim": given.dim,
        "upserts": 100 * min(given.calls, 200),
        "lmdb": {},
        "redis": {},
    }

    def said(name: str, result: dict[str, Any]) -> dict[str, Any]:
        print(name, json.dumps(result), flush=True)
        return result

    data = Data(given.tasks, given.dim)
    for dtype in ("float32", "float16", "int8"):
        found["lmdb"][dtype] = said(f"LMDB {dtype}", on_lmdb(data, dtype, given.repeats, given.calls))
    data = Data(given.redis_tasks, given.dim)
    with valkey("--appendonly", "no") as server:
        where = f"redis://127.0.0.1:{server.port}?prefix=bench"
        one = on_redis(data, where, server.port, given.redis_repeats, given.calls)
        found["redis"]["one server"] = said("one server", one)
    with cluster() as servers:
        where = f"redis://127.0.0.1:{servers[0].port}?cluster=true"
        three = on_redis(data, where, None, 1, given.calls)
        found["redis"]["a cluster of three"] = said("cluster", three)
    if given.feast_tasks:
        found["feast"] = said("Feast", with_feast(given.feast_tasks, given.dim, min(given.calls, 500)))
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    given.page.write_text(page(found))


if __name__ == "__main__":
    main()
