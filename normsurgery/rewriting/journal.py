"""What an edit in place has changed, so that it can be undone: the same objects, tie for tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from normsurgery.rewriting.tree import REGISTRIES

_ABSENT = object()


@dataclass(frozen=True)
class _Before:
    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    registries: dict[str, dict[str, Any]]
    transient: set[str]


@dataclass(frozen=True)
class _Change:
    """One entry that an edit changed: `home` is a registry, or "" for a plain attribute."""

    module: nn.Module
    home: str
    name: str
    value: Any


class Journal:
    """Remembers a model before an edit; `close` keeps what the edit changed, `undo` takes it back.

    Whatever else happens to the model between the two (training, a hook) is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = [_remember(module) for module in model.modules()]
        self._changes: list[_Change] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._held: list[tuple[Any, str, Any]] = []

    def close(self) -> None:
        for before in self._before:
            self._note(before)
        edited = {id(change.module) for change in self._changes}
        self._before = [before for before in self._before if id(before.module) in edited]

    def _note(self, before: _Before) -> None:
        module = before.module
        if type(module) is not before.cls:
            self._classes.append((module, before.cls))
        for home, old in (("", before.attributes), *before.registries.items()):
            new = _plain_attributes(module) if home == "" else vars(module)[home]
            for name in (*old, *(name for name in new if name not in old)):
                if old.get(name, _ABSENT) is not new.get(name, _ABSENT):
                    self._changes.append(_Change(module, home, name, old.get(name, _ABSENT)))

    def watch(self, holder: Any, name: str) -> None:
        """Also put back an attribute of an object that is no module (None: nothing)."""
        if holder is not None:
            self._held.append((holder, name, getattr(holder, name, _ABSENT)))

    def undo(self) -> nn.Module:
        """Put every changed entry back, in the old order; returns the old root."""
        for module, cls in self._classes:
            module.__class__ = cls
        for change in self._changes:
            home = vars(change.module) if change.home == "" else vars(change.module)[change.home]
            if change.value is _ABSENT:
                home.pop(change.name, None)
            else:
                home[change.name] = change.value
        for holder, name, value in self._held:
            if value is not _ABSENT:
                setattr(holder, name, value)
            elif hasattr(holder, name):
                delattr(holder, name)
        for before in self._before:
            before.module._non_persistent_buffers_set |= before.transient
            for home_name, old in before.registries.items():
                _reorder(vars(before.module)[home_name], old)
        self._recompile()
        return self._model

    def _recompile(self) -> None:
        """A graph that was put back is not yet what its module runs."""
        graphs = {id(c.module): c.module for c in self._changes if c.name == "_graph"}
        for module in graphs.values():
            if isinstance(module, fx.GraphModule):
                module.recompile()


def _remember(module: nn.Module) -> _Before:
    return _Before(
        module=module,
        cls=type(module),
        attributes=_plain_attributes(module),
        registries={name: dict(vars(module)[name]) for name in REGISTRIES},
        transient=set(module._non_persistent_buffers_set),
    )


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in REGISTRIES}


def _reorder(registry: dict[str, Any], old: dict[str, Any]) -> None:
    """The order of names is the order of a state_dict and of an optimizer's parameters."""
    names = [name for name in old if name in registry]
    entries = [(name, registry[name]) for name in (*names, *(n for n in registry if n not in old))]
    registry.clear()
    registry.update(entries)
