"""Plans and reports as files: JSON, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normsurgery.errors import UsageError


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name beside `path`, then rename."""
    final = Path(path)
    temporary = final.with_name(final.name + ".part")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(final)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError naming the file where it is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {what} from {path}: {error}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} does not hold {what}: it is a JSON {type(data).__name__}.")
    return data
