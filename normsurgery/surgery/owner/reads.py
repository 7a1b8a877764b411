"""Which of an owner's tensors its remaining code still reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from normsurgery.graph.positions import functions_within, held_by, syntax_of

Chain = tuple[str, ...]
# What a class runs to start afresh reads nothing that a forward computes with.
FRESH_START = frozenset({"__init__", "reset_parameters"})
ASKS_ABOUT = frozenset({"isinstance", "type", "id", "super", "getattr", "hasattr"})


def readers(
    owner_class: type, forward: ast.AST, replaced: FunctionType, names: Sequence[str]
) -> dict[str, str]:
    """For each dotted tensor name that other code reads: which code does.

    Other code is the rewritten `forward`, every method it reaches through `self` or `super()`,
    and every method of the user's classes, other than those that only initialise.
    """
    found: dict[str, str] = {}
    if not names:
        return found
    for where, chains in _code(owner_class, forward, replaced):
        for name in names:
            if name not in found and any(
                _touches(chain, tuple(name.split("."))) for chain in chains
            ):
                found[name] = where
    return found


def chains_of(tree: ast.AST, self_name: str) -> set[Chain]:
    """Every `self.a.b` of a function as ("a", "b"); () where `self` itself is handed on."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    chains = set()
    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and node.id == self_name) or _is_super(node):
            chains.add(_chain(node, parents))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            chains.add((node.value,) if node.value.isidentifier() else ("",))
    return chains - {("",)}


def self_name_of(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    return arguments[0].arg if arguments else None


def _code(
    owner_class: type, forward: ast.AST, replaced: FunctionType
) -> Iterator[tuple[str, set[Chain]]]:
    chains = _chains_in(forward)
    yield "forward", chains
    seen: set[Any] = {replaced.__code__}
    queue = [part for chain in chains for part in chain[:1]]
    while queue:
        for function in _methods(owner_class, queue.pop()):
            if function.__code__ in seen:
                continue
            seen.add(function.__code__)
            chains = _chains(function)
            yield function.__qualname__, chains
            queue.extend(part for chain in chains for part in chain[:1])
    for function in _own_methods(owner_class):
        if function.__code__ not in seen:
            yield function.__qualname__, _chains(function)


def _methods(owner_class: type, name: str) -> Iterator[FunctionType]:
    for base in owner_class.__mro__:
        if base is nn.Module:
            return
        yield from _functions(vars(base).get(name))


def _own_methods(owner_class: type) -> Iterator[FunctionType]:
    for base in owner_class.__mro__:
        if base.__module__.partition(".")[0] == "torch" or not issubclass(base, nn.Module):
            continue
        for name, value in vars(base).items():
            if name not in FRESH_START:
                yield from _functions(value)


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, property):
        for accessor in (value.fget, value.fset, value.fdel):
            yield from functions_within(accessor)
        return
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    yield from functions_within(value)


def _chains(function: FunctionType) -> set[Chain]:
    try:
        chains = _chains_in(syntax_of(function))
    except (OSError, SyntaxError):  # no source: any name the bytecode mentions may be a read
        return {(name,) for name in function.__code__.co_names}
    # A decorator's wrapper hands `self` on to the function it wraps, which is scanned itself.
    return chains - {()} if any(isinstance(v, FunctionType) for v in held_by(function)) else chains


def _chains_in(definition: ast.AST) -> set[Chain]:
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    name = self_name_of(definition)
    return chains_of(definition, name) if name else set()


def _chain(root: ast.AST, parents: dict[ast.AST, ast.AST]) -> Chain:
    parts: list[str] = []
    node = root
    while isinstance(parents.get(node), ast.Attribute):
        node = parents[node]
        assert isinstance(node, ast.Attribute)
        parts.append(node.attr)
    outside = parents.get(root)
    if not parts and isinstance(outside, ast.Call) and _calls(outside, ASKS_ABOUT):
        return ("",)
    return tuple(parts)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _calls(node, frozenset({"super"}))


def _calls(call: ast.Call, names: frozenset[str]) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in names


def _touches(chain: Chain, name: Chain) -> bool:
    shorter = min(len(chain), len(name))
    return chain[:shorter] == name[:shorter]
