"""What a fold will do, decided from recorded runs alone: no weight is needed, none is touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from normsurgery.errors import CannotTrace
from normsurgery.find import Located, locate
from normsurgery.fold.checks import BY_BATCH, NoMatch
from normsurgery.fold.confirming import confirmed
from normsurgery.fold.deciding import Decider, Decision
from normsurgery.fold.ground import Choices
from normsurgery.fold.other_batch import with_other_batch
from normsurgery.fold.parametrizations import apply_baked, baked_steps
from normsurgery.fold.unlisted import is_unlisted, with_unlisted
from normsurgery.fold.untying import with_own_copies
from normsurgery.inputs import Inputs
from normsurgery.plan import Plan, Step, versions
from normsurgery.selection import is_meant, select
from normsurgery.spec import Fidelity
from normsurgery.surgery.planning import with_children
from normsurgery.survey import Skip, Survey
from normsurgery.treecopy import tree_copy

DEFAULT = Choices()


def plan_fold(
    model: nn.Module,
    inputs: Inputs,
    *,
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    choices: Choices = DEFAULT,
    refused: Mapping[str, NoMatch] | None = None,
) -> Plan:
    """Every norm of the model as a Step with its Edits, or as a Skip with the check that failed.

    model: in eval mode; on the meta device it needs no memory. It is run on `inputs` and, where
        they have a batch, on another batch size too: a fold must hold for both.
    kind, only, exclude: which norms may be folded.
    refused: labels of sites that turned out to be impossible, with the reason.

    Raises CannotTrace where the model does not run, UsageError for a selection that is empty.
    """

    def decide(tree: nn.Module) -> Plan:
        return _plan_as_it_is(tree, inputs, kind, only, exclude, choices, refused or {})

    return with_own_copies(decide(model), model, inputs, choices, decide)


def _plan_as_it_is(
    model: nn.Module,
    inputs: Inputs,
    kind: str | None,
    only: Sequence[str | int],
    exclude: Sequence[str | int],
    choices: Choices,
    refused: Mapping[str, NoMatch],
) -> Plan:
    """Without a module that becomes two."""
    baked, left, ready = _baked(model, kind, only, exclude, choices)
    located = _located(ready, inputs, choices)
    sites = (*located.survey.sites, *(step.site for step in baked))
    chosen = {site.index for site in select(sites, kind, only, exclude)}
    decided, lost = _decided(ready, located, chosen, inputs, choices, refused)
    centred = _centred(lost)
    if centred:
        # A stream is centred whole or not at all: its norms rely on every writer.
        plain = replace(choices, rmsnorm=False)
        made = _plan_as_it_is(model, inputs, kind, only, exclude, plain, refused)
        return _staying(made, centred)
    known = {skip.path for skip in left}
    known |= {site.label for site in located.survey if is_unlisted(site)}
    done = {made.site.label for made in decided if isinstance(made, Step)}
    skips = (made for made in decided if isinstance(made, Skip) and made.path not in known)
    return Plan(
        type(model).__name__,
        with_children(ready, [*baked, *(made for made in decided if isinstance(made, Step))]),
        (*left, *skips, *(skip for skip in located.survey.skips if skip.path not in done)),
        versions=versions(),
    )


def _decided(
    model: nn.Module,
    located: Located,
    chosen: Collection[int],
    inputs: Inputs,
    choices: Choices,
    refused: Mapping[str, NoMatch],
) -> tuple[list[Decision], list[Decision]]:
    """What becomes of each norm on this batch and on another one; and, where a stream cannot be
    centred on both, what would have become of them.

    A step that does not hold for the other batch is left out, and all is decided again: others may
    rely on it.
    """
    refused = dict(refused)
    again: Located | None = None
    while True:
        decided = Decider(model, choices, refused).decide(located, chosen)
        other = with_other_batch(inputs)
        if other is None or not any(isinstance(made, Step) for made in decided):
            return decided, []
        again = again or _located_again(model, other, choices)
        if again is None:  # it runs on this batch only
            return decided, []
        held = confirmed(decided, located, again, choices)
        if _centred(held) < _centred(decided):
            return held, decided
        lost = _labels(decided) - _labels(held)
        if not lost:
            return decided, []
        refused |= dict.fromkeys(lost, BY_BATCH)


def _labels(decided: Sequence[Decision]) -> set[str]:
    return {made.site.label for made in decided if isinstance(made, Step)}


def _centred(decided: Sequence[Decision]) -> frozenset[str]:
    """The labels of the norms that are to become RMSNorms of a centred stream."""
    steps = (made for made in decided if isinstance(made, Step))
    return frozenset(step.site.label for step in steps if step.rule == "residual stream")


def _staying(plan: Plan, labels: frozenset[str]) -> Plan:
    """The plan, with the reason why these norms stay LayerNorms."""
    note = f"stays a LayerNorm: {BY_BATCH.reason}"
    steps = tuple(
        replace(step, notes=(*step.notes, note)) if step.site.label in labels else step
        for step in plan.steps
    )
    return replace(plan, steps=steps)


def _located(
    model: nn.Module, inputs: Inputs, choices: Choices, *, training: bool = True
) -> Located:
    """The norms, and where classes need not stay the modules that are as good as one."""
    found = locate(model, inputs, training=training)
    return found if choices.keep_classes else with_unlisted(found)


def _baked(
    model: nn.Module,
    kind: str | None,
    only: Sequence[str | int],
    exclude: Sequence[str | int],
    choices: Choices,
) -> tuple[list[Step], list[Skip], nn.Module]:
    """The weights that are baked in first, those that cannot be, and the model after that."""
    if choices.keep_classes:
        return [], [], model
    steps, skips = baked_steps(model, Survey(type(model).__name__, (), ()))
    # A norm may be folded into the baked weight as well: only the whole model is the same then.
    steps = [
        replace(step, fidelity=Fidelity.EVAL)
        for step in steps
        if is_meant(step.site, kind, only, exclude)
    ]
    ready = tree_copy(model) if steps else model
    for step in steps:
        ready = apply_baked(ready, step)
    return steps, skips, ready


def _located_again(model: nn.Module, other: Inputs, choices: Choices) -> Located | None:
    try:
        return _located(model, other, choices, training=False)
    except CannotTrace:
        return None
