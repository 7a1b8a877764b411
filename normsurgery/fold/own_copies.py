"""Modules that become two: one that is bound twice, or called in two places of one forward.

An Untie says where a copy goes: to a path that bound the shared module (a site of
form "module"), or to a call in the owner's forward ("formula"), which then calls its child `child`.
Its edits name the copies of the tensors. These steps come first in a plan.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from normsurgery.steps import Step, Untie
from normsurgery.surgery.owner import OwnerCall, Placement, reapply, rewrite_owner
from normsurgery.surgery.source import module_at
from normsurgery.surgery.tree import paths_of
from normsurgery.treecopy import tree_copy

KIND = "shared module"


def make_copies(
    model: nn.Module, steps: Sequence[Step], calls: Mapping[str, Sequence[OwnerCall]] | None
) -> None:
    """Carry out the Untie steps, in place.

    calls: recorded calls of each owner by its path, to prove its new forward on, in eval mode;
        None: it was proven before, and is made again.

    Raises CannotRewrite where an owner's forward cannot be rewritten; that owner is as it was.
    """
    own = [step for step in steps if isinstance(step, Untie)]
    for step in own:
        if step.site.form == "module":
            _bind_copy(model, step.site.path)
    in_forwards = [step for step in own if step.site.form != "module"]
    for path in dict.fromkeys(step.site.path for step in in_forwards):
        group = [step for step in in_forwards if step.site.path == path]
        _call_copies(model, path, group, None if calls is None else calls.get(path, ()))


def _call_copies(
    model: nn.Module, path: str, steps: Sequence[Untie], calls: Sequence[OwnerCall] | None
) -> None:
    owner = module_at(model, path)
    placements = [
        Placement(
            step.site,
            step.child,
            tree_copy(module_at(model, step.source), clone=True),
            copied=_below(path, step.source),
        )
        for step in steps
    ]
    if calls is None:
        reapply(owner, placements)
    else:
        rewrite_owner(owner, placements, calls, modes=(False,))


def _below(path: str, full: str) -> str:
    return full.removeprefix(f"{path}.") if path else full


def _bind_copy(model: nn.Module, path: str) -> None:
    """A module of its own at `path`, in containers of its own where those are shared as well."""
    parent = model
    *containers, last = path.split(".")
    for name in containers:
        child = parent._modules[name]
        assert child is not None
        if len(paths_of(model, child)) > 1:
            child = parent._modules[name] = _same_contents(child)
        parent = child
    shared = parent._modules[last]
    assert shared is not None
    parent._modules[last] = tree_copy(shared, clone=True)


def _same_contents(module: nn.Module) -> nn.Module:
    """Another module object with the very same tensors and children."""
    made = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)):
            vars(made)[name] = copy.copy(value)
    return made
