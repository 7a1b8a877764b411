"""Reports as files: a page to look at, Markdown to paste, JSON with a schema to read on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError

if TYPE_CHECKING:
    from normsurgery.report import Report
    from normsurgery.verifying import Evidence

SUFFIXES = (".html", ".md", ".json")


def check_report(path: str | Path, *, force: bool = False) -> None:
    """Raise UsageError where `write_report` could not write: told before the work, not after."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: a report is a page (.html), Markdown (.md) or JSON (.json); "
            "give a name that ends in one of them."
        )
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{path.parent}: there is no such directory to write {path.name} into.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already. Give another name, or --force.")


def write_report(
    result: Report | Evidence,
    path: str | Path,
    *,
    title: str = "",
    command: str = "",
    force: bool = False,
) -> Path:
    """Write a report or the evidence of a verification, whole or not at all.

    path: its suffix says what is written: `.html`, one page that needs no network; `.md`; `.json`,
    as `normsurgery.reporting.schema` describes it. title: what was compared or exported. command:
    the line that repeats it. Returns the path. Raises UsageError for another suffix, or where the
    file cannot be written.
    """
    check_report(path, force=force)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(_WRITERS[path.suffix](result, title, command), encoding="utf-8")
    temporary.replace(path)
    return path


def _page(result: Report | Evidence, title: str, command: str) -> str:
    from normsurgery.reporting.html import page

    return page(result, title=title, command=command)


def _markdown(result: Report | Evidence, title: str, command: str) -> str:
    from normsurgery.reporting.markdown import markdown

    return markdown(result, title=title, command=command)


def _json(result: Report | Evidence, title: str, command: str) -> str:
    data = _spelled({"title": title, "command": command, **result.to_json()})
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _spelled(value: Any) -> Any:
    """NaN and infinities as texts: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_WRITERS: dict[str, Callable[[Report | Evidence, str, str], str]] = {
    ".html": _page,
    ".md": _markdown,
    ".json": _json,
}
