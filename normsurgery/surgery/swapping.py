"""swap: another norm in the place of each selected one; the rest stays the same objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.artefacts.checkpoints import CONFIG_KEY
from normsurgery.errors import NormsurgeryError, UsageError
from normsurgery.plan import Init, Plan, versions
from normsurgery.randomstate import random_state_kept
from normsurgery.report import Report
from normsurgery.selection import Rule, as_rules
from normsurgery.spec import Fidelity, get
from normsurgery.steps import FoldStep
from normsurgery.surgery.application import Applied, apply
from normsurgery.surgery.calls import recorded_calls
from normsurgery.surgery.inherit import hooked_parameters
from normsurgery.surgery.journal import Journal
from normsurgery.surgery.keymap import KeyMap
from normsurgery.surgery.plan_record import config_of, record_plan
from normsurgery.surgery.planning import check_promise
from normsurgery.surgery.planning import plan as make_plan
from normsurgery.surgery.programs import apply_to_program
from normsurgery.surgery.statistics import estimate_statistics
from normsurgery.surgery.wrapped import unwrapped
from normsurgery.survey import Survey, renumbered
from normsurgery.treecopy import tree_copy

if TYPE_CHECKING:
    from normsurgery.inputs import Inputs
    from normsurgery.verify import Evidence

Model = TypeVar("Model", nn.Module, ExportedProgram)
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def swap(
    model: Model,
    to: str | None = None,
    *,
    rules: Iterable[Rule | str] = (),
    plan: Plan | None = None,
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    options: Mapping[str, Any] = NO_OPTIONS,
    init: Init = "copy",
    require: Fidelity | str | None = None,
    calibrate: Iterable[Any] | None = None,
    inputs: Any = None,
    inplace: bool = False,
) -> tuple[Model, Report]:
    """Replace norms, and measure what that did.

    Args:
        model: a module, a fx.GraphModule or an ExportedProgram. It stays as it is, unless
            `inplace`; then `report.undo()` takes the change back.
        to, rules, kind, only, exclude, options, init, require: as for `plan`; or a ready `plan`.
        calibrate: batches on which the running statistics of new norms are estimated.
        inputs: a tuple of positional or a dict of keyword arguments, or Inputs; inferred if None.

    Returns the changed model, of the user's own class, and the report. A model that is itself a
    norm comes back as the new module. Raises UsageError where nothing is selected or everything is
    refused, PromiseBroken where a step promises less than `require`, CannotTrace where the
    model does not run on the inputs that were given. A promise that was measured and broken is in
    the report.

    To find and to measure, copies of the model run some tens of times, hooks included: a hook that
    writes outside the model sees these runs. Hooks on a parameter itself (`Tensor.register_hook`)
    stay with that parameter, as with `copy.deepcopy`; the report names those that are not on the
    changed model.
    """
    rules = (rules,) if isinstance(rules, (str, Rule)) else tuple(rules)
    chosen = to is not None or rules or kind is not None or only or exclude or options
    if plan is not None and (chosen or init != "copy"):
        raise UsageError(
            "a plan is complete: leave out the target, rules, selection, options and init."
        )
    decide = partial(
        make_plan,
        to=to,
        rules=rules,
        kind=kind,
        only=only,
        exclude=exclude,
        options=options,
        init=init,
        require=require,
    )
    request = _Request(to, rules, plan, decide, require, calibrate, inputs, inplace)
    changed: Any
    if isinstance(model, ExportedProgram):
        changed, report = _swap_program(model, request)
    else:
        changed, report = _swap_module(model, request)
    return changed, report


@dataclass(frozen=True)
class _Request:
    """What a call of `swap` asked for; `decide` makes the plan where none was given."""

    to: str | None
    rules: tuple[Rule | str, ...]
    plan: Plan | None
    decide: Callable[[Survey, nn.Module], Plan]
    require: Fidelity | str | None
    calibrate: Iterable[Any] | None
    inputs: Any
    inplace: bool


def _swap_module(model: nn.Module, request: _Request) -> tuple[nn.Module, Report]:
    inner, notes = unwrapped(model)
    hooked = hooked_parameters(inner)
    with random_state_kept(inner):
        example, missing = _example(inner, request.inputs)
        plan, found = _planned(inner, inner, request, example)
        original = tree_copy(inner, clone=True) if request.inplace else inner
        working = inner if request.inplace else tree_copy(inner, clone=True)
        applied, journal = _applied(original, working, plan, example, request.inplace)
        if request.calibrate is not None:
            notes += (estimate_statistics(applied.model, applied.new_modules, request.calibrate),)
        evidence, unmeasured = _measured(
            original, applied.model, applied.plan, applied.keymap, example, request
        )
    if journal is not None:
        journal.watch(config_of(model), CONFIG_KEY)
    record_plan(applied.model, applied.plan)
    notes += _left_hooks(hooked, applied.model)
    report = Report(
        verb="swap",
        plan=applied.plan,
        keymap=applied.keymap,
        evidence=evidence,
        versions=versions(),
        notes=(*notes, *found, *applied.notes, *missing, *unmeasured),
        journal=journal,
    )
    return applied.model, report


def _swap_program(program: ExportedProgram, request: _Request) -> tuple[ExportedProgram, Report]:
    if request.inplace or request.calibrate is not None:
        raise UsageError("an exported program is neither edited in place nor calibrated.")
    original = program.module()
    with random_state_kept(original):
        example, missing = _example(program, request.inputs)
        plan, found = _planned(program, original, request, example)
        applied = apply_to_program(program, plan)
        evidence, unmeasured = _measured(
            original, applied.program.module(), applied.plan, applied.keymap, example, request
        )
    notes = (*found, *missing, *unmeasured)
    report = Report("swap", applied.plan, applied.keymap, evidence, versions(), notes)
    return applied.program, report


def _planned(
    model: nn.Module | ExportedProgram,
    module: nn.Module,
    request: _Request,
    inputs: Inputs | None,
) -> tuple[Plan, tuple[str, ...]]:
    """The plan that was given, or one made from what is found; and what to say about that."""
    if request.plan is not None:
        if any(isinstance(step, FoldStep) for step in request.plan.steps):
            raise UsageError("this is the plan of a fold. Use fold(plan=...).")
        check_promise(request.plan, request.require)
        return request.plan, ()
    survey = survey_for(model, request.to, request.rules, inputs)
    return request.decide(survey, module), survey.notes


def survey_for(
    model: nn.Module | ExportedProgram,
    to: str | None,
    rules: Iterable[Rule | str],
    inputs: Inputs | None,
) -> Survey:
    """The Survey to plan on: norms, and the places for layers or weights if a target wants them."""
    from normsurgery.find import find

    kinds = {get(rule.to).attach for rule in as_rules(to, rules, NO_OPTIONS)}
    surveys = [find(model, inputs, attach=attach) for attach in sorted(kinds)]
    if len(surveys) == 1:
        return surveys[0]
    return replace(
        surveys[0],
        sites=renumbered([site for survey in surveys for site in survey.sites]),
        skips=tuple(dict.fromkeys(skip for survey in surveys for skip in survey.skips)),
        notes=tuple(dict.fromkeys(note for survey in surveys for note in survey.notes)),
    )


def _example(
    model: nn.Module | ExportedProgram, inputs: Any
) -> tuple[Inputs | None, tuple[str, ...]]:
    """The inputs, given or inferred; where there are none, a note that says so."""
    from normsurgery.inputs import as_inputs, infer

    if inputs is not None:
        return as_inputs(inputs), ()
    try:
        return infer(model), ()
    except NormsurgeryError as error:
        return None, (f"not measured: no inputs were given and none could be inferred ({error})",)


def _applied(
    original: nn.Module, working: nn.Module, plan: Plan, inputs: Inputs | None, inplace: bool
) -> tuple[Applied, Journal | None]:
    owners = dict.fromkeys(step.site.path for step in plan.steps if step.site.form != "module")
    calls = recorded_calls(original, list(owners), inputs)
    journal = Journal(working) if inplace else None
    try:
        applied = apply(working, plan, calls)
    except BaseException:
        if journal is not None:
            journal.close()
            journal.undo()
        raise
    if not applied.plan.steps:
        reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in applied.plan.skips[:5])
        raise UsageError(f"every selected site of {plan.model} is refused: {reasons}.")
    if journal is not None:
        journal.close()
    return applied, journal


def _measured(
    original: nn.Module,
    changed: nn.Module,
    plan: Plan,
    keymap: KeyMap,
    inputs: Inputs | None,
    request: _Request,
) -> tuple[Evidence | None, tuple[str, ...]]:
    from normsurgery.verify import measure

    if inputs is None:
        return None, ()
    if any(tensor.is_meta for tensor in (*original.parameters(), *original.buffers())):
        return None, ("not measured: the model has no values (meta device)",)
    names = {move.old: move.new for move in keymap.moved if move.offset == 0.0}
    try:
        return measure(original, changed, plan, inputs, names=names), ()
    except NormsurgeryError as error:
        if request.inputs is not None:
            raise
        return None, (f"not measured: {error}",)


def _left_hooks(hooked: Mapping[str, Tensor], changed: nn.Module) -> tuple[str, ...]:
    """A note on the hooked parameters that the changed model does not have as they were."""
    present = {id(parameter) for parameter in changed.parameters()}
    left = [name for name, parameter in hooked.items() if id(parameter) not in present]
    if not left:
        return ()
    return (
        f"hooks registered on {', '.join(left)} stay with the old parameters: "
        "register them on the new ones",
    )
