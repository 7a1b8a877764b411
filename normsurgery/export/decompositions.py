"""How torch's norms are written in ONNX where the exporter's own way is unsafe or not one operator.

An ONNX operator without a kernel runs as the function body of its schema. GroupNormalization's
(onnxruntime has no CPU kernel for opset 21 and newer) takes the variance as E[x^2] - E[x]^2, which
is NaN or nonsense for a large mean or a constant input. So a group norm is written in a centred
form: in float32 as InstanceNormalization between Reshapes, in other types as its formula, which
half precision computes in float32, as torch does.

`translations` is for `torch.onnx.export(custom_translation_table=...)`; importing this loads onnx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat
from onnxscript.values import Opset

from normsurgery.export.cast_first import RMS_NORM_CAST_FIRST
from normsurgery.export.facts import Canonical

FLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT32_EPS = torch.finfo(torch.float32).eps  # what torch's rms_norm takes where eps is None
FLOAT64_EPS = torch.finfo(torch.float64).eps
RMS_OPSET = 23  # the first that has RMSNormalization
GROUP_OPSET = 21  # the first whose GroupNormalization has a scale per channel

Translation = Callable[..., Any]


def translations(opset: int) -> dict[Callable[..., Any], Translation]:
    """The translation table for one opset: ATen overload -> function that writes ONNX nodes."""
    nodes = _Nodes(opset)
    aten = torch.ops.aten
    return {
        aten.group_norm.default: _group_norm(nodes),
        aten.native_group_norm.default: _native_group_norm(nodes),
        aten.instance_norm.default: _instance_norm(nodes),
        aten.layer_norm.default: _layer_norm(nodes),
        aten.rms_norm.default: _rms_norm(nodes),
        RMS_NORM_CAST_FIRST: _rms_norm_cast_first(nodes),
    }


def operator_of(operator: str, opset: int, dtype: torch.dtype) -> tuple[str, str]:
    """What a norm that this ONNX operator computes is written as ("" for several), and why."""
    half, double = dtype == torch.bfloat16, dtype == torch.float64
    why = ""
    if operator == "RMSNormalization" and opset < RMS_OPSET:
        why = f"{operator} begins at opset {RMS_OPSET}"
    elif operator == "RMSNormalization" and double:
        why = f"{operator} computes in float32 at most"
    elif operator == "GroupNormalization":
        why = _why_no_group_normalization(opset, dtype)
    elif operator == "InstanceNormalization" and (half or double):
        why = f"onnxruntime has no CPU kernel for {operator} in {_name(dtype)}: written centred"
    elif operator == "LayerNormalization" and double:
        why = "its epsilon is a float32 attribute: written centred in float64"
    return ("", why) if why else (operator, "")


def _why_no_group_normalization(opset: int, dtype: torch.dtype) -> str:
    centred = (
        "written as InstanceNormalization between Reshapes"
        if dtype == torch.float32
        else "written centred, in float32 where the type is half precision"
    )
    if opset < GROUP_OPSET:
        return f"GroupNormalization has a scale per channel from opset {GROUP_OPSET} on: {centred}"
    return (
        "GroupNormalization has no CPU kernel in onnxruntime, and its function body takes the "
        f"variance as E[x^2] - E[x]^2, which is unsafe: {centred}"
    )


def as_written(norms: Sequence[Canonical], opset: int, dtype: torch.dtype) -> tuple[Canonical, ...]:
    """The norms that `canonicalised` reports, with what this opset makes of them in this type."""
    return tuple(_as_written(norm, opset, dtype) for norm in norms)


def _as_written(norm: Canonical, opset: int, dtype: torch.dtype) -> Canonical:
    if not norm.operator:
        return norm
    operator, why = operator_of(norm.operator, opset, dtype)
    return replace(norm, operator=operator, note="; ".join(filter(None, (why, norm.note))))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Nodes:
    """Writes nodes of one opset. What an operator gives back has no dtype, so callers know it."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.op: Any = Opset("", opset)

    def ints(self, values: Sequence[int]) -> Any:
        return self.op.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))

    def filled(self, value: float, x: Any, start: int, end: int | None, dtype: Any) -> Any:
        """`value` in a tensor of the sizes `start` to `end` of `x`; a constant where these are."""
        sizes = list(x.shape)[start:end]
        if all(isinstance(size, int) for size in sizes):
            return self.op.Constant(value=ir.tensor(np.full(sizes, value, dtype.numpy())))
        shape = self.op.Shape(x, start=start, end=end)
        return self.op.ConstantOfShape(shape, value=ir.tensor([value], dtype=dtype))

    def scalar(self, value: float, dtype: ir.DataType) -> Any:
        return self.op.Constant(value=ir.tensor(value, dtype=dtype))

    def cast(self, value: Any, before: ir.DataType, after: ir.DataType) -> Any:
        return value if before == after else self.op.Cast(value, to=int(after))

    def centred(self, x: Any, axes: Sequence[int], eps: float, dtype: ir.DataType) -> Any:
        """(x - mean) / sqrt(var + eps) over `axes`, the variance that of the centred values."""
        op, over = self.op, self.ints(axes)
        deviation = op.Sub(x, op.ReduceMean(x, over, keepdims=1))
        variance = op.ReduceMean(op.Mul(deviation, deviation), over, keepdims=1)
        return op.Div(deviation, op.Sqrt(op.Add(variance, self.scalar(eps, dtype))))

    def by_rms(self, x: Any, axes: Sequence[int], eps: float, dtype: ir.DataType) -> Any:
        """x / sqrt(mean(x^2) + eps), in the one spelling that onnxruntime fuses; in float64 in
        another, since it fuses into a kernel that computes in float32."""
        op = self.op
        squares = op.Pow(x, self.scalar(2.0, dtype))
        mean_square = op.ReduceMean(squares, self.ints(axes), keepdims=1)
        rms = op.Sqrt(op.Add(mean_square, self.scalar(eps, dtype)))
        return op.Mul(x, op.Reciprocal(rms)) if dtype == DOUBLE else op.Div(x, rms)

    def scaled(
        self, y: Any, weight: Any, bias: Any, rank: int, before: ir.DataType, dtype: ir.DataType
    ) -> Any:
        """Times weight plus bias, vectors of the second dimension, as far as there are such."""
        axes = list(range(1, rank - 1))
        for vector, apply in ((weight, self.op.Mul), (bias, self.op.Add)):
            if vector is not None:
                wide = self.cast(vector, before, dtype)
                y = apply(y, self.op.Unsqueeze(wide, self.ints(axes)) if axes else wide)
        return y


def _computed_in(dtype: ir.DataType) -> ir.DataType:
    """Torch computes the norms of half precision in float32."""
    return FLOAT if dtype in HALF else dtype


def _group_norm(nodes: _Nodes) -> Translation:
    def aten_group_norm(
        input: TFloat,
        num_groups: int,
        weight: TFloat | None = None,
        bias: TFloat | None = None,
        eps: float = 1e-05,
        cudnn_enabled: bool = True,
    ) -> Any:
        return _grouped(nodes, input, num_groups, weight, bias, eps)

    return aten_group_norm


def _grouped(nodes: _Nodes, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
    op, dtype, wide = nodes.op, x.dtype, _computed_in(x.dtype)
    sizes = list(x.shape)
    to_groups, back = _group_shapes(nodes, x, groups)
    y = op.Reshape(x, to_groups[0], allowzero=to_groups[1])
    if dtype == FLOAT:
        ones, zeros = (ir.tensor(np.full(groups, value, np.float32)) for value in (1.0, 0.0))
        ones, zeros = op.Constant(value=ones), op.Constant(value=zeros)
        y = op.InstanceNormalization(y, ones, zeros, epsilon=eps)
    else:
        axes = list(range(2, to_groups[2]))
        y = nodes.centred(nodes.cast(y, dtype, wide), axes, eps, wide)
    y = op.Reshape(y, back[0], allowzero=back[1])
    y = nodes.scaled(y, weight, bias, len(sizes), dtype, wide)
    return nodes.cast(y, wide, dtype)


def _group_shapes(
    nodes: _Nodes, x: Any, groups: int
) -> tuple[tuple[Any, int, int], tuple[Any, int]]:
    """Shape (with allowzero and rank) of the groups, and of the input again.

    Where only the batch is dynamic both are constants that copy it; no size is left to be inferred,
    which an empty batch would make ambiguous.
    """
    op, sizes = nodes.op, list(x.shape)
    known = all(isinstance(size, int) for size in sizes[1:])
    if known:
        elements = math.prod(sizes[1:]) // groups
        if elements:
            return (nodes.ints([0, groups, elements]), 0, 3), (nodes.ints([0, *sizes[1:]]), 0)
    batch, rest = op.Shape(x, start=0, end=1), op.Shape(x, start=2)
    channels = op.Shape(x, start=1, end=2)
    if isinstance(sizes[1], int):
        each = nodes.ints([sizes[1] // groups])
    else:
        each = op.Div(channels, nodes.ints([groups]))
    to_groups = op.Concat(batch, nodes.ints([groups]), each, rest, axis=0)
    return (to_groups, 1, len(sizes) + 1), (op.Shape(x), 1)


def _native_group_norm(nodes: _Nodes) -> Translation:
    def aten_native_group_norm(
        input: TFloat,
        weight: TFloat | None = None,
        bias: TFloat | None = None,
        N: Any = None,  # noqa: N803 - the names of torch's schema
        C: Any = None,  # noqa: N803
        HxW: Any = None,  # noqa: N803
        group: int = 1,
        eps: float = 1e-05,
    ) -> Any:
        """Of a program that was decomposed before; mean and rstd are of shape (N, groups)."""
        op, dtype, wide = nodes.op, input.dtype, _computed_in(input.dtype)
        (shape, allowzero, rank), _ = _group_shapes(nodes, input, group)
        x = nodes.cast(op.Reshape(input, shape, allowzero=allowzero), dtype, wide)
        over = nodes.ints(range(2, rank))
        mean = op.ReduceMean(x, over, keepdims=1)
        deviation = op.Sub(x, mean)
        variance = op.ReduceMean(op.Mul(deviation, deviation), over, keepdims=0)
        rstd = op.Reciprocal(op.Sqrt(op.Add(variance, nodes.scalar(eps, wide))))
        narrow = (nodes.cast(v, wide, dtype) for v in (op.Squeeze(mean, over), rstd))
        return _grouped(nodes, input, group, weight, bias, eps), *narrow

    return aten_native_group_norm


def _instance_norm(nodes: _Nodes) -> Translation:
    def aten_instance_norm(
        input: TFloat,
        weight: TFloat | None = None,
        bias: TFloat | None = None,
        running_mean: TFloat | None = None,
        running_var: TFloat | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-05,
        cudnn_enabled: bool = True,
    ) -> Any:
        x: Any = input
        dtype = x.dtype
        if use_input_stats and dtype not in (FLOAT, ir.DataType.FLOAT16):
            # No kernel for these, and below opset 22 InstanceNormalization has no bfloat16.
            return _by_channel(nodes, input, weight, bias, eps)
        vectors = [
            nodes.filled(value, x, 1, 2, dtype) if vector is None else vector
            for vector, value in ((weight, 1.0), (bias, 0.0))
        ]
        if use_input_stats:
            return nodes.op.InstanceNormalization(input, *vectors, epsilon=eps)
        return nodes.op.BatchNormalization(
            input, *vectors, running_mean, running_var, epsilon=eps, training_mode=False
        )

    return aten_instance_norm


def _by_channel(nodes: _Nodes, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    dtype, wide, rank = x.dtype, _computed_in(x.dtype), len(x.shape)
    y = nodes.centred(nodes.cast(x, dtype, wide), list(range(2, rank)), eps, wide)
    return nodes.cast(nodes.scaled(y, weight, bias, rank, dtype, wide), wide, dtype)


def _layer_norm(nodes: _Nodes) -> Translation:
    def aten_layer_norm(
        input: TFloat,
        normalized_shape: Sequence[int],
        weight: TFloat | None = None,
        bias: TFloat | None = None,
        eps: float = 1e-05,
        cudnn_enable: bool = True,
    ) -> Any:
        """The operator, but for float64, whose eps a float32 attribute cannot hold."""
        op, dtype, sizes = nodes.op, input.dtype, list(normalized_shape)
        if dtype != DOUBLE:
            scale = nodes.filled(1.0, input, -len(sizes), None, dtype) if weight is None else weight
            return op.LayerNormalization(input, scale, bias, axis=-len(sizes), epsilon=eps)[0]
        y = nodes.centred(input, list(range(-len(sizes), 0)), eps, dtype)
        y = y if weight is None else op.Mul(y, weight)
        return y if bias is None else op.Add(y, bias)

    return aten_layer_norm


def _rms_norm(nodes: _Nodes) -> Translation:
    def aten_rms_norm(
        input: TFloat,
        normalized_shape: Sequence[int],
        weight: TFloat | None = None,
        eps: float | None = None,
    ) -> Any:
        """All of it in float32, the weight as well, and cast once: torch's order."""
        dtype, wide, last = input.dtype, _computed_in(input.dtype), len(normalized_shape)
        if eps is None:
            eps = FLOAT64_EPS if dtype == DOUBLE else FLOAT32_EPS
        x = nodes.cast(input, dtype, wide)
        scale = None if weight is None else nodes.cast(weight, dtype, wide)
        if nodes.opset >= RMS_OPSET and dtype != DOUBLE:  # its first stage is float32 at most
            scale = nodes.filled(1.0, input, -last, None, wide) if scale is None else scale
            y = nodes.op.RMSNormalization(x, scale, axis=-last, epsilon=eps)
        else:
            y = nodes.by_rms(x, list(range(-last, 0)), eps, wide)
            y = y if scale is None else nodes.op.Mul(y, scale)
        return nodes.cast(y, wide, dtype)

    return aten_rms_norm


def _shape(value: Any) -> Sequence[int]:
    sizes: Sequence[int] = value.shape
    return sizes


def _rms_norm_cast_first(nodes: _Nodes) -> Translation:
    def rms_norm_cast_first(x: TFloat, weight: TFloat, eps: float) -> Any:
        """RMSNormalization itself casts first (stash_type 1); below its opset the same by hand."""
        dtype, wide, last = x.dtype, _computed_in(x.dtype), len(_shape(weight))
        if nodes.opset >= RMS_OPSET and dtype != DOUBLE:
            return nodes.op.RMSNormalization(x, weight, axis=-last, epsilon=eps)
        y = nodes.by_rms(nodes.cast(x, dtype, wide), list(range(-last, 0)), eps, wide)
        return nodes.op.Mul(nodes.cast(y, wide, dtype), weight)

    return rms_norm_cast_first
