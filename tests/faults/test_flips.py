"""A version flip every 100 ms under load, over HTTP and gRPC, while publishers, refreshes, roll-outs, forgetting and expiry go on:
each answer is what one version's model makes of what was known at some moment, whole; and of who was forgotten, nothing."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import httpx
import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from serving.process import Server, serving, wait_for_version
from tritonclient.grpc import service_pb2

import limaml
from limaml.errors import StoreError
from limaml.types import ROW

from .checker import check, check_log
from .conftest import FULL, reading
from .processes import Nursery
from .test_kills import address_of
from .world import MODEL, TASK, Known, World, joined

SECONDS = 120.0 if FULL else 5.0
EVERY = 0.1
ASKED = 16  # members
TOLERANCE = 3e-5
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Answer:
    began: float  # monotonic
    version: str
    rows: Sequence[int]  # places in `Expected.rows`
    known: Sequence[bool]
    logits: NDArray[np.float32]


class Expected:
    """What one model says of each asked row: for every number of clicks that may be known of the member, and for none."""

    def __init__(self, world: World, known: Known, places: Sequence[int], members: Sequence[str]) -> None:
        trained = limaml.load_model(known.model)
        data = trained.encoder.encode(joined(world, pl.concat([world.past, world.later])))
        assert data.source_row is not None
        row_of = {int(source): row for row, source in enumerate(data.source_row)}
        own, unknown = data.sides[TASK], trained.encoder.unknown_features(TASK)
        table: dict[str, list[torch.Tensor]] = {name: [] for name in own}
        vectors, rows, owners, colds = list[torch.Tensor](), list[int](), list[int](), list[bool]()
        for place, (source, member) in enumerate(zip(places, members, strict=True)):
            at = data.ids[TASK].index(member)
            theirs = {name: values[at : at + 1] for name, values in own.items()}
            states = [torch.from_numpy(state.vector) for state in known.states[member] if state is not None]
            none = [
                trained.model.cold_of(TASK, features, torch.arange(1))[0].detach() for features in (theirs, unknown)
            ]
            for number, vector in enumerate([*states, *none]):
                for features in (theirs, unknown):
                    for name, values in features.items():
                        table[name].append(values)
                    vectors.append(vector)
                    rows.append(row_of[source])
                    owners.append(place)
                    colds.append(number >= len(states))
        picked, each = torch.tensor(rows), torch.arange(len(rows))
        posed = replace(
            data,
            sides={**data.sides, TASK: {name: torch.cat(values) for name, values in table.items()}},
            index={ROW: data.index[ROW][picked], TASK: each},
            labels=data.labels[picked],
            weights=data.weights[picked],
            time=data.time[picked],
        )
        logits = trained.model.predict(posed, each, {TASK: torch.stack(vectors)}).numpy()[:, 0]
        self._logits = [
            {cold: logits[(np.array(owners) == place) & (np.array(colds) == cold)] for cold in (False, True)}
            for place in range(len(places))
        ]

    def explains(self, answer: Answer) -> bool:
        """Whether every row is one that this model gives for something that was or may have been known."""
        return all(
            bool((np.abs(self._logits[row][not known] - logit) < TOLERANCE).any())
            for row, known, logit in zip(answer.rows, answer.known, answer.logits, strict=True)
        )


@dataclass
class Story:
    """What happens to the store while questions are asked, by one command after the other."""

    world: World
    run: Path
    born: Nursery
    address: str | Path
    leaving: list[str]
    choose: random.Random = field(default_factory=lambda: random.Random(5))
    came: list[Path] = field(default_factory=list)
    gone: dict[str, float] = field(default_factory=dict)  # member → when forgetting had ended
    done: Counter[str] = field(default_factory=Counter)

    def tell(self, until: float) -> None:
        pieces = self.world.pieces(self.run / "pieces", 12)
        models = list(self.world.known.values())
        while time.monotonic() < until:
            act = self.choose.choice(["refresh", "refresh", "forget", "embed", "rollout"])
            if act == "refresh" and len(self.came) < len(pieces):
                self._do("refresh", self.run, pieces[len(self.came)])
                self.came.append(pieces[len(self.came)])
            elif act == "refresh":
                self._do("refresh", self.run)
            elif act == "embed":
                self._do("embed", self.run, "--keep", 2)
            elif act == "rollout":
                self._do("rollout", self.run, "--model", models[(self.done["rollout"] + 1) % 2].model)
            elif len(self.gone) < len(self.leaving):
                member = self.leaving[len(self.gone)]
                self._do("store", "forget", self.run, "--task", f"{TASK}:{member}")
                self.gone[member] = time.monotonic()
            self.done[act] += 1

    def _do(self, *command: object) -> None:
        self.born.do(*command, "--store", self.address)


@contextmanager
def flipping(address: str | Path, done: Counter[str]) -> Iterator[None]:
    """One of the newest versions is served after the other."""
    stop = threading.Event()

    def flip() -> None:
        with limaml.open_store(address) as store:
            while not stop.wait(EVERY):
                current = store.current(MODEL)
                ready = [version.id for version in store.versions(MODEL) if version.state == "ready"][-2:]
                for version in [version for version in ready if version != current][:1]:
                    try:
                        store.activate(MODEL, version)
                        done["flips"] += 1
                    except StoreError:  # it was removed just now
                        done["too late"] += 1

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(flip)
        try:
            yield
        finally:
            stop.set()
            running.result()


class Askers:
    """Those who ask, over HTTP and gRPC, one question after the other."""

    def __init__(self, server: Server, rows: Sequence[Mapping[str, object]]) -> None:
        self._server, self._rows = server, rows

    def http(self, until: float, seed: int) -> list[Answer]:
        found, choose = [], random.Random(seed)
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not found or time.monotonic() < until:
                rows, began = choose.sample(range(ASKED), 6), time.monotonic()
                said = client.post("/v1/score", json={"rows": [self._rows[row] for row in rows]})
                assert said.status_code == 200, said.text
                told = json.loads(said.content)
                assert "store" not in told, told
                (logits,) = told["logits"].values()
                found.append(Answer(began, told["version"], rows, told["known"], np.array(logits, np.float32)))
        return found

    def grpc(self, until: float, seed: int) -> list[Answer]:
        found, choose = [], random.Random(seed)
        with grpc.insecure_channel(self._server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            ask = channel.unary_unary(_METHOD)
            while not found or time.monotonic() < until:
                rows, began = choose.sample(range(ASKED), 6), time.monotonic()
                raw = ask(self._message([self._rows[row] for row in rows]), timeout=60)
                told = service_pb2.ModelInferResponse.FromString(raw)
                outputs = {output.name: output.contents for output in told.outputs}
                assert outputs["version"].bytes_contents[0].decode() == told.model_version
                logits = np.array(outputs["logit"].fp32_contents, np.float32)
                found.append(Answer(began, told.model_version, rows, outputs["known"].bool_contents, logits))
        return found

    def _message(self, rows: Sequence[Mapping[str, object]]) -> bytes:
        request = service_pb2.ModelInferRequest(model_name=MODEL)
        kinds = {int: ("INT64", "int64_contents"), float: ("FP64", "fp64_contents"), str: ("BYTES", "bytes_contents")}
        for name in rows[0]:
            data = [row[name] for row in rows]
            datatype, place = kinds[type(data[0])]
            contents = service_pb2.InferTensorContents(
                **{place: [one.encode() if isinstance(one, str) else one for one in data]}
            )
            request.inputs.add(name=name, datatype=datatype, shape=[len(rows)], contents=contents)
        return bytes(request.SerializeToString())


@pytest.mark.parametrize("kind", ["lmdb", "valkey"])
def test_every_answer_is_of_one_version_whatever_goes_on(kind: str, world: World, run: Path, born: Nursery) -> None:
    later = world.later.with_row_index("place", offset=len(world.past)).unique(TASK, keep="first", maintain_order=True)
    asked = later.head(ASKED)
    members, places = [str(member) for member in asked[TASK]], asked["place"].to_list()
    items = pl.read_parquet(world.folder / "items.parquet")
    rows = asked.select(TASK, "item_id").join(items, on="item_id", how="left", maintain_order="left").to_dicts()
    expected = {digest[:8]: Expected(world, known, places, members) for digest, known in world.known.items()}

    with address_of(kind, run) as address:
        born.do("embed", run, "--store", address)
        born.do("rollout", run, "--model", world.other, "--store", address)
        story = Story(world, run, born, address, members[::2])
        story.done["rollout"] = 1
        options = ["--store", address, "--port", 0, "--grpc-port", 0, "--poll", 0.02, "--timeout", 60]
        with serving(*options, "--log-requests", "none") as server:
            askers = Askers(server, rows)
            until = time.monotonic() + SECONDS
            with flipping(address, story.done), ThreadPoolExecutor(5) as pool:
                asking = [pool.submit(askers.http, until, seed) for seed in range(3)]
                asking += [pool.submit(askers.grpc, until, seed) for seed in range(3, 5)]
                story.tell(until)
                answers = [answer for each in asking for answer in each.result()]
            born.do("embed", run, "--keep", 1, "--store", address)
            born.do("refresh", run, "--store", address)
            with limaml.open_store(address) as store:
                last = store.current(MODEL)
            wait_for_version(server.url, last or "")
            after = askers.http(time.monotonic() + 0.2, 9)
            assert server.end() == 0, "".join(server.log)
        said = "".join(server.log)
        assert "Traceback" not in said and "A request failed" not in said, said[-5000:]
        born.do("embed", run, "--keep", 1, "--store", address)
        rows_in = pl.concat([world.later.head(0), *map(pl.read_parquet, story.came)])
        known = world.clicks(check_log(run / "log", world, rows_in, gone=story.gone))
        check(reading(address)(), world, least=known, most=known, promised=last, settled=True, gone=story.gone)

    for answer in [*answers, *after]:
        own = answer.version.rpartition("-")[2]
        assert expected[own].explains(answer), answer
        (other,) = expected.keys() - {own}
        assert not expected[other].explains(answer), "the two models cannot be told from each other"
        for row, is_known in zip(answer.rows, answer.known, strict=True):
            assert not is_known or answer.began < story.gone.get(members[row], np.inf), (members[row], answer)
    assert {answer.version for answer in after} == {last}
    versions = Counter(answer.version for answer in answers)
    assert {version.rpartition("-")[2] for version in versions} == expected.keys()
    assert story.done["flips"] > 3
    print(f"\n{kind}: {len(answers)} answers of {len(versions)} versions; {dict(story.done)}")
