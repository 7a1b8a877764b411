"""Functions of one value, casts and constants, and what scatters values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_cast import cast_to

Array = np.ndarray[Any, Any]
LOWER = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})


def erf(x: Array) -> Array:
    found: Array = torch.erf(torch.from_numpy(np.asarray(x, order="C"))).numpy()
    return found


def gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))
    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))))


def sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))


class Cast(OpRun):
    """Every cast to a lower floating type is one to float64."""

    def _run(
        self, x: Array, to: int = 0, saturate: int = 1, round_mode: str = "up"
    ) -> tuple[Array]:
        lifted: Any = TensorProto.DOUBLE if to in LOWER else to
        return (np.asarray(cast_to(np.asarray(x), lifted, bool(saturate), round_mode)),)


class Erf(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (erf(x),)


class Gelu(OpRun):
    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        return (gelu(x, approximate),)


class Sigmoid(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (sigmoid(x),)


class Softplus(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (np.logaddexp(0, x),)


class LogSoftmax(OpRun):
    """x - log(sum(exp(x))): the logarithm of a softmax is infinite where that vanishes."""

    def _run(self, x: Array, axis: int = -1) -> tuple[Array]:
        if x.size == 0:
            return (x,)
        axes: Any = axis
        if self.run_params["opsets"][""] < 13:  # all axes from there on, as one
            axes = tuple(range(axis % x.ndim, x.ndim))
        shifted = x - x.max(axes, keepdims=True)
        return (shifted - np.log(np.exp(shifted).sum(axes, keepdims=True)),)


class Mish(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (x * np.tanh(np.logaddexp(0, x)),)


class HardSwish(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (x * np.clip(x / 6 + 0.5, 0, 1),)


class Swish(OpRun):
    def _run(self, x: Array, alpha: float = 1.0) -> tuple[Array]:
        return (x * sigmoid(alpha * x),)


class Elu(OpRun):
    def _run(self, x: Array, alpha: float = 1.0) -> tuple[Array]:
        return (np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),)


class Celu(OpRun):
    def _run(self, x: Array, alpha: float = 1.0) -> tuple[Array]:
        return (np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha),)


class Selu(OpRun):
    def _run(self, x: Array, alpha: float = 1.0, gamma: float = 1.0) -> tuple[Array]:
        return (gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),)


class ScatterND(OpRun):
    def _run(
        self, data: Array, indices: Array, updates: Array, reduction: str = "none"
    ) -> tuple[Array]:
        result = np.array(data)
        _scatter(result, tuple(np.moveaxis(indices, -1, 0)), updates, reduction)
        return (result,)


class Pad(OpRun):
    """Versions 11 and newer; negative pads cut off."""

    def _run(
        self,
        data: Array,
        pads: Array,
        value: Array | None = None,
        axes: Array | None = None,
        mode: str = "constant",
    ) -> tuple[Array]:
        chosen = range(data.ndim) if axes is None else axes.tolist()
        half = len(pads) // 2
        sides = [(0, 0)] * data.ndim
        for place, axis in enumerate(chosen):
            sides[axis] = (int(pads[place]), int(pads[place + half]))
        cut = tuple(
            slice(max(0, -before), size - max(0, -after))
            for size, (before, after) in zip(data.shape, sides, strict=True)
        )
        more = [(max(0, before), max(0, after)) for before, after in sides]
        if mode == "constant":
            fill = data.dtype.type(0) if value is None else np.asarray(value).item()
            return (np.pad(data[cut], more, constant_values=fill),)
        modes: dict[str, Any] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
        return (np.pad(data[cut], more, mode=modes[mode]),)


class GatherElements(OpRun):
    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        axis %= data.ndim
        where: list[Array] = list(np.indices(indices.shape, sparse=True))
        where[axis] = indices  # negative ones count from the end, as numpy has it
        return (np.asarray(data[tuple(where)]),)


class ScatterElements(OpRun):
    def _run(
        self, data: Array, indices: Array, updates: Array, axis: int = 0, reduction: str = "none"
    ) -> tuple[Array]:
        result = np.array(data)
        where: list[Array] = list(np.indices(indices.shape, sparse=True))
        where[axis % data.ndim] = indices
        _scatter(result, tuple(where), updates, reduction)
        return (result,)


def _scatter(result: Array, where: tuple[Array, ...], updates: Array, reduction: str) -> None:
    """In place; a place that is named several times takes all its updates, in order."""
    if reduction in (None, "none"):
        result[where] = updates
        return
    functions = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    functions[reduction].at(result, where, updates)


OPERATORS: list[type[OpRun]] = [
    Cast,
    Erf,
    Gelu,
    Sigmoid,
    Softplus,
    LogSoftmax,
    Mish,
    HardSwish,
    Swish,
    Elu,
    Celu,
    Selu,
    ScatterND,
    Pad,
    GatherElements,
    ScatterElements,
]
