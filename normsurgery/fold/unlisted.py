"""Modules that are a scale and a shift per channel and that no norm is registered for.

LayerScale, a learned scale or bias, a batch norm written by hand, a normalisation of the input with
fixed statistics: `find` does not list them, for they normalise nothing, but they are in the way of
folds, and their own numbers can go where those of a batch norm go. Which they are is read off the
recorded run: nothing but arithmetic with constants along one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from normsurgery.find import Located
from normsurgery.fold.edits import Vector
from normsurgery.fold.ground import Affine
from normsurgery.graph import ModuleCall, Op, Recording, Ref
from normsurgery.graph.operations import Operation, as_data
from normsurgery.survey import Site

_SCALES = frozenset({"mul", "div", "neg"})
_SHIFTS = frozenset({"add", "sub", "rsub"})
_HANDS_ON = frozenset({"_to_copy", "alias", "detach", "clone"})
_ON_INPUT = _SCALES | _SHIFTS | _HANDS_ON | {"addcmul"}
_ON_CONSTANTS = _ON_INPUT | {
    "expand",
    "exp",
    "permute",
    "pow",
    "reciprocal",
    "reshape",
    "rsqrt",
    "sqrt",
    "squeeze",
    "t",
    "unsqueeze",
    "view",
    "_unsafe_view",
}


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


Spots = tuple[tuple[int, int], ...]


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
        readings = [_reading(recording, *pair) for pair in zip(own, spots, strict=True)]
        first = readings[0]
        if first is not None and all(other == first for other in readings):
            yield _site(recording, module, first, spots), tuple(spots)


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


def _spot(call: ModuleCall) -> tuple[int, int] | None:
    """The values that a call begins and ends with, where it is given and gives one."""
    given = (*call.args, *call.kwargs.values())
    if len(given) != 1 or not isinstance(given[0], Ref) or not isinstance(call.output, Ref):
        return None
    return given[0].value, call.output.value


def _reading(recording: Recording, call: ModuleCall, spot: tuple[int, int]) -> _Reading | None:
    start, end = spot
    ops = _between(recording, start, end)
    first, last = recording.values[start], recording.values[end]
    alike = first.shape == last.shape and first.tensor.dtype == last.tensor.dtype
    # Whatever else the call does, such as counting, would be lost with it.
    whole = {op.index for op in ops} == set(range(call.start, call.end))
    if not ops or not alike or not whole or first.constant:
        return None
    axes = [_axes(recording, op, len(first.shape)) for op in ops]
    along = {axis for found in axes if found is not None for axis in found}
    names = _own_tensors(recording, call.module, ops)
    if None in axes or len(along) > 1 or not names:
        return None
    parameters = {f"tensor{number}": name for number, name in enumerate(names)}
    operations = as_data(recording, ops, start, {name: role for role, name in parameters.items()})
    if operations is None:
        return None
    return _Reading(operations, parameters, next(iter(along), None), _parts(recording, ops))


def _between(recording: Recording, start: int, end: int) -> tuple[Op, ...]:
    """The operations that make `end`, those on constants too; none where it is not of `start`."""
    needed: dict[int, Op] = {}
    queue, reached = [end], False
    while queue:
        value = queue.pop()
        made_by = recording.values[value].op
        if value == start:
            reached = True
        elif made_by is not None and made_by not in needed:
            needed[made_by] = recording.ops[made_by]
            queue.extend(recording.ops[made_by].inputs)
        elif made_by is None and not recording.values[value].constant:
            return ()
    return tuple(needed[index] for index in sorted(needed)) if reached else ()


def _name(op: Op) -> str:
    schema = getattr(op.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _axes(recording: Recording, op: Op, rank: int) -> set[int] | None:
    """The axes of the input along which the operation differs; None where it may be not affine."""
    values = recording.values
    varying = [value for value in op.inputs if not values[value].constant]
    if not varying:
        return set() if _name(op) in _ON_CONSTANTS else None
    plain = _name(op) in _ON_INPUT and len(varying) == 1 and len(op.outputs) == 1
    if not plain or values[varying[0]].shape != values[op.outputs[0]].shape:
        return None
    inverse = _name(op) == "div" and op.inputs[0] != varying[0]
    if inverse or op.kwargs.get("rounding_mode") is not None:
        return None
    found: set[int] = set()
    for value in op.inputs:
        shape = values[value].shape if value != varying[0] else ()
        found |= {rank - len(shape) + place for place, size in enumerate(shape) if size != 1}
    return found


def _own_tensors(recording: Recording, module: nn.Module, ops: Sequence[Op]) -> list[str]:
    """The names of the module's own tensors that the operations read; none where another's is."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    read = dict.fromkeys(value for op in ops for value in op.inputs)
    constants = [recording.values[value] for value in read]
    named = [value for value in constants if value.constant and value.op is None]
    if any(value.name is None or id(value.tensor) not in own for value in named):
        return []
    return list(dict.fromkeys(value.name for value in named if value.name is not None))


def _parts(recording: Recording, ops: Sequence[Op]) -> tuple[str, ...]:
    constant = [value.constant for value in recording.values]
    on_input = [op for op in ops if not all(constant[value] for value in op.inputs)]
    names = {_name(op) for op in on_input}
    # c - x has a scale too, and so has c + 2 * x.
    turned = any(
        constant[op.inputs[0]] and (_name(op) == "sub" or op.kwargs.get("alpha", 1) != 1)
        for op in on_input
    )
    scales = turned or bool(names & (_SCALES | {"addcmul", "rsub"}))
    shifts = bool(names & (_SHIFTS | {"addcmul"}))
    return (*(("scale",) if scales else ()), *(("shift",) if shifts else ()))


def _site(
    recording: Recording, module: nn.Module, found: _Reading, spots: Sequence[tuple[int, int]]
) -> Site:
    start = recording.values[spots[0][0]]
    rank = len(start.shape)
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
            "features": start.shape[axis],
            # Of the sizes only their number matters: another batch must give the same edits.
            "shape": [size if place == axis else 2 for place, size in enumerate(start.shape)],
            "operations": list(found.operations),
            "parts": list(found.parts),
        },
        shape=start.shape,
        dtype=str(start.tensor.dtype).removeprefix("torch."),
        calls=len(spots),
        found_by="graph",
    )
