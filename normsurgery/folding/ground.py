"""What the rules of a fold stand on: the data flow, the norms in it, and what was folded before."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from normsurgery.edits.types import Edit, Vector
from normsurgery.errors import UsageError
from normsurgery.finding import Located
from normsurgery.flow import Flow
from normsurgery.flow.calls import values_in
from normsurgery.flow.flow import Operand, is_plain
from normsurgery.flow.nodes import inputs_of, maker, module_of, name_of, operator, outputs_of
from normsurgery.folding.checks import Check, NoMatch
from normsurgery.survey import Site


class Refused(Exception):
    """A rule does not apply; `match` says which check failed."""

    def __init__(self, check: Check, where: str = "", hint: str = "") -> None:
        self.match = NoMatch(check, where, hint)
        super().__init__(self.match.reason)

    def in_call(self, name: str) -> Refused:
        """The same, of another call than the example."""
        found = Refused(self.match.check, self.match.where, self.match.hint)
        found.match = replace(self.match, call=name)
        return found


@dataclass(frozen=True)
class Choices:
    """What the caller allows.

    rmsnorm: centre what writes to a residual stream, so that its LayerNorms become RMSNorms.
    keep_classes: every module keeps its class and its tensors, so no bias is created and a folded
        norm stays with neutral weights (a checkpoint that stock code loads).
    """

    untie: bool = False
    explicit_pad: bool = False
    keep_classes: bool = False
    rmsnorm: bool = False


PADS = ("refuse", "explicit")


def choices_of(*, rmsnorm: bool, pad: str, untie: bool) -> Choices:
    """As the verbs take them. Raises UsageError."""
    if pad not in PADS:
        raise UsageError(f"pad is {pad!r}; it must be one of: {', '.join(PADS)}.")
    return Choices(untie=untie, explicit_pad=pad == "explicit", rmsnorm=rmsnorm)


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift per channel, as Vectors; None is neutral."""

    scale: Vector | None
    shift: Vector | None

    def at(self, index: Sequence[int], features: int) -> Affine:
        """For channels in another order, with some of them left out or neutral."""
        if tuple(index) == tuple(range(features)):
            return self
        return Affine(
            None if self.scale is None else replace(self.scale, index=tuple(index)),
            None if self.shift is None else replace(self.shift, index=tuple(index)),
        )

    def without_shift(self) -> Affine:
        return Affine(self.scale, None)

    def over(self, number: float) -> Affine:
        """In front of a multiplication with a number: the shift is divided by it."""
        if self.shift is None:
            return self
        factor, offset = self.shift.factor / number, self.shift.offset / number
        return Affine(self.scale, replace(self.shift, factor=factor, offset=offset))

    def less(self, number: float) -> Affine:
        """In front of an addition of a number: scale * (y + c) + shift is scale * y + shift +
        c * (scale - 1), and c."""
        if not number or self.scale is None:
            return self
        shift = self.shift or replace(self.scale, part="shift", factor=0.0)
        return Affine(self.scale, replace(shift, offset=shift.offset + number))


@dataclass(frozen=True)
class Landing:
    """Nodes whose weights take up an affine, and the edits on them.

    nodes: one layer, or those of one run of a norm.
    tensors: the named tensors that change; every use of them must land with the same edits.
    """

    nodes: tuple[fx.Node, ...]
    tensors: tuple[Operand, ...]
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Run:
    """One run of a norm: the values it begins and ends with, and the nodes in between."""

    site: Site
    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class MergedLayer:
    """Parallel branches that are one layer from now on: everything that makes `output` of `source`.

    weight, bias: the names of its tensors; the bias may have to be created. shape: of the weight.
    channel_axis: that of input and output. padding: with zeros, by spatial dimension. centre: where
    in the weight the kernel of an identity lies; None where it has no place there.
    """

    source: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    weight: str
    bias: str
    has_bias: bool
    shape: tuple[int, ...]
    channel_axis: int
    groups: int
    padding: tuple[int, ...]
    centre: tuple[int, ...] | None = None

    @property
    def pads(self) -> bool:
        return any(self.padding)

    @property
    def path(self) -> str:
        """Of the module that it will be."""
        return self.weight.removesuffix(".weight")


@dataclass
class Ground:
    """A recorded run as the rules see it; `gone` are norms that were folded away already.

    call: its name; "" for the example. counted: names of the outputs that count (see Flow).
    gone: the value a norm ended with -> the value it began with.
    settled: the sites whose own scale and shift have been folded away.
    merged: the layers that parallel branches have become.
    created: biases that accepted folds create; untied: tensors that they make a copy of, with the
        nodes that read the copy.
    changed: the values that hold other numbers by now; absorbing: the nodes that make up for it.
    """

    located: Located
    choices: Choices
    call: str = ""
    counted: Sequence[str] | None = None
    flow: Flow = field(init=False)
    runs: dict[int, tuple[Run, ...]] = field(init=False)
    ends: dict[fx.Node, Run] = field(init=False)
    gone: dict[fx.Node, fx.Node] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    created: set[str] = field(default_factory=set)
    untied: dict[str, frozenset[fx.Node]] = field(default_factory=dict)
    merged: list[MergedLayer] = field(default_factory=list)
    changed: set[fx.Node] = field(default_factory=set)
    absorbing: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.flow = self.located.recording.counting(self.counted)
        self.runs = {
            site.index: tuple(
                Run(site, start, end, self.flow.between(start, end))
                for start, end in self.located.ends.get(site.index, ())
            )
            for site in self.located.survey
        }
        self.ends = {run.end: run for runs in self.runs.values() for run in runs}

    @property
    def model(self) -> nn.Module:
        return self.located.recording.model

    def extend(self, created: Collection[str]) -> dict[int, Site]:
        """Norms that were given a weight or a bias that they had not; returns them by index."""
        changed: dict[int, Site] = {}
        for site in self.located.survey:
            prefix = f"{site.path}." if site.path else ""
            own = {role: prefix + role for role in ("weight", "bias") if prefix + role in created}
            if site.form == "module" and own:
                changed[site.index] = replace(site, parameters={**site.parameters, **own})
        if not changed:
            return {}
        survey = self.located.survey
        sites = tuple(changed.get(site.index, site) for site in survey)
        self.located = replace(self.located, survey=replace(survey, sites=sites))
        for index, site in changed.items():
            self.runs[index] = tuple(replace(run, site=site) for run in self.runs[index])
            self.ends.update({run.end: run for run in self.runs[index]})
        return changed

    def site(self, index: int) -> Site:
        return next(site for site in self.located.survey if site.index == index)

    def gone_from(self, value: fx.Node) -> tuple[Run, ...]:
        """The runs of norms that began with this value, and are gone."""
        return tuple(self.ends[end] for end, start in self.gone.items() if start is value)

    def going_from(self, value: fx.Node) -> tuple[Run, ...]:
        """The runs of norms that begin with this value, and are still what they were.

        One of which nothing comes is left out, as it is among the readers of the value.
        """
        return tuple(
            run
            for run in self.ends.values()
            if run.start is value and run.end not in self.gone
            if run.site.index not in self.settled and self._is_wanted(run.end)
        )

    def _is_wanted(self, value: fx.Node) -> bool:
        flow = self.flow
        return bool(flow.readers(value)) or value in flow.returned or value in flow.kept

    def givers(self, values: Collection[fx.Node]) -> tuple[str, ...]:
        """The modules whose output one of the values is."""
        calls = self.located.recording.module_calls
        given = [call for call in calls if not set(values).isdisjoint(values_in(call.output))]
        paths = (self.located.recording.path(call.module) for call in given)
        return tuple(dict.fromkeys(path for path in paths if path))

    def changed_outputs(self) -> tuple[str, ...]:
        """The outputs that do not count and that hold other numbers by now."""
        changed = set(self.changed)
        for node in self.flow.operations:
            if node not in self.absorbing and not changed.isdisjoint(inputs_of(node)):
                changed.update(outputs_of(node))
        beside = {n: v for n, v in self.flow.outputs.items() if v not in self.flow.returned}
        return tuple(name for name, value in beside.items() if value in changed)

    def path(self, node: fx.Node) -> str:
        """Where a node stands, for people."""
        module = module_of(node)
        path = "" if module is None else self.flow.path(module)
        return path or operator(node).removeprefix("aten::")

    def require_only(self, value: fx.Node, readers: Iterable[fx.Node], what: str = "") -> None:
        """Raises Refused unless nothing but `readers` reads the value."""
        allowed = set(readers)
        flow = self.flow
        if value in flow.returned:
            raise Refused(Check.OUTPUT_USED, f"{what or self.name(value)} is returned by the model")
        if value in flow.kept:
            raise Refused(
                Check.OUTPUT_USED, f"{what or self.name(value)} is kept in an attribute of a module"
            )
        for reader in flow.readers(value):
            if reader not in allowed:
                raise Refused(
                    Check.OUTPUT_USED,
                    f"{what or self.name(value)} is read by {self.path(reader)} as well",
                )

    def require_inner(self, run: Run) -> None:
        """Nothing outside the norm reads what it computes on the way. Raises Refused."""
        for node in run.nodes:
            for output in outputs_of(node):
                if output is not run.end:
                    self.require_only(output, run.nodes, "a value inside the norm")

    def name(self, value: fx.Node) -> str:
        made_by = maker(value)
        if made_by is None:
            return name_of(value) or "an input"
        return f"the output of {self.path(made_by)}"

    def weight(self, value: fx.Node, node: fx.Node) -> Operand:
        """The named tensor that a node reads as its weight. Raises Refused."""
        operand = self.flow.operand(value)
        if operand is None:
            raise Refused(
                Check.COMPUTED_WEIGHT, f"the weight of {self.path(node)} is no single parameter"
            )
        if not is_plain(operand.tensor):
            raise Refused(
                Check.FOREIGN_WEIGHT,
                f"{operand.name} is a {type(operand.tensor).__name__} of {operand.tensor.dtype}",
                "Fold before quantizing, sharding or offloading.",
            )
        return operand

    def child_of(self, node: fx.Node, operand: Operand) -> nn.Module | None:
        """The module that runs the node with this tensor as its own `weight`."""
        module = module_of(node)
        own = None if module is None else module._parameters.get("weight")
        return module if own is operand.tensor else None


def is_torch_layer(module: nn.Module) -> bool:
    """Its forward is torch's own, and so knows what to do with a bias."""
    return type(module).forward.__module__.startswith("torch.nn.modules.")
