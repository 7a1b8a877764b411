"""Rewriting the one forward that holds a norm as a call or a formula.

The smallest incision: the owner keeps its class (a subclass of it, on that one instance), its
methods, attributes and hooks; only the norm's expression becomes `self.<name>(...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from normsurgery.errors import CannotRewrite
from normsurgery.surgery.owner.install import install, is_rewritten, original_class, restore
from normsurgery.surgery.owner.proof import prove
from normsurgery.surgery.owner.rewriting import OwnerCall, Placement, Rewriting
from normsurgery.surgery.owner.source import rewriting

__all__ = [
    "CannotRewrite",
    "OwnerCall",
    "Placement",
    "Rewriting",
    "is_rewritten",
    "original_class",
    "reapply",
    "restore",
    "rewrite_owner",
]

NOTHING: Mapping[str, str] = MappingProxyType({})


def rewrite_owner(
    owner: nn.Module,
    placements: Sequence[Placement],
    calls: Sequence[OwnerCall],
    *,
    modes: Sequence[bool] = (False, True),
    shared: Mapping[str, str] = NOTHING,
) -> Rewriting:
    """Put each placement's module in the place of its call or formula, editing `owner` in place.

    The new forward is accepted only if, with the norms swapped to themselves, it does on the
    recorded `calls` what the owner does, in each of `modes` (whether it trains). The tensors that
    the new norms take over leave the owner (`Rewriting.moved`), those that other code reads stay
    (`Rewriting.kept`), and so do those in `shared`, by their names below the owner, with the
    reason.

    Raises CannotRewrite, and then `owner` is as it was.
    """
    found = _keeping(rewriting(owner, placements), shared)
    prove(owner, found, placements, calls, modes)
    install(owner, found, {p.name: p.module for p in placements})
    return found


def reapply(
    owner: nn.Module,
    placements: Sequence[Placement],
    *,
    shared: Mapping[str, str] = NOTHING,
) -> Rewriting:
    """Make a rewrite again that was accepted before, on the original class, without any call.

    shared: as for `rewrite_owner`.

    Raises CannotRewrite where the forward's source is not the one that the sites speak of.
    """
    found = _keeping(rewriting(owner, placements), shared)
    install(owner, found, {p.name: p.module for p in placements})
    return found


def _keeping(found: Rewriting, shared: Mapping[str, str]) -> Rewriting:
    """The same, but these tensors stay with the owner."""
    stays = {name: why for name, why in shared.items() if name in found.moved}
    moved = tuple(name for name in found.moved if name not in stays)
    return replace(found, moved=moved, kept={**found.kept, **stays})
