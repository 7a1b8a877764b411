"""ONNX graphs: written node by node, taken from torch's exporter, and edited."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

Shape = Sequence[int | str]
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """`node("Add", "x bias", "y")`; the node is called as its first output is."""
    names = outputs.split()
    return helper.make_node(operator, inputs.split(), names, name=f"node_{names[0]}", **attributes)


def graph(
    nodes: Iterable[onnx.NodeProto],
    inputs: Mapping[str, tuple[torch.dtype, Shape]],
    outputs: Mapping[str, tuple[torch.dtype, Shape]],
    weights: Mapping[str, Tensor | float | Sequence[int]] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A valid model; a float in `weights` is float32, a sequence of integers int64."""

    def ports(side: Mapping[str, tuple[torch.dtype, Shape]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, TYPES[dtype], list(shape))
            for name, (dtype, shape) in side.items()
        ]

    tensors = [constant(name, value) for name, value in (weights or {}).items()]
    made = helper.make_graph(list(nodes), "case", ports(inputs), ports(outputs), tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return model


def constant(name: str, value: Tensor | float | Sequence[int]) -> TensorProto:
    return numpy_helper.from_array(array(value), name)


def array(value: Tensor | float | Sequence[int]) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dtype is torch.bfloat16:
            return value.float().numpy().astype(ml_dtypes.bfloat16)
        return np.array(value.numpy())
    return np.array(value, dtype=np.float32 if isinstance(value, float) else np.int64)


def tensor(proto: TensorProto) -> Tensor:
    found = numpy_helper.to_array(proto)
    if found.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(found.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(found))


def exported(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    opset: int = 18,
    dynamic: bool = True,
    optimize: bool = True,
    train: bool | None = False,
) -> onnx.ModelProto:
    """What `torch.onnx.export` writes today, with a dynamic batch unless told otherwise.

    train: the mode; None leaves every module in its own.
    """
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    if train is not None:
        model.train(train)
    with silence(), seeded():
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=opset,
            optimize=optimize,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    model.eval()
    return program.model_proto


@contextlib.contextmanager
def silence() -> Any:
    """The exporter logs and prints."""
    sink = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield sink
    finally:
        logging.disable(before)


@contextlib.contextmanager
def seeded() -> Any:
    """Python's `random` starts from 0, so that a draw that a trace freezes is always the same."""
    before = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(before)


def edited(model: onnx.ModelProto, change: Callable[[onnx.GraphProto], None]) -> onnx.ModelProto:
    """A copy with `change` done to its graph."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    change(copied.graph)
    return copied


def the(found: onnx.GraphProto, operator: str, index: int = 0) -> onnx.NodeProto:
    """The index-th node with this operator. Raises IndexError: then the case is stale."""
    return [n for n in found.node if n.op_type == operator][index]


def with_attribute(
    model: onnx.ModelProto, operator: str, index: int = 0, **attributes: Any
) -> onnx.ModelProto:
    def change(found: onnx.GraphProto) -> None:
        place = the(found, operator, index)
        kept = [a for a in place.attribute if a.name not in attributes]
        del place.attribute[:]
        place.attribute.extend(kept)
        place.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())

    return edited(model, change)


def with_weight(
    model: onnx.ModelProto, name: str, change: Callable[[Tensor], Tensor]
) -> onnx.ModelProto:
    """A copy in which the initializer called `name` is another one."""

    def put(found: onnx.GraphProto) -> None:
        place = next(i for i in found.initializer if i.name == name)
        place.CopyFrom(constant(name, change(tensor(place))))

    return edited(model, put)
