"""What is known about every norm without importing torch: its spec's literals, its docstring."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict, dataclass

from normsurgery import norms, spec


@dataclass(frozen=True)
class Entry:
    """One norm as `normsurgery norms` lists it."""

    name: str
    attach: str
    summary: str
    also: tuple[str, ...]
    owner: str = "normsurgery"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def entries() -> tuple[Entry, ...]:
    """All norms in the table's order, then those of installed packages."""
    return tuple(_entry(name) for name in spec.names())


def _entry(name: str) -> Entry:
    row = spec.row(name)
    owner = "normsurgery" if name in norms.NAMES else spec.get(name).owner
    return Entry(name, row.attach, row.summary, row.also, owner)


def documentation(name: str) -> str:
    """The docstring of the file that defines the norm. `name` is a canonical name."""
    if name not in norms.NAMES:
        return inspect.getdoc(inspect.getmodule(spec.get(name).formula)) or ""
    source = norms.file_of(name).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""
