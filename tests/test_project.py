"""The project around the package: what gets installed, and the rule about skipped tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

SKIPPING = {
    "test_call.py": 'import pytest\ndef test_it(): pytest.skip("why")\n',
    "test_mark.py": 'import pytest\n@pytest.mark.skip(reason="why")\ndef test_it(): pass\n',
    "test_xfail.py": 'import pytest\n@pytest.mark.xfail(reason="why")\ndef test_it(): assert 0\n',
    "test_module.py": 'import pytest\npytest.skip("why", allow_module_level=True)\n',
}
LISTED = """test_call.py::test_it | why
test_mark.py::test_it | why
test_xfail.py::test_it | why
test_module.py | why
"""


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without __init__.py imports from a checkout and is missing from the wheel."""
    folders = {path.parent for path in (ROOT / "normsurgery").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_requirement_has_a_tested_version() -> None:
    """A requirement that constraints.txt leaves open makes two installs differ."""
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    required = [*PROJECT["project"]["dependencies"], *extras["test"]]
    names = {_package(requirement).lower() for requirement in required}
    assert names - pinned == set()


def test_every_import_of_the_package_is_a_declared_requirement() -> None:
    """An undeclared import works in the test environment and fails after a plain install."""
    named = (_package(text) for text in PROJECT["project"]["dependencies"])
    declared = {IMPORTED_AS.get(name, name) for name in named}
    optional = PROJECT["project"]["optional-dependencies"].values()
    extras = {_package(text) for extra in optional for text in extra}
    own = {"normsurgery", *sys.stdlib_module_names}
    undeclared = set()
    for folder in ("normsurgery", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            undeclared |= _imports(tree.body) - declared
            undeclared |= _imports([tree]) - declared - extras  # an extra, inside a function
    assert undeclared - own == set()


IMPORTED_AS = {"onnx-ir": "onnx_ir", "protobuf": "google"}  # where a distribution says otherwise


def _package(requirement: str) -> str:
    return re.split(r"[ ;<>=\[]", requirement)[0]


def _imports(statements: Sequence[ast.AST]) -> set[str]:
    """Top-level packages that these statements import; a module's own run when it is imported."""
    nodes = [node for statement in statements for node in _run_with(statement)]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0
    }
    return {name.split(".")[0] for name in found}


def _run_with(statement: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield from ast.walk(statement)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_skip_that_is_not_listed_fails_the_run(tmp_path: Path, workers: str) -> None:
    """A skip with nobody's consent looks like a pass, in this process or in a worker's."""
    for allowed in ("", LISTED.replace("why", "another reason")):
        output = _run_tests(tmp_path, workers, allowed)
        blamed = {name for name in SKIPPING if re.search(f"^(FAILED|ERROR) {name}", output, re.M)}
        assert blamed == set(SKIPPING)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_listed_skip_is_let_through(tmp_path: Path, workers: str) -> None:
    output = _run_tests(tmp_path, workers, LISTED)
    assert not re.search("^(FAILED|ERROR)", output, re.M)
    assert "skipped" in output
    assert "1 xfailed" in output


def _run_tests(folder: Path, workers: str, allowed: str) -> str:
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    files = {**SKIPPING, "conftest.py": conftest, "allowed_skips.txt": allowed}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    words = [sys.executable, "-m", "pytest", *options, "-n", workers, str(folder)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout
