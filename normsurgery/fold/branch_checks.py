"""What a recorded run must show of a parallel branch before it may go into another layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import fx, nn

from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Ground, Refused
from normsurgery.graph.flow import Operand
from normsurgery.graph.nodes import frames
from normsurgery.surgery.source import tensor_at
from normsurgery.survey import Site

if TYPE_CHECKING:
    from normsurgery.fold.parallel_branches import Branch


def require_own(ground: Ground, branch: Branch, owner: nn.Module) -> None:
    """Nothing else uses the branch's tensors, and no hook sees what it computes.

    Raises Refused: CALLED_AGAIN, TIED, RETURNED, HOOK.
    """
    if branch.layer is not None:
        for operand in (branch.layer.weight, branch.layer.bias):
            if operand is not None:
                _require_own_tensor(ground, branch.path, operand)
    elif branch.run is not None:
        _require_own_norm(ground, branch.run.site, branch.nodes)
    for module in _inner_modules(branch.nodes, owner):
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused(Check.HOOK, f"{_path(ground, module)} has one")


def _inner_modules(nodes: Collection[fx.Node], owner: nn.Module) -> Iterator[nn.Module]:
    """The modules inside the owner in whose forwards the nodes ran."""
    for node in nodes:
        around = [frame.module for frame in frames(node)]
        if owner in around:
            yield from around[: around.index(owner)]


def _require_own_tensor(ground: Ground, path: str, operand: Operand) -> None:
    if len(ground.flow.uses(operand)) > 1 or ground.flow.is_exposed(operand):
        raise Refused(Check.CALLED_AGAIN, f"{path} runs more than once")
    _require_one_name(ground, operand)


def _require_one_name(ground: Ground, operand: Operand) -> None:
    if len(ground.flow.names(operand.tensor)) > 1:
        raise Refused(Check.TIED, f"{operand.name} has another name too")


def _require_own_norm(ground: Ground, site: Site, nodes: Collection[fx.Node]) -> None:
    if len(ground.runs[site.index]) > 1:
        raise Refused(Check.CALLED_AGAIN, f"{site.label} runs more than once")
    own = set(nodes)
    for name in site.parameters.values():
        operand = Operand(name, tensor_at(ground.model, name), ())
        _require_one_name(ground, operand)
        if ground.flow.is_exposed(operand):
            raise Refused(Check.RETURNED, f"{name} itself is returned by the model")
        others = [node for node in ground.flow.uses(operand) if node not in own]
        if others:
            raise Refused(Check.TIED, f"{name} is read by {ground.path(others[0])} as well")


def _path(ground: Ground, module: nn.Module) -> str:
    return ground.located.recording.path(module)
