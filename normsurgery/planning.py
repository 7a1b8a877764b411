"""plan: what a swap or a fold will do, decided on a Survey that may have been saved before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from normsurgery.errors import UsageError
from normsurgery.plan import Init, Plan
from normsurgery.selection import Rule
from normsurgery.spec import Fidelity
from normsurgery.survey import Survey

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def plan(
    survey: Survey,
    model: nn.Module | ExportedProgram,
    to: str | None = None,
    *,
    fold: bool = False,
    rules: Iterable[Rule | str] = (),
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    options: Mapping[str, Any] | None = None,
    init: Init = "copy",
    require: Fidelity | str | None = None,
    inputs: Any = None,
    calls: Sequence[Any] = (),
    rmsnorm: bool = False,
    pad: Literal["refuse", "explicit"] = "refuse",
    untie: bool = False,
) -> Plan:
    """Decide what each selected site of `survey` shall become; the model is read, never changed.

    Args:
        to, options: the target norm and its options; or `rules`, of which the first that matches a
            site decides.
        fold: plan a fold instead of a swap, of a model in eval mode.
        kind, only, exclude: the selection, by kind, by path globs or indices.
        init: "copy" carries the learned tensors, "reset" starts fresh.
        require: refuse unless every step promises at least this.
        inputs, calls, rmsnorm, pad, untie: of a fold, as `fold` takes them. Without `inputs`, those
            that the survey was made with are drawn again.

    Raises UsageError where nothing is selected, everything is refused, or an option is unknown or
    belongs to the other verb; CannotConvert where the given options make a site impossible;
    PromiseBroken for `require`; CannotTrace where a model to fold does not run.
    """
    from torch.export import ExportedProgram

    from normsurgery.surgery.wrapped import unwrapped

    module = model.module() if isinstance(model, ExportedProgram) else unwrapped(model)[0]
    if not fold:
        _require_unused("a swap", inputs=inputs, calls=calls, rmsnorm=rmsnorm, untie=untie)
        from normsurgery.surgery.planning import plan as plan_swap

        return plan_swap(
            survey,
            module,
            to,
            rules=rules,
            kind=kind,
            only=only,
            exclude=exclude,
            options=options,
            init=init,
            require=require,
        )
    _require_unused("a fold", to=to, rules=tuple(rules), options=options)
    from normsurgery.fold.folding import switched_to_eval
    from normsurgery.fold.ground import choices_of
    from normsurgery.fold.planning import Planner, Request
    from normsurgery.surgery.planning import check_promise

    switched_to_eval(module, False)
    choices = choices_of(rmsnorm=rmsnorm, pad=pad, untie=untie)
    request = Request(kind, only, exclude, choices, calls)
    made = Planner(module, _inputs(survey, inputs), request, survey).plan({})
    check_promise(made, require)
    return made


def _require_unused(verb: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value not in (None, False, ()):
            raise UsageError(f"{name} is no option of {verb}: leave it out, or see `fold=`.")


def _inputs(survey: Survey, inputs: Any) -> Any:
    from normsurgery.inputs import as_inputs, parse

    if inputs is not None:
        return as_inputs(inputs)
    if not survey.inputs:
        raise UsageError("the survey was made without a run: give the inputs of the model.")
    return parse([text for text in survey.inputs.split("--input ") if text.strip()])
