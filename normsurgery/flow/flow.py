"""Who makes and who reads each value of a recorded run, and which named tensor a weight is.

Names are not identities: a tensor is what shares its memory, whatever it is called, and a reader is
whatever reads it, be it an operation, the model's output or an attribute that keeps it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten_with_path

from normsurgery.flow.calls import FunctionCall, ModuleCall
from normsurgery.flow.nodes import (
    arguments,
    in_order,
    inputs_of,
    is_constant,
    maker,
    name_of,
    operator,
    outputs_of,
    position,
    shape,
    tensor,
    users_of,
    writes,
)
from normsurgery.flow.operators import VIEWS, Kind, kind_of
from normsurgery.inputs import flatten_outputs
from normsurgery.treecopy import tensors_of


@dataclass(frozen=True)
class Operand:
    """A constant value that is one named tensor, seen through views.

    name: its first name. tensor: the object. axes: for each dimension of the value, the axis of
    the tensor it runs along; None for one that was inserted. part: some of it was left out, along
    axes that are as long as they are.
    """

    name: str
    tensor: Tensor
    axes: tuple[int | None, ...]
    part: bool = False


@dataclass
class Flow:
    """The data flow of one recorded run.

    graph: every operation that ran, with its tensors (see flow.nodes). model: the tree copy that
    ran. paths: every path that binds a module, by `id(module)`. operations: in the order they ran.
    measured: the values whose size some code asked for. lines: those of its methods that ran.
    counted: the names of the outputs that count (see `outputs`); None: all of them. What leads to
    none of these leads nowhere. Where the names are none of this run's, as those of a tuple and of
    a dict are, as many count, from the first on.
    """

    model: nn.Module
    paths: Mapping[int, tuple[str, ...]]
    training: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    operations: list[fx.Node] = field(default_factory=list)
    calls: list[FunctionCall] = field(default_factory=list)
    module_calls: list[ModuleCall] = field(default_factory=list)
    measured: set[fx.Node] = field(default_factory=set)
    lines: Mapping[CodeType, set[int]] = field(default_factory=dict)
    counted: Sequence[str] | None = None

    def counting(self, names: Sequence[str] | None) -> Flow:
        """The same run, of which only these outputs count."""
        return replace(self, counted=names)

    def path(self, module: nn.Module) -> str:
        return self.paths[id(module)][0]

    def values(self) -> Iterator[fx.Node]:
        """Every value, in the order they were met."""
        return (node for node in self.graph.nodes if "val" in node.meta)

    @cached_property
    def outputs(self) -> dict[str, fx.Node]:
        """The values that the model gives back, by where they stand in what it returns."""
        root = [call for call in self.module_calls if call.module is self.model]
        if not root:
            return {}
        output = root[-1].output
        leaves = tree_flatten_with_path(output)[0]
        found = {_dotted(path): leaf for path, leaf in leaves if isinstance(leaf, fx.Node)}
        # What pytree does not know (a plain dataclass) holds the tensors themselves.
        opaque = flatten_outputs(output)
        known = {id(tensor(value)): value for value in self.values()} if opaque else {}
        return {**found, **{n: known[id(t)] for n, t in opaque.items() if id(t) in known}}

    @cached_property
    def returned(self) -> frozenset[fx.Node]:
        """The outputs that count."""
        every = list(self.outputs.values())
        if self.counted is None:
            return frozenset(every)
        common = [self.outputs[name] for name in self.counted if name in self.outputs]
        return frozenset(common or every[: len(self.counted)])

    def readers(self, value: fx.Node) -> Sequence[fx.Node]:
        """The operations that read the value, in the order they ran, without those that lead
        nowhere."""
        return [user for user in users_of(value) if user in self._live]

    @cached_property
    def _live(self) -> set[fx.Node]:
        """The operations that something comes of: an output, a write, a number for Python."""
        wanted = set(self.returned | self.kept)
        live: set[fx.Node] = set()
        for node in reversed(self.operations):
            made = outputs_of(node)
            if not made or writes(node) or not wanted.isdisjoint(made):
                live.add(node)
                wanted.update(inputs_of(node))
        return live

    def after(self, operation: fx.Node) -> Iterator[fx.Node]:
        """The operations that ran after this one."""
        place = bisect_right(self.operations, position(operation), key=position)
        return iter(self.operations[place:])

    def between(self, start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """The operations that make `end` of `start`, without those on constants alone."""
        found: set[fx.Node] = set()
        queue = [end]
        while queue:
            node = maker(value := queue.pop())
            if value is start or node is None or node in found or is_constant(value):
                continue
            found.add(node)
            queue.extend(inputs_of(node))
        return in_order(found)

    @cached_property
    def kept(self) -> frozenset[fx.Node]:
        """The computed values that an attribute of some module holds after the run."""
        held = {id(attribute) for attribute in tensors_of(self.model)}
        computed = (value for node in self.operations for value in outputs_of(node))
        return frozenset(value for value in computed if id(tensor(value)) in held)

    @cached_property
    def _roots(self) -> dict[int, fx.Node]:
        """Memory of a named tensor -> the value that first stands for it."""
        found: dict[int, fx.Node] = {}
        for value in self.values():
            if value.op == "get_attr" and name_of(value) is not None:
                found.setdefault(_memory(tensor(value)), value)
        return found

    def root(self, value: fx.Node) -> fx.Node | None:
        """The value of the named tensor that a constant value is a view of."""
        return self._roots.get(_memory(tensor(value))) if is_constant(value) else None

    @cached_property
    def _uses(self) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, frozenset[fx.Node]]]:
        """By named tensor, the operations that read it; by constant, the named tensors it is made
        of."""
        found: dict[fx.Node, list[fx.Node]] = {}
        sources: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.operations:
            read = frozenset[fx.Node]().union(*(self._sources(v, sources) for v in inputs_of(node)))
            made = outputs_of(node)
            if made and all(map(is_constant, made)):
                sources.update(dict.fromkeys(made, read))
                continue
            for source in read:
                found.setdefault(source, []).append(node)
        return found, sources

    def _sources(
        self, value: fx.Node, known: Mapping[fx.Node, frozenset[fx.Node]]
    ) -> frozenset[fx.Node]:
        if not is_constant(value):
            return frozenset()
        if value in known:
            return known[value]
        root = self.root(value)
        return frozenset() if root is None else frozenset({root})

    def uses(self, operand: Operand) -> Sequence[fx.Node]:
        """Every operation that reads the tensor, under any name, through any view or
        computation."""
        root = self._roots.get(_memory(operand.tensor))
        return () if root is None else self._uses[0].get(root, ())

    def is_exposed(self, operand: Operand) -> bool:
        """Whether the model gives back the tensor, or something computed from it alone."""
        root = self._roots.get(_memory(operand.tensor))
        return any(root in self._sources(value, self._uses[1]) for value in self.returned)

    def operand(self, value: fx.Node) -> Operand | None:
        """The named tensor behind a constant value, or None where it is computed."""
        if not is_constant(value):
            return None
        steps: list[fx.Node] = []
        while (node := maker(value)) is not None:
            seen = kind_of(node) in VIEWS or operator(node) in _PARTS
            if not seen or not inputs_of(node):
                return None
            steps.append(node)
            value = inputs_of(node)[0]
        name, held = name_of(value), tensor(value)
        if name is None:
            return None
        axes: tuple[int | None, ...] | None = tuple(range(held.dim()))
        for node in reversed(steps):
            axes = _moved(node, axes) if axes is not None else None
        part = any(operator(node) in _PARTS for node in steps)
        return None if axes is None else Operand(name, held, axes, part)

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model that was recorded, under each of its names."""
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return {**dict(self.model.named_parameters(remove_duplicate=False)), **buffers}

    @cached_property
    def _names(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, list[str]] = {}
        for name, held in self.named.items():
            found.setdefault(_memory(held), []).append(name)
        return {memory: tuple(names) for memory, names in found.items()}

    def names(self, held: Tensor) -> tuple[str, ...]:
        """Every name of the tensor in the model that was recorded."""
        return self._names.get(_memory(held), ())


_PARTS = frozenset({"aten::slice", "aten::narrow"})


def permutation(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """For a node that permutes dimensions: which of its input's each of its output's is."""
    if operator(node) == "aten::t":
        return (0,) if rank == 1 else (1, 0)
    if operator(node) == "aten::transpose":
        first, second = (int(axis) % rank for axis in arguments(node)[1:3])
        order = list(range(rank))
        order[first], order[second] = second, first
        return tuple(order)
    if operator(node) == "aten::permute":
        return tuple(int(axis) % rank for axis in arguments(node)[1])
    return None


def _moved(node: fx.Node, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    if kind_of(node) is Kind.SAME or operator(node) in _PARTS:
        return axes
    order = permutation(node, len(axes))
    if order is not None:
        return tuple(axes[axis] for axis in order)
    before, after = shape(inputs_of(node)[0]), shape(outputs_of(node)[0])
    # Only dimensions of size one come and go: anything else splits or joins axes.
    rest = [(size, axis) for size, axis in zip(before, axes, strict=True) if size != 1]
    if [size for size, _ in rest] != [size for size in after if size != 1]:
        return None
    queue = [axis for _, axis in rest]
    return tuple(None if size == 1 else queue.pop(0) for size in after)


def _dotted(path: Sequence[Any]) -> str:
    """As `hidden_states.3`; `output` for a bare tensor."""
    names = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return ".".join(map(str, names)) or "output"


def _memory(held: Tensor) -> int:
    try:
        return int(held.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass without storage of its own
        return id(held)


def is_plain(held: Tensor) -> bool:
    """An ordinary dense floating tensor: not quantized, not sharded, no subclass with own data."""
    ordinary = type(held) in (Tensor, nn.Parameter, nn.Buffer)
    return ordinary and held.is_floating_point() and held.layout is torch.strided
