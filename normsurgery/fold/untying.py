"""Modules that are shared, and given a copy where sharing is all that blocks a fold.

All modules that can be split are split on a copy of the model, and that is planned. What both
halves would hold alike in the end stays shared; the others are steps in front of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from normsurgery.fold.checks import NoMatch
from normsurgery.fold.edits import Edit
from normsurgery.fold.own_copies import make_copies
from normsurgery.fold.shared_modules import possible_copies
from normsurgery.plan import Plan
from normsurgery.steps import Untie
from normsurgery.treecopy import tree_copy

if TYPE_CHECKING:
    from normsurgery.fold.planning import Planner
    from normsurgery.fold.worklist import Key


def with_own_copies(
    planner: Planner, made: Plan, blocked: frozenset[int], refused: Mapping[Key, NoMatch]
) -> Plan:
    """The plan, or where a shared module is in the way, one that gives it a copy.

    made: the plan for the model as it is; blocked: the norms that stay because a module is called
    again. Without `choices.untie` it stays what it is, and its refusals say what untying costs.
    """
    copies = possible_copies(planner.model, planner.inputs, first=len(made.steps) + len(made.skips))
    if not copies:
        return made
    better, still = _planned(planner, copies, refused)
    needed = [step for step in copies if _is_needed(step, better)]
    if len(needed) < len(copies):
        copies = needed
        better, still = _planned(planner, needed, refused)
    freed = blocked - still
    if not freed:
        return made
    if planner.request.choices.untie:
        return replace(better, steps=(*copies, *better.steps))
    hint = _hint(copies)
    return planner.decided(refused, dict.fromkeys(freed, hint))[0]


def _planned(
    planner: Planner, copies: Sequence[Untie], refused: Mapping[Key, NoMatch]
) -> tuple[Plan, frozenset[int]]:
    tree = tree_copy(planner.model)
    make_copies(tree, copies, None)
    return planner.on(tree).decided(refused, {})


def _is_needed(step: Untie, plan: Plan) -> bool:
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


def _hint(copies: Sequence[Untie]) -> str:
    size = sum(step.size for step in copies)
    names = ", ".join(dict.fromkeys(step.source for step in copies))
    return f"untie=True gives {names} a copy for every call that needs one ({size} bytes)."
