"""What becomes of one norm, as a Step of the plan; and why it stays, as a Skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from normsurgery.errors import CannotConvert
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.edits import Fill
from normsurgery.fold.ground import Ground, Refused
from normsurgery.fold.preconditions import require_called_as
from normsurgery.fold.rules import Proposal
from normsurgery.spec import Fidelity, get
from normsurgery.steps import Fold
from normsurgery.surgery.obstacles import lost_fact
from normsurgery.surgery.references import ModuleReferences
from normsurgery.surgery.source import build, source_of, tensor_at, what_is_left
from normsurgery.survey import Site, Skip


def step_of(
    ground: Ground,
    model: nn.Module,
    site: Site,
    proposal: Proposal,
    left: NoMatch | None,
    around: ModuleReferences,
) -> Fold:
    """The step that carries a proposal out. Raises Refused where no norm can be left in its place.

    left: why it is no more than what the proposal says.
    """
    edits = proposal.agreed.edits
    to, options = proposal.to, proposal.options
    if ground.choices.keep_classes:
        edits, to, options = (*edits, *neutral(site)), site.kind, {}
    step = Fold(
        site=site,
        to=to,
        options=options,
        fidelity=Fidelity.EVAL,
        notes=(*proposal.agreed.notes, *proposal.notes, *_still(left)),
        where=proposal.rule,
        edits=edits,
        changes=ground.givers(proposal.changed),
    )
    return _readable(ground, model, step, around)


def neutral(site: Site) -> tuple[Fill, ...]:
    """The norm's own tensors, so filled that its scale is 1 and its shift 0."""
    values = {
        "weight": 1.0 - float(site.settings.get("weight_offset", 0.0)),
        "bias": 0.0,
        "running_mean": 0.0,
        "running_var": 1.0 - float(site.settings.get("eps") or 0.0),
    }
    return tuple(
        Fill(name, values[role]) for role, name in site.parameters.items() if role in values
    )


def _readable(ground: Ground, model: nn.Module, step: Fold, around: ModuleReferences) -> Fold:
    """The step, or one that leaves a neutral norm where other code asks for its weight's dtype."""
    conversion = get(step.to).conversion(step.site.kind)
    kept = ground.choices.keep_classes or "pad" in step.options
    if step.site.form != "module" or kept or conversion is None:
        return step
    there = {r: name for r, name in step.site.parameters.items() if name not in ground.created}
    source, options = what_is_left(source_of(model, replace(step.site, parameters=there)), step)
    try:
        new = build(conversion, source, options, "copy")
    except CannotConvert as error:
        raise Refused(Check.NOT_REWRITABLE, error.why, error.cure) from error
    require_called_as(ground, step.site, new)
    reason = lost_fact(model, step.site, new, around)
    if reason is None:
        return step
    filled = neutral(step.site)
    if all(edit.target not in ground.created and _is_full(model, edit) for edit in filled):
        raise Refused(Check.COMPUTES, reason)
    return replace(
        step,
        to=step.site.kind,
        options={},
        edits=(*step.edits, *filled),
        notes=(*step.notes, f"stays, with a scale of 1 and a shift of 0: {reason}"),
    )


def _is_full(model: nn.Module, edit: Fill) -> bool:
    tensor = tensor_at(model, edit.target)
    return not tensor.is_meta and bool((tensor == edit.value).all())


def _still(left: NoMatch | None) -> tuple[str, ...]:
    return () if left is None else (f"{left.reason}. {left.hint}".rstrip(". "),)


def skip(site: Site, match: NoMatch) -> Skip:
    return Skip(site.label, match.reason, match.hint, site.kind)


# A rule that fails so never had a chance; what another rule says is the reason.
_HOPELESS = (Check.NO_NEIGHBOUR, Check.UNKNOWN, Check.NON_LINEAR, Check.ADDED, Check.RETURNED)


def foremost(failed: Sequence[NoMatch]) -> NoMatch:
    """The failed check that stands closest to a fold; the first among equals."""
    return min(failed, key=_rank)


def _rank(match: NoMatch) -> int:
    if match.call:  # the example allowed it
        return 0
    if match.check is Check.NO_NEIGHBOUR:
        return 3
    return 2 if match.check in _HOPELESS else 1
