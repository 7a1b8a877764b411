"""The forward of one owner, with all its norms rewritten and then the sums of its branches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normsurgery.errors import CannotRewrite
from normsurgery.plan import Step
from normsurgery.surgery.building import Built
from normsurgery.surgery.owner import OwnerCall, Placement, reapply, rewrite_owner
from normsurgery.surgery.owner.graphs import rewrite_graph_module
from normsurgery.surgery.relation import tensors_in
from normsurgery.survey import CallSite


def placement_of(item: Built) -> Placement:
    return Placement(item.step.site, item.step.child, item.new, item.source)


def rewritten(
    owner: nn.Module,
    items: Sequence[Built],
    calls: Sequence[OwnerCall] | None,
    shared: Mapping[str, str],
    following: Sequence[CallSite],
) -> tuple[Sequence[str], Mapping[CallSite, CallSite]]:
    """Rewrite the forward of one owner.

    Returns the names of the new norms in it, and where the places `following` are now.
    """
    if isinstance(owner, fx.GraphModule):
        replacements = [(item.step.site, item.new) for item in items]
        return rewrite_graph_module(owner, replacements, kept=shared), {}
    placements = [placement_of(item) for item in items]
    if calls is None:
        made = reapply(owner, placements, shared=shared, following=following)
    elif _is_without_values(owner, calls):
        raise CannotRewrite("it has no values (meta device) to prove a rewritten forward on")
    else:
        # A fold holds in eval mode, and that is where the rewritten forward must agree.
        folds = all(item.step.action == "fold" for item in items)
        modes = (False,) if folds else (False, True)
        made = rewrite_owner(
            owner, placements, calls, modes=modes, shared=shared, following=following
        )
    return [placement.name for placement in placements], made.followed


def _is_without_values(owner: nn.Module, calls: Sequence[OwnerCall]) -> bool:
    leaves = tree_leaves(([(call.args, call.kwargs) for call in calls], tensors_in(owner)))
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)


def where_it_is_now(step: Step, followed: Mapping[CallSite, CallSite]) -> Step:
    """The step on the forward that other norms of it were already taken out of."""
    call = step.site.call
    now = None if call is None else followed.get(call)
    return step if now is None else replace(step, site=replace(step.site, call=now))


def sums_of(merges: Iterable[Step], owner_path: str) -> list[CallSite]:
    """Where an owner adds up branches that are to be merged."""
    sites = (step.site for step in merges if step.edits and step.site.path == owner_path)
    return [site.call for site in sites if site.call is not None]
