"""fold: norms out of a model, exactly, into the weights around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn
from torch.export import ExportedProgram

from normsurgery.errors import UsageError
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.editing import CannotHold
from normsurgery.fold.ground import Choices
from normsurgery.fold.planning import plan_fold
from normsurgery.fold.programs import folded_program, with_companions
from normsurgery.fold.pruning import prune_identities
from normsurgery.fold.speed import measure_speed
from normsurgery.inputs import as_inputs, infer
from normsurgery.plan import MERGED, Plan, Step, versions
from normsurgery.randomstate import random_state_kept
from normsurgery.report import Report
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
PADS = ("refuse", "explicit")


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
    assume_inputs: bool = False,
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
        assume_inputs: fold also where code that these inputs did not reach might see the change.
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
    notes += _eval_notes(inner, eval)
    given = infer(model) if inputs is None else as_inputs(inputs)
    if pad not in PADS:
        raise UsageError(f"pad is {pad!r}; it must be one of: {', '.join(PADS)}.")
    choices = Choices(
        untie=untie,
        explicit_pad=pad == "explicit",
        assume_inputs=assume_inputs,
        rmsnorm=rmsnorm,
    )
    changed: Any
    with random_state_kept(inner):
        original = tree_copy(inner, clone=True) if inplace else inner
        ready = _in_eval(original) if eval else original

        def decide(refused: dict[str, NoMatch]) -> Plan:
            return plan_fold(
                ready,
                given,
                kind=kind,
                only=only,
                exclude=exclude,
                choices=choices,
                refused=refused,
            )

        if isinstance(model, ExportedProgram):
            changed, report = folded_program(model, given, plan, decide, verify=verify, time=time)
            return changed, report
        made = _carried_out(ready, given, plan, decide)
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
    other = next((step for step in plan.steps if step.action != "fold"), None)
    if other is not None:
        raise UsageError(
            f"this is no plan of a fold: it would {other.action} {other.site.label}. Use swap."
        )


def _eval_notes(model: nn.Module, switch: bool) -> tuple[str, ...]:
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


def _carried_out(
    original: nn.Module,
    inputs: Inputs,
    plan: Plan | None,
    decide: Callable[[dict[str, NoMatch]], Plan],
) -> Applied:
    """The plan carried out on a copy. A step that turns out impossible is decided again without."""
    refused: dict[str, NoMatch] = {}
    while True:
        made = decide(refused) if plan is None else plan
        working = tree_copy(original, clone=True)
        try:
            applied = _apply(original, working, made, inputs)
        except CannotHold as error:
            if plan is not None or error.step.site.label in refused:
                raise
            refused[error.step.site.label] = error.match
            continue
        impossible = _impossible(made, applied)
        if not impossible:
            return applied
        if plan is None and impossible.keys() <= refused.keys():
            # A step that was decided together with others: without these it is not there.
            impossible = with_companions(made, impossible)
        if plan is not None or impossible.keys() <= refused.keys():
            label, match = next(iter(impossible.items()))
            raise UsageError(f"{label}: {match.reason}. Make a new plan without it (exclude).")
        refused |= impossible


def _apply(original: nn.Module, working: nn.Module, plan: Plan, inputs: Inputs) -> Applied:
    owners = dict.fromkeys(step.site.path for step in plan.steps if step.site.form != "module")
    merges = (step for step in plan.steps if step.rule == MERGED and step.edits)
    owners |= dict.fromkeys(step.site.settings["owner"] for step in merges)
    calls = recorded_calls(original, list(owners), inputs) if owners else {}
    return apply(working, plan, calls)


def _impossible(plan: Plan, applied: Applied) -> dict[str, NoMatch]:
    """Labels of the steps that were not carried out, with the reason."""
    done = {id(step) for step in applied.plan.steps}  # two steps may have one label
    reasons = {skip.path: skip.reason for skip in applied.plan.skips}
    return {
        step.site.label: NoMatch(Check.NOT_REWRITABLE, _without_head(reasons[step.site.label]))
        for step in plan.steps
        if id(step) not in done and not _is_part_of_merge(step)
    }


def _is_part_of_merge(step: Step) -> bool:
    """A norm that would have gone with a merge of branches: without it, other rules may take it."""
    return step.rule == MERGED and not step.edits


def _without_head(reason: str) -> str:
    return reason.removeprefix(f"{Check.NOT_REWRITABLE.value}: ")


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
