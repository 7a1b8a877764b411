"""Which tensors must stay where they are, since more than their owner's forward gets them there."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from normsurgery.rewriting.owner.rewriting import Placement, tensor_names
from normsurgery.rewriting.references import ModuleReferences


def shared_tensors(
    owner: nn.Module, placements: Collection[Placement], around: ModuleReferences
) -> dict[str, str]:
    """Of the old norms' tensors, by their names below `owner`, those that another module reaches.

    The values say how. A module that holds them and that is bound outside the owner too may be
    called there; another forward may read them by their names. around: of the model.
    """
    names = {name for p in placements for name in tensor_names(owner, p).values()}
    outside = {
        path: _bound_outside(owner, path, around)
        for path in {name.rpartition(".")[0] for name in names}
    }
    found: dict[str, str] = {}
    for name in sorted(names):
        path, _, local = name.rpartition(".")
        why = outside[path] or _held_or_read(owner, path, local, around)
        if why is not None:
            found[name] = why
    return found


def _bound_outside(owner: nn.Module, path: str, around: ModuleReferences) -> str | None:
    """Where a module below the owner is bound that is not below it, or None."""
    if not path:
        return None
    below = [f"{place}." if place else "" for place in around.paths_of(owner)]
    for other in around.paths_of(owner.get_submodule(path)):
        if not any(other.startswith(place) for place in below):
            return f"{path} is also {other}"
    return None


def _held_or_read(owner: nn.Module, path: str, local: str, around: ModuleReferences) -> str | None:
    holder = owner.get_submodule(path)
    place = around.holder_of(holder) if path else None
    if place is not None:
        return f"{path} is also held by {place}"
    own = around.paths_of(owner)
    reads = (r for r in around.reads_of(holder) if r.attribute == local and r.owner not in own)
    return next((str(read) for read in reads), None)
