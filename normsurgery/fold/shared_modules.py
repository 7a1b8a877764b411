"""Which modules of a model could be two: those bound at two paths, or called in two places.

A module bound at two paths gets a copy at every path but its first. A module that one forward calls
in several places gets a copy for every place but the first; the forward is then rewritten, and a
rewriting counts only if it is proven.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from normsurgery.errors import CannotRewrite, CannotTrace
from normsurgery.find.by_type import typed_norms
from normsurgery.find.call_sites import call_site
from normsurgery.find.candidates import NotProven
from normsurgery.find.events import Event
from normsurgery.fold.edits import Copy
from normsurgery.fold.own_copies import KIND, make_copies
from normsurgery.graph import Flow, FrameRecord, ModuleCall, record
from normsurgery.graph.nodes import frames, maker
from normsurgery.inputs import Inputs
from normsurgery.spec import Fidelity
from normsurgery.steps import Untie
from normsurgery.surgery.calls import recorded_calls
from normsurgery.surgery.names import fresh_name
from normsurgery.survey import CallSite, Origin, Site
from normsurgery.treecopy import tree_copy


def possible_copies(model: nn.Module, inputs: Inputs, *, first: int) -> list[Untie]:
    """A Step for every module that could be split so that each call has one of its own.

    first: the number of the first Site. The model itself is not touched.
    """
    tree = tree_copy(model)
    norms = frozenset(path for typed in typed_norms(tree) for path in typed.paths)
    steps = _at_paths(tree, norms)
    make_copies(tree, steps, None)
    try:
        recording = record(tree, inputs)
    except CannotTrace:  # a forward that asks whether two of its modules are one
        return []
    called = {recording.path(call.module) for call in recording.module_calls}
    steps = [step for step in steps if step.site.path in called]
    steps += _proven(tree, _in_forwards(recording, norms), inputs)
    return [replace(s, site=replace(s.site, index=first + n)) for n, s in enumerate(steps)]


# --- bound at two paths -------------------------------------------------------------------------


def _at_paths(tree: nn.Module, norms: Collection[str]) -> list[Untie]:
    first: dict[int, str] = {}
    steps: list[Untie] = []
    for path, module in tree.named_modules(remove_duplicate=False):
        source = first.setdefault(id(module), path)
        if source != path and module._parameters and path not in norms:
            site = _site(module, (path,), None)
            steps.append(_step(module, site, source, f"{path}."))
    return steps


# --- called in two places of a forward ----------------------------------------------------------


def _in_forwards(recording: Flow, norms: Collection[str]) -> list[Untie]:
    """One Step for each place but the first, with a child's name that is free in the owner."""
    found: dict[int, _Shared] = {}
    for call in recording.module_calls:
        if call.module._parameters and recording.path(call.module) not in norms:
            shared = _shared(recording, call.module, norms)
            if shared is not None:
                found[id(shared.module)] = shared
    paths = [recording.path(shared.module) for shared in found.values()]
    taken: dict[int, set[str]] = {}
    steps: list[Untie] = []
    for shared in found.values():
        path, prefix = (recording.path(m) for m in (shared.module, shared.owner))
        if any(other.startswith(f"{path}.") for other in paths):
            continue  # what it holds is split
        names = taken.setdefault(id(shared.owner), set(dir(shared.owner)))
        for place in shared.places[1:]:
            child = _fresh(path.rpartition(".")[2], names)
            names.add(child)
            site = _site(shared.module, recording.paths[id(shared.owner)], place)
            below = f"{prefix}.{child}." if prefix else f"{child}."
            steps.append(replace(_step(shared.module, site, path, below), child=child))
    return steps


@dataclass(frozen=True)
class _Shared:
    """A module, the one owner whose forward calls it, and where it does."""

    module: nn.Module
    owner: nn.Module
    places: tuple[CallSite, ...]


def _shared(recording: Flow, module: nn.Module, norms: Collection[str]) -> _Shared | None:
    """The module, or what it is in, that one forward calls in several places; None without."""
    while (found := _places(recording, module)) is not None:
        path = recording.path(module)
        buffers = any(True for _ in module.buffers())
        inside = path.startswith(f"{recording.path(found.owner)}.".lstrip("."))
        if buffers or not inside or any(norm.startswith(f"{path}.") for norm in norms):
            return None
        if len(found.places) > 1:
            return found
        module = found.owner
    return None


def _places(recording: Flow, module: nn.Module) -> _Shared | None:
    """Where it is called more than once by one owner; None unless each call is of one value and
    gives one."""
    calls = [call for call in recording.module_calls if call.module is module]
    found = [_place(recording, call) for call in calls]
    known = [item for item in found if item is not None]
    if len(calls) < 2 or len(known) < len(calls) or len({id(owner) for owner, _ in known}) > 1:
        return None
    places = dict.fromkeys(place for _, place in known)
    return _Shared(module, known[0][0], tuple(places))


def _place(recording: Flow, call: ModuleCall) -> tuple[nn.Module, CallSite] | None:
    by_position = len(call.args) == 1 and not call.kwargs
    by_name = not call.args and list(call.kwargs) == ["input"]
    if not by_position and not by_name:
        return None
    given = call.args[0] if by_position else call.kwargs["input"]
    if not isinstance(given, fx.Node) or not isinstance(call.output, fx.Node):
        return None
    made = maker(call.output)
    if made is None or made not in call.operations:
        return None
    outside = _outside(made, call.module)
    if not outside or isinstance(outside[0].module, fx.GraphModule):
        return None
    owner = outside[0].module
    event = Event(given, call.output, (), outside, constant=False)
    try:
        found = call_site(recording, owner, owner, event, call.output, call.operations, given)
    except NotProven:
        return None
    assert found.output is not None
    # What it is called with stands in the call itself.
    return owner, replace(found, input=Origin(), region=(found.output,))


def _outside(node: fx.Node, module: nn.Module) -> tuple[FrameRecord, ...]:
    """The frames around the module's own."""
    own = [place for place, frame in enumerate(frames(node)) if frame.module is module]
    return frames(node)[own[-1] + 1 :] if own else ()


def _fresh(name: str, taken: set[str]) -> str:
    return fresh_name(name if name.isidentifier() else "shared", taken, first=2)


def _proven(tree: nn.Module, steps: Sequence[Untie], inputs: Inputs) -> list[Untie]:
    """The steps of the owners whose forwards can be rewritten; on a model without values, none."""
    held = (*tree.parameters(), *tree.buffers())
    if not steps or any(tensor.is_meta for tensor in held):
        return []
    paths = list(dict.fromkeys(step.site.path for step in steps))
    calls = recorded_calls(tree, paths, inputs)
    proven: list[Untie] = []
    for path in paths:
        group = [step for step in steps if step.site.path == path]
        try:
            make_copies(tree_copy(tree), group, calls)
        except CannotRewrite:
            continue
        proven += group
    return proven


# --- steps --------------------------------------------------------------------------------------


def _site(module: nn.Module, paths: tuple[str, ...], call: CallSite | None) -> Site:
    return Site(
        index=0,
        kind=KIND,
        paths=paths,
        form="module" if call is None else "formula",
        class_name=type(module).__name__,
        parameters={},
        settings={},
        attach="layer",
        call=call,
    )


def _step(module: nn.Module, site: Site, source: str, prefix: str) -> Untie:
    named = dict(module.named_parameters())
    return Untie(
        site=site,
        to="identity",
        options={},
        fidelity=Fidelity.EVAL,
        notes=tuple(
            f"untied: {prefix}{name} is a copy of its own ({_size(tensor)} bytes)"
            for name, tensor in named.items()
        ),
        source=source,
        size=sum(map(_size, named.values())),
        edits=tuple(Copy(f"{prefix}{name}", f"{source}.{name}") for name in named),
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
