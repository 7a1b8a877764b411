"""Exported programs: the graph itself is rewritten, and a program comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.export import ExportedProgram

from normsurgery.edits.types import Create, Drop, writes
from normsurgery.errors import CannotRewrite, UsageError
from normsurgery.folding.weights import edit_weights
from normsurgery.plans import Plan
from normsurgery.rewriting.application import aliases_of
from normsurgery.rewriting.building import Built, built_step, note
from normsurgery.rewriting.keymap import Entries, KeyMap
from normsurgery.rewriting.owner.exported import rewrite_exported
from normsurgery.rewriting.source import tensor_at
from normsurgery.survey import Skip


@dataclass(frozen=True)
class AppliedToProgram:
    """A new program, the plan as it was carried out, and how state_dict keys moved."""

    program: ExportedProgram
    plan: Plan
    keymap: KeyMap


def apply_to_program(program: ExportedProgram, plan: Plan) -> AppliedToProgram:
    """A new program with the norms of `plan` in it; dynamic shapes stay dynamic.

    A norm that cannot be rewritten becomes a Skip of the returned plan; `program` is unchanged.
    Raises UsageError where none can.
    """
    module = program.module()
    built = [built_step(module, step, plan.init) for step in plan.steps]
    refused = _refused(program, built)
    done = [item for item in built if item.step.site.label not in refused]
    if not done:
        reasons = "; ".join(f"{label}: {skip.reason}" for label, skip in refused.items())
        raise UsageError(f"every selected site of the exported program is refused: {reasons}.")
    changed = rewrite_exported(program, [(item.step.site, item.new) for item in done])
    carried_out = replace(
        plan, steps=tuple(item.step for item in done), skips=(*refused.values(), *plan.skips)
    )
    return AppliedToProgram(changed, carried_out, _keymap(program, changed, done, carried_out))


def fold_program(program: ExportedProgram, plan: Plan) -> AppliedToProgram:
    """A new program with the edits of a fold made and its norms taken out.

    Where a norm cannot be taken out nothing is done, and it is a Skip of the returned plan. Raises
    CannotHold where a weight cannot hold what the fold makes of it.
    """
    module = program.module()
    # A norm that stays as an affine is made of tensors that other steps may have changed.
    edit_weights(module, plan.steps)
    built = [built_step(module, step, plan.init) for step in plan.steps]
    refused = _refused(program, built)
    if refused:
        left = tuple(step for step in plan.steps if step.site.label not in refused)
        skips = (*refused.values(), *plan.skips)
        return AppliedToProgram(
            program, replace(plan, steps=left, skips=skips), Entries().keymap(plan)
        )
    edits = [e for step in plan.steps for e in step.edits if not isinstance(e, Drop)]
    tensors = {name: tensor_at(module, name).detach() for edit in edits for name in writes(edit)}
    changed = rewrite_exported(
        program,
        [(item.step.site, item.new) for item in built],
        tensors,
        {edit.target: edit.like for edit in edits if isinstance(edit, Create)},
    )
    return AppliedToProgram(changed, plan, _keymap(program, changed, built, plan))


def _refused(program: ExportedProgram, built: Sequence[Built]) -> dict[str, Skip]:
    """The sites that cannot be rewritten, each tried alone, by label."""
    refused: dict[str, Skip] = {}
    for item in built:
        site = item.step.site
        try:
            rewrite_exported(program, [(site, item.new)])
        except CannotRewrite as error:
            reason = f"the program cannot be rewritten: {error.reason}"
            refused[site.label] = Skip(site.label, reason, "", site.kind)
    return refused


def _keymap(
    old: ExportedProgram, new: ExportedProgram, done: Sequence[Built], plan: Plan
) -> KeyMap:
    entries = Entries()
    left = set(old.state_dict) - set(new.state_dict)
    for position, item in enumerate(done):
        left -= note(position, item, ("",), entries, f"{item.step.child}.", set(new.state_dict))
    entries.dropped += sorted(left)
    entries.aliases = aliases_of(old.module(), plan)
    return entries.keymap(plan)
