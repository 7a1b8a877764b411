"""What is known about every norm without importing torch: the table, and each file's docstring."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict, dataclass
from pathlib import Path

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
    also = tuple(short for short, long in norms.SHORT_FORMS.items() if long == name)
    row = norms.TABLE.get(name)
    if row is not None:
        return Entry(name, row.attach, row.summary, also)
    plugin = spec.get(name)
    return Entry(name, plugin.attach, plugin.summary, also, plugin.owner)


def documentation(name: str) -> str:
    """The docstring of the file that defines the norm. `name` is a canonical name."""
    row = norms.TABLE.get(name)
    if row is None:
        return inspect.getdoc(inspect.getmodule(spec.get(name).formula)) or ""
    source = Path(norms.__file__).with_name(f"{row.file}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""
