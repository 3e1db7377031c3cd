"""Folders: what was written comes back, and nothing else is accepted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml import artifact, durable
from limaml.artifact import MANIFEST, copy_folder, read_folder, verify_folder, write_folder
from limaml.errors import ArtifactError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    seed = draw(st.integers(0, 2**31))
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    return raw.to(draw(st.sampled_from(DTYPES)))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def example(path: Path, seed: int = 0, **changes: Any) -> str:
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = {
        "tensors": {"weights": {"a": torch.randn(30, 4, generator=generator), "b": torch.zeros(0)}, "state": {}},
        "documents": {"schema": {"seed": seed, "names": ["x", "ä"]}, "metrics": [1, 2.5]},
        "kind": "model",
        "format": 1,
    }
    return write_folder(path, **(arguments | changes))


@settings(max_examples=40)
@given(
    tensors=st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), any_tensor(), max_size=4),
    document=documents,
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], document: object
) -> None:
    path = tmp_path_factory.mktemp("round") / "folder"
    digest = write_folder(path, tensors={"w": tensors}, documents={"d": document}, kind="thing", format=3)
    folder = read_folder(path, kind="thing", format=3)
    assert folder.digest == digest
    assert json.dumps(folder.documents["d"]) == json.dumps(document)  # compared as text: 0 and False, key order
    assert folder.tensors.keys() == {"w"}
    assert folder.tensors["w"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        loaded = folder.tensors["w"][name]
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert bits(loaded) == bits(tensor)


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    first = example(tmp_path / "a")
    assert example(tmp_path / "b") == first
    different = [
        example(tmp_path / "c", seed=1),
        example(tmp_path / "c", kind="checkpoint"),
        example(tmp_path / "c", format=2),
        example(tmp_path / "c", documents={}),
    ]
    assert len({first, *different}) == 5


def test_tied_views_and_gradients_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(base)
    write_folder(
        tmp_path / "f",
        tensors={
            "w": {
                "a": parameter,
                "tied": parameter,
                "turned": base.T,
                "part": base[1],
                "wide": base[:, :1].expand(3, 9),
            }
        },
        kind="model",
        format=1,
    )
    found = read_folder(tmp_path / "f", kind="model").tensors["w"]
    assert torch.equal(found["a"], base)
    assert torch.equal(found["tied"], base)
    assert torch.equal(found["turned"], base.T)
    assert torch.equal(found["part"], base[1])
    assert torch.equal(found["wide"], base[:, :1].expand(3, 9))
    assert not found["a"].requires_grad


def test_the_random_state_survives(tmp_path: Path) -> None:
    torch.manual_seed(3)
    write_folder(tmp_path / "f", tensors={"rng": {"cpu": torch.get_rng_state()}}, kind="checkpoint", format=1)
    expected = torch.rand(5)
    torch.set_rng_state(read_folder(tmp_path / "f", kind="checkpoint").tensors["rng"]["cpu"])
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "schema.json", "metrics.json", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove", "link"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / "f"
    example(path)
    file = path / name
    raw = file.read_bytes()
    if damage == "flip":
        choose = random.Random(7)
        for _ in range(30):
            where = choose.randrange(len(raw))
            changed = bytearray(raw)
            changed[where] ^= 1 << choose.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(ArtifactError, match=name):
                read_folder(path, kind="model")
        file.write_bytes(raw)
        read_folder(path, kind="model")
        return
    if damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(raw[:-1] if damage == "truncate" else raw + b"\n")
    with pytest.raises(ArtifactError, match=name):
        verify_folder(path)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    example(tmp_path / "f")
    (tmp_path / "f" / "stranger.bin").write_bytes(b"x")
    (tmp_path / "f" / "schema.json").unlink()
    with pytest.raises(ArtifactError, match=r"'stranger.bin' is not in the manifest; 'schema.json' is missing"):
        read_folder(tmp_path / "f", kind="model")


def test_a_change_after_opening_is_seen_when_tensors_are_loaded(tmp_path: Path) -> None:
    example(tmp_path / "f")
    folder = read_folder(tmp_path / "f", kind="model")
    file = tmp_path / "f" / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        folder.tensors["weights"]


def test_kind_format_and_layout(tmp_path: Path) -> None:
    example(tmp_path / "f")
    with pytest.raises(ArtifactError, match="holds a 'model', not a 'checkpoint'"):
        read_folder(tmp_path / "f", kind="checkpoint")
    with pytest.raises(ArtifactError, match=r"of format 1; this limaml reads format 2"):
        read_folder(tmp_path / "f", kind="model", format=2)
    with pytest.raises(ArtifactError, match="There is no folder"):
        read_folder(tmp_path / "none", kind="model")
    (tmp_path / "f" / MANIFEST).write_text('{"limaml_layout": 99}')
    with pytest.raises(ArtifactError, match="layout 99"):
        read_folder(tmp_path / "f", kind="model")


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"a": [1, {"b": float("nan")}]}, r"doc\.a\[1\]\.b is nan"),
        ({"a": {1: 2}}, r"key 1 at doc\.a"),
        ([object()], r"doc\[0\] is of type object"),
        ([torch.ones(1)], r"doc\[0\] is of type Tensor"),
    ],
)
def test_documents_that_json_would_change_are_refused(tmp_path: Path, document: object, where: str) -> None:
    with pytest.raises(ArtifactError, match=where):
        write_folder(tmp_path / "f", documents={"doc": document}, kind="model", format=1)
    assert list(tmp_path.iterdir()) == []


def test_a_document_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ArtifactError, match="contains itself"):
        write_folder(tmp_path / "f", documents={"doc": loop}, kind="model", format=1)


def test_tensors_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    for bad in (torch.eye(2).to_sparse(), torch.ones(1, device="meta"), [1.0]):
        with pytest.raises(ArtifactError, match="Tensor 'odd' of 'w'"):
            write_folder(tmp_path / "f", tensors={"w": {"odd": bad}}, kind="model", format=1)  # type: ignore[dict-item]


@pytest.mark.parametrize("stem", ["../up", "", "a/b", "manifest", "x" * 200, "ä"])
def test_file_names_are_plain(tmp_path: Path, stem: str) -> None:
    with pytest.raises(ArtifactError, match="called"):
        write_folder(tmp_path / "f", documents={stem: 1}, kind="model", format=1)


def test_what_limaml_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(ArtifactError, match="not a folder that limaml wrote"):
            example(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    example(tmp_path / "empty")
    read_folder(tmp_path / "empty", kind="model")


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # a file system that cannot swap two directories
        monkeypatch.setattr(durable, "_rename_exchange", lambda one, other: False)
    example(tmp_path / "f", seed=1)
    digest = example(tmp_path / "f", seed=2, documents={})
    assert read_folder(tmp_path / "f", kind="model").digest == digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_without_exchange_a_crash_between_the_renames_leaves_the_old(tmp_path: Path) -> None:
    old = example(tmp_path / "f", seed=1)
    (tmp_path / "f").rename(tmp_path / ".f.replaced")
    assert read_folder(tmp_path / "f", kind="model").digest == old
    new = example(tmp_path / "f", seed=2)
    assert read_folder(tmp_path / "f", kind="model").digest == new
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_reader_never_sees_a_mix_while_folders_are_replaced(tmp_path: Path) -> None:
    digests = {example(tmp_path / "f", seed=seed): seed for seed in range(2)}
    stop = threading.Event()
    failures: list[BaseException] = []

    def replace() -> None:
        try:
            while not stop.is_set():
                for seed in range(2):
                    example(tmp_path / "f", seed=seed)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=replace)
    writer.start()
    end = time.monotonic() + 1.0
    reads = 0
    while time.monotonic() < end:
        folder = read_folder(tmp_path / "f", kind="model")
        assert folder.documents["schema"]["seed"] == digests[folder.digest]
        reads += 1
    stop.set()
    writer.join()
    assert failures == []
    assert reads > 10


def test_a_manifest_that_goes_while_it_is_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example(tmp_path / "f")
    read = artifact._read_manifest

    def read_and_gone(place: Path) -> artifact.Manifest:
        found = read(place)
        (place / MANIFEST).unlink()
        return found

    monkeypatch.setattr(artifact, "_read_manifest", read_and_gone)
    with pytest.raises(ArtifactError, match=r"'manifest.json' is missing"):
        read_folder(tmp_path / "f", kind="model")


WRITER = f"""
import sys, types, torch
sys.modules["limaml"] = types.ModuleType("limaml")
sys.modules["limaml"].__path__ = [{str(Path(artifact.__file__).parent)!r}]
from limaml.artifact import write_folder
torch.set_num_threads(1)
seed = 0
while True:
    tensors = {{name: {{"t": torch.full((20_000,), seed)}} for name in "abcdef"}}
    write_folder(sys.argv[1], tensors=tensors, documents={{"seed": seed}}, kind="checkpoint", format=1)
    print(seed, flush=True)
    seed += 1
"""


def test_kill_9_while_writing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    choose = random.Random(11)
    path = tmp_path / "f"
    for _ in range(2):
        shutil.rmtree(path, ignore_errors=True)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        confirmed = int(writer.stdout.readline())
        time.sleep(choose.random() * 0.1)
        os.kill(writer.pid, signal.SIGKILL)
        confirmed = max([confirmed, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        writer.wait()
        writer.stdout.close()
        folder = read_folder(path, kind="checkpoint")
        seed = folder.documents["seed"]
        assert seed in (confirmed, confirmed + 1)
        assert all(int(folder.tensors[name]["t"].unique().item()) == seed for name in "abcdef")
    example(path, kind="checkpoint")
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]  # the killed writers' scratch folders are gone


def test_a_copy_is_verified(tmp_path: Path) -> None:
    digest = example(tmp_path / "f")
    assert copy_folder(tmp_path / "f", tmp_path / "g").digest == digest
    assert read_folder(tmp_path / "g", kind="model").digest == digest
    (tmp_path / "f" / "schema.json").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=r"schema\.json"):
        copy_folder(tmp_path / "f", tmp_path / "h")
    assert not (tmp_path / "h").exists()


def test_verifying_needs_no_torch(tmp_path: Path) -> None:
    example(tmp_path / "f")
    code = f"""
import sys, types
sys.modules["limaml"] = types.ModuleType("limaml")  # the file alone, without what `import limaml` brings
sys.modules["limaml"].__path__ = [{str(Path(artifact.__file__).parent)!r}]
from limaml.artifact import verify_folder
verify_folder(sys.argv[1])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=True)


def test_exports() -> None:
    assert all(hasattr(artifact, name) for name in artifact.__all__)
