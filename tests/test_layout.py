"""The house rules that a machine can check: imports point one way, `__init__` is a table of contents, exports exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import limaml

PACKAGE = Path(limaml.__file__).parent
ORDER = [
    "types",
    "errors",
    "hashing",
    "durable",
    "config",
    "artifact",
    "interactions",
    "tasks",
    "meta",
    "embeddings",
    "store",
]
ORDER += ["stream", "serving", "evaluate", "cli"]
# The store knows nothing of models; publishing, which knows both, lies with the embeddings.
ALLOWED = {("embeddings", "store"), ("interactions", "tasks")}

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every `limaml` module that a file imports, wherever in it, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "limaml":
            names = [node.module] if "." in node.module else [f"limaml.{alias.name}" for alias in node.names]
            found += [(name, node.lineno) for name in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names if alias.name.startswith("limaml.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for name, line in imports_of(path):
        other = name.split(".")[1]
        if other == part or other not in ORDER or (part, other) in ALLOWED:
            continue
        assert ORDER.index(other) < ORDER.index(part), f"{path.name}:{line} imports {name}, which comes later"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_init_is_a_table_of_contents(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        exports = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        assert documents or exports or isinstance(node, ast.ImportFrom), f"{path}:{node.lineno} is more than contents"


def test_every_export_exists_and_is_sorted() -> None:
    assert limaml.__all__ == sorted(limaml.__all__)
    for name in limaml.__all__:
        assert getattr(limaml, name) is not None


def test_no_persisted_file_is_pickled() -> None:
    """`pickle`, and the loaders that use it, appear nowhere in the package."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {
                    "pickle",
                    "dill",
                    "joblib",
                    "shelve",
                }, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), f"{path}:{node.lineno}"
