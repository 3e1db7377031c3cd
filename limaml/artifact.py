"""A folder that can be trusted: safetensors weights, JSON documents, and a manifest with the hash of every file.

Models and training checkpoints are kept as such folders. A folder is written beside its place and moved there whole, so
a crash leaves the old one or the new one; whatever was changed, cut short, lost or added since is refused by name.
Nothing in it is pickled, so reading a folder from a stranger runs no code of theirs.

    model/
      manifest.json        kind, format, digest, sha256 and size of every file, versions of the libraries
      weights.safetensors  one file per entry of `tensors`
      schema.json          one file per entry of `documents`

The *digest* names the content: it is made of the kind, the format and the files' hashes, not of dates or versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limaml.durable import clear_leftovers, put_in_place, read_steadily, scratch_beside
from limaml.errors import ArtifactError

if TYPE_CHECKING:  # the store verifies folders without torch
    from torch import Tensor

__all__ = ["MANIFEST", "Folder", "Manifest", "copy_folder", "read_folder", "verify_folder", "write_folder"]

MANIFEST = "manifest.json"
_LAYOUT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MARK = "limaml_layout"
_LIBRARIES = ("limaml", "torch", "polars", "safetensors")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `files` maps a file's name to its (sha256 in hex, size in bytes)."""

    kind: str
    format: int
    digest: str
    files: Mapping[str, tuple[str, int]]
    versions: Mapping[str, str]
    created: str


@dataclass(frozen=True)
class Folder:
    """A folder whose every file has been verified.

    `tensors` loads a file when it is asked for (and hashes what it loads once more), always to the CPU.
    """

    path: Path
    manifest: Manifest
    documents: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]

    @property
    def digest(self) -> str:
        return self.manifest.digest


def write_folder(
    path: str | Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    documents: Mapping[str, object] | None = None,
    kind: str,
    format: int,  # noqa: A002
) -> str:
    """Write the folder `path` in one step, in place of an older one of limaml's if there is one; returns the digest.

    `tensors`: file stem → tensor name → tensor of any dense dtype and device (tensors that share memory are stored
    apart). `documents`: file stem → JSON value: string keys, finite numbers, tuples become lists, order is kept.

    Raises `ArtifactError` for what cannot be stored, and if `path` is something that limaml did not write.
    """
    target = Path(path).resolve()
    tensors, documents = tensors or {}, documents or {}
    _check_names(kind, format, tensors, documents)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target)
    beside = scratch_beside(target)
    beside.mkdir()
    try:
        for stem, named in tensors.items():
            _save_tensors(beside / f"{stem}.safetensors", stem, named)
        for stem, document in documents.items():
            (beside / f"{stem}.json").write_bytes(_encode_document(stem, document))
        files = {entry.name: _hash(entry) for entry in sorted(beside.iterdir())}
        manifest = _describe(kind, format, files, _versions(), datetime.now(UTC).isoformat(timespec="seconds"))
        (beside / MANIFEST).write_bytes(_encode_manifest(manifest))
        put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest.digest


def read_folder(path: str | Path, *, kind: str, format: int | None = None) -> Folder:  # noqa: A002
    """Verify every file of the folder at `path` and read its documents.

    `kind` must be the kind it was written as, and `format` (where given) its format. Raises `ArtifactError` that names
    each file which is missing, changed, cut short, or not listed in the manifest.
    """

    def read(place: Path) -> Folder:
        manifest = _verify(place, kind, format)
        documents = {
            name.removesuffix(".json"): json.loads(_load(place, name, manifest))
            for name in manifest.files
            if name.endswith(".json")
        }
        return Folder(place, manifest, documents, _LazyTensors(place, manifest))

    return read_steadily(Path(path).resolve(), read)


def verify_folder(path: str | Path, *, kind: str | None = None, format: int | None = None) -> Manifest:  # noqa: A002
    """Check every file of the folder at `path` against its manifest, without loading a tensor (or torch)."""
    return read_steadily(Path(path).resolve(), lambda place: _verify(place, kind, format))


def copy_folder(source: str | Path, target: str | Path) -> Manifest:
    """Copy a verified folder to `target` in one step; the copy is verified before it is moved into place."""
    goal = Path(target).resolve()
    _check_replaceable(goal)
    goal.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(goal)
    beside = scratch_beside(goal)

    def copy(place: Path) -> Manifest:
        shutil.rmtree(beside, ignore_errors=True)
        manifest = _verify(place, None, None)
        beside.mkdir()
        for name in (*manifest.files, MANIFEST):
            shutil.copyfile(place / name, beside / name)
        return _verify(beside, None, None, shown=place)

    try:
        manifest = read_steadily(Path(source).resolve(), copy)
        put_in_place(beside, goal)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


# ---------------------------------------------------------------------------------------------------- writing


def _check_names(kind: str, number: int, tensors: Mapping[str, object], documents: Mapping[str, object]) -> None:
    if not _NAME.fullmatch(kind):
        raise ArtifactError(f"The kind of a folder must be a short plain word, got {kind!r}.")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ArtifactError(f"The format of a folder must be a number from 0, got {number!r}.")
    names = [*(f"{stem}.safetensors" for stem in tensors), *(f"{stem}.json" for stem in documents)]
    folded: dict[str, str] = {MANIFEST: MANIFEST}
    for name in names:
        if not _NAME.fullmatch(name):
            raise ArtifactError(
                f"A file of a folder cannot be called {name!r}: use letters, digits, '.', '_' and '-', at most 100."
            )
        if name.casefold() in folded:  # some file systems do not tell the two apart
            raise ArtifactError(f"Two files of a folder would be called {name!r}; rename one.")
        folded[name.casefold()] = name


def _save_tensors(path: Path, stem: str, named: Mapping[str, Tensor]) -> None:
    import torch
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        where = f"Tensor '{name}' of '{stem}'"
        if not isinstance(name, str) or name == "__metadata__":
            raise ArtifactError(f"{where} must be named by a string other than '__metadata__'; rename it.")
        if not isinstance(tensor, torch.Tensor):
            raise ArtifactError(f"{where} is of type {type(tensor).__name__}, not a tensor; put it into a document.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ArtifactError(
                f"{where} is not dense data ({tensor.layout}, {tensor.device}); call .to_dense() first."
            )
        plain = tensor.detach().cpu().contiguous()
        if plain.numel() and plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    try:
        save_file(ready, path)
    except OSError:
        raise
    except Exception as error:
        kinds = sorted({str(tensor.dtype) for tensor in ready.values()})
        raise ArtifactError(f"The tensors of '{stem}' (dtypes {', '.join(kinds)}) cannot be stored: {error}") from error


def _encode_document(stem: str, document: object) -> bytes:
    try:
        _check_json(document, stem)
    except RecursionError as error:
        raise ArtifactError(f"Document '{stem}' is nested too deeply, or contains itself; store a flat one.") from error
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot hold but a JSON escape can
        return (json.dumps(document, allow_nan=False, indent=1) + "\n").encode()


def _check_json(value: object, path: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ArtifactError(f"The value at {path} is {value}, which JSON cannot hold; store None instead.")
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            if type(entry) is not str:  # long vocabularies are lists of strings
                _check_json(entry, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ArtifactError(f"The key {key!r} at {path} is not a string, which JSON would change silently.")
            _check_json(entry, f"{path}.{key}")
    else:
        raise ArtifactError(
            f"The value at {path} is of type {type(value).__name__}; a document holds only None, booleans, numbers, "
            "strings, lists and dicts with string keys."
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            found[name] = "unknown"
    return found


def _describe(
    kind: str, number: int, files: Mapping[str, tuple[str, int]], versions: Mapping[str, str], created: str
) -> Manifest:
    content = {"layout": _LAYOUT, "kind": kind, "format": number, "files": {n: list(f) for n, f in files.items()}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return Manifest(kind, number, digest, dict(files), dict(versions), created)


def _encode_manifest(manifest: Manifest) -> bytes:
    body: dict[str, object] = {
        _MARK: _LAYOUT,
        "kind": manifest.kind,
        "format": manifest.format,
        "digest": manifest.digest,
        "files": {name: {"sha256": sha, "bytes": size} for name, (sha, size) in sorted(manifest.files.items())},
        "versions": dict(sorted(manifest.versions.items())),
        "created": manifest.created,
    }
    # the digest leaves versions and date out, so that equal content has an equal name; the seal covers them as well
    body["seal"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body, indent=1) + "\n").encode()


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size


# ---------------------------------------------------------------------------------------------------- reading


def _verify(place: Path, kind: str | None, number: int | None, shown: Path | None = None) -> Manifest:
    manifest = _read_manifest(place)
    shown = shown or place
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"The folder {shown} holds a '{manifest.kind}', not a '{kind}'; pass another folder.")
    if number is not None and manifest.format != number:
        raise ArtifactError(
            f"The folder {shown} is a '{manifest.kind}' of format {manifest.format}; this limaml reads format {number}. "
            f"It was written by limaml {manifest.versions.get('limaml', 'unknown')}: use that version, or write it anew."
        )
    problems: list[str] = []
    with os.scandir(place) as entries:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    for name in sorted(present.keys() - manifest.files.keys() - {MANIFEST}):
        problems.append(f"'{name}' is not in the manifest")
    if MANIFEST not in present:  # it was there a moment ago: the folder is being removed, or replaced
        problems.append(f"'{MANIFEST}' is missing")
    elif not stat.S_ISREG(present[MANIFEST].st_mode):
        problems.append(f"'{MANIFEST}' is not a plain file")
    for name, (sha, size) in sorted(manifest.files.items()):
        if name not in present:
            problems.append(f"'{name}' is missing")
        elif not stat.S_ISREG(present[name].st_mode):
            problems.append(f"'{name}' is not a plain file")
        elif present[name].st_size != size:
            problems.append(f"'{name}' has {present[name].st_size} bytes, {size} were written")
        elif _hash(place / name)[0] != sha:
            problems.append(f"'{name}' was changed: its sha256 is not the one that was written")
    if problems:
        raise ArtifactError(
            f"The folder {shown} is not as limaml wrote it: {'; '.join(problems)}. Restore it from a copy, or write it anew."
        )
    return manifest


def _read_manifest(place: Path) -> Manifest:
    if not place.is_dir():
        raise ArtifactError(f"There is no folder {place}.")
    try:
        raw = (place / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(
            f"The folder {place} has no '{MANIFEST}': limaml did not write it, or it was removed."
        ) from None
    try:
        found = json.loads(raw)
        layout = found[_MARK]
        if layout != _LAYOUT:
            raise ArtifactError(
                f"The folder {place} has layout {layout!r}, which this version of limaml does not know (it knows "
                f"{_LAYOUT}): update limaml."
            )
        files = {name: (entry["sha256"], entry["bytes"]) for name, entry in found["files"].items()}
        manifest = _describe(found["kind"], found["format"], files, found["versions"], found["created"])
        intact = _encode_manifest(manifest) == raw and all(_NAME.fullmatch(name) for name in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        intact = False
    if not intact:
        raise ArtifactError(f"'{MANIFEST}' in {place} was changed or cut short. Restore the folder from a copy.")
    return manifest


def _load(place: Path, name: str, manifest: Manifest) -> bytes:
    raw = (place / name).read_bytes()
    if hashlib.sha256(raw).hexdigest() != manifest.files[name][0]:
        raise ArtifactError(f"'{name}' in {place} was changed while it was read; read the folder again.")
    return raw


class _LazyTensors(Mapping[str, Mapping[str, "Tensor"]]):
    def __init__(self, place: Path, manifest: Manifest) -> None:
        self._place, self._manifest = place, manifest
        self._stems = [n.removesuffix(".safetensors") for n in manifest.files if n.endswith(".safetensors")]
        self._loaded: dict[str, Mapping[str, Tensor]] = {}

    def __getitem__(self, stem: str) -> Mapping[str, Tensor]:
        if stem not in self._loaded:
            if stem not in self._stems:
                raise KeyError(stem)
            from safetensors.torch import load

            name = f"{stem}.safetensors"
            try:
                self._loaded[stem] = load(_load(self._place, name, self._manifest))
            except FileNotFoundError:
                raise ArtifactError(f"'{name}' in {self._place} was removed since the folder was read.") from None
        return self._loaded[stem]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stems)

    def __len__(self) -> int:
        return len(self._stems)


def _check_replaceable(target: Path) -> None:
    if not os.path.lexists(target):
        return
    ours = target.is_dir() and not target.is_symlink() and ((target / MANIFEST).is_file() or not any(target.iterdir()))
    if not ours:
        raise ArtifactError(
            f"{target} exists and is not a folder that limaml wrote: nothing was changed. Choose another."
        )
