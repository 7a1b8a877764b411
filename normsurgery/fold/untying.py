"""Modules that are shared, and given a copy where sharing is all that blocks a fold.

All modules that can be split are split on a copy of the model, and that is planned. What both
halves would hold alike in the end stays shared; the others are steps in front of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from normsurgery.fold.checks import Check
from normsurgery.fold.edits import Edit
from normsurgery.fold.ground import Choices
from normsurgery.fold.own_copies import make_copies
from normsurgery.fold.shared_modules import possible_copies
from normsurgery.inputs import Inputs
from normsurgery.plan import Plan, Step
from normsurgery.survey import Skip
from normsurgery.treecopy import tree_copy

Decide = Callable[[nn.Module], Plan]


def with_own_copies(
    made: Plan, model: nn.Module, inputs: Inputs, choices: Choices, decide: Decide
) -> Plan:
    """The plan, or where a shared module is in the way, one that gives it a copy.

    made: what `decide` says of the model as it is. Without `choices.untie` it stays what it is,
    and its refusals say what untying would cost.
    """
    blocked = _blocked(made)
    if not blocked or choices.keep_classes:
        return made
    copies = possible_copies(model, inputs, first=len(made.steps) + len(made.skips))
    if not copies:
        return made
    better = _planned(model, copies, decide)
    needed = [step for step in copies if _is_needed(step, better)]
    if len(needed) < len(copies):
        copies, better = needed, _planned(model, needed, decide)
    freed = blocked - _blocked(better)
    if not freed:
        return made
    if choices.untie:
        return replace(better, steps=(*copies, *better.steps))
    return _with_hints(made, freed, copies)


def _planned(model: nn.Module, copies: Sequence[Step], decide: Decide) -> Plan:
    tree = tree_copy(model)
    make_copies(tree, copies, None)
    return decide(tree)


def _blocked(plan: Plan) -> frozenset[str]:
    """Labels of the norms that stay, or stay an affine, because a module is called again."""
    left = {skip.path for skip in plan.skips if _is_called_again(skip.reason)}
    reduced = (step for step in plan.steps if any(map(_is_called_again, step.notes)))
    return frozenset(left | {step.site.label for step in reduced})


def _is_called_again(reason: str) -> bool:
    return reason.startswith(Check.CALLED_AGAIN.value)


def _is_needed(step: Step, plan: Plan) -> bool:
    """Whether the copy is edited in another way than what it is a copy of.

    A forward is rewritten once: one with a norm to take out of it keeps its shared modules.
    """
    rewritten = {made.site.path for made in plan.steps if made.site.form != "module"}
    if step.site.form != "module" and step.site.path in rewritten:
        return False
    edits = [edit for made in plan.steps for edit in made.edits]
    path = f"{step.site.path}.{step.child}".strip(".")
    return _below(edits, f"{path}.") != _below(edits, f"{step.site.settings['source']}.")


def _below(edits: Sequence[Edit], prefix: str) -> list[Edit]:
    """The edits of tensors whose names begin so, without that beginning."""
    return [_shortened(edit, prefix) for edit in edits if edit.target.startswith(prefix)]


def _shortened(edit: Edit, prefix: str) -> Edit:
    names: dict[str, Any] = {
        field.name: getattr(edit, field.name).removeprefix(prefix)
        for field in fields(edit)
        if field.name in ("target", "weight", "like", "source")
    }
    return replace(edit, **names)


def _with_hints(plan: Plan, freed: frozenset[str], copies: Sequence[Step]) -> Plan:
    """The plan with what untie=True would do for the norms that it frees."""
    size = sum(step.site.settings["bytes"] for step in copies)
    names = ", ".join(dict.fromkeys(step.site.settings["source"] for step in copies))
    hint = f"untie=True gives {names} a copy for every call that needs one ({size} bytes)."

    def hinted(skip: Skip) -> Skip:
        return replace(skip, hint=hint) if skip.path in freed else skip

    def noted(step: Step) -> Step:
        if step.site.label not in freed:
            return step
        notes = (f"{n}. {hint}" if _is_called_again(n) else n for n in step.notes)
        return replace(step, notes=tuple(notes))

    return replace(plan, steps=tuple(map(noted, plan.steps)), skips=tuple(map(hinted, plan.skips)))
