"""Making a swapped structure again: on a fresh model, and around a file that holds no code."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx, nn

from normsurgery.errors import CannotRead, CannotRewrite, UsageError
from normsurgery.fold.neutral import NeutralBranch
from normsurgery.norms.weightstandardization import is_standardized, take_off
from normsurgery.plan import Plan
from normsurgery.steps import FoldStep, Step
from normsurgery.surgery.application import apply
from normsurgery.surgery.owner import Placement, is_rewritten, reapply, restore
from normsurgery.surgery.plan_record import record_plan
from normsurgery.surgery.references import ModuleReferences
from normsurgery.surgery.sharing import shared_tensors
from normsurgery.surgery.source import module_at
from normsurgery.treecopy import tree_copy

if TYPE_CHECKING:
    from normsurgery.report import Report


def rebuild(model: nn.Module, plan: Plan | Report) -> nn.Module:
    """Make the swapped structure again on a fresh model, before `load_state_dict`.

    Needs no inputs and no weights: `model` may be on the meta device. It is edited in place and
    returned (a model that is itself a norm comes back as the new module). Raises UsageError where
    the model is not the one the plan was made for, CannotRead where a forward that was rewritten
    is written differently now.
    """
    made = plan if isinstance(plan, Plan) else plan.plan
    _check_model(model, made)
    applied = apply(model, made, None)
    if len(applied.plan.steps) < len(made.steps):
        refused = applied.plan.skips[0]
        raise CannotRead(
            f"{refused.path} of {made.model} cannot be made again: {refused.reason}. The plan was "
            f"made with {_versions(made)}; use these versions, or swap the original model again."
        )
    record_plan(applied.model, made)
    return applied.model


def restore_originals(model: nn.Module) -> nn.Module:
    """A copy of a swapped model without what no pickle can hold; `restore_rewrites` undoes it.

    Every rewritten owner has its original class again, and does not run: its old forward looks for
    tensors that have moved. Every standardized weight is the raw one in a plain layer. The copy
    shares its other tensors with `model`.
    """
    copied = tree_copy(model)
    for module in copied.modules():
        if is_rewritten(module):
            restore(module)
        if is_standardized(module):
            take_off(module, baked=False)
    return copied


def holds_rewrites(model: nn.Module) -> bool:
    """Whether the model has something that `restore_originals` takes back."""
    return any(is_rewritten(module) or is_standardized(module) for module in model.modules())


def restore_rewrites(model: nn.Module, plan: Plan | Report) -> nn.Module:
    """Make again what `restore_originals` took back, in place; returns the model.

    Raises CannotRead where a forward is written differently than when the plan was made.
    """
    made = plan if isinstance(plan, Plan) else plan.plan
    # What a fold baked in is a plain layer, which is saved as it is.
    weights = tuple(
        s for s in made.steps if s.site.attach == "weight" and not isinstance(s, FoldStep)
    )
    if weights:
        model = apply(model, replace(made, steps=weights), None).model
    calls = [
        step for step in made.steps if step.site.form != "module" and not _is_gone(model, step)
    ]
    around = ModuleReferences(model)
    for path in dict.fromkeys(step.site.path for step in calls):
        owner = module_at(model, path)
        if isinstance(owner, fx.GraphModule):
            continue  # its graph is saved as it is
        placements = [
            Placement(s.site, s.child, _taken(owner, s)) for s in calls if s.site.path == path
        ]
        try:
            reapply(owner, placements, shared=shared_tensors(owner, placements, around))
        except CannotRewrite as error:
            raise CannotRead(
                f"the forward of {path or made.model} cannot be rewritten as it was: "
                f"{error.reason}. The plan was made with {_versions(made)}."
            ) from error
    return model


def _is_gone(model: nn.Module, step: Step) -> bool:
    """Whether its owner was part of a branch that was merged into another one."""
    parts = step.site.path.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    there = dict(model.named_modules())
    return any(isinstance(there.get(path), NeutralBranch) for path in above)


def _taken(owner: nn.Module, step: Step) -> nn.Module:
    child = owner._modules.pop(step.child, None)
    if child is None:
        raise CannotRead(
            f"{step.site.path or 'the model itself'} has no module {step.child!r} for its "
            "rewritten norm. The file is not the one its plan speaks of."
        )
    return child


def _check_model(model: nn.Module, plan: Plan) -> None:
    if type(model).__name__ != plan.model:
        raise UsageError(
            f"the plan was made for a {plan.model}, and this is a {type(model).__name__}. "
            "Build the same model again."
        )


def _versions(plan: Plan) -> str:
    return ", ".join(f"{name} {version}" for name, version in plan.versions.items())
