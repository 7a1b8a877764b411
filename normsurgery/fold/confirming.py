"""Whether decisions made for one batch size hold for another: the same rules, the same edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normsurgery.find import Located
from normsurgery.fold.agreement import agree
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.deciding import Decision, skip, take
from normsurgery.fold.edits import Centre, Fill
from normsurgery.fold.ground import Choices, Ground, Refused
from normsurgery.fold.residual_stream import stream_of
from normsurgery.fold.rules import (
    Rule,
    into_consumers,
    into_padding_consumers,
    into_producer,
)
from normsurgery.graph import Recording
from normsurgery.plan import MERGED, Step
from normsurgery.survey import Skip

BY_BATCH = NoMatch(Check.HIDDEN_BRANCH, "the batch size decides what runs")


def confirmed(
    decided: Sequence[Decision], located: Located, again: Located, choices: Choices
) -> list[Decision]:
    """The decisions that a run with another batch size leads to as well."""
    if _signature(again.recording) == _signature(located.recording):
        return list(decided)
    ground = Ground(again, choices)
    places = {site.label: site.index for site in again.survey}
    return [
        made
        if isinstance(made, Skip) or _holds(ground, places.get(made.site.label), made)
        else skip(made.site, [BY_BATCH])
        for made in decided
    ]


def _holds(ground: Ground, place: int | None, made: Step) -> bool:
    """Whether the rule that made the step makes the same edits here; then it is taken as done."""
    # A merge is proven on several batches; an affine is what the norm is, whatever surrounds it.
    if made.rule in (MERGED, "standalone affine"):
        return True
    if place is None or not ground.runs[place]:
        return False
    site = ground.site(place)
    rule = _rule_that_edited(made)
    centred = [edit for edit in made.edits if isinstance(edit, Centre)]
    try:
        if rule is not None:
            proposal = rule(ground, site)
            if any(edit not in made.edits for edit in proposal.agreed.edits):
                return False
            take(ground, site, proposal)
        again = agree(ground, stream_of(ground, site).landings).edits if centred else ()
        return all(edit in again for edit in centred) and all(edit in made.edits for edit in again)
    except Refused:
        return False


def _rule_that_edited(made: Step) -> Rule | None:
    """The rule that its edits come from; None where they are none, or what centring adds."""
    if made.rule == "residual stream":
        folded = any(not isinstance(edit, (Centre, Fill)) for edit in made.edits)
        return into_consumers if folded else None
    return {
        "into producer": into_producer,
        "into consumers": into_consumers,
        "into consumers, explicit padding": into_padding_consumers,
    }.get(made.rule)


def _signature(recording: Recording) -> list[tuple[Any, ...]]:
    """What ran on what and where, without sizes."""
    return [
        (op.name, op.inputs, op.outputs, tuple(recording.path(f.module) for f in op.frames))
        for op in recording.ops
    ]
