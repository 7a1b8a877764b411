"""Builds a model from `package.module:factory`, the code that its user names."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from normsurgery.errors import CannotRead, UnknownName

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory(text: str) -> bool:
    """Whether a text has the form `package.module:factory`."""
    return _FACTORY.fullmatch(text) is not None


def build(text: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the factory. Modules of the working directory can be named.

    Raises CannotRead if it cannot be imported, fails, or makes no module, and UnknownName for an
    argument it does not take.
    """
    factory = _import(text)
    _check_arguments(text, factory, arguments)
    try:
        model = factory(**arguments)
    except Exception as error:  # a user's code may fail in any way
        raise CannotRead(
            f"{text}: the factory failed with {type(error).__name__}: {error}. "
            "Give the arguments it needs as --arg name=value."
        ) from error
    if not isinstance(model, nn.Module):
        raise CannotRead(f"{text}: the factory made a {type(model).__name__}, not a torch module.")
    return model


def _import(text: str) -> Any:
    module_name, _, qualified = text.partition(":")
    try:
        with working_directory_importable():
            value: Any = importlib.import_module(module_name)
    except Exception as error:  # an import may fail in any way
        raise CannotRead(
            f"{text}: cannot import {module_name} ({type(error).__name__}: {error}). "
            "Run from the directory that holds it, or install its package."
        ) from error
    for part in qualified.split("."):
        if not hasattr(value, part):
            raise UnknownName(f"factory in {module_name}", qualified, _callables(value))
        value = getattr(value, part)
    if not callable(value):
        raise CannotRead(f"{text}: is a {type(value).__name__}, which cannot be called.")
    return value


def _callables(value: Any) -> list[str]:
    return [name for name, item in vars(value).items() if callable(item) and name[:1] != "_"]


def _check_arguments(text: str, factory: Any, arguments: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a builtin without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise UnknownName(f"argument of {text}", name, parameters)


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Let an import find the modules of the working directory, as it does in a script there."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
