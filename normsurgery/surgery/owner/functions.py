"""Copies of functions and classes that differ from theirs in one part."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn

from normsurgery.graph.positions import functions_of, functions_within


def rewrapped(
    value: Any, old: FunctionType, new: FunctionType, done: dict[int, FunctionType]
) -> Any:
    """`value` with `old` replaced by `new`: itself where it does not hold `old`, else a copy."""
    if value is old:
        return new
    if not isinstance(value, FunctionType) or old not in functions_within(value):
        return value
    if id(value) in done:
        return done[id(value)]
    # A cell that does not hold the old function stays the very cell: others may share it.
    cells = value.__closure__ or ()
    closure = tuple(CellType() if _holds(cell, old) else cell for cell in cells)
    copied = done[id(value)] = _with_closure(value, closure)
    for new_cell, cell in zip(closure, cells, strict=True):
        if new_cell is not cell:
            new_cell.cell_contents = rewrapped(cell.cell_contents, old, new, done)
    if "__wrapped__" in vars(value):
        copied.__wrapped__ = rewrapped(value.__wrapped__, old, new, done)  # type: ignore[attr-defined]
    return copied


def _holds(cell: CellType, old: FunctionType) -> bool:
    try:
        return old in functions_within(cell.cell_contents)
    except ValueError:  # the name is not bound yet
        return False


def dressed(function: FunctionType, original: FunctionType) -> FunctionType:
    """With everything of `original` that is not its code."""
    function.__kwdefaults__ = dict(original.__kwdefaults__) if original.__kwdefaults__ else None
    function.__annotations__ = dict(original.__annotations__)
    function.__qualname__ = original.__qualname__
    function.__module__ = original.__module__
    function.__doc__ = original.__doc__
    vars(function).update(vars(original))
    return function


# --- classes --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def unrelated(cls: type) -> type:
    """A class like `cls` that shares no base with it but `nn.Module`: as `cls` is written, on
    copies of its bases. `super()` in its methods means these."""
    twins: dict[type, type] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, nn.Module) or base is nn.Module:
            twins[base] = base
            continue
        namespace = {n: v for n, v in vars(base).items() if n not in ("__dict__", "__weakref__")}
        metaclass: Any = type(base)
        twin = metaclass(base.__name__, tuple(twins[b] for b in base.__bases__), namespace)
        twins[base] = twin
    for base, twin in twins.items():
        for name, value in vars(base).items() if twin is not base else ():
            if any("__class__" in f.__code__.co_freevars for f in functions_of(value)):
                setattr(twin, name, in_class(value, twins))
    return twins[cls]


def in_class(value: Any, twins: Mapping[type, type]) -> Any:
    """A method whose `super()` looks from the twin of the class that it was written in."""
    if isinstance(value, property):
        get, put, drop = (in_class(one, twins) for one in (value.fget, value.fset, value.fdel))
        return property(get, put, drop, value.__doc__)
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(in_class(value.__func__, twins))
    for function in list(functions_within(value)):
        cells = tuple(_twin_cell(cell, twins) for cell in function.__closure__ or ())
        if any(new is not old for new, old in zip(cells, function.__closure__ or (), strict=True)):
            value = rewrapped(value, function, _with_closure(function, cells), {})
    return value


def _twin_cell(cell: CellType, twins: Mapping[type, type]) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # the name is not bound yet
        return cell
    twin = twins.get(held) if isinstance(held, type) else None
    return cell if twin is None or twin is held else CellType(twin)


def _with_closure(function: FunctionType, closure: tuple[CellType, ...]) -> FunctionType:
    copied = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    return dressed(copied, function)
