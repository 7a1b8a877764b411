"""Convolutions, pooling and sampling: through torch in float64, or over numpy's windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx.reference.op_run import OpRun
from torch import Tensor

Array = np.ndarray[Any, Any]
Sizes = Sequence[int]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _torch(x: Array) -> Tensor:
    # An array that is broadcast is read-only, which torch warns of.
    return torch.from_numpy(np.array(x, order="C") if not x.flags.writeable else np.asarray(x))


def _spans(kernel: Sizes, dilations: Sizes) -> list[int]:
    return [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]


def _paddings(
    auto_pad: str | None,
    pads: Sizes | None,
    sizes: Sizes,
    spans: Sizes,
    strides: Sizes,
) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis."""
    count = len(sizes)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (math.ceil(size / step) - 1) * step + span - size)
            for size, span, step in zip(sizes, spans, strides, strict=True)
        ]
        return [_halves(total, auto_pad == "SAME_UPPER") for total in totals]
    if auto_pad == "VALID" or pads is None:
        return [(0, 0)] * count
    return list(zip(pads[:count], pads[count:], strict=True))


def _halves(total: int, more_after: bool) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if more_after else (large, small)


def _for_torch(paddings: Sequence[tuple[int, int]]) -> list[int]:
    """In torch's order: the last axis first."""
    return [side for pair in reversed(paddings) for side in pair]


class Conv(OpRun):
    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sizes | None = None,
        group: int = 1,
        kernel_shape: Sizes | None = None,
        pads: Sizes | None = None,
        strides: Sizes | None = None,
    ) -> tuple[Array]:
        count = x.ndim - 2
        strides, dilations = strides or [1] * count, dilations or [1] * count
        spans = _spans(weight.shape[2:], dilations)
        around = _paddings(auto_pad, pads, x.shape[2:], spans, strides)
        padded = F.pad(_torch(x), _for_torch(around))
        return (
            _CONVOLUTIONS[count](
                padded,
                _torch(weight),
                None if bias is None else _torch(bias),
                stride=list(strides),
                dilation=list(dilations),
                groups=group,
            ).numpy(),
        )


class ConvTranspose(OpRun):
    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sizes | None = None,
        group: int = 1,
        kernel_shape: Sizes | None = None,
        output_padding: Sizes | None = None,
        output_shape: Sizes | None = None,
        pads: Sizes | None = None,
        strides: Sizes | None = None,
    ) -> tuple[Array]:
        count = x.ndim - 2
        strides, dilations = strides or [1] * count, dilations or [1] * count
        more = output_padding or [0] * count
        if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            output_shape = [size * step for size, step in zip(x.shape[2:], strides, strict=True)]
        full = _TRANSPOSED[count](
            _torch(x), _torch(weight), stride=list(strides), dilation=list(dilations), groups=group
        )
        if output_shape is None:
            cut = _paddings(auto_pad, pads, x.shape[2:], [1] * count, strides)
        else:
            wanted = output_shape[-count:]
            totals = [
                size + extra - want
                for size, extra, want in zip(full.shape[2:], more, wanted, strict=True)
            ]
            cut = [_halves(total, auto_pad == "SAME_UPPER") for total in totals]
        ends = [(-before, extra - after) for (before, after), extra in zip(cut, more, strict=True)]
        y = F.pad(full, _for_torch(ends))
        if bias is not None:
            y = y + _torch(bias).reshape(1, -1, *(1,) * count)
        return (y.numpy(),)


def _windows(
    x: Array,
    kernel: Sizes,
    strides: Sizes,
    dilations: Sizes,
    paddings: Sequence[tuple[int, int]],
    ceil_mode: bool,
    fill: float,
    beyond: float,
) -> Array:
    """(N, C, *out, *kernel): `fill` in the padding, `beyond` where ceil_mode reaches past it."""
    spatial = x.shape[2:]
    edges, extra, outs = [(0, 0), (0, 0)], [(0, 0), (0, 0)], []
    for size, span, step, (before, after) in zip(
        spatial, _spans(kernel, dilations), strides, paddings, strict=True
    ):
        free = size + before + after - span
        out = (math.ceil(free / step) if ceil_mode else free // step) + 1
        if ceil_mode and (out - 1) * step >= size + before:
            out -= 1  # a window may not start in the padding after the input
        edges.append((before, after))
        extra.append((0, max(0, (out - 1) * step + span - (size + before + after))))
        outs.append(out)
    padded = np.pad(np.pad(x, edges, constant_values=fill), extra, constant_values=beyond)
    view = np.lib.stride_tricks.sliding_window_view(
        padded, _spans(kernel, dilations), axis=tuple(range(2, x.ndim))
    )
    starts = tuple(
        slice(0, (out - 1) * step + 1, step) for out, step in zip(outs, strides, strict=True)
    )
    within = tuple(slice(None, None, step) for step in dilations)
    return view[(slice(None), slice(None), *starts, *within)]


class AveragePool(OpRun):
    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        dilations: Sizes | None = None,
        kernel_shape: Sizes = (),
        pads: Sizes | None = None,
        strides: Sizes | None = None,
    ) -> tuple[Array]:
        count = x.ndim - 2
        strides, dilations = strides or [1] * count, dilations or [1] * count
        spans = _spans(kernel_shape, dilations)
        around = _paddings(auto_pad, pads, x.shape[2:], spans, strides)
        shared = (kernel_shape, strides, dilations, around, bool(ceil_mode))
        axes = tuple(range(-count, 0))
        sums = _windows(x, *shared, 0.0, 0.0).sum(axes)
        ones = np.ones((1, 1, *x.shape[2:]))
        weights = _windows(ones, *shared, float(bool(count_include_pad)), 0.0).sum(axes)
        return (sums / weights,)


class MaxPool(OpRun):
    """Its second output is as the text of the standard and onnxruntime have it; the reference of
    the onnx package counts otherwise."""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int = 0,
        dilations: Sizes | None = None,
        kernel_shape: Sizes = (),
        pads: Sizes | None = None,
        storage_order: int = 0,
        strides: Sizes | None = None,
    ) -> tuple[Array, ...]:
        count = x.ndim - 2
        strides, dilations = strides or [1] * count, dilations or [1] * count
        spans = _spans(kernel_shape, dilations)
        around = _paddings(auto_pad, pads, x.shape[2:], spans, strides)
        shared = (kernel_shape, strides, dilations, around, bool(ceil_mode))
        least = -math.inf if x.dtype.kind == "f" else int(np.iinfo(x.dtype).min)
        windows = _windows(x, *shared, least, least)
        axes = tuple(range(-count, 0))
        if len(self.output) < 2:
            return (windows.max(axes),)
        places = _windows(_places(x.shape, storage_order), *shared, -1, -1)
        return windows.max(axes), _first_largest(windows, places, count)


def _places(shape: Sizes, storage_order: int) -> Array:
    """The position of every value in the flat input, without padding.

    storage_order: 1 counts the spatial axes of one channel in column-major order.
    """
    inside = np.arange(math.prod(shape[2:]), dtype=np.int64)
    inside = inside.reshape(shape[2:], order="F" if storage_order else "C")
    channels = np.arange(math.prod(shape[:2]), dtype=np.int64) * inside.size
    return channels.reshape(*shape[:2], *(1,) * inside.ndim) + inside


def _first_largest(windows: Array, places: Array, count: int) -> Array:
    """The place of the first largest value of each window; -1 stands for padding."""
    outside = windows.shape[: windows.ndim - count]
    values, flat = windows.reshape(*outside, -1), places.reshape(*outside, -1)
    largest = values.max(-1, keepdims=True)
    found = ((values == largest) | np.isnan(values)) & (flat >= 0)
    first: Array = np.take_along_axis(flat, found.argmax(-1)[..., None], -1)[..., 0]
    return first


class GridSample(OpRun):
    def _run(
        self,
        x: Array,
        grid: Array,
        align_corners: int = 0,
        mode: str = "linear",
        padding_mode: str = "zeros",
    ) -> tuple[Array]:
        modes = {"linear": "bilinear", "cubic": "bicubic"}
        return (
            F.grid_sample(
                _torch(x),
                _torch(grid),
                modes.get(mode, mode),
                padding_mode,
                bool(align_corners),
            ).numpy(),
        )


class AffineGrid(OpRun):
    def _run(self, theta: Array, size: Array, align_corners: int = 0) -> tuple[Array]:
        return (F.affine_grid(_torch(theta), size.tolist(), bool(align_corners)).numpy(),)


class Einsum(OpRun):
    def _run(self, *values: Array, equation: str = "") -> tuple[Array]:
        return (np.asarray(np.einsum(equation, *values, optimize=len(values) > 1)),)


OPERATORS: list[type[OpRun]] = [
    Conv,
    ConvTranspose,
    AveragePool,
    MaxPool,
    GridSample,
    AffineGrid,
    Einsum,
]
