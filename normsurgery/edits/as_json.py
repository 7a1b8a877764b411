"""Edits as JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from normsurgery.edits.types import Edit, Vector

_BY_NAME = {edit.__name__: edit for edit in get_args(Edit)}


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """The edit as JSON values; `edit` names its kind."""
    return {"edit": type(edit).__name__, **_fields(edit)}


def edit_from_json(data: Mapping[str, Any]) -> Edit:
    """The edit that `edit_to_json` wrote. Raises KeyError and TypeError for anything else."""
    values = {name: _value(name, value) for name, value in data.items() if name != "edit"}
    made: Edit = _BY_NAME[data["edit"]](**values)
    return made


def _fields(item: Edit | Vector) -> dict[str, Any]:
    return {field.name: _json(field.name, getattr(item, field.name)) for field in fields(item)}


def _json(name: str, value: Any) -> Any:
    if isinstance(value, Vector):
        return _fields(value)
    if name == "index" and value is not None:
        return _index_to_json(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _value(name: str, value: Any) -> Any:
    if name == "by" and value is not None:
        return Vector(**{key: _value(key, item) for key, item in value.items()})
    if name == "index" and value is not None:
        return _index_from_json(value)
    return tuple(value) if isinstance(value, list) else value


def _index_to_json(index: Sequence[int]) -> Any:
    """A list, or where it is shorter `{"runs": [[first, step, count], ...]}`."""
    runs = _runs(index)
    return {"runs": runs} if 3 * len(runs) < len(index) else list(index)


def _index_from_json(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        return tuple(value)
    return tuple(
        first + step * place for first, step, count in value["runs"] for place in range(count)
    )


def _runs(index: Sequence[int]) -> list[list[int]]:
    """The index as arithmetic progressions, each as long as it goes."""
    runs: list[list[int]] = []
    for value in index:
        if runs and runs[-1][2] == 1:
            runs[-1][1:] = [value - runs[-1][0], 2]
        elif runs and value == runs[-1][0] + runs[-1][1] * runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([value, 0, 1])
    return runs
