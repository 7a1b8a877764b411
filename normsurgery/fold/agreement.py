"""Whether the landings of a fold can all be had: no weight is wanted twice, or read by others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from normsurgery.fold.channels import NEUTRAL
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import AddProduct, Copy, Create, Edit, Scale, Shift
from normsurgery.fold.ground import Ground, Landing, Refused
from normsurgery.graph.flow import Operand
from normsurgery.graph.nodes import module_of
from normsurgery.surgery.source import tensor_at


@dataclass(frozen=True)
class Agreed:
    """The edits of all landings, each weight's once; `notes` say what untying costs."""

    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()
    created: frozenset[str] = frozenset()
    untied: Mapping[str, frozenset[fx.Node]] = field(default_factory=dict)


def agree(ground: Ground, landings: Sequence[Landing]) -> Agreed:
    """Raises Refused where a weight would need two values, or where something else reads it."""
    edits: list[Edit] = []
    notes: list[str] = []
    untied: dict[str, frozenset[fx.Node]] = {}
    for same in _by_weight(_joined(ground, landings)):
        first = same[0]
        if any(landing.edits != first.edits for landing in same):
            where = ", ".join(sorted({ground.path(landing.nodes[-1]) for landing in same}))
            raise Refused(
                Check.CALLED_AGAIN,
                f"{where} would need different weights in different calls",
                _OWN_MODULE,
            )
        own = _require_own(ground, same)
        new = [copy for copy in own if copy.target not in ground.untied]
        names = _names_now(ground, same, own)
        edits += [*new, *(_renamed(edit, names) for edit in first.edits)]
        notes += [_cost(ground, copy) for copy in new]
        nodes = frozenset(node for landing in same for node in landing.nodes)
        untied |= {copy.target: nodes for copy in own}
    created = frozenset(edit.target for edit in edits if isinstance(edit, Create))
    return Agreed(tuple(edits), tuple(notes), created, untied)


_OWN_MODULE = "Give every call a module of its own."


def _joined(ground: Ground, landings: Sequence[Landing]) -> list[Landing]:
    """One landing per node: a node that is reached on two ways lands what came on each."""
    found: dict[tuple[fx.Node, ...], Landing] = {}
    for landing in landings:
        known = found.get(landing.nodes)
        if known is None:
            found[landing.nodes] = landing
            continue
        if _meant(known.edits) & _meant(landing.edits):
            raise Refused(Check.CALLED_AGAIN, f"{ground.path(landing.nodes[-1])} reads it twice")
        tensors = {id(operand.tensor): operand for operand in (*known.tensors, *landing.tensors)}
        edits = (*known.edits, *(e for e in landing.edits if not isinstance(e, Create)))
        found[landing.nodes] = Landing(landing.nodes, tuple(tensors.values()), edits)
    return list(found.values())


def _meant(edits: Sequence[Edit]) -> set[int]:
    """The places along the channels that the vectors of some edits change."""
    vectors = [edit.by for edit in edits if isinstance(edit, (Scale, AddProduct, Shift))]
    features = max((int(v.settings.get("features", 0)) for v in vectors), default=0)
    return {
        place
        for vector in vectors
        for place, channel in enumerate(vector.index or range(features))
        if channel != NEUTRAL
    }


def _by_weight(landings: Sequence[Landing]) -> list[list[Landing]]:
    """Landings that share a tensor, in groups."""
    groups: list[list[Landing]] = []
    for landing in landings:
        held = {id(operand.tensor) for operand in landing.tensors}
        touching = [
            group
            for group in groups
            if any(id(o.tensor) in held for member in group for o in member.tensors)
        ]
        merged = [member for group in touching for member in group]
        groups = [group for group in groups if group not in touching]
        groups.append([*merged, landing])
    return groups


def _require_own(ground: Ground, same: Sequence[Landing]) -> list[Copy]:
    """The tensors of these landings are read by these nodes alone, or may be copied."""
    nodes = {node for landing in same for node in landing.nodes}
    copies: list[Copy] = []
    for operand in {id(o.tensor): o for landing in same for o in landing.tensors}.values():
        elsewhere = _read_elsewhere(ground, nodes)
        others = [u for u in ground.flow.uses(operand) if u not in nodes | elsewhere]
        if ground.flow.is_exposed(operand):
            raise Refused(Check.RETURNED, f"{operand.name} itself is returned by the model")
        if others:
            copies.append(_copy(ground, operand, same, others))
    return copies


def _read_elsewhere(ground: Ground, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that read a copy of their own, unless these are among them."""
    found: set[fx.Node] = set()
    for readers in ground.untied.values():
        if readers.isdisjoint(nodes):
            found |= readers
    return found


def _copy(
    ground: Ground, operand: Operand, same: Sequence[Landing], others: Sequence[fx.Node]
) -> Copy:
    """A tensor of its own for these landings. Raises Refused."""
    modules = {id(module_of(node)) for landing in same for node in landing.nodes}
    where = ground.path(others[0])
    if any(id(module_of(node)) in modules for node in others):
        raise Refused(Check.CALLED_AGAIN, f"{where} is called elsewhere too", _OWN_MODULE)
    names = ground.flow.names(operand.tensor)
    if len(names) < 2:
        raise Refused(Check.TIED, f"{operand.name} is read by {where} as well")
    own = _own_name(ground, operand.tensor, same)
    if own is None:
        raise Refused(Check.TIED, f"{operand.name} is read by {where} as well")
    if not ground.choices.untie:
        size = operand.tensor.numel() * operand.tensor.element_size()
        other = next(name for name in names if name != own)
        raise Refused(
            Check.TIED,
            f"{own} is {other}, which {where} reads",
            f"untie=True gives it a copy of its own ({size} bytes).",
        )
    return Copy(own, next(n for n in names if n != own and n not in ground.untied))


def _own_name(ground: Ground, tensor: Tensor, same: Sequence[Landing]) -> str | None:
    module = module_of(same[0].nodes[-1])
    if module is None:
        return None
    path = ground.flow.path(module)
    held = (*module.named_parameters(path, recurse=False), *module.named_buffers(path, False))
    return next((name for name, value in held if value is tensor), None)


def _names_now(ground: Ground, same: Sequence[Landing], own: Sequence[Copy]) -> dict[str, str]:
    """First name -> the one to edit: a copy's own, or the first of those that no copy took."""
    copied = {id(tensor_at(ground.model, copy.target)): copy.target for copy in own}
    found: dict[str, str] = {}
    for operand in (operand for landing in same for operand in landing.tensors):
        left = (n for n in ground.flow.names(operand.tensor) if n not in ground.untied)
        found[operand.name] = copied.get(id(operand.tensor)) or next(left, operand.name)
    return found


def _renamed(edit: Edit, names: Mapping[str, str]) -> Edit:
    edit = replace(edit, target=names.get(edit.target, edit.target))
    if isinstance(edit, AddProduct):
        edit = replace(edit, weight=names.get(edit.weight, edit.weight))
    if isinstance(edit, Create):
        edit = replace(edit, like=names.get(edit.like, edit.like))
    return edit


def _cost(ground: Ground, copy: Copy) -> str:
    tensor = tensor_at(ground.model, copy.target)
    size = tensor.numel() * tensor.element_size()
    return f"untied: {copy.target} is a copy of its own ({size} bytes)"
