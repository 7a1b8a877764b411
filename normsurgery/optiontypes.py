"""Whether the value of an option fits the annotation of the parameter it is for."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Sequence: "a list",
    type(None): "null",
}


def wanted_instead(function: Callable[..., Any], name: str, value: Any) -> str | None:
    """What the parameter `name` of `function` takes, in words, if `value` is not of that type.

    None where it fits, or where the parameter has no annotation that says.
    """
    if not inspect.signature(function).parameters[name].annotation:
        return None
    hint = get_type_hints(function).get(name, Any)
    choices = _choices(hint)
    if any(_fits(choice, value) for choice in choices):
        return None
    words = [_word(choice) for choice in choices if choice is not type(None)]
    return " or ".join(words)


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for part in get_args(hint) for choice in _choices(part))
    return (hint,)


def _fits(choice: Any, value: Any) -> bool:
    if choice is Any:
        return True
    if get_origin(choice) is Literal:
        return value in get_args(choice)
    plain = get_origin(choice) or choice
    if plain is Sequence:
        return isinstance(value, (list, tuple))
    if plain in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if plain is float else plain)


def _word(choice: Any) -> str:
    if get_origin(choice) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(choice))
    plain = get_origin(choice) or choice
    return _WORDS.get(plain, getattr(plain, "__name__", str(plain)))
