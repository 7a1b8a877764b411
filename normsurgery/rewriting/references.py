"""Who refers to a module of a model other than by calling it at its place in the tree.

A parent whose forward reads `self.norm.weight` computes with the norm's tensors itself: it would
ignore a replacement, or fail on it. The sources of every forward, and of the methods and properties
it reaches on `self`, are scanned for such reads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from normsurgery.rewriting.attribute_chains import EVERY, Chain, chains_of, functions_used
from normsurgery.rewriting.tree import holders, paths_of_all

# Facts that a replacement of the same shape and type also has.
HARMLESS = frozenset({"forward", "__call__", "training"})
HARMLESS_OF_TENSOR = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "is_cuda"})
# torch's fused encoder path, in these two functions, is switched off instead (fastpath.py).
SWITCHED_OFF: frozenset[object] = frozenset(
    {nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward}
)


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


class ModuleReferences:
    """Of one model, as it is when first asked, for all of its modules at once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def holder_of(self, module: nn.Module) -> str | None:
        """Where the module is held outside the module tree (a plain list, a bound method)."""
        return self._holders.get(id(module))

    def reads_of(self, module: nn.Module) -> list[Read]:
        """The reads of its attributes in the forwards of others."""
        return self._reads.get(id(module), [])

    def paths_of(self, module: nn.Module) -> list[str]:
        """Every path that reaches the module; "" is the model."""
        return self._paths.get(id(module), [])

    @functools.cached_property
    def _holders(self) -> dict[int, str]:
        return holders(self._model)

    @functools.cached_property
    def _reads(self) -> dict[int, list[Read]]:
        return _reads(self._model)

    @functools.cached_property
    def _paths(self) -> dict[int, list[str]]:
        return paths_of_all(self._model)


def _reads(model: nn.Module) -> dict[int, list[Read]]:
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
        reached = [found for value in reached for found in child_named(value, name)]
        for module in reached:
            if id(module) not in seen:
                seen.add(id(module))
                yield module, chain[position + 1 :]


def child_named(value: nn.Module, name: str) -> list[nn.Module]:
    """The modules that one name of a chain leads to."""
    if name == EVERY:
        return [child for child in value._modules.values() if child is not None]
    found = value._modules.get(name, vars(value).get(name))
    return [found] if isinstance(found, nn.Module) else []


def _forward_chains(owner: nn.Module) -> tuple[tuple[str, Chain], ...]:
    """(function name, chain) of everything of some length that the forward reads from `self`."""
    kinds = (FunctionType, MethodType, functools.partial)
    held = {name: value for name, value in vars(owner).items() if isinstance(value, kinds)}
    cls: type = type(owner)
    return _chains_used(cls, held) if held else _chains_of_class(cls)


@functools.lru_cache(maxsize=1024)
def _chains_of_class(owner: type) -> tuple[tuple[str, Chain], ...]:
    return _chains_used(owner, {})


def _chains_used(owner: type, held: Mapping[str, Any]) -> tuple[tuple[str, Chain], ...]:
    return tuple(
        (function.__qualname__, chain)
        for function in functions_used(owner, ["forward"], held)
        if function not in SWITCHED_OFF
        for chain in sorted(chains_of(function))
        if len(chain) > 1
    )
