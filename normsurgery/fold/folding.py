"""fold: norms out of a model, exactly, into the weights around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn
from torch.export import ExportedProgram

from normsurgery.errors import UsageError
from normsurgery.fold.carrying_out import carried_out
from normsurgery.fold.ground import choices_of
from normsurgery.fold.planning import Planner, Request
from normsurgery.fold.programs import folded_program
from normsurgery.fold.pruning import prune_identities
from normsurgery.fold.speed import measure_speed
from normsurgery.fold.untied_flags import correct_ties
from normsurgery.inputs import as_inputs, infer
from normsurgery.plan import Plan, versions
from normsurgery.randomstate import random_state_kept
from normsurgery.report import Report
from normsurgery.steps import FoldStep, Merge
from normsurgery.surgery.application import Applied, apply
from normsurgery.surgery.calls import recorded_calls
from normsurgery.surgery.journal import Journal
from normsurgery.surgery.plan_record import record_plan
from normsurgery.surgery.wrapped import has_mode, unwrapped
from normsurgery.treecopy import tree_copy

if TYPE_CHECKING:
    from normsurgery.inputs import Inputs
    from normsurgery.verify import Evidence


Model = TypeVar("Model", bound=nn.Module | ExportedProgram)


def fold(
    model: Model,
    *,
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    plan: Plan | None = None,
    inputs: Any = None,
    eval: bool = False,
    rmsnorm: bool = False,
    pad: Literal["refuse", "explicit"] = "refuse",
    untie: bool = False,
    calls: Sequence[Any] = (),
    prune: bool = False,
    verify: bool = True,
    time: bool = False,
    inplace: bool = False,
) -> tuple[Model, Report]:
    """Remove norms by absorbing them into their neighbours; each is proven or left with a reason.

    Args:
        model: a module in eval mode, or any with `eval=True`; or an ExportedProgram. It stays as it
            is, unless `inplace`; then `report.undo()` takes the change back.
        kind, only, exclude: which norms; or a ready `plan`.
        inputs: a tuple of positional or a dict of keyword arguments, or Inputs; inferred if None.
        eval: switch a model in train mode to eval.
        rmsnorm: also centre what writes to residual streams, so that LayerNorms that read them
            become RMSNorms.
        pad: "explicit" folds a norm also into convolutions that pad with zeros: a module that pads
            what a zero behind the norm was in front of it takes its place, and they pad nothing.
        untie: a tied weight that is in the way becomes a copy of its own.
        calls: further calls for which the fold must hold, each a dict of keyword arguments that are
            added to the inputs, or the whole of its inputs.
        prune: take what became nn.Identity out of the nn.Sequential that holds it, where nothing
            else refers to it; no name of another module changes.
        verify: measure the result against a float64 run of the original.
        time: count norm operators and measure how much faster a forward is, in some two seconds.

    Returns the folded model, of the user's own class and in eval mode, and the report: its plan
    names every norm, as a step or as a skip with the check that failed. Raises UsageError for a
    model in train mode, CannotTrace where it does not run on the inputs that were given.
    """
    if plan is not None:
        _require_fold(plan, chosen=kind is not None or bool(only) or bool(exclude))
    inner, notes = _opened(model, inplace)
    notes += switched_to_eval(inner, eval)
    given = infer(model) if inputs is None else as_inputs(inputs)
    choices = choices_of(rmsnorm=rmsnorm, pad=pad, untie=untie)
    changed: Any
    with random_state_kept(inner):
        original = tree_copy(inner, clone=True) if inplace else inner
        ready = _in_eval(original) if eval else original

        request = Request(kind, only, exclude, choices, calls)
        planner = Planner(ready, given, request) if plan is None else None
        decide = None if planner is None else planner.plan
        if isinstance(model, ExportedProgram):
            changed, report = folded_program(model, given, plan, decide, verify=verify, time=time)
            return changed, report

        def on_copy(made: Plan) -> Applied:
            return _apply(ready, tree_copy(ready, clone=True), made, given)

        made = carried_out(plan, decide, on_copy)
        journal = None
        if inplace:
            made, journal = _in_place(inner, made, given, eval, prune)
        elif prune:
            made = _pruned(made)
        evidence, unmeasured = _measured(original, made, given) if verify else (None, ())
        timed = time and made.plan.steps and not _is_meta(original)
        speed = measure_speed(original, made.model, given) if timed else None
    record_plan(made.model, made.plan)
    report = Report(
        verb="fold",
        plan=made.plan,
        keymap=made.keymap,
        evidence=evidence,
        versions=versions(),
        notes=(*notes, *made.notes, *unmeasured),
        journal=journal,
        speed=speed,
    )
    changed = made.model
    return changed, report


def _opened(model: nn.Module | ExportedProgram, inplace: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """The module to plan on, and what to say about it."""
    if not isinstance(model, ExportedProgram):
        return unwrapped(model)
    if inplace:
        raise UsageError("an exported program is not edited in place: leave out inplace.")
    return model.module(), ()


def _require_fold(plan: Plan, *, chosen: bool) -> None:
    if chosen:
        raise UsageError("a plan is complete: leave out kind, only and exclude.")
    other = next((step for step in plan.steps if not isinstance(step, FoldStep)), None)
    if other is not None:
        raise UsageError(
            f"this is no plan of a fold: it would {other.action} {other.site.label}. Use swap."
        )


def switched_to_eval(model: nn.Module, switch: bool) -> tuple[str, ...]:
    """What is switched to eval mode. Raises UsageError where that was not asked for."""
    if not has_mode(model):
        return ()
    training = [path for path, module in model.named_modules() if module.training]
    if not training or (not model.training and not switch):
        return ()
    if not switch:
        raise UsageError(
            f"{type(model).__name__} is in train mode, where norms compute with the batch. A fold "
            "holds in eval mode: call .eval() on it, or pass eval=True."
        )
    named = ", ".join(path or "the model" for path in training[:5])
    more = f" and {len(training) - 5} more" if len(training) > 5 else ""
    return (f"switched to eval mode: {named}{more}",)


def _in_eval(model: nn.Module) -> nn.Module:
    copied = tree_copy(model)
    return copied.eval()


def _apply(original: nn.Module, working: nn.Module, plan: Plan, inputs: Inputs) -> Applied:
    owners = dict.fromkeys(step.site.path for step in plan.steps if step.site.form != "module")
    owners |= dict.fromkeys(step.owner for step in plan.steps if isinstance(step, Merge))
    calls = recorded_calls(original, list(owners), inputs) if owners else {}
    applied = apply(working, plan, calls)
    correct_ties(applied.model, plan)
    return applied


def _in_place(
    model: nn.Module, made: Applied, inputs: Inputs, switch: bool, prune: bool
) -> tuple[Applied, Journal]:
    """What was carried out on a copy, again on the user's own model."""
    journal = Journal(model)
    try:
        if switch:
            model.eval()
        applied = _apply(model, model, made.plan, inputs)
        if prune:
            applied = _pruned(applied)
    except BaseException:
        journal.close()
        journal.undo()
        raise
    journal.close()
    return replace(applied, plan=made.plan), journal


def _pruned(applied: Applied) -> Applied:
    there = dict(applied.model.named_modules())  # a merge takes the branches out whole
    left = [
        s.site.path
        for s in applied.plan.steps
        if s.site.form == "module" and s.to == "identity" and s.site.path in there
    ]
    gone = prune_identities(applied.model, left)
    notes = (f"{len(gone)} nn.Identity taken out",) if gone else ()
    return replace(applied, notes=(*applied.notes, *notes))


def _measured(
    original: nn.Module, made: Applied, inputs: Inputs
) -> tuple[Evidence | None, tuple[str, ...]]:
    from normsurgery.verify import measure

    if _is_meta(original):
        return None, ("not measured: the model has no values (meta device)",)
    if not made.plan.steps:
        return None, ()
    return measure(original, made.model, made.plan, inputs), ()


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
