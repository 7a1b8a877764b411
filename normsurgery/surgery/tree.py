"""The module tree: every place that binds a module, and replacing it at each of them."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

REGISTRIES = ("_modules", "_parameters", "_buffers")


def bindings(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (parent, name) that registers `wanted`, aliases and containers included."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is wanted
    ]


def paths_of(model: nn.Module, wanted: nn.Module) -> list[str]:
    """Every path that reaches `wanted`, through every alias of every parent; "" is the model."""
    return [
        path for path, module in model.named_modules(remove_duplicate=False) if module is wanted
    ]


def paths_of_all(model: nn.Module) -> dict[int, list[str]]:
    """Every path of every module, by the `id` of it."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Bind `new` wherever `old` is registered, in its position; returns the (new) root."""
    return Bindings(model).replace(model, old, new)


class Bindings:
    """Every place that registers each module, read once for all of a model's replacements."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self._read(model)

    def _read(self, model: nn.Module) -> None:
        self._places.clear()
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, name))

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
        """Bind `new` wherever `old` is registered, in its position; returns the (new) root."""
        places = self._places.pop(id(old), [])
        for parent, name in places:
            parent._modules[name] = new
        self._places[id(new)] = places
        root = new if model is old else model
        if any(True for _ in (*old.children(), *new.children())):
            self._read(root)
        return root


def holders(model: nn.Module) -> dict[int, str]:
    """For every module that another one holds outside the module tree, by `id`, where first: in a
    plain list, a partial, a bound method. A replacement in the tree would not reach it there."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in REGISTRIES:
                continue
            for held in _modules_in(value):
                if held is not module:
                    found.setdefault(id(held), f"{path}.{name}" if path else name)
    return found


def _modules_in(value: Any) -> Iterator[nn.Module]:
    seen: set[int] = set()
    open_values = deque([value])
    while open_values:
        current = open_values.popleft()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, nn.Module):
            yield current
        open_values.extend(_parts(current))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _filled(cell))


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # an empty cell
        return False
