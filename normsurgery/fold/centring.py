"""LayerNorms that read a residual stream become RMSNorms: what writes to the stream is centred."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from normsurgery.fold.acceptance import accepted
from normsurgery.fold.agreement import agree
from normsurgery.fold.checks import NoMatch
from normsurgery.fold.ground import Ground, Refused
from normsurgery.fold.residual_stream import is_candidate, stream_of
from normsurgery.plan import Step
from normsurgery.spec import Fidelity, get
from normsurgery.survey import Site, Skip


def centre(
    ground: Ground,
    model: nn.Module,
    site: Site,
    allowed: Collection[int],
    decided: dict[int, Step | Skip],
) -> None:
    """Make RMSNorms of all LayerNorms on the stream that this one reads, where it can be.

    allowed: the sites that may be folded. decided: what becomes of each site, which is changed.
    """
    made = decided[site.index]
    done = isinstance(made, Step) and made.to == get(site.kind).without_mean
    if done or not is_candidate(site) or not ground.runs[site.index]:
        return
    try:
        stream = stream_of(ground, site)
        agreed = agree(ground, stream.landings)
        notes = accepted(ground, model, stream.runs, stream.landings, frozenset(stream.values))
    except Refused as refusal:
        decided[site.index] = _stays(site, made, refusal.match)
        return
    ground.untied |= agreed.untied
    sites = [s for s in ground.located.survey if s.index in stream.sites]
    steps = [
        step
        for s in sites
        if s.index in allowed
        if (step := _as_rmsnorm(ground, s, decided[s.index])) is not None
    ]
    if not steps:
        return
    # Other folds may still write to what is centred: it comes last.
    steps[-1] = replace(
        steps[-1],
        edits=(*steps[-1].edits, *agreed.edits),
        notes=(*steps[-1].notes, *agreed.notes, *notes),
    )
    for step in steps:
        del decided[step.site.index]
        decided[step.site.index] = step


def _as_rmsnorm(ground: Ground, site: Site, made: Step | Skip) -> Step | None:
    """The step that makes an RMSNorm of a LayerNorm on a centred stream; None if it has a bias."""
    folded = isinstance(made, Step) and (
        ground.choices.keep_classes or not made.options.get("affine", True)
    )
    if "bias" in site.parameters and not folded and not ground.choices.keep_classes:
        return None
    edits = made.edits if isinstance(made, Step) else ()
    notes = made.notes if isinstance(made, Step) else ()
    whole = folded or "weight" not in site.parameters
    return Step(
        site=site,
        to=site.kind if ground.choices.keep_classes else get(site.kind).without_mean,
        options={} if ground.choices.keep_classes or not whole else {"affine": False},
        fidelity=Fidelity.EVAL,
        action="fold",
        notes=notes,
        rule="residual stream",
        edits=edits,
    )


def _stays(site: Site, made: Step | Skip, match: NoMatch) -> Step | Skip:
    """A LayerNorm whose mean cannot be folded away."""
    if isinstance(made, Step):
        return replace(made, notes=(*made.notes, f"stays a LayerNorm: {match.reason}"))
    return Skip(site.label, match.reason, match.hint, site.kind)
