"""Rewriting the one forward that holds a norm as a call or a formula.

The smallest incision: the owner keeps its class (a subclass of it, on that one instance), its
methods, attributes and hooks; only the norm's expression becomes `self.<name>(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from torch import nn

from normsurgery.errors import CannotRewrite
from normsurgery.surgery.owner import fx, source
from normsurgery.surgery.owner.install import install, is_rewritten, original_class, restore
from normsurgery.surgery.owner.proof import prove
from normsurgery.surgery.owner.rewriting import OwnerCall, Placement, Rewriting
from normsurgery.survey import CallSite

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

Way = Callable[[nn.Module, Sequence[Placement]], Rewriting]
NOTHING: Mapping[str, str] = MappingProxyType({})


def rewrite_owner(
    owner: nn.Module,
    placements: Sequence[Placement],
    calls: Sequence[OwnerCall],
    *,
    modes: Sequence[bool] = (False, True),
    shared: Mapping[str, str] = NOTHING,
    following: Sequence[CallSite] = (),
) -> Rewriting:
    """Put each placement's module in the place of its call or formula, editing `owner` in place.

    By fx first, where that is exactly faithful, else in the source of its forward; either is
    accepted only if, with the norms swapped to themselves, it does on the recorded `calls` what
    the owner does, in each of `modes` (whether it trains). The tensors that the new norms take over
    leave the owner (`Rewriting.moved`), those that other code reads stay (`Rewriting.kept`), and so
    do those in `shared`, by their names below the owner, with the reason. following: other places
    in that forward that are to be rewritten next; only the source way knows them afterwards.

    Raises CannotRewrite, and then `owner` is as it was.
    """

    def accepted(way: Callable[[nn.Module, Sequence[Placement]], Rewriting]) -> Rewriting:
        found = _keeping(way(owner, placements), shared)
        prove(owner, found, placements, calls, modes)
        return found

    ways: Sequence[Way] = (fx.rewriting, source.rewriting)
    if following:
        ways = (partial(source.rewriting, following=following), fx.rewriting)
    return _install_first(owner, placements, ways, accepted)


def reapply(
    owner: nn.Module,
    placements: Sequence[Placement],
    *,
    shared: Mapping[str, str] = NOTHING,
    following: Sequence[CallSite] = (),
) -> Rewriting:
    """Make a rewrite again that was accepted before, on the original class, without any call.

    shared, following: as for `rewrite_owner`.

    Raises CannotRewrite where the forward's source is not the one that the sites speak of.
    """
    ways = (partial(source.rewriting, following=following), fx.rewriting)
    return _install_first(
        owner, placements, ways, lambda way: _keeping(way(owner, placements), shared)
    )


def _keeping(found: Rewriting, shared: Mapping[str, str]) -> Rewriting:
    """The same, but these tensors stay with the owner."""
    stays = {name: why for name, why in shared.items() if name in found.moved}
    moved = tuple(name for name in found.moved if name not in stays)
    return replace(found, moved=moved, kept={**found.kept, **stays})


def _install_first(
    owner: nn.Module,
    placements: Sequence[Placement],
    ways: Sequence[Way],
    make: Callable[[Way], Rewriting],
) -> Rewriting:
    reasons: dict[str, None] = {}
    for way in ways:
        try:
            rewriting = make(way)
            install(owner, rewriting, {p.name: p.module for p in placements})
        except CannotRewrite as refusal:
            reasons[refusal.reason] = None
        else:
            return rewriting
    raise CannotRewrite("; ".join(reasons))
