"""Folding again finds nothing to do: a norm whose tensors are neutral already is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from normsurgery.artefacts.checkpoints import RECORD
from normsurgery.fold.checkpoint.evaluating import Evaluation
from normsurgery.fold.checkpoint.keys import Names
from normsurgery.fold.checkpoint.layout import Layout, read_object
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import Centre, Edit, Fill
from normsurgery.plan import Plan
from normsurgery.steps import Step
from normsurgery.survey import Skip


def without_neutral(plan: Plan, layout: Layout, names: Names) -> Plan:
    """The plan with a Skip for each step that would change nothing.

    The plan was made without values; only the tensors that it would make neutral are read here.
    What centring changes is seen in the record of an earlier fold: rounding hides it from a look
    at the values.
    """
    evaluation = Evaluation(edits_of(plan), names, layout.entries)
    before = set(_folded_before(layout))
    void = {
        step.site.index
        for step in plan.steps
        if _is_neutral(step, evaluation) and (_only_gains(step) or step.site.label in before)
    }
    skips = tuple(_skip(step) for step in plan.steps if step.site.index in void)
    steps = tuple(step for step in plan.steps if step.site.index not in void)
    return replace(plan, steps=steps, skips=(*skips, *plan.skips))


def edits_of(plan: Plan) -> tuple[Edit, ...]:
    """The edits of all steps, in order."""
    return tuple(edit for step in plan.steps for edit in step.edits)


def _is_neutral(step: Step, evaluation: Evaluation) -> bool:
    fills = [edit for edit in step.edits if isinstance(edit, Fill)]
    values = ((evaluation.source(edit.target), edit.value) for edit in fills)
    return bool(step.edits) and all(bool((tensor == value).all()) for tensor, value in values)


def _only_gains(step: Step) -> bool:
    """Whether all that the step moves is the norm's own scale and shift."""
    return any(isinstance(e, Fill) for e in step.edits) and not any(
        isinstance(edit, Centre) for edit in step.edits
    )


def _folded_before(layout: Layout) -> Iterator[str]:
    file = layout.directory / RECORD
    folds = read_object(file).get("folds", []) if file.is_file() else []
    for fold in folds:
        for step in Plan.from_json(fold["plan"]).steps:
            yield step.site.label


def _skip(step: Step) -> Skip:
    reason = f"{Check.COMPUTES.value}: its tensors are neutral already"
    return Skip(step.site.label, reason, "", step.site.kind)
