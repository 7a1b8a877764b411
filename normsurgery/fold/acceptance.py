"""Whether what surrounds a proposed fold in a recorded run allows it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx, nn

from normsurgery.fold.ground import Ground, Landing
from normsurgery.fold.preconditions import require_eval, require_no_hooks
from normsurgery.graph.nodes import module_of


def require_accepted(
    ground: Ground, model: nn.Module, landings: Sequence[Landing], changed: Collection[fx.Node]
) -> None:
    """No hook and no module in train mode meets what changes. Raises Refused.

    Hooks that a model puts on itself in another call collect what that call gives beside.
    """
    if not landings:
        return
    nodes = (node for landing in landings for node in landing.nodes)
    modules = {id(m): m for node in nodes if (m := module_of(node)) is not None}
    if not ground.call:
        require_no_hooks(ground, changed, modules.values())
    require_eval(ground, model, changed)
