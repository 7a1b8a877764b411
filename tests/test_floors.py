"""Who imports whom: every file from its own floor and from below, also inside functions.

The two exceptions of a kind: what reads files back makes again what was made (a swapped model, the
parts of a report), and a verdict is traced to its cause where one is asked for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import normsurgery

PACKAGE = Path(normsurgery.__file__).parent
# From the ground up; what stands on one line may import each other.
FLOORS = (
    (
        *("errors", "jsonfiles", "htmltable", "optiontypes"),
        *("collector", "randomstate", "treecopy", "wrapped"),
    ),
    ("spec", "norms"),
    ("survey", "selection", "numerics"),
    ("inputs",),
    ("flow",),
    ("edits",),
    ("steps", "plans"),
    ("artefacts", "finding", "onnxfile"),
    ("verifying",),
    ("report",),
    ("rewriting", "folding", "swapping"),
    ("planning", "exporting"),
    ("blaming",),
    ("reporting", "testing"),
)
EXCEPTIONS = {
    ("artefacts", "rewriting"): "a model that was swapped is made again when it is loaded",
    ("inputs", "artefacts"): "a file of tensors is vetted as any other",
    ("report", "exporting"): "a report reads its parts back",
    ("report", "folding"): "a report reads its parts back",
    ("report", "rewriting"): "a report reads its parts back",
    ("verifying", "exporting"): "inner values are those of the exported program",
    ("verifying", "blaming"): "verify(blame=True)",
}
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(module: str) -> str:
    """The package or module right below normsurgery that a dotted name belongs to."""
    return module.removeprefix("normsurgery.").partition(".")[0]


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import of ours that runs, wherever it stands."""
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "normsurgery":
            names = (name.name for name in node.names if not name.name.startswith("__"))
            yield from ((f"normsurgery.{name}", node.lineno) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.lineno


def upward(path: Path) -> list[tuple[str, str, int]]:
    """(own part, other part, line) of every import of a higher floor."""
    own = part_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = ((part_of(n), line) for n, line in imported(tree) if n.startswith("normsurgery."))
    return [(own, other, line) for other, line in ours if HEIGHT[other] > HEIGHT[own]]


def test_every_part_has_a_floor() -> None:
    parts = {part_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
    assert parts - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_floor_and_from_below(path: Path) -> None:
    wrong = [found for found in upward(path) if found[:2] not in EXCEPTIONS]
    assert not wrong, [f"{path.name}:{line} imports {other}" for _, other, line in wrong]


def test_every_exception_is_still_one() -> None:
    found = {pair[:2] for path in FILES for pair in upward(path)}
    assert set(EXCEPTIONS) == found


def test_an_upward_import_inside_a_function_is_seen(tmp_path: Path) -> None:
    tree = ast.parse("def f():\n    from normsurgery.folding import folding\n")
    assert list(imported(tree)) == [("normsurgery.folding", 2)]


def test_packages_do_not_hide_verbs() -> None:
    """`import normsurgery.folding.rules` and `normsurgery.fold` both work, without tricks."""
    parts = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()}
    assert parts.isdisjoint(normsurgery.__all__)
