"""What a swap will do: for each selected site a Step, or a Skip with the reason it stays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from normsurgery.errors import CannotConvert, PromiseBroken, UsageError
from normsurgery.plan import Init, Plan, checked_init, skip_line, versions
from normsurgery.selection import Rule, as_rules, select
from normsurgery.spec import Conversion, Fidelity, NormSpec, Source, get
from normsurgery.steps import Duplicate, Replay, Step, Swap
from normsurgery.survey import Site, Skip, Survey

if TYPE_CHECKING:
    from torch import nn

    from normsurgery.surgery.references import ModuleReferences


def plan(
    survey: Survey,
    model: nn.Module,
    to: str | None = None,
    *,
    rules: Iterable[Rule | str] = (),
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    options: Mapping[str, Any] | None = None,
    init: Init = "copy",
    require: Fidelity | str | None = None,
) -> Plan:
    """Decide what each selected site of `survey` shall become; the model is read, never changed.

    Args:
        to, options: the target norm and its options; or `rules`, of which the first that matches a
            site decides.
        kind, only, exclude: the selection, by kind, by path globs or indices.
        init: "copy" carries the learned tensors, "reset" starts fresh.
        require: refuse unless every step promises at least this.

    Raises UsageError where nothing is selected, everything is refused, or an option is unknown;
    CannotConvert where the given options make a site impossible; PromiseBroken for `require`.
    """
    from normsurgery.surgery.references import ModuleReferences

    chosen_rules = as_rules(to, rules, options or {})
    checked_init(init)
    if not survey.sites:
        raise UsageError(f"{survey.model} has no normalization to swap.{_skips_text(survey.skips)}")
    selected = {site.index for site in select(survey.sites, kind, only, exclude)}
    steps: list[Step] = []
    skips: list[Skip] = []
    refused: list[Skip] = []
    around = ModuleReferences(model)
    for site in survey.sites:
        rule = next((rule for rule in chosen_rules if rule.matches(site)), None)
        if site.index not in selected or rule is None:
            skips.append(_skip(site, "not selected"))
            continue
        outcome = _decide(model, site, rule, init, around)
        if isinstance(outcome, Step):
            steps.append(outcome)
        else:
            refused.append(outcome)
    if not steps:
        raise UsageError(_why_no_step(survey, refused))
    made = Plan(
        survey.model,
        with_children(model, steps),
        (*refused, *skips, *survey.skips),
        init,
        versions(),
    )
    check_promise(made, require)
    return made


def _decide(
    model: nn.Module, site: Site, rule: Rule, init: Init, around: ModuleReferences
) -> Step | Skip:
    from normsurgery.surgery.obstacles import lost_fact, obstacle
    from normsurgery.surgery.source import source_of

    target = get(rule.to)
    if site.attach != target.attach:
        return _skip(site, _ATTACH_REASONS[site.attach, target.attach])
    same = _is_same(site, target, rule, init)
    copies = same and _has_own_class(model, site, target)
    reason = obstacle(model, site, copies=copies, around=around)
    if reason is not None:
        return _skip(site, reason)
    if copies:
        note = "a copy of the same module"
        return Duplicate(site, target.name, {}, Fidelity.IDENTICAL, (note,))
    if same and site.call is not None and site.call.operations:
        note = "its own operations, as a module"
        return Replay(site, target.name, {}, Fidelity.IDENTICAL, (note,))
    conversion = target.conversion(site.kind)
    if conversion is None:
        return _skip(site, f"there is no conversion from {site.kind} to {target.name}")
    conversion.check_options(rule.options, target.name)
    source = source_of(model, site)
    try:
        resolved, new = _resolve(conversion, source, rule.options, init, target)
    except CannotConvert as error:
        if rule.options and _possible(conversion, source, init, target):
            raise  # the options the caller chose are what makes it impossible
        return _skip(site, error.why, error.cure)
    reason = None if new is None else lost_fact(model, site, new, around)
    if reason is not None:
        return _skip(site, reason)
    promise = conversion.promise(source, resolved)
    if init == "reset" and promise > Fidelity.RETRAIN and source.tensors:
        promise = Fidelity.RETRAIN
    return Swap(site, target.name, resolved, promise)


def with_children(model: nn.Module, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, those in a forward with the first free norm_0, norm_1, ... of their owner."""
    from normsurgery.surgery.names import fresh_name
    from normsurgery.surgery.source import module_at

    taken: dict[str, set[str]] = {}
    named: list[Step] = []
    for step in steps:
        if step.site.form != "module" and not step.child:
            path = step.site.path
            used = taken.setdefault(path, set(dir(module_at(model, path))))
            step = replace(step, child=fresh_name("norm", used))
            used.add(step.child)
        named.append(step)
    return tuple(named)


def _is_same(site: Site, target: NormSpec, rule: Rule, init: Init) -> bool:
    same = site.kind == target.name and site.attach == "norm"
    return same and not rule.options and init == "copy"


def _has_own_class(model: nn.Module, site: Site, target: NormSpec) -> bool:
    """Whether a module is of the very class that its kind is made as: another one (a fused or
    hand-written norm, a subclass) is replaced like a norm of any other kind."""
    from normsurgery.surgery.source import module_at, source_of

    conversion = target.conversion(site.kind)
    if site.form != "module" or conversion is None:
        return site.form == "module"
    module = module_at(model, site.path)
    try:
        _, new = _resolve(conversion, source_of(model, site), {}, "copy", target)
    except CannotConvert:
        return type(module) in target.classes
    return type(module) is type(new)


def _resolve(
    conversion: Conversion,
    source: Source,
    options: Mapping[str, Any],
    init: Init,
    target: NormSpec,
) -> tuple[dict[str, Any], nn.Module | None]:
    """The complete options, and a trial build: some reasons to refuse show only there.

    A layer is not built on trial: its weight may be large.
    """
    from normsurgery.surgery.source import build

    resolved = dict(conversion.resolve(source, options) if conversion.resolve else options)
    built = build(conversion, source, resolved, init) if target.attach == "norm" else None
    try:
        return dict(json.loads(json.dumps(resolved))), built
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"an option of {target.name} cannot be written to a plan: {error}. Give JSON values."
        ) from error


def _possible(conversion: Conversion, source: Source, init: Init, target: NormSpec) -> bool:
    try:
        _resolve(conversion, source, {}, init, target)
    except CannotConvert:
        return False
    return True


_ATTACH_REASONS = {
    ("weight", "norm"): "it normalises a weight, not an activation",
    ("layer", "norm"): "it is a layer, not a norm",
    ("norm", "weight"): "it is a norm of activations, and the target acts on a weight",
    ("layer", "weight"): "it is the place of a layer, and the target acts on a weight",
    ("norm", "layer"): "it is a norm, and the target wraps a layer",
    ("weight", "layer"): "it is the place of a weight, and the target wraps a layer",
}


def _skip(site: Site, reason: str, hint: str = "") -> Skip:
    return Skip(site.label, reason, hint, site.kind)


def _why_no_step(survey: Survey, refused: list[Skip]) -> str:
    if not refused:
        kinds = ", ".join(f"{name} ({count})" for name, count in survey.counts().items())
        return (
            f"no site of {survey.model} is selected. Kinds present: {kinds}. "
            "Loosen the selection (kind, only, exclude, the left side of the rules)."
        )
    reasons = Counter(f"{skip.reason}. {skip.hint}".rstrip(". ") for skip in refused)
    text = "; ".join(
        f"{reason} ({count} sites)" if count > 1 else reason for reason, count in reasons.items()
    )
    paths = ", ".join(skip.path or "(the model itself)" for skip in refused[:5])
    more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
    return f"every selected site of {survey.model} is refused ({paths}{more}): {text}."


def _skips_text(skips: Sequence[Skip]) -> str:
    return "".join(f"\n{skip_line(skip)}" for skip in skips)


def check_promise(made: Plan, require: Fidelity | str | None) -> None:
    """Raise PromiseBroken, naming the sites, where a step promises less than `require`."""
    if require is None:
        return
    wanted = require if isinstance(require, Fidelity) else Fidelity.parse(require)
    less = [step for step in made.steps if step.fidelity < wanted]
    if not less:
        return
    named = ", ".join(
        f"{step.site.label or '(the model itself)'} ({step.site.kind} -> {step.to}: "
        f"{step.fidelity.name.lower()})"
        for step in less[:5]
    )
    more = f" and {len(less) - 5} more" if len(less) > 5 else ""
    raise PromiseBroken(
        f"{wanted.name.lower()} is required, and {len(less)} of {len(made.steps)} steps promise "
        f"less: {named}{more}. Nothing was changed. Exclude these sites or require less."
    )
