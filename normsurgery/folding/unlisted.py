"""Modules that are a scale and a shift per channel and that no norm is registered for.

LayerScale, a learned scale or bias, a batch norm written by hand, a normalisation of the input with
fixed statistics: `find` does not list them, for they normalise nothing, but they are in the way of
folds, and their own numbers can go where those of a batch norm go. Which they are is read off the
recorded run: nothing but arithmetic with constants along one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from normsurgery.edits.types import Vector
from normsurgery.finding import Located
from normsurgery.flow import Flow, ModuleCall
from normsurgery.flow.nodes import (
    inputs_of,
    is_constant,
    name_of,
    operations_between,
    operator,
    outputs_of,
    shape,
    tensor,
)
from normsurgery.flow.operations import Operation, as_data
from normsurgery.flow.operators import SAME_NUMBERS, Kind, kind_of
from normsurgery.folding.ground import Affine
from normsurgery.survey import Site

_ON_INPUT = frozenset({Kind.SCALE, Kind.ADD, Kind.ADD_PRODUCT, Kind.SAME})
_ON_CONSTANTS = _ON_INPUT | SAME_NUMBERS | {Kind.POWER}


def with_unlisted(located: Located) -> Located:
    """Located with a Site for each such module as well, numbered after those of the survey."""
    survey = located.survey
    found = list(_found(located))
    sites = [replace(site, index=len(survey) + n) for n, (site, _) in enumerate(found)]
    ends = {site.index: spots for site, (_, spots) in zip(sites, found, strict=True)}
    return Located(
        replace(survey, sites=(*survey.sites, *sites)),
        located.recording,
        {**located.ends, **ends},
    )


def with_unlisted_ends(located: Located) -> Located:
    """Where such modules of the survey stand in another run, in which they do the same."""
    there = {site.path: (site, spots) for site, spots in _found(located)}
    ends = dict(located.ends)
    for site in filter(is_unlisted, located.survey):
        ends.pop(site.index, None)
        found, spots = there.get(site.path, (site, ()))
        if spots and found.settings == site.settings:
            ends[site.index] = spots
    return replace(located, ends=ends)


def is_unlisted(site: Site) -> bool:
    """Whether the site is one that `find` does not list."""
    return "operations" in site.settings


def affine_of_unlisted(site: Site) -> Affine:
    """What the recorded operations do to each channel, as Vectors."""
    settings = {name: site.settings[name] for name in ("features", "channel_axis", "shape")}
    operations = tuple(site.settings["operations"])
    parts = site.settings["parts"]
    return Affine(
        Vector("scale", site.parameters, settings, operations) if "scale" in parts else None,
        Vector("shift", site.parameters, settings, operations) if "shift" in parts else None,
    )


@dataclass(frozen=True)
class _Reading:
    """What one call of a module does.

    axis: that of its channels, counted from the end for the last one; None if all are alike.
    parts: which of scale and shift there is.
    """

    operations: tuple[Operation, ...]
    parameters: dict[str, str]
    axis: int | None
    parts: tuple[str, ...]


Spots = tuple[tuple[fx.Node, fx.Node], ...]


def _found(located: Located) -> Iterator[tuple[Site, Spots]]:
    recording = located.recording
    calls: dict[int, list[ModuleCall]] = {}
    for call in recording.module_calls:
        calls.setdefault(id(call.module), []).append(call)
    for own in calls.values():
        module = own[0].module
        inner = any(id(part) in calls for part in module.modules() if part is not module)
        if inner or _is_listed(located, recording.path(module)):
            continue
        spots = [spot for call in own if (spot := _spot(call)) is not None]
        if len(spots) != len(own):
            continue
        readings = [_reading(*pair) for pair in zip(own, spots, strict=True)]
        first = readings[0]
        if first is not None and all(other == first for other in readings):
            yield _site(recording, module, first, tuple(spots)), tuple(spots)


def _is_listed(located: Located, path: str) -> bool:
    """Whether the module is a norm, is part of one, or has one in it."""
    listed = [site for site in located.survey if not is_unlisted(site)]
    names = [(site.form, name) for site in listed for name in site.paths]
    return any(
        name == path
        or name.startswith(f"{path}." if path else "")
        or (form == "module" and path.startswith(f"{name}."))
        for form, name in names
    )


def _spot(call: ModuleCall) -> tuple[fx.Node, fx.Node] | None:
    """The values that a call begins and ends with, where it is given and gives one."""
    given = (*call.args, *call.kwargs.values())
    if len(given) != 1 or not isinstance(given[0], fx.Node):
        return None
    return (given[0], call.output) if isinstance(call.output, fx.Node) else None


def _reading(call: ModuleCall, spot: tuple[fx.Node, fx.Node]) -> _Reading | None:
    start, end = spot
    nodes = operations_between(start, end)
    alike = shape(start) == shape(end) and tensor(start).dtype == tensor(end).dtype
    # Whatever else the call does, such as counting, would be lost with it.
    if not nodes or not alike or nodes != call.operations or is_constant(start):
        return None
    axes = [_axes(node, len(shape(start))) for node in nodes]
    along = {axis for found in axes if found is not None for axis in found}
    names = _own_tensors(call.module, nodes)
    if None in axes or len(along) > 1 or not names:
        return None
    parameters = {f"tensor{number}": name for number, name in enumerate(names)}
    operations = as_data(nodes, start, {name: role for role, name in parameters.items()})
    if operations is None:
        return None
    return _Reading(operations, parameters, next(iter(along), None), _parts(nodes))


def _axes(node: fx.Node, rank: int) -> set[int] | None:
    """The axes of the input along which the operation differs; None where it may be not affine."""
    varying = [value for value in inputs_of(node) if not is_constant(value)]
    if not varying:
        return set() if kind_of(node) in _ON_CONSTANTS else None
    made = outputs_of(node)
    plain = kind_of(node) in _ON_INPUT and len(varying) == 1 and len(made) == 1
    if not plain or shape(varying[0]) != shape(made[0]):
        return None
    inverse = operator(node) == "aten::div" and inputs_of(node)[0] is not varying[0]
    if inverse or node.kwargs.get("rounding_mode") is not None:
        return None
    found: set[int] = set()
    for value in inputs_of(node):
        sizes = shape(value) if value is not varying[0] else ()
        found |= {rank - len(sizes) + place for place, size in enumerate(sizes) if size != 1}
    return found


def _own_tensors(module: nn.Module, nodes: Sequence[fx.Node]) -> list[str]:
    """The names of the module's own tensors that the operations read; none where another's is."""
    own = {id(held) for held in (*module.parameters(), *module.buffers())}
    read = dict.fromkeys(value for node in nodes for value in inputs_of(node))
    held = [value for value in read if value.op == "get_attr"]
    names = [name for value in held if (name := name_of(value)) is not None]
    if len(names) < len(held) or any(id(tensor(value)) not in own for value in held):
        return []
    return list(dict.fromkeys(names))


def _parts(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    on_input = [node for node in nodes if not all(map(is_constant, inputs_of(node)))]
    kinds = {kind_of(node) for node in on_input}
    # c - x has a scale too, and so has c + 2 * x.
    turned = any(
        is_constant(inputs_of(node)[0])
        and (operator(node) == "aten::sub" or node.kwargs.get("alpha", 1) != 1)
        for node in on_input
    )
    turned |= any(operator(node) == "aten::rsub" for node in on_input)
    scales = turned or not kinds.isdisjoint({Kind.SCALE, Kind.ADD_PRODUCT})
    shifts = not kinds.isdisjoint({Kind.ADD, Kind.ADD_PRODUCT})
    return (*(("scale",) if scales else ()), *(("shift",) if shifts else ()))


def _site(recording: Flow, module: nn.Module, found: _Reading, spots: Spots) -> Site:
    start = spots[0][0]
    rank = len(shape(start))
    # A scale that all channels share fits either place; images have their channels second.
    axis = found.axis if found.axis is not None else (1 if rank > 3 else rank - 1)
    return Site(
        index=0,
        kind="affine",
        paths=recording.paths[id(module)],
        form="module",
        class_name=type(module).__name__,
        parameters=found.parameters,
        settings={
            "eps": 0.0,
            "channel_axis": -1 if axis == rank - 1 and axis != 1 else axis,
            "features": shape(start)[axis],
            # Of the sizes only their number matters: another batch must give the same edits.
            "shape": [size if place == axis else 2 for place, size in enumerate(shape(start))],
            "operations": list(found.operations),
            "parts": list(found.parts),
        },
        shape=shape(start),
        dtype=str(tensor(start).dtype).removeprefix("torch."),
        calls=len(spots),
        found_by="graph",
    )
