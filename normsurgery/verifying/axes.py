"""Which axes of the inputs of an ONNX graph may take other sizes, and inputs of those sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

from normsurgery.inputs import Inputs

if TYPE_CHECKING:
    from normsurgery.onnxfile.reading import OnnxFile

METADATA_KEY = "normsurgery.axes"  # of the model: JSON, axis name -> [least, most or null]
BATCH_SIZES = (1, 2, 7)
LARGER_SIZE = 17  # what is cut off or wrong from some small size on does not show below it
MOST_ELEMENTS = 2**22  # an upper bound is tried where all inputs together stay below this


@dataclass(frozen=True)
class Axis:
    """One dynamic axis, over every input that has it.

    places: (index of the tensor among the leaves of the inputs, dimension). size: in the example.
    low, high: the sizes that were declared, where they are known.
    """

    name: str
    places: tuple[tuple[int, int], ...]
    size: int
    low: int | None = None
    high: int | None = None

    @property
    def is_batch(self) -> bool:
        return all(dimension == 0 for _, dimension in self.places)


def dynamic_axes(
    file: OnnxFile,
    inputs: Inputs,
    order: Sequence[str] = (),
    program: ExportedProgram | None = None,
) -> tuple[Axis, ...]:
    """The named axes of the graph's inputs, batch first; without those that `program` has fixed.

    Raises UsageError where the inputs do not fit the graph.
    """
    leaves = _leaves(inputs)
    bounds = _bounds(file)
    found: dict[str, list[tuple[int, int]]] = {}
    for name, position in matched(file, inputs, order).items():
        port = next(port for port in file.inputs if port.name == name)
        for dimension, size in enumerate(port.shape or ()):
            if isinstance(size, str):
                found.setdefault(size, []).append((position, dimension))
    fixed = set() if program is None else _fixed(program, leaves)
    axes = [
        Axis(name, tuple(places), leaves[places[0][0]].shape[places[0][1]], *bounds.get(name, ()))
        for name, places in found.items()
        if not fixed & set(places)
    ]
    return tuple(sorted(axes, key=lambda axis: not axis.is_batch))


def matched(file: OnnxFile, inputs: Inputs, order: Sequence[str] = ()) -> dict[str, int]:
    """Input of the graph -> index of the tensor that feeds it, among the leaves of the inputs."""
    from normsurgery.onnxfile.feeding import feeds  # onnx is loaded where there is a graph

    leaves, structure = tree_flatten((inputs.args, dict(inputs.kwargs)))
    copied = [
        leaf.detach().cpu().contiguous().clone() if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    places = {
        leaf.data_ptr(): index
        for index, leaf in enumerate(copied)
        if isinstance(leaf, Tensor) and leaf.numel()
    }
    fed = feeds(file, Inputs(*tree_unflatten(copied, structure)), order)
    found = {
        name: places[int(array.ctypes.data)]
        for name, array in fed.items()
        if array.size and int(array.ctypes.data) in places
    }
    # What has no element has no address: those go by their order.
    empty = [i for i, leaf in enumerate(copied) if isinstance(leaf, Tensor) and not leaf.numel()]
    return found | dict(zip((n for n, array in fed.items() if not array.size), empty, strict=False))


def sizes_to_try(axis: Axis) -> Iterator[int]:
    """1, 2, 7 for a batch; 1, 2 and an odd one for another axis; 17; then the declared bounds."""
    odd = () if axis.is_batch else (axis.size | 1, axis.size + 3 - axis.size % 2)
    wanted = [*(BATCH_SIZES if axis.is_batch else (1, 2)), *odd[:1], LARGER_SIZE]
    wanted += [bound for bound in (axis.low, axis.high) if bound]
    for size in dict.fromkeys(wanted):
        # torch writes a least size of 2 where it means that 0 and 1 were not traced
        too_small = axis.low is not None and axis.low > 2 and size < axis.low
        too_large = axis.high is not None and size > axis.high
        if size != axis.size and not too_small and not too_large:
            yield size


def resized(inputs: Inputs, axis: Axis, size: int) -> Inputs | None:
    """The inputs with the axis repeated or cut to `size`; None where that would be too large."""
    leaves, structure = tree_flatten((inputs.args, dict(inputs.kwargs)))
    for position, dimension in axis.places:
        tensor = leaves[position]
        shape = list(tensor.shape)
        shape[dimension] = size
        if math.prod(shape) > MOST_ELEMENTS:
            return None
        if tensor.numel() == 0:
            leaves[position] = tensor.new_zeros(shape)
            continue
        index = torch.arange(size, device=tensor.device) % tensor.shape[dimension]
        leaves[position] = tensor.index_select(dimension, index)
    return Inputs(*tree_unflatten(leaves, structure))


def cut(inputs: Inputs, axis: Axis, start: int, stop: int) -> Inputs:
    """The inputs from `start` to `stop` along the axis."""
    leaves, structure = tree_flatten((inputs.args, dict(inputs.kwargs)))
    for position, dimension in axis.places:
        leaves[position] = leaves[position].narrow(dimension, start, stop - start)
    return Inputs(*tree_unflatten(leaves, structure))


def _leaves(inputs: Inputs) -> list[Any]:
    leaves: list[Any] = tree_flatten((inputs.args, dict(inputs.kwargs)))[0]
    return leaves


def _bounds(file: OnnxFile) -> dict[str, tuple[int, int | None]]:
    for entry in (*file.proto.metadata_props, *file.proto.graph.metadata_props):
        if entry.key == METADATA_KEY:
            read = json.loads(entry.value)
            return {name: (int(low), high) for name, (low, high) in read.items()}
    return {}


def _fixed(program: ExportedProgram, leaves: Sequence[Any]) -> set[tuple[int, int]]:
    """Axes of the inputs that the program was traced for one size of."""
    wanted = program.graph_signature.user_inputs
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    values = [nodes.get(name) if isinstance(name, str) else None for name in wanted]
    if len(values) != len(leaves):
        return set()
    return {
        (position, dimension)
        for position, value in enumerate(values)
        if isinstance(value, Tensor)
        for dimension, size in enumerate(value.shape)
        if isinstance(size, int)
    }
