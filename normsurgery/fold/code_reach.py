"""Which code of a model reaches which of its modules by name, other than by calling them.

`ModuleReferences.reads_of` tells which forwards read an attribute of a module. Here the code is
followed onto other modules as well (`self.block.dtype`, a property of the block), and code counts
that looks through what a module holds (`self.block.parameters()`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from normsurgery.surgery.attribute_chains import Chain, aliases_in, chains_at, functions_named
from normsurgery.surgery.references import child_named

OF_CHILDREN = frozenset({"_modules", "children", "named_children"})
OF_TENSORS = frozenset(
    {"buffers", "modules", "named_buffers", "named_modules", "named_parameters", "parameters"}
) | {"state_dict"}


@dataclass(frozen=True)
class Reach:
    """An expression `self.<chain>` in a function that `owner` runs, and the module it ends at.

    rest: what is asked of that module. only_called: the module itself, to call it.
    """

    owner: nn.Module
    code: CodeType
    function: str
    chain: Chain
    module: nn.Module
    rest: Chain
    only_called: bool
    only_first: bool

    def touches(self, module: nn.Module) -> bool:
        """Whether it asks for the module, or looks through modules among which that is."""
        if self.module is module:
            return not self.only_called
        name = next(iter(self.rest), "")
        if name in OF_CHILDREN:
            return any(child is module for child in self.module.children())
        inside = name in OF_TENSORS and not self.only_first
        return inside and any(held is module for held in self.module.modules())


def reaches(model: nn.Module) -> Iterator[Reach]:
    """Everything that the forwards of the model reach, and the methods and properties they use."""
    queue = [(module, "forward") for module in model.modules()]
    seen: set[tuple[int, str]] = set()
    while queue:
        owner, name = queue.pop()
        if (id(owner), name) in seen:
            continue
        seen.add((id(owner), name))
        for function in functions_named(type(owner), name, vars(owner)):
            for found in _reached(owner, function):
                yield found
                queue += [(found.module, part) for part in found.rest[:1]]


def _reached(owner: nn.Module, function: Callable[..., Any]) -> Iterator[Reach]:
    for chain, called in _scanned(function).items():
        for module, rest in _ends([owner], chain):
            yield Reach(
                owner,
                function.__code__,
                function.__qualname__,
                chain,
                module,
                rest,
                only_called=called and not rest,
                only_first=_only_first(function),
            )


def _ends(modules: Sequence[nn.Module], chain: Chain) -> Iterator[tuple[nn.Module, Chain]]:
    """The modules that the names lead to, and the names that lead on to no module."""
    for module in modules:
        further = child_named(module, chain[0]) if chain else []
        if further:
            yield from _ends(further, chain[1:])
        else:
            yield module, chain


# --- in the syntax of one function --------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _scanned(function: Callable[..., Any]) -> Mapping[Chain, bool]:
    """The chains from `self` in one function, each as long as it is written, and whether they are
    called and nothing else is done with them."""
    definition = _definition(function)
    if definition is None:
        return {}
    arguments = (*definition.args.posonlyargs, *definition.args.args)
    if not arguments:
        return {}
    aliases = aliases_in(definition, arguments[0].arg)
    parents = _parents(definition)
    found: dict[Chain, bool] = {}
    for node in ast.walk(definition):
        outside = parents.get(node)
        if isinstance(outside, (ast.Attribute, ast.Subscript)) and outside.value is node:
            continue  # `self.norm` in `self.norm.weight`
        called = isinstance(outside, ast.Call) and outside.func is node
        for chain in filter(None, chains_at(node, aliases)):
            found[chain] = found.get(chain, True) and called
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=4096)
def _only_first(function: Callable[..., Any]) -> bool:
    """Whether it takes no more than the first of what a module holds: `next(self.parameters())`."""
    definition = _definition(function)
    if definition is None:
        return False
    firsts = {
        inner
        for node in ast.walk(definition)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next"
        for inner in ast.walk(node)
    }
    return all(
        node in firsts
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and node.attr in OF_TENSORS
    )


def _definition(function: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # no source: nothing can be read from it
        return None
    return found if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
