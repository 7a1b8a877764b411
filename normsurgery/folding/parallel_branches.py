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

from torch import fx, nn

from normsurgery.finding.places import LAYERS
from normsurgery.flow.nodes import (
    arguments,
    frames,
    inputs_of,
    is_constant,
    maker,
    operator,
    outputs_of,
    shape,
)
from normsurgery.flow.operators import CONVOLUTION, LAYER_ARGUMENTS, Kind, kind_of
from normsurgery.folding.affines import is_affine
from normsurgery.folding.branch_checks import require_own
from normsurgery.folding.branch_geometry import merged_geometry
from normsurgery.folding.checks import Check, NoMatch
from normsurgery.folding.ground import Ground, Refused, Run
from normsurgery.folding.kernels import Geometry, Sizes
from normsurgery.folding.layers import Layer, layer
from normsurgery.rewriting.source import tensor_at
from normsurgery.survey import Site

KIND = "sum of branches"
ADDITIONS = frozenset({"aten::add", "aten::sub"})


@dataclass(frozen=True)
class Branch:
    """One summand: a layer of torch's, or a norm of the input itself.

    source: the value that it reads. nodes: everything it runs. path: of the layer; of a norm, its
    label. normed: a norm is or was part of it. sign: -1 where it is taken away. between: what norms
    that are gone made of `source` in front of it.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    path: str
    normed: bool
    sign: int = 1
    layer: Layer | None = None
    run: Run | None = None
    between: tuple[fx.Node, ...] = ()

    @property
    def essential(self) -> tuple[fx.Node, ...]:
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
    output: fx.Node
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
        # id of a module -> what it runs, but for views of its weights
        self.ran: dict[int, set[fx.Node]] = {}
        for node in ground.flow.operations:
            if not outputs_of(node) or not all(map(is_constant, outputs_of(node))):
                for frame in frames(node):
                    self.ran.setdefault(id(frame.module), set()).add(node)

    def of(self, branch: Branch) -> nn.Module:
        """The outermost module that runs the branch, and nothing else, and holds nothing else.

        Raises Refused where there is none.
        """
        inside = set(branch.nodes)
        essential = set(branch.essential)
        own = _tensors_of(self.ground, branch)
        for frame in reversed(frames(branch.essential[0])):
            ran = self.ran.get(id(frame.module), set())
            held = {id(parameter) for parameter in frame.module.parameters()}
            if essential <= ran <= inside and held <= own:
                return frame.module
        raise Refused(Check.NOT_REWRITABLE, f"no module runs {branch.path} alone")


def _tensors_of(ground: Ground, branch: Branch) -> set[int]:
    """The ids of the parameters of its layer and of the norms in it."""
    sites = [] if branch.run is None else [branch.run.site]
    inside = set(branch.nodes)
    for run in (ground.ends[end] for end in ground.gone):
        sites += [run.site] if inside.issuperset(run.nodes) else []
    own = {id(tensor_at(ground.model, n)) for site in sites for n in site.parameters.values()}
    operands = () if branch.layer is None else (branch.layer.weight, branch.layer.bias)
    return own | {id(operand.tensor) for operand in operands if operand is not None}


# --- the sums -----------------------------------------------------------------------------------


def _sums(ground: Ground, modules: _Places) -> Iterator[tuple[fx.Node, list[Branch]]]:
    """The output and the branches of each sum that is not part of a larger one."""
    done: set[fx.Node] = set()
    for node in reversed(ground.flow.operations):
        if operator(node) in ADDITIONS and node not in done:
            yield from _Tree(ground, modules, done).found_from(node)


class _Tree:
    """One tree of additions, read from its root."""

    def __init__(self, ground: Ground, modules: _Places, done: set[fx.Node]) -> None:
        self.ground, self.modules, self.done = ground, modules, done
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
        sign = -1 if operator(node) == "aten::sub" else 1
        begins = len(inputs_of(node)) == 1 and plain and arguments(node)[1] == 0
        if begins:  # sum() begins with 0
            return self._branches(inputs_of(node)[0], (node,))
        shapes = {shape(value) for value in (*inputs_of(node), *outputs_of(node))}
        if len(inputs_of(node)) != 2 or not plain or len(shapes) != 1:
            return None
        # What is added to itself is no two branches.
        parts = [
            (value, self._branches(value, (node,))) for value in dict.fromkeys(inputs_of(node))
        ]
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
            return [self._identity(run)] if is_affine(run.site) else None
        while value in ground.gone:
            gone = ground.ends[value]
            value, readers, nodes = gone.start, gone.nodes, (*gone.nodes, *nodes)
            ground.require_only(value, readers)
        node = maker(value)
        if node is None:
            return None
        if operator(node) in ADDITIONS and not nodes:
            return self._addition(node)
        while node is not None and kind_of(node) is Kind.RESHAPE:
            ground.require_only(inputs_of(node)[0], (node,))
            nodes = (node, *nodes)
            node = maker(inputs_of(node)[0])
        if node is None or operator(node) not in LAYER_ARGUMENTS:
            return None
        return [_layer_branch(ground, node, nodes, normed)]

    def _identity(self, run: Run) -> Branch:
        """Raises Refused where no module runs the norm alone."""
        found = Branch(run.start, run.nodes, run.site.label, normed=True, run=run)
        self.modules.of(found)
        return found


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
    nodes = (*before, node, *after)
    return Branch(source, nodes, _path(ground, module), normed, layer=found)


def _source(ground: Ground, found: Layer, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What the layer reads, seen through the views that a linear layer makes of it."""
    value, reader, before = found.input, node, list[fx.Node]()
    while operator(node) != CONVOLUTION and (made_by := maker(value)) is not None:
        if kind_of(made_by) is not Kind.RESHAPE or len(ground.flow.readers(value)) != 1:
            break
        value, reader = inputs_of(made_by)[0], made_by
        before.insert(0, reader)
    return value, before


# --- one sum ------------------------------------------------------------------------------------


def _branch_sum(
    ground: Ground, modules: _Places, output: fx.Node, branches: Sequence[Branch]
) -> BranchSum:
    """Raises Refused where its branches are no one layer together, or run by no module alone."""
    geometry, places = merged_geometry(ground, branches)
    at = dict(zip(map(id, branches), places, strict=True))
    # The last one: zeros are added up before it, and hardly any to a tensor.
    kept = next((branch for branch in reversed(branches) if _has_room(branch, geometry)), None)
    if kept is None:
        raise Refused(Check.AXIS, "none of its kernels has room for the others")
    owner = _owner(ground, output, branches)
    for branch in branches:
        require_own(ground, branch, owner)
        # A branch that is gone gives no tensor, which is more than other numbers in an output.
        made = {value for node in branch.nodes for value in outputs_of(node)}
        returned = made.intersection(ground.flow.outputs.values())
        if returned:
            raise Refused(Check.RETURNED, ground.name(returned.pop()))
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


def _owner(ground: Ground, output: fx.Node, branches: Sequence[Branch]) -> nn.Module:
    """The innermost module that adds the branches up and holds them all. Raises Refused."""
    node = maker(output)
    around = dict.fromkeys(frame.module for frame in frames(node)) if node is not None else {}
    for module in around:
        above = f"{_path(ground, module)}.".lstrip(".")
        if all(branch.path.startswith(above) for branch in branches):
            return module
    raise Refused(Check.NOT_REWRITABLE, "no module adds the branches up and holds them all")


def _has_room(branch: Branch, geometry: Geometry) -> bool:
    found = branch.layer
    kernel = () if found is None else tuple(found.weight.tensor.shape[2:])
    return found is not None and branch.sign > 0 and kernel == geometry.kernel


def _path(ground: Ground, module: nn.Module) -> str:
    return ground.located.recording.path(module)
