"""LayerNorms that read a residual stream become RMSNorms: what writes to the stream is centred."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from normsurgery.fold.acceptance import require_accepted
from normsurgery.fold.agreement import Agreed, agree
from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Ground, Refused
from normsurgery.fold.residual_stream import Stream, is_candidate, stream_of
from normsurgery.fold.worklist import Worklist, require_unread
from normsurgery.spec import Fidelity, get
from normsurgery.steps import Fold, Step
from normsurgery.survey import Site


def centre(
    grounds: Sequence[Ground], model: nn.Module, allowed: Collection[int], work: Worklist
) -> None:
    """Make RMSNorms of all LayerNorms on a stream that can be centred in every measured call.

    allowed: the sites that may be folded. work: what becomes of each site, which is changed.
    """
    example = grounds[0]
    for site in [site for site in example.located.survey if site.index in allowed]:
        made = work.made.get(site.index)
        if not is_candidate(site) or not example.runs[site.index]:
            continue
        if made is not None and made.to == get(site.kind).without_mean:
            continue
        try:
            stream, agreed = _centred(grounds, model, site)
        except Refused as refusal:
            if made is None:
                work.failed[site.index] = [refusal.match]
            else:
                note = f"stays a LayerNorm: {refusal.match.reason}"
                work.made[site.index] = replace(made, notes=(*made.notes, note))
            continue
        _take(example, stream, agreed, allowed, work)


def _centred(grounds: Sequence[Ground], model: nn.Module, site: Site) -> tuple[Stream, Agreed]:
    """The stream that the norm reads, with the edits that centre it. Raises Refused."""
    example = grounds[0]
    stream, agreed = _centred_in(example, model, site)
    streams = [(example, stream)]
    for ground in grounds[1:]:
        try:
            if not ground.runs[site.index]:
                require_unread(ground, (edit.target for edit in agreed.edits))
                continue
            other, edits = _centred_in(ground, model, site)
            if any(edit not in agreed.edits for edit in edits.edits):
                raise Refused(Check.OTHER_EDITS)
            require_unread(ground, (e.target for e in agreed.edits if e not in edits.edits))
            streams.append((ground, other))
        except Refused as refusal:
            raise refusal.in_call(ground.call) from None
    for ground, found in streams:
        ground.untied |= agreed.untied
        ground.changed |= found.values.keys()
        ground.absorbing |= {node for run in found.runs for node in run.nodes}
    return stream, agreed


def _centred_in(ground: Ground, model: nn.Module, site: Site) -> tuple[Stream, Agreed]:
    stream = stream_of(ground, site)
    agreed = agree(ground, stream.landings)
    require_accepted(ground, model, stream.landings, stream.values.keys())
    return stream, agreed


def _take(
    ground: Ground, stream: Stream, agreed: Agreed, allowed: Collection[int], work: Worklist
) -> None:
    sites = [s for s in ground.located.survey if s.index in stream.sites and s.index in allowed]
    made = [(s.index, _as_rmsnorm(ground, s, work.made.get(s.index))) for s in sites]
    steps = [(index, step) for index, step in made if step is not None]
    for index, step in steps:
        work.made.pop(index, None)
        work.made[index] = step
    if not steps:
        return
    # Other folds may still write to what is centred: it comes last.
    index, last = steps[-1]
    given = len(ground.givers(stream.values.keys()))
    told = f"what {given} modules give to the stream has mean zero afterwards"
    edits, notes = (*last.edits, *agreed.edits), (*last.notes, *agreed.notes, told)
    work.made[index] = replace(last, edits=edits, notes=notes)


def _as_rmsnorm(ground: Ground, site: Site, made: Step | None) -> Step | None:
    """The step that makes an RMSNorm of a LayerNorm on a centred stream; None if it has a bias."""
    kept = ground.choices.keep_classes
    folded = made is not None and (kept or not made.options.get("affine", True))
    if "bias" in site.parameters and not folded and not kept:
        return None
    whole = folded or "weight" not in site.parameters
    without_mean = get(site.kind).without_mean
    assert without_mean is not None
    return Fold(
        site=site,
        to=site.kind if kept else without_mean,
        options={} if kept or not whole else {"affine": False},
        fidelity=Fidelity.EVAL,
        notes=() if made is None else made.notes,
        where="residual stream",
        edits=() if made is None else made.edits,
        changes=() if made is None else made.changes,
    )
