"""Who reads a norm without calling it.

A parent whose forward reads `self.norm.weight` computes with the norm's tensors itself: it would
ignore a replacement, or fail on it. The sources of every forward, and of the methods and properties
it reaches on `self`, are scanned for such reads.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# Facts that a replacement of the same shape and type also has.
HARMLESS = frozenset({"forward", "__call__", "training"})
HARMLESS_OF_TENSOR = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "is_cuda"})


Chain = tuple[str, ...]
Chains = frozenset[Chain]
Aliases = dict[str, Chains]

LONGEST = 12  # `layer = layer.next` in a loop would grow without end
EVERY = "*"  # in a chain: an element that is only known when the forward runs
# torch's fused encoder path, in these two functions, is switched off instead (fastpath.py).
SWITCHED_OFF = frozenset({nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward})


@dataclass(frozen=True)
class Read:
    """An expression in a forward that reads an attribute of a module instead of calling it.

    fact: only the dtype, the device or the shape of that attribute is read.
    """

    owner: str
    function: str
    expression: str
    attribute: str
    fact: bool

    def __str__(self) -> str:
        return f"{self.owner or 'the model itself'} reads {self.expression} in {self.function}"


def reads_of(model: nn.Module, wanted: nn.Module) -> Iterator[Read]:
    """Every read of an attribute of `wanted` in the forward of another module."""
    yield from reads(model).get(id(wanted), ())


def reads(model: nn.Module) -> dict[int, list[Read]]:
    """Every read of an attribute of a module in the forward of another one, by the `id` of it."""
    found: dict[int, list[Read]] = {}
    for path, owner in model.named_modules():
        for function, chain in _forward_chains(owner):
            for module, rest in _passed(owner, chain):
                if module is not owner and rest[0] not in HARMLESS:
                    fact = len(rest) > 1 and rest[1] in HARMLESS_OF_TENSOR
                    read = Read(path, function, "self." + ".".join(chain), rest[0], fact)
                    found.setdefault(id(module), []).append(read)
    return found


def _passed(owner: nn.Module, chain: Chain) -> Iterator[tuple[nn.Module, Chain]]:
    """The modules that `self.<chain>` reaches on its way, with what is left of it from there."""
    reached: list[nn.Module] = [owner]
    seen: set[int] = set()
    for position, name in enumerate(chain[:-1]):
        reached = [found for value in reached for found in _step(value, name)]
        for module in reached:
            if id(module) not in seen:
                seen.add(id(module))
                yield module, chain[position + 1 :]


def _step(value: nn.Module, name: str) -> list[nn.Module]:
    if name == EVERY:
        return [child for child in value._modules.values() if child is not None]
    found = value._modules.get(name, vars(value).get(name))
    return [found] if isinstance(found, nn.Module) else []


def _forward_chains(owner: nn.Module) -> Iterator[tuple[str, Chain]]:
    """(function name, chain) of everything the forward of `owner` reads from `self`."""
    seen: set[str] = set()
    open_names = ["forward"]
    while open_names:
        name = open_names.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _definitions(owner, name):
            for chain in sorted(_scan(function)):
                yield function.__qualname__, chain
                open_names.append(chain[0])


def _definitions(owner: nn.Module, name: str) -> Iterator[Callable[..., Any]]:
    """Every function that `self.<name>` or `super().<name>` may run; torch's own base excepted."""
    own = vars(owner).get(name)
    candidates = [own] if own is not None else []
    candidates += [vars(cls)[name] for cls in type(owner).__mro__ if name in vars(cls)]
    for candidate in candidates:
        function = _plain_function(candidate)
        if function is None or function in SWITCHED_OFF:
            continue
        if function.__module__ != nn.Module.__module__:
            yield function


def _plain_function(value: Any) -> Callable[..., Any] | None:
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    if isinstance(value, functools.partial):
        value = value.func
    value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
    return value if inspect.isfunction(value) else None


@functools.lru_cache(maxsize=4096)
def _scan(function: Callable[..., Any]) -> Chains:
    """The attribute chains from `self` in one function: `self.norm.weight` as (norm, weight)."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source: nothing can be read from it
        return frozenset()
    definition = tree.body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return frozenset()
    arguments = (*definition.args.posonlyargs, *definition.args.args)
    if not arguments:
        return frozenset()
    aliases = _aliases(definition, arguments[0].arg)
    found = {id(node): _chains(node, aliases) for node in ast.walk(definition)}
    for node in ast.walk(definition):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and found[id(node)]:
            found[id(node.value)] = frozenset()  # `self.norm` in `self.norm.weight`
    return frozenset(chain for chains in found.values() for chain in chains if chain)


def _aliases(definition: ast.AST, self_name: str) -> Aliases:
    """Local names that stand for `self` or for chains from it: `norm = self.norm`.

    A name that is bound more than once stands for all that it was bound to.
    """
    aliases: Aliases = {self_name: frozenset({()})}
    size = -1
    while size != sum(map(len, aliases.values())):  # a name may stand for another name
        size = sum(map(len, aliases.values()))
        for node in ast.walk(definition):
            target, chains = _bound(node, aliases)
            if target is not None and target != self_name:
                known = aliases.get(target, frozenset())
                short = frozenset(chain for chain in chains if len(chain) <= LONGEST)
                aliases[target] = known | short
    return aliases


def _bound(node: ast.AST, aliases: Aliases) -> tuple[str | None, Chains]:
    """The name that a statement binds to chains, by assignment or as a loop over a container."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return _name(node.targets[0]), _chains(node.value, aliases)
    if not isinstance(node, (ast.For, ast.comprehension)):
        return None, frozenset()
    target, values = node.target, node.iter
    if _calls(values, "enumerate") and isinstance(target, ast.Tuple) and len(target.elts) == 2:
        assert isinstance(values, ast.Call)
        target, values = target.elts[1], values.args[0]
    return _name(target), frozenset((*chain, EVERY) for chain in _chains(values, aliases))


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _chains(node: ast.AST, aliases: Aliases) -> Chains:
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
        elif _is_getattr(node):
            assert isinstance(node, ast.Call) and isinstance(node.args[1], ast.Constant)
            names.append(str(node.args[1].value))
            node = node.args[0]
        else:
            return frozenset()
    starts = aliases.get(node.id, frozenset())
    return frozenset((*start, *reversed(names)) for start in starts)


def _is_getattr(node: ast.AST) -> bool:
    return (
        _calls(node, "getattr")
        and isinstance(node, ast.Call)
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    )


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
