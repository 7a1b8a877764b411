"""Norm operators: mean and variance in two passes, whatever the operator's function body says."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]


def standardised(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    """(x - mean) / sqrt(biased variance + epsilon), the mean, and 1 / sqrt(variance + epsilon)."""
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    scale = 1 / np.sqrt((centred * centred).mean(axes, keepdims=True) + epsilon)
    return centred * scale, mean, scale


def over_root_mean_square(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array]:
    """x / sqrt(mean of squares + epsilon), and what x is multiplied by."""
    scale = 1 / np.sqrt((x * x).mean(axes, keepdims=True) + epsilon)
    return x * scale, scale


def per_channel(values: Array, dimensions: int) -> Array:
    """(C,) as (1, C, 1, ...), for an input with so many dimensions."""
    return values.reshape(1, -1, *(1,) * (dimensions - 2))


def _from(axis: int, x: Array) -> tuple[int, ...]:
    return tuple(range(axis % x.ndim, x.ndim))


class LayerNormalization(OpRun):
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array | None = None,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[Array, ...]:
        y, mean, inverse = standardised(x, _from(axis, x), epsilon)
        y = y * scale if bias is None else y * scale + bias
        return y, mean, inverse


class RMSNormalization(OpRun):
    def _run(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array]:
        return (over_root_mean_square(x, _from(axis, x), epsilon)[0] * scale,)


class SimplifiedLayerNormalization(OpRun):
    """onnxruntime's RMSNormalization, under ONNX's own domain."""

    op_schema = None

    def _run(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array, ...]:
        y, inverse = over_root_mean_square(x, _from(axis, x), epsilon)
        return y * scale, inverse


class GroupNormalization(OpRun):
    """Versions 18 (scale and bias per group) and 21 (per channel)."""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        stash_type: int = 1,
    ) -> tuple[Array]:
        N, C = x.shape[:2]
        grouped = x.reshape(N, num_groups, C // num_groups, *x.shape[2:])
        y = standardised(grouped, tuple(range(2, grouped.ndim)), epsilon)[0].reshape(x.shape)
        if self.run_params["opsets"][""] < 21:
            scale, bias = (np.repeat(values, C // num_groups) for values in (scale, bias))
        return (y * per_channel(scale, x.ndim) + per_channel(bias, x.ndim),)


class InstanceNormalization(OpRun):
    def _run(self, x: Array, scale: Array, bias: Array, epsilon: float = 1e-5) -> tuple[Array]:
        y = standardised(x, tuple(range(2, x.ndim)), epsilon)[0]
        return (y * per_channel(scale, x.ndim) + per_channel(bias, x.ndim),)


class BatchNormalization(OpRun):
    """Version 9 and newer; in training mode with its new running statistics (biased variance)."""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        variance: Array,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
    ) -> tuple[Array, ...]:
        running: tuple[Array, ...] = ()
        if training_mode:
            axes = (0, *range(2, x.ndim))
            old, (mean, variance) = (mean, variance), (x.mean(axes), x.var(axes))
            new = (mean, variance)
            running = tuple(
                momentum * before + (1 - momentum) * now
                for before, now in zip(old, new, strict=True)
            )
        factor = scale / np.sqrt(variance + epsilon)
        y = (x - per_channel(mean, x.ndim)) * per_channel(factor, x.ndim)
        return (y + per_channel(bias, x.ndim), *running)


class MeanVarianceNormalization(OpRun):
    def _run(self, x: Array, axes: tuple[int, ...] = (0, 2, 3)) -> tuple[Array]:
        # The standard has 1e-9 added to the deviation, outside the root.
        centred = x - x.mean(tuple(axes), keepdims=True)
        deviation = np.sqrt((centred * centred).mean(tuple(axes), keepdims=True))
        return (centred / (deviation + float(np.float32(1e-9))),)


class LRN(OpRun):
    def _run(
        self,
        x: Array,
        alpha: float = 1e-4,
        beta: float = 0.75,
        bias: float = 1.0,
        size: int = 1,
    ) -> tuple[Array]:
        before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
        edges = [(0, 0), (before, after), *((0, 0),) * (x.ndim - 2)]
        squares = np.pad(x * x, edges)
        windows = np.lib.stride_tricks.sliding_window_view(squares, size, axis=1)
        return (x / (bias + alpha / size * windows.sum(-1)) ** beta,)


OPERATORS: list[type[OpRun]] = [
    LayerNormalization,
    RMSNormalization,
    SimplifiedLayerNormalization,
    GroupNormalization,
    InstanceNormalization,
    BatchNormalization,
    MeanVarianceNormalization,
    LRN,
]
