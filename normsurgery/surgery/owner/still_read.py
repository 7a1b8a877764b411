"""Which of an owner's tensors its remaining code still reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import FunctionType

from torch import nn

from normsurgery.graph.positions import functions_of
from normsurgery.surgery.attribute_chains import (
    EVERY,
    Chain,
    Chains,
    Definition,
    chains_in,
    chains_of,
    functions_used,
)

# What a class runs to start afresh reads nothing that a forward computes with.
FRESH_START = frozenset({"__init__", "reset_parameters"})


def still_read(
    owner_class: type, forward: Definition, replaced: FunctionType, names: Sequence[str]
) -> dict[str, str]:
    """For each dotted tensor name that other code reads: which code does.

    Other code is the rewritten `forward`, every method of the user's classes that the old one did
    not run, other than those that only initialise, and what these reach through `self` or
    `super()`. A helper that only the old forward ran went with the norm.
    """
    found: dict[str, str] = {}
    if not names:
        return found
    for where, chains in _code(owner_class, forward, replaced):
        for name in names:
            wanted = tuple(name.split("."))
            if name not in found and any(_touches(chain, wanted) for chain in chains):
                found[name] = where
    return found


def _code(
    owner_class: type, forward: Definition, replaced: FunctionType
) -> Iterator[tuple[str, Chains]]:
    chains = chains_in(forward)
    yield "forward", chains
    before = set(functions_used(owner_class, _names(chains_of(replaced)), {})) | {replaced}
    apart = [function for function in _own_methods(owner_class) if function not in before]
    named = _names(chains.union(*map(chains_of, apart)))
    for function in dict.fromkeys((*functions_used(owner_class, named, {}), *apart)):
        if function is not replaced:
            yield function.__qualname__, chains_of(function)


def _names(chains: Chains) -> list[str]:
    return sorted({chain[0] for chain in chains if chain})


def _own_methods(owner_class: type) -> Iterator[FunctionType]:
    for base in owner_class.__mro__:
        if base.__module__.partition(".")[0] == "torch" or not issubclass(base, nn.Module):
            continue
        for name, value in vars(base).items():
            if name not in FRESH_START:
                yield from functions_of(value)


def _touches(chain: Chain, name: Chain) -> bool:
    """Whether one leads to the other, or to what holds it."""
    return all(one in (other, EVERY) for one, other in zip(chain, name, strict=False))
