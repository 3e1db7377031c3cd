"""Feast's look-ups, measured in an environment of its own (it wants another pandas). `benchmarks.store` makes that and runs this:
`python store_feast.py FOLDER TASKS DIM CALLS [REDIS_PORT]` prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, Float32


def main() -> None:
    folder, tasks, dim, calls = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    online = (
        {"type": "redis", "connection_string": f"127.0.0.1:{sys.argv[5]}"}
        if len(sys.argv) > 5
        else {"type": "sqlite", "path": str(folder / "online.db")}
    )
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    ids = [f"member-{number:09d}" for number in range(tasks)]
    frame = pd.DataFrame({"member_id": ids, "event_timestamp": datetime.now(UTC)})
    frame["embedding"] = list(rng.normal(size=(tasks, dim)).astype(np.float32))
    frame.head(10).to_parquet(folder / "source.parquet")
    source = FileSource(path=str(folder / "source.parquet"), timestamp_field="event_timestamp")
    member = Entity(name="member", join_keys=["member_id"], value_type=ValueType.STRING)
    view = FeatureView(
        name="vectors",
        entities=[member],
        schema=[Field(name="embedding", dtype=Array(Float32))],
        source=source,
        ttl=timedelta(days=1),
    )
    config = RepoConfig(
        project="bench", provider="local", registry=str(folder / "registry.db"), online_store=online,
        entity_key_serialization_version=3, offline_store={"type": "file"},
    )  # fmt: skip
    store = FeatureStore(config=config)
    store.apply([member, view])
    begun = time.perf_counter()
    for start in range(0, tasks, 10_000):
        store.write_to_online_store("vectors", frame.iloc[start : start + 10_000])
    found = {"rate": tasks / (time.perf_counter() - begun)}
    for asked in (1, 100):
        times = []
        for _ in range(calls):
            rows = [{"member_id": ids[row]} for row in rng.integers(0, tasks, asked)]
            begun = time.perf_counter()
            answer = store.get_online_features(features=["vectors:embedding"], entity_rows=rows).to_dict()
            vectors = np.array(answer["embedding"], np.float32)
            times.append(time.perf_counter() - begun)
            assert vectors.shape == (asked, dim)
        found |= {
            f"get{asked}_{name}": float(np.quantile(times, share)) for name, share in (("p50", 0.5), ("p99", 0.99))
        }
    print(json.dumps(found))


main()
