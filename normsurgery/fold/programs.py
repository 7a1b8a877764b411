"""Folding in an exported program: its tensors are edited, and the norms vanish from its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from normsurgery.errors import UsageError
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.editing import CannotHold
from normsurgery.fold.speed import measure_speed
from normsurgery.fold.twins import followers
from normsurgery.plan import Plan, versions
from normsurgery.randomstate import random_state_kept
from normsurgery.report import Report
from normsurgery.surgery.programs import AppliedToProgram, fold_program

if TYPE_CHECKING:
    from normsurgery.inputs import Inputs

Decide = Callable[[dict[str, NoMatch]], Plan]


def folded_program(
    program: ExportedProgram,
    inputs: Inputs,
    plan: Plan | None,
    decide: Decide,
    *,
    verify: bool,
    time: bool,
) -> tuple[ExportedProgram, Report]:
    """A new program without the norms of the plan, and the report; the given one is unchanged.

    decide: makes the plan on `program.module()`, where none is given, without the sites refused.
    Raises UsageError where a given plan cannot be carried out.
    """
    from normsurgery.verify import measure

    original = program.module()
    with random_state_kept(original):
        made = _carried_out(program, plan, decide)
        evidence = None
        if verify and made.plan.steps:
            evidence = measure(original, made.program.module(), made.plan, inputs)
        timed = time and made.plan.steps
        speed = measure_speed(original, made.program.module(), inputs) if timed else None
    return made.program, Report("fold", made.plan, made.keymap, evidence, versions(), speed=speed)


def _carried_out(program: ExportedProgram, plan: Plan | None, decide: Decide) -> AppliedToProgram:
    """A step that turns out impossible is decided again without."""
    refused: dict[str, NoMatch] = {}
    while True:
        made = decide(refused) if plan is None else plan
        try:
            applied = fold_program(program, made)
        except CannotHold as error:
            if plan is not None:
                raise
            refused[error.step.site.label] = error.match
            continue
        done = {step.site.label for step in applied.plan.steps}
        left = [step.site.label for step in made.steps if step.site.label not in done]
        if not left:
            return applied
        reasons = {skip.path: skip.reason for skip in applied.plan.skips}
        if plan is not None:
            raise UsageError(
                f"{left[0]}: {reasons[left[0]]}. Make a new plan without it (exclude)."
            )
        impossible = {label: NoMatch(Check.NOT_REWRITABLE, reasons[label]) for label in left}
        if impossible.keys() <= refused.keys():
            impossible = with_companions(made, impossible)
        if impossible.keys() <= refused.keys():
            raise UsageError(f"{left[0]}: {reasons[left[0]]}. Leave it out (exclude).")
        refused |= impossible


def with_companions(plan: Plan, impossible: Mapping[str, NoMatch]) -> dict[str, NoMatch]:
    """With the steps that hold the edits of an impossible one, and all that these lead."""
    found = dict(impossible)
    for lead in plan.steps:
        group = [lead.site.label, *(site.label for site in followers(lead, plan.steps))]
        match = next((impossible[label] for label in group if label in impossible), None)
        if match is not None:
            found |= {label: impossible.get(label, match) for label in group}
    return found
