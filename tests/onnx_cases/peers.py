"""How others decide today whether an ONNX file is right, with their own constants.

They decide nothing here: they show which correct pairs a fixed tolerance rejects.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from onnx_cases.case import Sides
from onnx_cases.graphs import array

BF16 = 16  # onnx.TensorProto.BFLOAT16


def _torch(found: Tensor, wanted: Tensor) -> bool:
    """torch.onnx.export(verify=True): a NaN is neither above the one bound nor the other."""
    if found.numel() == 0:
        return False  # it takes infinity for the largest difference of nothing
    difference = (found - wanted).abs()
    relative = difference / (wanted.abs() + 1e-7)
    return not (float(difference.max()) >= 5e-3 or float(relative.max()) >= 1e-1)


def _polygraphy(found: Tensor, wanted: Tensor) -> bool:
    difference = (found - wanted).abs()
    return bool(((difference <= 1e-5) | (difference <= 1e-5 * wanted.abs())).all())


def _close(absolute: float, relative: float, nan: bool = False) -> Callable[[Tensor, Tensor], bool]:
    def accepts(found: Tensor, wanted: Tensor) -> bool:
        return bool(torch.isclose(found, wanted, relative, absolute, equal_nan=nan).all())

    return accepts


RULES: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "torch.onnx": _torch,
    "Polygraphy": _polygraphy,
    "optimum": _close(1e-5, 1e-5),
    "onnxsim": _close(1e-5, 1e-4),
    "OnnxSlim": _close(1e-4, 1e-3, nan=True),
}


def rejected_by(sides: Sides) -> list[str]:
    """The rules that reject onnxruntime's outputs on the example, against torch's own there."""
    source = sides.source
    assert isinstance(source, nn.Module)
    found = runtime_outputs(sides)
    with torch.no_grad():
        leaves = tree_leaves(copy.deepcopy(source).eval()(*sides.inputs))
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    pairs = [
        (a.double(), b.double())
        for a, b in zip(found, wanted, strict=True)
        if b.is_floating_point()
    ]
    dies = (
        ["torch.onnx"] if any(leaf is None for leaf in leaves[: len(wanted)]) else []
    )  # it takes None for a tensor
    return dies + [name for name, fits in RULES.items() if not all(fits(*pair) for pair in pairs)]


def runtime_outputs(sides: Sides) -> list[Tensor]:
    """Of onnxruntime on the CPU, all optimisations, with inputs by the forward's names."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    file = str(sides.file) if isinstance(sides.file, Path) else sides.file.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    ports = {port.name: port.type for port in session.get_inputs()}
    forward = sides.source.forward  # type: ignore[union-attr]
    named = [name for name in inspect.signature(forward).parameters if name in ports]
    order = named if len(named) == len(ports) else list(ports)
    feeds = {
        name: _value(value, ports[name]) for name, value in zip(order, sides.inputs, strict=True)
    }
    return [_tensor(value) for value in session.run_with_ort_values(None, feeds)]


def _value(value: Tensor, port: str) -> Any:
    if port == "tensor(float16)":
        value = value.half()
    made = array(value)
    if made.dtype == ml_dtypes.bfloat16:
        raw = made.view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, BF16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(made)


def _tensor(value: Any) -> Tensor:
    if value.element_type() == BF16:
        raw = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
        return raw.clone().view(torch.bfloat16)
    return torch.from_numpy(np.array(value.numpy()))
