"""Whether the data flow of a recorded run tells all that a proposed fold relies on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from normsurgery.fold.affines import is_affine
from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Ground, Landing, Refused, Run
from normsurgery.fold.preconditions import require_eval, require_no_hooks
from normsurgery.fold.rules import Proposal
from normsurgery.graph import Recording
from normsurgery.graph.branches import hidden_uses, reads_data, same_conditions
from normsurgery.graph.flow import Node
from normsurgery.survey import Site


def accepted(
    ground: Ground,
    model: nn.Module,
    runs: Sequence[Run],
    landings: Sequence[Landing],
    changed: frozenset[int],
    last_axis: Literal["scale", "affine"] | None = None,
) -> tuple[str, ...]:
    """What to say about the step. Raises Refused where the data flow does not tell all."""
    if not landings:
        return ()
    recording = ground.located.recording
    nodes = [node for landing in landings for node in landing.nodes]
    nodes += [node for run in runs for node in run.nodes]
    modules = {id(n.module): n.module for n in nodes if n.module is not None}
    require_no_hooks(ground, changed, modules.values())
    require_eval(ground, model, changed)
    unseen = hidden_uses(
        recording,
        modules=tuple(modules.values()),
        values=changed,
        last_axis=last_axis,
    )
    between = (ground.flow.maker(value) for value in changed)
    nodes += [node for node in between if node is not None]
    apart = same_conditions(recording, [recording.ops[i] for i in sorted({n.index for n in nodes})])
    reasons = (*unseen, *(() if apart is None else (apart,)))
    if reasons and not ground.choices.assume_inputs:
        raise Refused(_kind_of_branch(recording, nodes), reasons[0], _ASSUME)
    return tuple(f"holds for calls like the example only: {reason}" for reason in reasons)


_ASSUME = "assume_inputs=True folds it for calls like the example."


def _kind_of_branch(recording: Recording, nodes: Sequence[Node]) -> Check:
    """Whether a forward around these nodes asks a tensor for a number, as a branch on data does."""
    running = {frame.serial for node in nodes for frame in node.frames}
    reads = (op.frames[0].serial for op in reads_data(recording) if op.frames)
    return Check.HIDDEN_BRANCH if running.isdisjoint(reads) else Check.DATA_DEPENDENT


def last_axis_of(site: Site, proposal: Proposal) -> Literal["scale", "affine"] | None:
    """What crosses to the consumers of a norm of tokens, to which picking tokens makes nothing."""
    if proposal.rule != "into consumers" or site.settings.get("channel_axis") != -1:
        return None
    return "affine" if is_affine(site) or "bias" in site.parameters else "scale"
