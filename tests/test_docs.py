"""The README is run: its commands and its Python print what it says they print."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from normsurgery.cli.main import app
from normsurgery.inputs import Inputs
from normsurgery.verifying import hard_inputs
from normsurgery.verifying.hard_inputs import inputs_of_a_graph

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?%?")
IMAGES = Inputs((torch.ones(2, 1, 32, 32),))
LABELS = [case.label for case in (*hard_inputs(IMAGES), *inputs_of_a_graph(IMAGES, ()))]
# Which hard input comes closest to failing depends on how a machine rounds.
INPUT = re.compile(rf"\b({'|'.join(map(re.escape, LABELS))}) \((plain|grad)\)")


class Block(NamedTuple):
    line: int
    language: str
    text: str


class Command(NamedTuple):
    line: str
    output: str


def blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The `$ ` lines of a console block, each with the output that follows it."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        yield Command(line, output)


def masked(text: str) -> list[str]:
    """Lines with every number as #, every run of spaces as one: the same on any machine."""
    text = INPUT.sub("INPUT", text)
    lines = (" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's reader is: a folder with the example's file as model.pt."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "examples" / "digits_resnet.pt", place / "model.pt")
    return place


def test_the_readme_prints_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documentation that nobody runs is wrong after the first change."""
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    ran, wrong = 0, []
    found = blocks()
    for block, following in zip(found, [*found[1:], None], strict=True):
        for said, printed in _runs(block, following, namespace):
            ran += 1
            if masked(said) != masked(printed):
                wrong.append(f"README.md:{block.line} says\n{said}\nand this is printed\n{printed}")
    assert "\n\n".join(wrong) == ""
    assert ran > 0


def _runs(
    block: Block, following: Block | None, namespace: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    if block.language == "console":
        for command in commands(block):
            yield command.output, _output(command.line)
    if block.language == "python":
        # In a file of its own, since a forward whose source cannot be read cannot be rewritten.
        file = Path(f"readme_{block.line}.py").resolve()
        file.write_text(block.text, encoding="utf-8")
        stdout = io.StringIO()
        with redirect_stdout(stdout):
            exec(compile(block.text, str(file), "exec"), namespace)
        said = following.text if following is not None and following.language == "text" else ""
        yield said, stdout.getvalue()


def _output(line: str) -> str:
    """What a command prints on stdout; one that is not ours runs only if it is about files."""
    words = shlex.split(line)
    if words[0] == "normsurgery":
        return CliRunner().invoke(app, words[1:]).stdout
    if words[0] not in ("ls", "cat"):
        return ""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("verb", ["find", "swap", "fold", "export", "verify", "norms", "explain"])
def test_the_readme_shows_every_verb(verb: str) -> None:
    shown = [command.line for block in blocks() for command in commands(block)]
    assert any(line.startswith(f"normsurgery {verb}") for line in shown)


@pytest.mark.parametrize("verb", ["find", "swap", "fold", "export", "verify"])
def test_the_readme_shows_every_verb_from_python(verb: str) -> None:
    assert any(f"ns.{verb}(" in block.text for block in blocks() if block.language == "python")
