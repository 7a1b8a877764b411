"""Example inputs for an ONNX graph that comes without any, and what its integers index."""

from __future__ import annotations

import torch
from torch import Tensor

from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import OnnxFile, Port
from normsurgery.verifying.axes import matched

BATCH = 2
OTHER = 8  # size of a dynamic axis that is not the first
SAME_VALUES = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


def inputs_of(file: OnnxFile, seed: int = 0) -> Inputs:
    """Inputs of the shapes and types that the graph declares, by name: normal values, ids within
    the table that they index, masks of ones. Dynamic axes are 2 (the first axis) or 8 long."""
    generator = torch.Generator().manual_seed(seed)
    rows = indexed_rows(file)
    sizes: dict[str, int] = {}
    values = {port.name: _value(port, rows, sizes, generator) for port in file.inputs}
    return Inputs((), values)


def indexed_rows(file: OnnxFile) -> dict[str, int]:
    """Input of the graph -> rows of the smallest table that it indexes (by Gather on axis 0)."""
    tables = {t.name: int(t.dims[0]) for t in file.proto.graph.initializer if t.dims}
    ports = {port.name for port in file.inputs}
    aliases = {name: name for name in ports}
    rows: dict[str, int] = {}
    for node in file.proto.graph.node:
        read = [aliases.get(name, "") for name in node.input]
        if node.op_type in SAME_VALUES and read and read[0]:
            aliases[node.output[0]] = read[0]
        if node.op_type == "Gather" and len(read) == 2 and read[1] and node.input[0] in tables:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            known = tables[node.input[0]]
            if axis == 0:
                rows[read[1]] = min(known, rows.get(read[1], known))
    return rows


def rows_by_position(file: OnnxFile, inputs: Inputs, order: tuple[str, ...]) -> dict[int, int]:
    """Index of an input among the leaves -> rows of the table it indexes."""
    places = matched(file, inputs, order)
    return {places[name]: rows for name, rows in indexed_rows(file).items() if name in places}


def _value(
    port: Port, rows: dict[str, int], sizes: dict[str, int], generator: torch.Generator
) -> Tensor:
    shape = [
        size if isinstance(size, int) else sizes.setdefault(str(size), BATCH if not axis else OTHER)
        for axis, size in enumerate(port.shape or ())
    ]
    if port.dtype.is_floating_point or port.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(port.dtype)
    if port.name in rows:
        return torch.randint(0, rows[port.name], shape, generator=generator).to(port.dtype)
    return torch.ones(shape, dtype=port.dtype)
