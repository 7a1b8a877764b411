"""Whether what surrounds a proposed fold in a recorded run allows it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from normsurgery.fold.ground import Ground, Landing
from normsurgery.fold.preconditions import require_eval, require_no_hooks


def require_accepted(
    ground: Ground, model: nn.Module, landings: Sequence[Landing], changed: Collection[int]
) -> None:
    """No hook and no module in train mode meets what changes. Raises Refused.

    Hooks that a model puts on itself in another call collect what that call gives beside.
    """
    if not landings:
        return
    nodes = [node for landing in landings for node in landing.nodes]
    modules = {id(n.module): n.module for n in nodes if n.module is not None}
    if not ground.call:
        require_no_hooks(ground, changed, modules.values())
    require_eval(ground, model, changed)
