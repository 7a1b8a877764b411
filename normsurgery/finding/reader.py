"""Reading one recording: a Site for every norm it shows, a Skip for what stays unexplained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, fx, nn

from normsurgery import spec as registry
from normsurgery.finding import by_graph, by_run
from normsurgery.finding.by_type import all_paths
from normsurgery.finding.call_sites import by_place, call_site, require_last_of_its_place
from normsurgery.finding.candidates import NotProven, groups, named_tensors
from normsurgery.finding.casts import cast_order
from normsurgery.finding.counters import counter
from normsurgery.finding.events import Event, plain
from normsurgery.finding.places import absorbable
from normsurgery.finding.proof import Proof
from normsurgery.finding.regions import prove_region
from normsurgery.finding.whole_modules import prove_module
from normsurgery.flow import Flow, ModuleCall
from normsurgery.flow.nodes import (
    is_constant,
    maker,
    module_of,
    name_of,
    operator,
    outputs_of,
    position,
    shape,
    tensor,
    users_of,
)
from normsurgery.flow.operations import as_data
from normsurgery.flow.operators import SAME_NUMBERS, kind_of
from normsurgery.survey import Site, Skip

Key = tuple[Any, ...]
Ends = tuple[
    tuple[fx.Node, fx.Node], ...
]  # of each run of a norm: the values it begins and ends with


@dataclass(frozen=True)
class Tree:
    """The user's modules: by their first path, and every path of each by `id`."""

    modules: Mapping[str, nn.Module]
    paths: Mapping[int, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Tree:
        paths = all_paths(model)
        return cls({paths[id(module)][0]: module for module in model.modules()}, paths)


class Reader:
    """Reads one recording. `typed` are the Sites known by class, by first path; `proofs` is a cache
    that outlives it, since equal modules are proven once."""

    def __init__(
        self,
        tree: Tree,
        recording: Flow,
        typed: Mapping[str, Site],
        proofs: dict[Any, Proof | None],
    ) -> None:
        self.tree = tree
        self.recording = recording
        self.typed_sites = typed
        self.proofs = proofs
        self.skips: list[Skip] = []
        self.ends: dict[Key, Ends] = {}
        self.calls: dict[int, list[ModuleCall]] = {}
        for call in recording.module_calls:
            self.calls.setdefault(id(call.module), []).append(call)
        self.typed = {id(m) for m in recording.model.modules() if recording.path(m) in typed}

    def sites(self) -> Iterator[tuple[Key, Site]]:
        """Every norm that ran, under a key by which another recording's is known to be the same."""
        events = sorted(
            (*by_run.events(self.recording), *by_graph.events(self.recording)),
            key=lambda event: [position(node) for node in event.operations],
        )
        yield from self._typed_modules(events)
        free = [e for e in events if not any(id(f.module) in self.typed for f in e.frames)]
        for group in groups(free):
            yield from self._group(group, free)

    # --- modules known by class ---------------------------------------------------------------

    def _typed_modules(self, events: Sequence[Event]) -> Iterator[tuple[Key, Site]]:
        for module in self.recording.model.modules():
            if id(module) not in self.typed:
                continue
            path = self.recording.path(module)
            calls = [c for c in self.calls.get(id(module), []) if _ends(c) is not None]
            direct = [e for e in events if any(f.module is module for f in e.frames)]
            if calls:
                ends = [_ends(call) for call in calls]
            else:  # called through `.forward`, which no hook sees
                ends = [(event.input, event.output) for event in direct]
            if not ends:
                continue
            site = self.typed_sites[path]
            spots = [end for end in ends if end is not None]
            constant = all(is_constant(start) for start, _ in spots)
            attach: Literal["norm", "weight"] = "weight" if constant else "norm"
            ends_in = absorbable(self.recording, [end for _, end in spots])
            if ends_in is not None and attach == "norm":
                site = replace(site, settings={**site.settings, "activation_module": ends_in})
            self.ends["module", path] = tuple(spots)
            site = _on_one_sample(site, module, [start for start, _ in spots])
            yield ("module", path), replace(site, attach=attach, **self._facts(spots))

    def _facts(self, ends: Sequence[tuple[fx.Node, fx.Node]]) -> dict[str, Any]:
        start, _ = ends[0]
        consumers = dict.fromkeys(name for _, end in ends for name in self._consumers(end))
        return {
            "calls": len(ends),
            "shape": min((shape(start) for start, _ in ends), key=prod),
            "dtype": dtype_name(tensor(start)),
            "producer": self._producer(start),
            "consumers": tuple(consumers),
        }

    def _producer(self, value: fx.Node) -> str | None:
        made_by = maker(plain(value))
        return name_of(plain(value)) if made_by is None else self._place(made_by)

    def _consumers(self, value: fx.Node) -> list[str]:
        found: list[str] = []
        for node in users_of(value):
            if kind_of(node) in SAME_NUMBERS and outputs_of(node):
                found.extend(self._consumers(outputs_of(node)[0]))
            else:
                found.append(self._place(node) or operator(node))
        return found

    def _place(self, node: fx.Node) -> str | None:
        module = module_of(node)
        return None if module is None else self.recording.path(module)

    # --- everything else ------------------------------------------------------------------------

    def _group(self, group: Sequence[Event], events: Sequence[Event]) -> Iterator[tuple[Key, Site]]:
        first = group[0]
        owner = first.frames[0].module if first.frames else self.recording.model
        if first.constant:
            yield from self._weight(group, owner)
            return
        whole = self._whole_module(group, owner, events)
        if whole is not None:
            yield ("module", whole.path), whole
            return
        for part in by_place(self._original(owner), owner, group):
            yield from self._part(part, owner)

    def _part(self, group: Sequence[Event], owner: nn.Module) -> Iterator[tuple[Key, Site]]:
        """What stands at one place of the owner's forward."""
        try:
            site, ends = self._expression(group, owner)
        except NotProven as error:
            if not group[0].frozen:
                self._skip(group[0], owner, str(error))
            return
        # Of a formula, only the first run was proven to end where its region ends.
        if site.form == "call" or len(group) == 1:
            self.ends[key_of(site)] = ends
        yield key_of(site), replace(site, **self._facts(ends))

    def _skip(self, event: Event, owner: nn.Module, reason: str) -> None:
        path = self.recording.path(owner)
        span = event.frames[0].span if event.frames else None
        line = f", line {span.line} of its forward" if span is not None else ""
        skip = Skip(
            path=path,
            reason=f"it normalises ({type(owner).__name__}{line}), but {reason}",
            hint="It is left as it is. Register a norm with this formula to have it recognised.",
            kind=event.kind or "",
        )
        if skip not in self.skips:  # a helper may normalise at several places
            self.skips.append(skip)

    def _original(self, module: nn.Module) -> nn.Module:
        return self.tree.modules[self.recording.path(module)]

    def _whole_module(
        self, group: Sequence[Event], owner: nn.Module, events: Sequence[Event]
    ) -> Site | None:
        calls = self.calls.get(id(owner), [])
        if not calls or isinstance(owner, fx.GraphModule):
            return None
        inside = [e for e in events if any(f.module is owner for f in e.frames)]
        if len(inside) != len(calls):
            return None
        original = self._original(owner)
        event = group[0]
        proof = prove_module(original, calls, event, self.proofs)
        if proof is None:
            return None
        path = self.recording.path(owner)
        prefix = f"{path}." if path else ""
        ends = [(self._given(call), call.output) for call in calls]
        site = Site(
            index=0,
            kind=proof.kind,
            paths=self.tree.paths[id(original)],
            form="module",
            class_name=type(original).__name__,
            parameters={role: prefix + name for role, name in proof.reading.tensors.items()},
            settings={
                **cast_order(original, proof, shape(ends[0][0])),
                **_said_eps(event, proof),
                **({"inputs": dict(proof.inputs)} if proof.inputs else {}),
            },
            found_by="proof",
            proof_error=proof.error,
            notes=_hook_notes(original),
        )
        self.ends[key_of(site)] = tuple(ends)
        return replace(site, **self._facts(ends))

    def _given(self, call: ModuleCall) -> fx.Node:
        """The argument of the call that is normalised: the first of the output's shape or any."""
        values = _given_to(call)
        return next((v for v in values if shape(v) == shape(call.output)), values[0])

    def _expression(self, group: Sequence[Event], owner: nn.Module) -> tuple[Site, Ends]:
        event = group[0]
        if event.refusal:
            raise NotProven(event.refusal)
        if event.kind is not None:
            return self._call(group, owner)
        region = prove_region(event, owner)
        proof = region.proof
        site = self._call_site(group, owner, region.output, region.operations, region.input)
        ends = ((region.input, region.output), *((e.input, e.output) for e in group[1:]))
        roles = {name: role for role, name in proof.reading.tensors.items()}
        operations = as_data(region.operations, region.input, roles)
        made = replace(
            site,
            call=None if site.call is None else replace(site.call, operations=operations),
            kind=proof.kind,
            form="formula",
            parameters=dict(proof.reading.tensors),
            settings=dict(proof.reading.settings),
            found_by="proof",
            proof_error=proof.error,
        )
        return made, ends

    def _call(self, group: Sequence[Event], owner: nn.Module) -> tuple[Site, Ends]:
        event = group[0]
        parameters = named_tensors(event)
        if any(named_tensors(other) != parameters for other in group[1:]):
            raise NotProven("this line normalises with different parameters each time it runs")
        site = self._call_site(group, owner, event.output, event.operations, event.input)
        made = replace(
            site,
            kind=event.kind or "",
            parameters={**parameters, **counter(self.recording, parameters)},
            settings=dict(event.settings or {}),
            found_by="run",
        )
        return made, tuple((e.input, e.output) for e in group)

    def _call_site(
        self,
        group: Sequence[Event],
        owner: nn.Module,
        output: fx.Node,
        operations: Sequence[fx.Node],
        start: fx.Node,
    ) -> Site:
        original = self._original(owner)
        for other in group[1:]:
            require_last_of_its_place(self.recording, original, owner, other)
        call = call_site(self.recording, original, owner, group[0], output, operations, start)
        return Site(
            index=0,
            kind="",
            paths=self.tree.paths[id(original)],
            form="call",
            class_name=type(original).__name__,
            parameters={},
            settings={},
            call=call,
            notes=_hook_notes(original),
        )

    def _weight(self, group: Sequence[Event], owner: nn.Module) -> Iterator[tuple[Key, Site]]:
        """A norm of a weight: what the input is made of is a parameter."""
        event = group[0]
        name = name_of(plain(event.input))
        kind = event.kind
        if kind is None:
            try:
                kind = prove_region(event, owner).proof.kind
            except NotProven:
                return
        if name is None:
            return
        original = self._original(owner)
        settings = {"eps": (event.settings or {}).get("eps"), "channel_axis": 0}
        site = Site(
            index=0,
            kind=kind,
            paths=self.tree.paths[id(original)],
            form="call" if event.kind else "formula",
            class_name=type(original).__name__,
            parameters={"weight": name},
            settings={**settings, "features": shape(event.input)[0]},
            shape=shape(event.input),
            dtype=dtype_name(tensor(event.input)),
            calls=len(group),
            attach="weight",
            found_by="run" if event.kind else "proof",
        )
        yield ("weight", name), site


def _on_one_sample(site: Site, module: nn.Module, starts: Sequence[fx.Node]) -> Site:
    """Without a batch axis the channels come first: they are counted from the end, as for both."""
    rank_of = registry.get(site.kind).sample_rank
    rank = None if rank_of is None else rank_of(module)
    if rank is None or all(len(shape(start)) != rank for start in starts):
        return site
    return replace(site, settings={**site.settings, "channel_axis": -rank})


def key_of(site: Site) -> Key:
    """By which another recording's site is known to be the same."""
    if site.attach == "weight":
        return ("weight", site.parameters["weight"])
    if site.form == "module":
        return ("module", site.path)
    return ("call", site.path, None if site.call is None else replace(site.call, operations=None))


def place_of(key: Key) -> Key:
    """The key without what may differ from run to run: which expressions belong to a call."""
    call = key[2] if key[0] == "call" else None
    return key if call is None else (*key[:2], call.function, call.output, call.node)


def dtype_name(held: Tensor) -> str:
    """As `float32`."""
    return str(held.dtype).removeprefix("torch.")


def _said_eps(event: Event, proof: Proof) -> dict[str, Any]:
    """What a call of the very norm says: by default eps may be that of the type, which float64
    cannot show."""
    said = (event.settings or {}).get("eps") if event.kind == proof.kind else None
    return {} if said is None else {"eps": said}


def _hook_notes(module: nn.Module) -> tuple[str, ...]:
    # The graph of an exported program checks its inputs in a hook of torch's own.
    hooked = module._forward_hooks or module._forward_pre_hooks
    if hooked and not isinstance(module, fx.GraphModule):
        return ("a forward hook runs on this module as well",)
    return ()


def _given_to(call: ModuleCall) -> list[fx.Node]:
    """The tensors that a call was given as arguments of their own."""
    return [leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, fx.Node)]


def _ends(call: ModuleCall) -> tuple[fx.Node, fx.Node] | None:
    given = _given_to(call)
    if not given or not isinstance(call.output, fx.Node):
        return None
    return given[0], call.output
