"""Folding in an exported program: its tensors are edited, and the norms vanish from its graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from normsurgery.folding.carrying_out import Decide, carried_out
from normsurgery.folding.speed import measure_speed
from normsurgery.plans import Plan, versions
from normsurgery.randomstate import random_state_kept
from normsurgery.report import Report
from normsurgery.rewriting.programs import fold_program

if TYPE_CHECKING:
    from normsurgery.inputs import Inputs


def folded_program(
    program: ExportedProgram,
    inputs: Inputs,
    plan: Plan | None,
    decide: Decide | None,
    *,
    verify: bool,
    time: bool,
) -> tuple[ExportedProgram, Report]:
    """A new program without the norms of the plan, and the report; the given one is unchanged.

    decide: makes the plan on `program.module()`, where none is given, without the sites refused.
    Raises UsageError where a given plan cannot be carried out.
    """
    from normsurgery.verifying import measure

    original = program.module()
    with random_state_kept(original):
        made = carried_out(plan, decide, lambda chosen: fold_program(program, chosen))
        evidence = None
        if verify and made.plan.steps:
            evidence = measure(original, made.program.module(), made.plan, inputs)
        timed = time and made.plan.steps
        speed = measure_speed(original, made.program.module(), inputs) if timed else None
    return made.program, Report("fold", made.plan, made.keymap, evidence, versions(), speed=speed)
