"""What a function reads from `self`, as chains of names: `self.norm.weight` as (norm, weight).

A local name that stands for `self`, or for something reached from it, counts as what it stands for.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from normsurgery.flow.positions import functions_of, held_by, syntax_of

Chain = tuple[str, ...]
Chains = frozenset[Chain]
Aliases = Mapping[str, Chains]
Definition = ast.FunctionDef | ast.AsyncFunctionDef

LONGEST = 12  # `layer = layer.next` in a loop would grow without end
EVERY = "*"  # in a chain: an element that is only known when the function runs
ASKS_ABOUT = frozenset({"isinstance", "type", "id", "super", "getattr", "hasattr"})
NOTHING: Chains = frozenset()


@functools.lru_cache(maxsize=4096)
def chains_of(function: FunctionType) -> Chains:
    """The chains in one function; without source, every name that its bytecode mentions."""
    try:
        chains = chains_in(syntax_of(function))
    except (OSError, SyntaxError):
        return frozenset((name,) for name in function.__code__.co_names)
    # A decorator's wrapper hands `self` on to the function it wraps, which is read itself.
    wraps = any(isinstance(held, FunctionType) for held in held_by(function))
    return chains - {()} if wraps else chains


def chains_in(definition: Definition) -> Chains:
    """Every chain in a definition, each as long as it is written; () where `self` is handed on.

    A string that could be a name counts as one: `getattr(self, name)` may get it from anywhere.
    """
    self_name = self_name_of(definition)
    if self_name is None:
        return NOTHING
    aliases = aliases_in(definition, self_name)
    found: set[Chain] = set()
    inner: set[int] = set()  # what is a part of a longer chain, or is only asked about
    for node in ast.walk(definition):  # the outer ones first
        chains = chains_at(node, aliases)
        if isinstance(node, (ast.Attribute, ast.Subscript)) and chains:
            inner.add(id(node.value))  # `self.norm` in `self.norm.weight`
        elif isinstance(node, ast.Call) and any(_calls(node, name) for name in ASKS_ABOUT):
            inner |= {id(a) for a in node.args if chains_at(a, aliases) == frozenset({()})}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            chains = frozenset({(node.value,)} if node.value.isidentifier() else ())
        found |= chains if id(node) not in inner else NOTHING
    return frozenset(found)


def self_name_of(definition: Definition) -> str | None:
    """What a method calls `self`; None where it takes none."""
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    return arguments[0].arg if arguments else None


def aliases_in(definition: ast.AST, self_name: str) -> Aliases:
    """Local names that stand for `self` or for chains from it: `norm = self.norm`.

    A name that is bound more than once stands for all that it was bound to.
    """
    aliases: dict[str, Chains] = {self_name: frozenset({()})}
    size = -1
    while size != sum(map(len, aliases.values())):  # a name may stand for another name
        size = sum(map(len, aliases.values()))
        for node in ast.walk(definition):
            target, chains = _bound(node, aliases)
            if target is not None and target != self_name:
                known = aliases.get(target, NOTHING)
                aliases[target] = known | {chain for chain in chains if len(chain) <= LONGEST}
    return aliases


def chains_at(node: ast.AST, aliases: Aliases) -> Chains:
    """`self.a.b[0].c` as (a, b, 0, c); none where the expression is another."""
    names: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            index = node.slice
            names.append(str(index.value) if isinstance(index, ast.Constant) else EVERY)
            node = node.value
        elif isinstance(node, ast.Call) and _is_getattr(node):
            assert isinstance(node.args[1], ast.Constant)
            names.append(str(node.args[1].value))
            node = node.args[0]
        elif _calls(node, "super"):
            return frozenset({tuple(reversed(names))} if names else ())
        else:
            return NOTHING
    starts = aliases.get(node.id, NOTHING)
    return frozenset((*start, *reversed(names)) for start in starts)


def _bound(node: ast.AST, aliases: Aliases) -> tuple[str | None, Chains]:
    """The name that a statement binds to chains, by assignment or as a loop over a container."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return _name(node.targets[0]), chains_at(node.value, aliases)
    if not isinstance(node, (ast.For, ast.comprehension)):
        return None, NOTHING
    target, values = node.target, node.iter
    if _calls(values, "enumerate") and isinstance(target, ast.Tuple) and len(target.elts) == 2:
        assert isinstance(values, ast.Call)
        target, values = target.elts[1], values.args[0]
    return _name(target), frozenset((*chain, EVERY) for chain in chains_at(values, aliases))


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _is_getattr(call: ast.Call) -> bool:
    named = len(call.args) >= 2 and isinstance(call.args[1], ast.Constant)
    return named and _calls(call, "getattr")


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) == name


# --- the functions that names stand for -----------------------------------------------------------


def functions_named(owner: type, name: str, held: Mapping[str, Any]) -> Iterator[FunctionType]:
    """What `self.<name>` or `super().<name>` may run; torch's own base class excepted.

    held: attributes of the instance itself.
    """
    yield from functions_of(held.get(name))
    for base in owner.__mro__:
        if base is not nn.Module:
            yield from functions_of(vars(base).get(name))


def functions_used(
    owner: type, names: Iterable[str], held: Mapping[str, Any]
) -> Iterator[FunctionType]:
    """Every function that these names of `self` stand for, and that those use of `self` in turn."""
    queue = list(names)
    asked: set[str] = set()
    seen: set[FunctionType] = set()
    while queue:
        name = queue.pop()
        if name in asked:
            continue
        asked.add(name)
        for function in functions_named(owner, name, held):
            if function not in seen:
                seen.add(function)
                yield function
                queue += sorted({chain[0] for chain in chains_of(function) if chain})
