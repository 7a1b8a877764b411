"""Parallel linear branches: a sum of convolutions (or linears) of one input becomes one of them.

RepVGG, MobileOne, ACNet and the like, after the batch norm behind each convolution was folded into
it. A batch norm of the input itself, which is no convolution, is one with the kernel of an
identity. A plain residual (x + conv(x)) is no norm and stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from normsurgery.find.call_sites import call_site, names_at
from normsurgery.find.candidates import NotProven
from normsurgery.find.events import Event
from normsurgery.find.places import LAYERS
from normsurgery.fold.affines import is_affine
from normsurgery.fold.branch_checks import require_own
from normsurgery.fold.branch_geometry import merged_geometry
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.ground import Ground, Refused, Run
from normsurgery.fold.kernels import Geometry, Sizes
from normsurgery.fold.landings import CONVOLUTION, PRODUCTS, Layer, layer
from normsurgery.graph.nodes import (
    arguments,
    frames,
    inputs_of,
    maker,
    module_of,
    operator,
    outputs_of,
    shape,
)
from normsurgery.graph.positions import forward_of
from normsurgery.survey import CallSite, Origin, Site

KIND = "sum of branches"
VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})


@dataclass(frozen=True)
class Branch:
    """One summand: a layer of torch's at `path`, or a norm of the input itself.

    source: the value that it reads. nodes: everything it runs. normed: a norm is or was part of it.
    between: what norms that are gone made of `source` in front of it.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    path: str
    normed: bool
    layer: Layer | None = None
    run: Run | None = None
    between: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class BranchSum:
    """A sum of branches that are one layer together.

    owner: the path of the module whose forward adds them up; `call`: where. output: the value of
    the sum. at: for each branch, the place of its kernel in the merged one. notes: for its Step.
    """

    owner: str
    output: fx.Node
    paths: tuple[str, ...]
    call: CallSite
    branches: tuple[Branch, ...]
    geometry: Geometry
    at: tuple[Sizes, ...]
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As the label of the Site that its Step has."""
        line = self.call.output.line if self.call.output is not None else "?"
        return f"{self.owner}#line{line}"

    @property
    def convolutions(self) -> tuple[str, ...]:
        return tuple(branch.path for branch in self.branches if branch.layer is not None)

    @property
    def identities(self) -> tuple[Site, ...]:
        return _identities(self.branches)


@dataclass(frozen=True)
class Apart:
    """A sum whose branches must stay apart, and the norms of the input that are among them."""

    match: NoMatch
    identities: tuple[Site, ...]

    @property
    def reason(self) -> str:
        return self.match.reason


def branch_sums(ground: Ground) -> tuple[list[BranchSum], list[Apart]]:
    """Every sum of two or more branches in the run that can be one layer, and those that cannot.

    `ground.gone` holds the norms that were folded into their convolution. A norm of the input
    counts as a branch where it is a scale and a shift per channel and was not folded elsewhere. A
    sum in which there was no norm is left alone: it is the author's.
    """
    found: list[BranchSum] = []
    apart: list[Apart] = []
    for output, branches in _sums(ground):
        try:
            found.append(_branch_sum(ground, output, branches))
        except Refused as refusal:
            apart.append(Apart(refusal.match, _identities(branches)))
    return found, apart


def _identities(branches: Sequence[Branch]) -> tuple[Site, ...]:
    return tuple(branch.run.site for branch in branches if branch.run is not None)


# --- the sums -----------------------------------------------------------------------------------


def _sums(ground: Ground) -> Iterator[tuple[fx.Node, list[Branch]]]:
    """The output and the branches of each sum that is not part of a larger one."""
    done: set[fx.Node] = set()
    for node in reversed(ground.flow.operations):
        if operator(node) == "aten::add" and node not in done:
            yield from _Tree(ground, done).found_from(node)


class _Tree:
    """One tree of additions, read from its root."""

    def __init__(self, ground: Ground, done: set[fx.Node]) -> None:
        self.ground, self.done = ground, done
        self.found: list[tuple[fx.Node, list[Branch]]] = []

    def found_from(self, root: fx.Node) -> list[tuple[fx.Node, list[Branch]]]:
        self.root = outputs_of(root)[0]
        self._keep(self.root, self._addition(root))
        return self.found

    def _keep(self, output: fx.Node, branches: list[Branch] | None) -> None:
        if branches is None or len(branches) < 2:
            return
        if any(branch.layer for branch in branches) and any(branch.normed for branch in branches):
            self.found.append((output, branches))

    def _addition(self, node: fx.Node) -> list[Branch] | None:
        """The branches it adds up; None where one summand is none, and the others are kept."""
        self.done.add(node)
        plain = node.kwargs.get("alpha", 1) == 1
        if len(inputs_of(node)) == 1 and plain and arguments(node)[1] == 0:  # sum() begins with 0
            return self._branches(inputs_of(node)[0], (node,))
        shapes = {shape(value) for value in (*inputs_of(node), *outputs_of(node))}
        if len(inputs_of(node)) != 2 or not plain or len(shapes) != 1:
            return None
        # What is added to itself is no two branches.
        parts = [
            (value, self._branches(value, (node,))) for value in dict.fromkeys(inputs_of(node))
        ]
        known = [branches for _, branches in parts if branches is not None]
        together = self._of_one_value([branch for branches in known for branch in branches])
        if len(known) == 2 and together is not None:
            return together
        for value, branches in parts:
            self._keep(value, branches)
        return None

    def _of_one_value(self, branches: Sequence[Branch]) -> list[Branch] | None:
        """The branches, seen to begin with the same value; None where they do not.

        A norm that is gone gives what it was given: it may stand in front of some of them.
        """
        read = [self._back_from(branch.source) for branch in branches]
        common = [v for v in next(iter(read), ()) if all(v in values for values in read)]
        if not common:
            return None
        return [
            self._begun_at(branch, values[: values.index(common[0])], common[0])
            for branch, values in zip(branches, read, strict=True)
        ]

    def _begun_at(self, branch: Branch, passed: Sequence[fx.Node], source: fx.Node) -> Branch:
        """The branch with the norms that are gone in front of it, whose outputs are `passed`. One
        that something outside the sum reads as well is no part of it."""
        if not passed:
            return branch
        inside = set(self.ground.flow.between(source, self.root))
        own = [
            value
            for value in passed
            if all(node in inside for node in self.ground.flow.readers(value))
        ]
        before = [node for value in reversed(own) for node in self.ground.ends[value].nodes]
        nodes, between = (*before, *branch.nodes), (*branch.between, *own)
        return replace(branch, source=source, nodes=nodes, between=between, normed=True)

    def _back_from(self, value: fx.Node) -> list[fx.Node]:
        """The value, and those that it was made of by norms that are gone."""
        found = [value]
        while value in self.ground.gone:
            value = self.ground.gone[value]
            found.append(value)
        return found

    def _branches(self, value: fx.Node, readers: Sequence[fx.Node]) -> list[Branch] | None:
        try:
            return self._summand(value, readers)
        except Refused:
            return None

    def _summand(self, value: fx.Node, readers: Sequence[fx.Node]) -> list[Branch] | None:
        ground = self.ground
        ground.require_only(value, readers)
        nodes: tuple[fx.Node, ...] = ()
        normed = value in ground.gone
        run = ground.ends.get(value)
        if run is not None and not normed:
            return [_identity(ground, run)] if _is_affine_run(run) else None
        while value in ground.gone:
            gone = ground.ends[value]
            value, readers, nodes = gone.start, gone.nodes, (*gone.nodes, *nodes)
            ground.require_only(value, readers)
        node = maker(value)
        if node is None:
            return None
        if operator(node) == "aten::add" and not nodes:
            return self._addition(node)
        while node is not None and operator(node) in VIEWS:
            ground.require_only(inputs_of(node)[0], (node,))
            nodes = (node, *nodes)
            node = maker(inputs_of(node)[0])
        if node is None or (operator(node) != CONVOLUTION and operator(node) not in PRODUCTS):
            return None
        return [_layer_branch(ground, node, nodes, normed)]


def _is_affine_run(run: Run) -> bool:
    return run.site.form == "module" and is_affine(run.site)


def _identity(ground: Ground, run: Run) -> Branch:
    return Branch(run.start, run.nodes, run.site.path, normed=True, run=run)


def _layer_branch(ground: Ground, node: fx.Node, after: Sequence[fx.Node], normed: bool) -> Branch:
    """Raises Refused where it is no layer of torch's with weights of its own, run once."""
    found = layer(ground, node)
    module = ground.child_of(node, found.weight)
    where = ground.path(node)
    if module is None or type(module) not in LAYERS or found.transposed:
        raise Refused(Check.UNKNOWN, f"{where} is no plain layer of torch's")
    if (found.into, found.out) != (1, 0):
        raise Refused(Check.AXIS, f"{where} has its weight the other way round")
    source, before = _source(ground, found, node)
    return Branch(source, (*before, node, *after), _path(ground, module), normed, layer=found)


def _source(ground: Ground, found: Layer, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What the layer reads, seen through the views that a linear layer makes of it."""
    value, reader, before = found.input, node, list[fx.Node]()
    while operator(node) != CONVOLUTION and (made_by := maker(value)) is not None:
        if operator(made_by) not in VIEWS or len(ground.flow.readers(value)) != 1:
            break
        value, reader = inputs_of(made_by)[0], made_by
        before.insert(0, reader)
    return value, before


# --- one sum ------------------------------------------------------------------------------------


def _branch_sum(ground: Ground, output: fx.Node, branches: Sequence[Branch]) -> BranchSum:
    """Raises Refused where its branches are no one layer together, or not in one forward."""
    # The largest kernel first: a tensor that is made is made like its tensors.
    layers = [branch for branch in branches if branch.layer is not None]
    ordered = [*layers, *(branch for branch in branches if branch.layer is None)]
    geometry, at = merged_geometry(ground, ordered)
    node = maker(output)
    owner = None if node is None else module_of(node)
    if node is None or owner is None or isinstance(owner, fx.GraphModule):
        raise Refused(Check.NOT_REWRITABLE, "the sum is made outside any forward of a module")
    for branch in ordered:
        require_own(ground, branch, owner)
        for value in branch.between:
            ground.require_only(value, [node for other in ordered for node in other.nodes])
    return BranchSum(
        owner=_path(ground, owner),
        output=output,
        paths=ground.located.recording.paths[id(owner)],
        call=_call(ground, owner, node, output, ordered),
        branches=tuple(ordered),
        geometry=geometry,
        at=at,
    )


def _call(
    ground: Ground, owner: nn.Module, node: fx.Node, output: fx.Node, branches: Sequence[Branch]
) -> CallSite:
    recording, source = ground.located.recording, branches[0].source
    ops = ground.flow.between(source, output)
    event = Event(source, output, (), frames(node), constant=False)
    try:
        call = call_site(recording, owner, owner, event, output, ops, source)
    except NotProven as error:
        raise Refused(Check.NOT_REWRITABLE, str(error)) from error
    if call.input.name is not None:
        return call
    # Local names are known where the owner itself runs an operation: at the additions.
    own = (frames(part)[0] for part in ops if module_of(part) is owner)
    bound = {name for frame in own for name, value in frame.names.items() if value is source}
    # Two names of one value may be two values in another call: what is given to a branch is meant.
    written = [name for name in _given_names(owner, ops) if name in bound]
    if len(bound) > 1 and not written:
        raise Refused(Check.NOT_REWRITABLE, "what its branches read has two names")
    name = next(iter((*written, *bound)), None)
    return call if name is None else replace(call, input=Origin(name))


def _given_names(owner: nn.Module, ops: Sequence[fx.Node]) -> Iterator[str]:
    """The names in the expressions of the owner's forward that run the operations."""
    for frame in (frame for op in ops for frame in frames(op) if frame.module is owner):
        function = None if frame.code is None else forward_of(type(owner), frame.code)
        if function is not None:
            yield from names_at(function, frame.span)


def _path(ground: Ground, module: nn.Module) -> str:
    return ground.located.recording.path(module)
