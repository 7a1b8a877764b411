"""First rung: modules whose class is registered and whose forward is that class's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from normsurgery import spec as registry
from normsurgery.spec import NormSpec, Reading


@dataclass(frozen=True)
class Typed:
    """A module that is a norm by its class."""

    module: nn.Module
    paths: tuple[str, ...]
    spec: NormSpec
    reading: Reading


def all_paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every path that binds a module, by `id(module)`, in the order of the tree."""
    found: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[id(module)] = (*found.get(id(module), ()), name)
    return found


def typed_norms(model: nn.Module) -> Iterator[Typed]:
    """Every norm by class; what lies inside one (an ensemble's members) belongs to it."""
    paths = all_paths(model)
    classes = {
        cls: found
        for found in registry.specs()
        if found.attach == "norm" and found.found_by_class
        for cls in reversed(found.classes)
    }
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        found = _spec_of(module, classes)
        if found is None:
            continue
        inside.update(id(part) for part in module.modules())
        yield Typed(module, paths[id(module)], found, found.read(module))


def _spec_of(module: nn.Module, classes: dict[type, NormSpec]) -> NormSpec | None:
    known = next((cls for cls in type(module).__mro__ if cls in classes), None)
    if known is None or not _runs_as(module, known):
        return None
    return classes[known]


def _runs_as(module: nn.Module, known: type) -> bool:
    """Nothing stands between the class and what a call of the module computes."""
    if type(module).forward is not known.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        return False
    return not module._forward_hooks and not module._forward_pre_hooks
