"""Who makes and who reads each value of a recorded run, and which named tensor a weight is.

Names are not identities: a tensor is what shares its memory, whatever it is called, and a reader is
whatever reads it, be it an operation, the model's output or an attribute that keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from normsurgery.graph.recording import FrameRecord, FunctionCall, Op, Recording, Ref, refs_in
from normsurgery.inputs import flatten_outputs
from normsurgery.treecopy import tensors_of

PADDING = frozenset({F.pad})  # watched: a circular padding is a dozen copies into slices


@dataclass(frozen=True)
class Node:
    """One operation, or one watched function call taken as one.

    name: as `aten::mul`, without overload or in-place underscore; `pad` for a call of F.pad.
    index: of its first operation: nodes run in this order.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frames: tuple[FrameRecord, ...]
    index: int
    op: Op | None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def module(self) -> nn.Module | None:
        """The innermost module whose forward it ran in."""
        return self.frames[0].module if self.frames else None


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


class Flow:
    """The data flow of one recording, asked for by value.

    counted: the names of the outputs that count (`outputs_of`); None: all of them. What leads to
    none of these leads nowhere. Where the names are none of this run's, as those of a tuple and of
    a dict are, as many count, from the first on.
    """

    def __init__(self, recording: Recording, counted: Sequence[str] | None = None) -> None:
        self.recording = recording
        self.outputs = outputs_of(recording)
        self.returned = frozenset(_counted(self.outputs, counted))
        self.nodes = tuple(_nodes(recording))
        self._makers = {output: node for node in self.nodes for output in node.outputs}
        self._readers: dict[int, list[Node]] = {}
        live = self._live()
        for node in self.nodes:
            if node.index in live:
                for value in dict.fromkeys(node.inputs):
                    self._readers.setdefault(value, []).append(node)

    def maker(self, value: int) -> Node | None:
        """The node that made the value; None for a parameter, a buffer or an input."""
        return self._makers.get(value)

    def readers(self, value: int) -> Sequence[Node]:
        """The nodes that read the value, in the order they ran, without those that lead nowhere."""
        return self._readers.get(value, ())

    def _live(self) -> set[int]:
        """Indices of the nodes that something comes of: an output, a write, a number for Python."""
        wanted = set(self.returned | self.kept)
        live: set[int] = set()
        for node in reversed(self.nodes):
            if not node.outputs or _writes(node) or not wanted.isdisjoint(node.outputs):
                live.add(node.index)
                wanted.update(node.inputs)
        return live

    def between(self, start: int, end: int) -> tuple[Node, ...]:
        """The nodes that make `end` of `start`, without those that work on constants alone."""
        found: dict[int, Node] = {}
        queue = [end]
        while queue:
            node = self.maker(value := queue.pop())
            if value == start or node is None or node.index in found or self.is_constant(value):
                continue
            found[node.index] = node
            queue.extend(node.inputs)
        return tuple(found[index] for index in sorted(found))

    def shape(self, value: int) -> tuple[int, ...]:
        return self.recording.values[value].shape

    def is_constant(self, value: int) -> bool:
        return self.recording.values[value].constant

    @cached_property
    def kept(self) -> frozenset[int]:
        """The computed values that an attribute of some module holds after the run."""
        held = {id(tensor) for tensor in tensors_of(self.recording.model)}
        return frozenset(
            number
            for number, value in enumerate(self.recording.values)
            if value.op is not None and id(value.tensor) in held
        )

    @cached_property
    def _roots(self) -> dict[int, int]:
        """Memory of a named tensor -> the value that first stands for it."""
        found: dict[int, int] = {}
        for number, value in enumerate(self.recording.values):
            if value.constant and value.op is None and value.name is not None:
                found.setdefault(_memory(value.tensor), number)
        return found

    def root(self, value: int) -> int | None:
        """The value of the named tensor that a constant value is a view of."""
        tensor = self.recording.values[value].tensor
        return self._roots.get(_memory(tensor)) if self.is_constant(value) else None

    @cached_property
    def _uses(self) -> tuple[dict[int, list[Node]], dict[int, frozenset[int]]]:
        """By named tensor, the nodes that read it; by constant, the named tensors it is made of."""
        found: dict[int, list[Node]] = {}
        sources: dict[int, frozenset[int]] = {}
        for node in self.nodes:
            read = frozenset[int]().union(*(self._sources(v, sources) for v in node.inputs))
            if all(self.is_constant(value) for value in node.outputs) and node.outputs:
                for output in node.outputs:
                    sources[output] = read
                continue
            for source in read:
                found.setdefault(source, []).append(node)
        return found, sources

    def _sources(self, value: int, known: Mapping[int, frozenset[int]]) -> frozenset[int]:
        if not self.is_constant(value):
            return frozenset()
        if value in known:
            return known[value]
        root = self.root(value)
        return frozenset() if root is None else frozenset({root})

    def uses(self, operand: Operand) -> Sequence[Node]:
        """Every node that reads the tensor, under any name, through any view or computation."""
        root = self._roots.get(_memory(operand.tensor))
        return () if root is None else self._uses[0].get(root, ())

    def is_exposed(self, operand: Operand) -> bool:
        """Whether the model gives back the tensor, or something computed from it alone."""
        root = self._roots.get(_memory(operand.tensor))
        return any(root in self._sources(value, self._uses[1]) for value in self.returned)

    def operand(self, value: int) -> Operand | None:
        """The named tensor behind a constant value, or None where it is computed."""
        if not self.is_constant(value):
            return None
        steps: list[Node] = []
        while (node := self.maker(value)) is not None:
            if node.name not in _VIEWS | _PARTS or not node.inputs:
                return None
            steps.append(node)
            value = node.inputs[0]
        found = self.recording.values[value]
        if found.name is None:
            return None
        axes: tuple[int | None, ...] | None = tuple(range(found.tensor.dim()))
        for node in reversed(steps):
            axes = _moved(self, node, axes) if axes is not None else None
        part = any(node.name in _PARTS for node in steps)
        return None if axes is None else Operand(found.name, found.tensor, axes, part)

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model that was recorded, under each of its names."""
        model = self.recording.model
        buffers = dict(model.named_buffers(remove_duplicate=False))
        return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}

    @cached_property
    def _names(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, list[str]] = {}
        for name, held in self.named.items():
            found.setdefault(_memory(held), []).append(name)
        return {memory: tuple(names) for memory, names in found.items()}

    def names(self, tensor: Tensor) -> tuple[str, ...]:
        """Every name of the tensor in the model that was recorded."""
        return self._names.get(_memory(tensor), ())


def _writes(node: Node) -> bool:
    """Whether the node writes into a tensor it was given: then something may read that later."""
    if node.op is None:
        return False
    schema = getattr(node.op.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


_SAME = frozenset(
    f"aten::{name}"
    for name in ("_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh", "to")
)
_RESHAPES = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias",
        "_unsafe_view",
        "flatten",
        "reshape",
        "squeeze",
        "unsqueeze",
        "view",
    )
)
_VIEWS = _SAME | _RESHAPES | {"aten::t", "aten::transpose", "aten::permute"}
_PARTS = frozenset({"aten::slice", "aten::narrow"})


def permutation(node: Node, rank: int) -> tuple[int, ...] | None:
    """For a node that permutes dimensions: which of its input's each of its output's is."""
    if node.name == "aten::t":
        return (0,) if rank == 1 else (1, 0)
    if node.name == "aten::transpose":
        first, second = (int(axis) % rank for axis in node.args[1:3])
        order = list(range(rank))
        order[first], order[second] = second, first
        return tuple(order)
    if node.name == "aten::permute":
        return tuple(int(axis) % rank for axis in node.args[1])
    return None


def _moved(flow: Flow, node: Node, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    if node.name in _SAME | _PARTS:
        return axes
    order = permutation(node, len(axes))
    if order is not None:
        return tuple(axes[axis] for axis in order)
    before, after = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    # Only dimensions of size one come and go: anything else splits or joins axes.
    rest = [(size, axis) for size, axis in zip(before, axes, strict=True) if size != 1]
    if [size for size, _ in rest] != [size for size in after if size != 1]:
        return None
    queue = [axis for _, axis in rest]
    return tuple(None if size == 1 else queue.pop(0) for size in after)


def _nodes(recording: Recording) -> Iterator[Node]:
    paddings = {call.index: call for call in recording.calls if call.function in PADDING}
    done: set[int] = set()
    for op in recording.ops:
        call = paddings.get(op.call) if op.call is not None else None
        if call is None:
            yield _of_op(op)
        elif call.index not in done:
            done.add(call.index)
            yield _of_call(call)


def _of_op(op: Op) -> Node:
    schema = getattr(op.target, "_schema", None)
    name = str(schema.name) if schema is not None else str(op.target)
    name = name if name.startswith("aten::_") else name.removesuffix("_")
    return Node(name, op.args, op.kwargs, op.inputs, op.outputs, op.frames, op.index, op)


def _of_call(call: FunctionCall) -> Node:
    outputs = refs_in(call.output)
    given = refs_in((call.args, call.kwargs))
    return Node("pad", call.args, call.kwargs, given, outputs, call.frames, call.start, None)


def outputs_of(recording: Recording) -> dict[str, int]:
    """The values that the model gives back, by where they stand in what it returns."""
    root = [call for call in recording.module_calls if call.module is recording.model]
    if not root:
        return {}
    output = root[-1].output
    leaves = tree_flatten_with_path(output)[0]
    found = {_dotted(path): leaf.value for path, leaf in leaves if isinstance(leaf, Ref)}
    # What pytree does not know (a plain dataclass) holds the tensors themselves.
    known = {id(value.tensor): number for number, value in enumerate(recording.values)}
    opaque = flatten_outputs(output)
    return {**found, **{n: known[id(t)] for n, t in opaque.items() if id(t) in known}}


def _dotted(path: Sequence[Any]) -> str:
    """As `hidden_states.3`; `output` for a bare tensor."""
    names = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return ".".join(map(str, names)) or "output"


def _counted(outputs: Mapping[str, int], names: Sequence[str] | None) -> list[int]:
    if names is None:
        return list(outputs.values())
    common = [outputs[name] for name in names if name in outputs]
    return common or list(outputs.values())[: len(names)]


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass without storage of its own
        return id(tensor)


def is_plain(tensor: Tensor) -> bool:
    """An ordinary dense floating tensor: not quantized, not sharded, no subclass with own data."""
    ordinary = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return ordinary and tensor.is_floating_point() and tensor.layout is torch.strided
