"""Imports what a judged pickle names, and looks at every class before one object of it is made.

Only a layer, a configuration or an enum may be made, and only without code of its own that loading
would run.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from normsurgery.artefacts import allowed
from normsurgery.artefacts.factory import working_directory_importable
from normsurgery.artefacts.nodes import Call, Name, New, Program, path_to
from normsurgery.artefacts.vetting import FIXED_NAMES, Refused, Vetted, is_torch_value, root_class

_TORCHS_OWN_STATE = "torch.nn.modules."


def resolve(vetted: Vetted, trust: Collection[str] = ()) -> dict[str, Any]:
    """Import what a judged pickle names and look at every class. Raises Refused.

    The packages in `trust` may lie in the working directory; no other is looked for there.
    """
    program = vetted.program
    root = root_class(program)
    created = {str(node.cls) for node in program.nodes if isinstance(node, New)}
    called = {str(node.function) for node in program.nodes if isinstance(node, Call)}
    resolved: dict[str, Any] = {}
    for node in program.nodes:
        if not isinstance(node, Name) or str(node) in resolved:
            continue
        name = str(node)
        own = node.module.partition(".")[0] in trust
        with working_directory_importable() if own else nullcontext():
            value = _look_up(node, program, root)
        if name not in FIXED_NAMES and not is_torch_value(node):
            why = _refuse_class(name, value, name in created, name in called)
            if why:
                raise Refused(path_to(program.root, node), name, why, root)
        resolved[name] = value
    return resolved


def _look_up(node: Name, program: Program, root: str) -> Any:
    path, name = path_to(program.root, node), str(node)
    top = node.module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise Refused(path, name, f"needs the package {top}, which is not installed", root)
    try:
        value: Any = importlib.import_module(node.module)
        for part in node.name.split("."):
            value = vars(value)[part]
    except KeyError:
        raise Refused(path, name, f"is not in the installed version of {top}", root) from None
    except Exception as error:  # an import may fail in any way
        raise Refused(path, name, f"cannot be imported ({error})", root) from None
    return value


def _refuse_class(name: str, value: Any, created: bool, called: bool) -> str | None:
    """Why an object of an allowed package may not be used as the pickle wants to use it."""
    if not isinstance(value, type):
        return "is a function or a value, and only known pure functions are allowed"
    if f"{value.__module__}.{value.__qualname__}" != name:
        return f"is another name for {value.__module__}.{value.__qualname__}"
    if called:
        return None if issubclass(value, enum.Enum) else "would be called with arguments"
    if issubclass(value, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return "has code as its state"
    if not (issubclass(value, (nn.Module, enum.Enum)) or is_configuration(value)):
        return "is neither a layer nor a configuration nor an enum"
    return _own_code(value) if created else None


def is_configuration(cls: type) -> bool:
    """Whether instances of a class only hold settings: a dataclass or a library's config class."""
    bases = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    return dataclasses.is_dataclass(cls) or bool(bases & allowed.CONFIGURATIONS)


def _own_code(cls: type) -> str | None:
    """Which code of its own a class would run while it is created, filled, or thrown away."""
    if issubclass(cls, enum.Enum):
        return "is an enum, and would be created as an object"
    if cls.__new__ is not object.__new__:
        return "has a __new__ of its own, which would run"
    if hasattr(cls, "__del__"):
        return "has a __del__ of its own, which would run"
    for base in cls.__mro__:
        if "__setstate__" in vars(base):
            own = not base.__module__.startswith(_TORCHS_OWN_STATE)
            return (
                f"has a __setstate__ of its own ({base.__module__}), which would run"
                if own
                else None
            )
    return None
