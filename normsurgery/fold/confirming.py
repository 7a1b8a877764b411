"""Whether decisions made for one batch size hold for another: the same rules, the same edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normsurgery.find import Located
from normsurgery.fold.agreement import agree
from normsurgery.fold.branch_surroundings import belong_to
from normsurgery.fold.checks import BY_BATCH
from normsurgery.fold.deciding import Decision, skip, take, take_merge
from normsurgery.fold.edits import Centre, Fill
from normsurgery.fold.ground import Choices, Ground, Refused
from normsurgery.fold.parallel_branches import branch_sums
from normsurgery.fold.residual_stream import stream_of
from normsurgery.fold.rules import (
    Rule,
    into_consumers,
    into_padding_consumers,
    into_producer,
)
from normsurgery.fold.twins import as_one, followers, is_follower
from normsurgery.graph import Recording
from normsurgery.plan import MERGED, Step


def confirmed(
    decided: Sequence[Decision], located: Located, again: Located, choices: Choices
) -> list[Decision]:
    """The decisions that a run with another batch size leads to as well."""
    if _signature(again.recording) == _signature(located.recording):
        return list(decided)
    ground = Ground(again, choices)
    steps = [made for made in decided if isinstance(made, Step)]
    failed = {label for made in steps for label in _failed(ground, made, steps)}
    return [
        skip(made.site, [BY_BATCH])
        if isinstance(made, Step) and made.site.label in failed
        else made
        for made in decided
    ]


def _failed(ground: Ground, made: Step, steps: Sequence[Step]) -> tuple[str, ...]:
    """The labels of the step and of those that lean on it, unless it holds here as well."""
    if made.rule == MERGED:
        _take_merge(ground, made)
        return ()
    if is_follower(made):
        return ()
    again = {site.label: site for site in ground.located.survey}
    labels = (made.site.label, *(site.label for site in followers(made, steps)))
    sites = [again[label] for label in labels if label in again]
    if made.rule == "standalone affine":  # what the norm is, whatever surrounds it
        return ()
    if len(sites) < len(labels):
        return labels
    with as_one(ground, sites[0], sites[1:]):
        return () if _holds(ground, sites[0].index, made) else labels


def _take_merge(ground: Ground, made: Step) -> None:
    """The same branches are one layer here too. (That they are is proven, on several batches.)"""
    if not made.edits:
        return
    for found in branch_sums(ground)[0]:
        paths = [branch.path for branch in found.branches]
        if found.label == made.site.label and paths == made.site.settings["branches"]:
            take_merge(ground, found, made)
            belong_to(ground, found)


def _holds(ground: Ground, place: int, made: Step) -> bool:
    """Whether the rule that made the step makes the same edits here; then it is taken as done."""
    if not ground.runs[place]:
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
