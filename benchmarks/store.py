"""What a store takes for publishing, for a look-up of 100 members and for a refresh of 100, on LMDB and on Valkey servers of this
machine (one, and a cluster of three), and how close the estimate of bytes is: `python -m benchmarks.store`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from limaml.store import open_store
from tests.store.servers import cluster, valkey

TASKS, DIM, ASKED, CALLS = 200_000, 64, 100, 1000


def measure(name: str, where: str) -> None:
    rng = np.random.default_rng(0)
    ids = [f"member-{number:09d}" for number in range(TASKS)]
    vectors, one = rng.normal(size=(TASKS, DIM)).astype(np.float32), np.ones(TASKS, np.int64)
    with open_store(where) as store:
        estimate = store.estimate({"member": TASKS}, {"member": DIM})
        begun = time.perf_counter()
        with store.publish("m", dims={"member": DIM}) as publication:
            publication.put("member", ids, vectors, one, one)
            version = publication.commit().version
        rate, size = TASKS / (time.perf_counter() - begun), store.size()
        get, upsert = [], []
        for call in range(CALLS):
            some = [ids[row] for row in rng.integers(0, TASKS, ASKED)]
            begun = time.perf_counter()
            store.get("m", "member", some)
            get.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            store.upsert("m", version, "member", some, vectors[:ASKED], one[:ASKED] + call, one[:ASKED])
            upsert.append(time.perf_counter() - begun)
    print(
        f"{name:24} publish {rate:8,.0f} a second, get {np.median(get) * 1e3:5.2f} ms (p99 {np.quantile(get, 0.99) * 1e3:5.2f}), "
        f"upsert {np.median(upsert) * 1e3:5.2f} ms, {size.bytes / TASKS:.0f} bytes a task, estimate {estimate.bytes / size.bytes:.2f}",
        flush=True,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure("LMDB", str(Path(folder) / "store"))
    for buckets in (16, 64, 256):
        with valkey("--appendonly", "no") as server:
            measure(f"one server, {buckets} buckets", f"redis://127.0.0.1:{server.port}?buckets={buckets}")
        with cluster() as servers:
            where = f"redis://127.0.0.1:{servers[0].port}?cluster=true&buckets={buckets}"
            measure(f"three nodes, {buckets}", where)


if __name__ == "__main__":
    main()
