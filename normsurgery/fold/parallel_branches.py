"""Parallel linear branches: a sum of convolutions (or linears) of one input becomes one of them.

RepVGG, MobileOne, ACNet and the like, after the batch norm behind each convolution was folded into
it. A batch norm of the input itself, which is no convolution, is one with the kernel of an
identity. A plain residual (x + conv(x)) is no norm and stays.

The forward stays as it is. The sum is put into the convolution of one branch; in the place of each
other branch stands a module that adds nothing (neutral.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from normsurgery.find.places import LAYERS
from normsurgery.fold.affines import is_affine
from normsurgery.fold.branch_checks import require_own
from normsurgery.fold.branch_geometry import merged_geometry
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.ground import Ground, Refused, Run
from normsurgery.fold.kernels import Geometry, Sizes
from normsurgery.fold.landings import CONVOLUTION, PRODUCTS, Layer, layer
from normsurgery.graph.flow import Node
from normsurgery.surgery.source import tensor_at
from normsurgery.survey import Site

KIND = "sum of branches"
VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})
ADDITIONS = frozenset({"aten::add", "aten::sub"})


@dataclass(frozen=True)
class Branch:
    """One summand: a layer of torch's, or a norm of the input itself.

    source: the value that it reads. nodes: everything it runs. path: of the layer; of a norm, its
    label. normed: a norm is or was part of it. sign: -1 where it is taken away. between: what norms
    that are gone made of `source` in front of it.
    """

    source: int
    nodes: tuple[Node, ...]
    path: str
    normed: bool
    sign: int = 1
    layer: Layer | None = None
    run: Run | None = None
    between: tuple[int, ...] = ()

    @property
    def essential(self) -> tuple[Node, ...]:
        """Without the views and the norms around it."""
        if self.layer is not None:
            return (self.layer.node,)
        return self.nodes if self.run is None else self.run.nodes


@dataclass(frozen=True)
class BranchSum:
    """A sum of branches that are one layer together: that of the first of them.

    owner: the path of the module whose forward adds them up. output: the value of the sum. places:
    the path of the module that runs each other branch and nothing else. at: for each branch, the
    place of its kernel in the first one's. notes: for its Step.
    """

    owner: str
    output: int
    branches: tuple[Branch, ...]
    places: tuple[str, ...]
    geometry: Geometry
    at: tuple[Sizes, ...]
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> Layer:
        """The layer that the sum is put into."""
        found = self.branches[0].layer
        assert found is not None
        return found

    @property
    def label(self) -> str:
        """That of the Site which its Step has: the path of the layer that is kept."""
        return self.branches[0].path

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
    modules = _Places(ground)
    for output, branches in _sums(ground, modules):
        try:
            found.append(_branch_sum(ground, modules, output, branches))
        except Refused as refusal:
            apart.append(Apart(refusal.match, _identities(branches)))
    return found, apart


def _identities(branches: Sequence[Branch]) -> tuple[Site, ...]:
    return tuple(branch.run.site for branch in branches if branch.run is not None)


# --- who runs a branch --------------------------------------------------------------------------


class _Places:
    """The modules of a recorded run, by what each of them runs."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.ran: dict[int, set[int]] = {}  # id of a module -> its nodes, but views of its weights
        for node in ground.flow.nodes:
            if not node.outputs or not all(map(ground.flow.is_constant, node.outputs)):
                for frame in node.frames:
                    self.ran.setdefault(id(frame.module), set()).add(node.index)

    def of(self, branch: Branch) -> nn.Module:
        """The outermost module that runs the branch, and nothing else, and holds nothing else.

        Raises Refused where there is none.
        """
        inside = {node.index for node in branch.nodes}
        essential = {node.index for node in branch.essential}
        own = _tensors_of(self.ground, branch)
        for frame in reversed(branch.essential[0].frames):
            ran = self.ran.get(id(frame.module), set())
            held = {id(parameter) for parameter in frame.module.parameters()}
            if essential <= ran <= inside and held <= own:
                return frame.module
        raise Refused(Check.NOT_REWRITABLE, f"no module runs {branch.path} alone")


def _tensors_of(ground: Ground, branch: Branch) -> set[int]:
    """The ids of the parameters of its layer and of the norms in it."""
    sites = [] if branch.run is None else [branch.run.site]
    inside = {node.index for node in branch.nodes}
    for run in (ground.ends[end] for end in ground.gone):
        sites += [run.site] if inside.issuperset(node.index for node in run.nodes) else []
    own = {id(tensor_at(ground.model, n)) for site in sites for n in site.parameters.values()}
    operands = () if branch.layer is None else (branch.layer.weight, branch.layer.bias)
    return own | {id(operand.tensor) for operand in operands if operand is not None}


# --- the sums -----------------------------------------------------------------------------------


def _sums(ground: Ground, modules: _Places) -> Iterator[tuple[int, list[Branch]]]:
    """The output and the branches of each sum that is not part of a larger one."""
    done: set[int] = set()
    for node in reversed(ground.flow.nodes):
        if node.name in ADDITIONS and node.index not in done:
            yield from _Tree(ground, modules, done).found_from(node)


class _Tree:
    """One tree of additions, read from its root."""

    def __init__(self, ground: Ground, modules: _Places, done: set[int]) -> None:
        self.ground, self.modules, self.done = ground, modules, done
        self.root = -1
        self.found: list[tuple[int, list[Branch]]] = []

    def found_from(self, root: Node) -> list[tuple[int, list[Branch]]]:
        self.root = root.outputs[0]
        self._keep(self.root, self._addition(root))
        return self.found

    def _keep(self, output: int, branches: list[Branch] | None) -> None:
        if branches is None or len(branches) < 2:
            return
        if any(branch.layer for branch in branches) and any(branch.normed for branch in branches):
            self.found.append((output, branches))

    def _addition(self, node: Node) -> list[Branch] | None:
        """The branches it adds up; None where one summand is none, and the others are kept."""
        self.done.add(node.index)
        plain = node.kwargs.get("alpha", 1) == 1
        sign = -1 if node.name == "aten::sub" else 1
        if len(node.inputs) == 1 and plain and node.args[1] == 0:  # sum() begins with 0
            return self._branches(node.inputs[0], (node,))
        shapes = {self.ground.flow.shape(value) for value in (*node.inputs, *node.outputs)}
        if len(node.inputs) != 2 or not plain or len(shapes) != 1:
            return None
        # What is added to itself is no two branches.
        parts = [(value, self._branches(value, (node,))) for value in dict.fromkeys(node.inputs)]
        if len(parts) == 2 and all(branches is not None for _, branches in parts):
            first, second = (branches or [] for _, branches in parts)
            negated = [replace(branch, sign=sign * branch.sign) for branch in second]
            together = self._of_one_value([*first, *negated])
            if together is not None:
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

    def _begun_at(self, branch: Branch, passed: Sequence[int], source: int) -> Branch:
        """The branch with the norms that are gone in front of it, whose outputs are `passed`. One
        that something outside the sum reads as well is no part of it."""
        if not passed:
            return branch
        inside = {node.index for node in self.ground.flow.between(source, self.root)}
        own = [
            value
            for value in passed
            if all(node.index in inside for node in self.ground.flow.readers(value))
        ]
        before = [node for value in reversed(own) for node in self.ground.ends[value].nodes]
        nodes, between = (*before, *branch.nodes), (*branch.between, *own)
        return replace(branch, source=source, nodes=nodes, between=between, normed=True)

    def _back_from(self, value: int) -> list[int]:
        """The value, and those that it was made of by norms that are gone."""
        found = [value]
        while value in self.ground.gone:
            value = self.ground.gone[value]
            found.append(value)
        return found

    def _branches(self, value: int, readers: Sequence[Node]) -> list[Branch] | None:
        try:
            return self._summand(value, readers)
        except Refused:
            return None

    def _summand(self, value: int, readers: Sequence[Node]) -> list[Branch] | None:
        ground, flow = self.ground, self.ground.flow
        ground.require_only(value, readers)
        nodes: tuple[Node, ...] = ()
        normed = value in ground.gone
        run = ground.ends.get(value)
        if run is not None and not normed:
            return [self._identity(run)] if is_affine(run.site) else None
        while value in ground.gone:
            gone = ground.ends[value]
            value, readers, nodes = gone.start, gone.nodes, (*gone.nodes, *nodes)
            ground.require_only(value, readers)
        node = flow.maker(value)
        if node is None:
            return None
        if node.name in ADDITIONS and not nodes:
            return self._addition(node)
        while node is not None and node.name in VIEWS:
            ground.require_only(node.inputs[0], (node,))
            nodes = (node, *nodes)
            node = flow.maker(node.inputs[0])
        if node is None or (node.name != CONVOLUTION and node.name not in PRODUCTS):
            return None
        return [_layer_branch(ground, node, nodes, normed)]

    def _identity(self, run: Run) -> Branch:
        """Raises Refused where no module runs the norm alone."""
        found = Branch(run.start, run.nodes, run.site.label, normed=True, run=run)
        self.modules.of(found)
        return found


def _layer_branch(ground: Ground, node: Node, after: Sequence[Node], normed: bool) -> Branch:
    """Raises Refused where it is no layer of torch's with weights of its own, run once."""
    found = layer(ground, node)
    module = ground.child_of(node, found.weight)
    where = ground.path(node)
    if module is None or type(module) not in LAYERS or found.transposed:
        raise Refused(Check.UNKNOWN, f"{where} is no plain layer of torch's")
    if (found.into, found.out) != (1, 0):
        raise Refused(Check.AXIS, f"{where} has its weight the other way round")
    source, before = _source(ground, found, node)
    nodes = (*before, node, *after)
    return Branch(source, nodes, _path(ground, module), normed, layer=found)


def _source(ground: Ground, found: Layer, node: Node) -> tuple[int, list[Node]]:
    """What the layer reads, seen through the views that a linear layer makes of it."""
    value, reader, before = found.input, node, list[Node]()
    while node.name != CONVOLUTION and (maker := ground.flow.maker(value)) is not None:
        if maker.name not in VIEWS or len(ground.flow.readers(value)) != 1:
            break
        value, reader = maker.inputs[0], maker
        before.insert(0, reader)
    return value, before


# --- one sum ------------------------------------------------------------------------------------


def _branch_sum(
    ground: Ground, modules: _Places, output: int, branches: Sequence[Branch]
) -> BranchSum:
    """Raises Refused where its branches are no one layer together, or run by no module alone."""
    geometry, places = merged_geometry(ground, branches)
    at = dict(zip(map(id, branches), places, strict=True))
    kept = next((branch for branch in branches if _has_room(branch, geometry)), None)
    if kept is None:
        raise Refused(Check.AXIS, "none of its kernels has room for the others")
    node = ground.flow.maker(output)
    owner = None if node is None else node.module
    if owner is None:
        raise Refused(Check.NOT_REWRITABLE, "the sum is made outside any forward of a module")
    for branch in branches:
        require_own(ground, branch, owner)
        for value in branch.between:
            ground.require_only(value, [node for other in branches for node in other.nodes])
    others = [branch for branch in branches if branch is not kept]
    ordered = (kept, *others)
    return BranchSum(
        owner=_path(ground, owner),
        output=output,
        branches=ordered,
        places=tuple(_path(ground, modules.of(branch)) for branch in others),
        geometry=geometry,
        at=tuple(at[id(branch)] for branch in ordered),
    )


def _has_room(branch: Branch, geometry: Geometry) -> bool:
    found = branch.layer
    kernel = () if found is None else tuple(found.weight.tensor.shape[2:])
    return found is not None and branch.sign > 0 and kernel == geometry.kernel


def _path(ground: Ground, module: nn.Module) -> str:
    return ground.located.recording.path(module)
