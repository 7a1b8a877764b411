"""Which norms can go: solved for by least squares in float64, from the structure and its tensors.

A norm can go if the weights and biases of the layers before it, or of the layers that read it, can
be chosen so that the model without it computes the same. With statistics, "without it" means that
nothing stands in its place; a norm that computes stays, without its weight and bias. The unknowns
are whole weights, as far as the layer's class can hold them. The equations are every value that
must not change: what the norm put out or its readers put out, and every other reading of anything
that moved. A solution counts if it also holds on other data, within 1e-10.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .interpret import STRUCTURAL, Call, Tensors, apply_layer, evaluate, run
from .neighbours import Neighbours, after, before
from .program import BATCH, STATISTICS, Layer, Node, Program

BOUND = 1e-10
BATCH_SIZE = 40
ROWS_PER_UNKNOWN = 6


@dataclass(frozen=True)
class Verdict:
    """Whether a norm can go, and into which layers of which side."""

    foldable: bool
    side: str = ""
    into: frozenset[str] = frozenset()


def judge_norm(program: Program, tensors: Tensors, norm: str) -> Verdict:
    """Whether this norm can go, into the layers before it or else into those after it."""
    layer = program.layers[norm]
    if norm in program.hooks or not _has_something_to_fold(program, layer, tensors):
        return Verdict(False)
    sides: list[tuple[str, Callable[..., Neighbours]]] = [("consumers", after)]
    if layer.kind in STATISTICS:
        sides.insert(0, ("producers", before))
    for name, neighbours_of in sides:
        found = neighbours_of(program, norm)
        if found.layers and solvable(program, tensors, norm, found, name == "consumers"):
            return Verdict(True, name, found.layers)
    return Verdict(False)


def _has_something_to_fold(program: Program, layer: Layer, tensors: Tensors) -> bool:
    if layer.kind in STATISTICS:
        return True
    if layer.kind in BATCH:
        return False
    return program.tensor(layer.name, "weight") in tensors


def solvable(
    program: Program, tensors: Tensors, norm: str, found: Neighbours, into_consumers: bool
) -> bool:
    """Whether weights of these layers exist with which the model without the norm is the same."""
    if any(node.settings.get("of") in found.layers for node in program.nodes):
        return False  # a weight read on its own must stay; chance may leave it free where it is not
    unknown = _unknowns(program, tensors, found.layers)
    generator = torch.Generator().manual_seed(program.seed)

    def system() -> System:
        walks = [
            Walk(program, norm, found, into_consumers, call) for call in _calls(program, generator)
        ]
        return System.make(tensors, walks, generator)

    solution = _solve(system(), unknown)
    return solution is not None and system().error(solution) < BOUND


def _unknowns(program: Program, tensors: Tensors, layers: Iterable[str]) -> dict[str, Tensor]:
    unknown: dict[str, Tensor] = {}
    for name in sorted(layers):
        layer = program.layers[name]
        weight = program.tensor(name, "weight")
        if weight in tensors:
            unknown[weight] = tensors[weight]
        bias = program.tensor(name, "bias")
        if bias in tensors:
            unknown[bias] = tensors[bias]
        elif layer.settings.get("bias_size"):
            unknown[bias] = torch.zeros(layer.settings["bias_size"], dtype=torch.float64)
    return unknown


def _calls(program: Program, generator: torch.Generator) -> list[Call]:
    """Random calls that take every branch."""
    conditions = {node.when for node in program.nodes}
    calls = [Call(random_input(program, generator, BATCH_SIZE))]
    if "batch" in conditions:
        calls.append(Call(random_input(program, generator, 1)))
    if "flag" in conditions:
        flag = 1.5 + torch.rand((), generator=generator, dtype=torch.float64)
        calls.append(replace(calls[0], flag=flag))
    return calls


def random_input(program: Program, generator: torch.Generator, batch: int) -> Tensor:
    """An input of this batch size."""
    shape = (batch, *program.shape)
    if program.ids:
        return torch.randint(program.vocabulary, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class System:
    """The equations on given data: `observe(tensors)` must give `targets`, each of size 1."""

    observe: Callable[[Tensors], list[Tensor]]
    targets: list[Tensor]
    tensors: Tensors

    @classmethod
    def make(cls, tensors: Tensors, walks: list[Walk], generator: torch.Generator) -> System:
        runs = [walk.local_values(tensors, generator) for walk in walks]
        pairs = list(zip(walks, runs, strict=True))
        targets = [values[name] for walk, values in pairs for name in walk(tensors, values)]
        sizes = [_size(target) for target in targets]

        def observe(changed: Tensors) -> list[Tensor]:
            got = [value for walk, values in pairs for value in walk(changed, values).values()]
            return [value / size for value, size in zip(got, sizes, strict=True)]

        return cls(observe, [t / s for t, s in zip(targets, sizes, strict=True)], tensors)

    def error(self, changed: Mapping[str, Tensor]) -> float:
        """The largest relative error of any value that must not change."""
        got = self.observe({**self.tensors, **changed})
        pairs = zip(got, self.targets, strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


def _size(tensor: Tensor) -> Tensor:
    return tensor.abs().max().clamp_min(1e-300)


@dataclass(frozen=True)
class Walk:
    """One run without the norm: the values that must be what they were, by name."""

    program: Program
    norm: str
    found: Neighbours
    into_consumers: bool
    call: Call

    def local_values(self, tensors: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        """Every value of a run in which what comes from elsewhere is random data.

        So that nothing holds by chance of what stands before: a channel that a relu has switched
        off, the few rows of an embedding, a sum that a layer norm has made zero.
        """
        values = run(self.program, tensors, self.call)
        near: set[str] = set()
        for node in self.program.nodes:
            here = node.layer == self.norm or node.layer in self.found.layers
            moves = node.name in self.found.between or node.op in STRUCTURAL
            if here or self._reads_solved(node) or (moves and near & set(node.inputs)):
                near.add(node.name)
                inputs = [values[name] for name in node.inputs]
                values[node.name] = evaluate(self.program, node, inputs, tensors, self.call)
            else:
                shape = values[node.name].shape
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                values[node.name] = drawn
        return values

    def __call__(self, tensors: Tensors, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for node in self.program.nodes:
            runs = self.call.holds(node.when)
            is_norm = runs and node.layer == self.norm
            reads_solved = runs and self._reads_solved(node)
            if not (is_norm or reads_solved or set(node.inputs) & set(moved)):
                continue
            inputs = [moved.get(name, values[name]) for name in node.inputs]
            if is_norm:
                left = self._what_is_left(inputs[0], tensors)
                (moved if self.into_consumers else kept)[node.name] = left
                continue
            new = evaluate(self.program, node, inputs, tensors, self.call)
            if self._may_move(node, runs):
                reader = runs and self.into_consumers and node.layer in self.found.layers
                (kept if reader else moved)[node.name] = new
                continue
            if reads_solved:
                kept[node.name] = new
            kept.update({name: moved[name] for name in node.inputs if name in moved})
        kept.update({name: moved[name] for name in self.program.outputs if name in moved})
        return kept

    def _may_move(self, node: Node, runs: bool) -> bool:
        if runs and node.layer and node.layer in self.found.layers:
            return True
        return node.name in self.found.between or node.op in STRUCTURAL or not runs

    def _reads_solved(self, node: Node) -> bool:
        """Whether the node reads a tensor that is solved for, its own or a tied one."""
        name = node.settings.get("of", node.layer)
        if not name:
            return False
        solved = {
            self.program.tensor(layer, role)
            for layer in self.found.layers
            for role in ("weight", "bias")
        }
        return bool({self.program.tensor(name, role) for role in ("weight", "bias")} & solved)

    def _what_is_left(self, x: Tensor, tensors: Tensors) -> Tensor:
        layer = self.program.layers[self.norm]
        if layer.kind in STATISTICS:
            return x
        return apply_layer(self.program, layer, x, tensors, neutral=True)


def _solve(system: System, unknown: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The least squares solution of the equations, linear in the unknowns; None if they are not."""
    names, shapes = list(unknown), [unknown[name].shape for name in unknown]
    sizes = [shape.numel() for shape in shapes]

    def tensors(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(sizes)
        return {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}

    targets = torch.cat([target.flatten() for target in system.targets])
    generator = torch.Generator().manual_seed(0)
    total = sum(sizes)
    rows = torch.randperm(len(targets), generator=generator)[: ROWS_PER_UNKNOWN * total + 200]

    def observed(flat: Tensor) -> Tensor:
        got = system.observe({**system.tensors, **tensors(flat)})
        return torch.cat([value.flatten() for value in got])[rows]

    if _cannot_move(system, tensors, total):
        return None
    at_zero = observed(torch.zeros(total, dtype=torch.float64))
    probe = torch.randn(total, generator=generator, dtype=torch.float64)
    once, twice = observed(probe), observed(2 * probe)
    if float((twice - 2 * once + at_zero).abs().max()) > 1e-9 * float(twice.abs().max() + 1):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # vmap names what it runs one by one
        columns = torch.func.vmap(observed, chunk_size=64)(torch.eye(total, dtype=torch.float64))
    matrix = (columns - at_zero).T
    solution = torch.zeros(total, dtype=torch.float64)
    for _ in range(2):  # the second time makes up for the rounding of the first
        missing = targets[rows] - at_zero - matrix @ solution
        solution += torch.linalg.lstsq(matrix, missing[:, None], driver="gelsd").solution[:, 0]
    return tensors(solution)


def _cannot_move(
    system: System, tensors: Callable[[Tensor], dict[str, Tensor]], total: int
) -> bool:
    """Whether some equation is wrong and holds none of the unknowns."""
    zero, one = torch.zeros(total, dtype=torch.float64), torch.ones(total, dtype=torch.float64)
    here = system.observe({**system.tensors, **tensors(zero)})
    there = system.observe({**system.tensors, **tensors(one)})
    return any(
        torch.equal(a, b) and float((a - target).abs().max()) > BOUND
        for a, b, target in zip(here, there, system.targets, strict=True)
    )
