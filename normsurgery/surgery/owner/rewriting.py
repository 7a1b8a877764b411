"""What goes into an owner, what it is called with, and what a rewritten forward is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normsurgery.errors import CannotRewrite
from normsurgery.spec import Source
from normsurgery.surgery.relation import tensors_in
from normsurgery.survey import CallSite, Site


@dataclass(frozen=True)
class Placement:
    """A norm that takes the place of one call or formula: `owner.<name> = module`.

    `source` is what the module was converted from; it is needed only where the old norm's tensors
    live outside the owner. `copied` is set where it is no norm but a copy of the module of that
    name, which the expression calls.
    """

    site: Site
    name: str
    module: nn.Module
    source: Source | None = None
    copied: str = ""

    @property
    def call(self) -> CallSite:
        if self.site.call is None:
            raise CannotRewrite(f"{self.site.label} is a module, not a call in a forward")
        return self.site.call


@dataclass(frozen=True)
class OwnerCall:
    """One recorded call of an owner, to replay."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False


@dataclass(frozen=True)
class Rewriting:
    """A new forward for an owner, as a function of `self` alone, so that it fits any copy.

    moved: tensors (dotted names below the owner) that the new norms take over and that leave it.
    kept: tensors of the old norms that stay because other code reads them, with that reason.
    """

    forward: Callable[..., Any]
    moved: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


def tensor_names(owner: nn.Module, placement: Placement) -> dict[str, str]:
    """Role -> dotted name below the owner, for the old norm's tensors that live there."""
    names: dict[str, str] = {}
    for role, full_name in placement.site.parameters.items():
        name = _relative(owner, full_name, placement.site.paths)
        if name is None and placement.source is not None:
            name = _name_of(owner, placement.source.tensors.get(role))
        if name is not None:
            names[role] = name
    return names


def tensor_at(owner: nn.Module, dotted: str) -> Tensor:
    parent, _, name = dotted.rpartition(".")
    value = getattr(owner.get_submodule(parent), name)
    if not isinstance(value, Tensor):
        raise CannotRewrite(f"{dotted} is not a tensor of {type(owner).__name__}")
    return value


def check_distinct(placements: Sequence[Placement]) -> None:
    """One owner, one function, one expression each. Raises CannotRewrite."""
    if len({(p.call.function, p.call.source_hash) for p in placements}) > 1:
        raise CannotRewrite("its norms stand in two different functions")
    if len({p.name for p in placements}) < len(placements):
        raise CannotRewrite("two norms were given the same name")
    if len({p.call.output for p in placements}) < len(placements):
        raise CannotRewrite(
            "one expression in its forward computes several norms, one after the other"
        )


def _relative(owner: nn.Module, full_name: str, paths: Sequence[str]) -> str | None:
    tensors = tensors_in(owner)
    for path in paths:
        prefix = f"{path}." if path else ""
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and name in tensors:
            return name
    return None


def _name_of(owner: nn.Module, tensor: Tensor | None) -> str | None:
    return next((name for name, own in tensors_in(owner).items() if own is tensor), None)
