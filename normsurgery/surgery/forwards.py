"""The forward of one owner, with all its norms rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normsurgery.errors import CannotRewrite
from normsurgery.surgery.building import Built
from normsurgery.surgery.owner import OwnerCall, Placement, reapply, rewrite_owner
from normsurgery.surgery.owner.graphs import rewrite_graph_module
from normsurgery.surgery.relation import tensors_in


def placement_of(item: Built) -> Placement:
    return Placement(item.step.site, item.step.child, item.new, item.source)


def rewritten(
    owner: nn.Module,
    items: Sequence[Built],
    calls: Sequence[OwnerCall] | None,
    shared: Mapping[str, str],
) -> Sequence[str]:
    """Rewrite the forward of one owner; returns the names of the new norms in it."""
    if isinstance(owner, fx.GraphModule):
        replacements = [(item.step.site, item.new) for item in items]
        return rewrite_graph_module(owner, replacements, kept=shared)
    placements = [placement_of(item) for item in items]
    if calls is None:
        reapply(owner, placements, shared=shared)
    elif _is_without_values(owner, calls):
        raise CannotRewrite("it has no values (meta device) to prove a rewritten forward on")
    else:
        # A fold holds in eval mode, and that is where the rewritten forward must agree.
        folds = all(item.step.action == "fold" for item in items)
        modes = (False,) if folds else (False, True)
        rewrite_owner(owner, placements, calls, modes=modes, shared=shared)
    return [placement.name for placement in placements]


def _is_without_values(owner: nn.Module, calls: Sequence[OwnerCall]) -> bool:
    leaves = tree_leaves(([(call.args, call.kwargs) for call in calls], tensors_in(owner)))
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)
