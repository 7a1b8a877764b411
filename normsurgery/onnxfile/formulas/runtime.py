"""The fused operators that onnxruntime writes into its optimised graphs (com.microsoft)."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from normsurgery.onnxfile.formulas import norms
from normsurgery.onnxfile.formulas.layers import Conv
from normsurgery.onnxfile.formulas.pointwise import gelu, sigmoid

Array = np.ndarray[Any, Any]
DOMAIN = "com.microsoft"


class _Fused(OpRun):
    op_domain = DOMAIN
    op_schema = None  # the operator of the same name in ONNX has other attributes


class Gelu(_Fused):
    def _run(self, x: Array) -> tuple[Array]:
        return (gelu(x),)


class FastGelu(_Fused):
    def _run(self, x: Array, bias: Array | None = None) -> tuple[Array]:
        return (gelu(x if bias is None else x + bias, "tanh"),)


class BiasGelu(_Fused):
    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        return (gelu(x + bias),)


class QuickGelu(_Fused):
    def _run(self, x: Array, alpha: float = 1.702) -> tuple[Array]:
        return (x * sigmoid(alpha * x),)


class FusedMatMul(_Fused):
    def _run(
        self,
        a: Array,
        b: Array,
        alpha: float = 1.0,
        transA: int = 0,  # noqa: N803 the attributes' names
        transB: int = 0,  # noqa: N803
        transBatchA: int = 0,  # noqa: N803
        transBatchB: int = 0,  # noqa: N803
    ) -> tuple[Array]:
        if transBatchA or transBatchB:
            raise NotImplementedError("FusedMatMul with transposed batches")
        left = np.swapaxes(a, -1, -2) if transA and a.ndim > 1 else a
        right = np.swapaxes(b, -1, -2) if transB and b.ndim > 1 else b
        return (np.asarray(alpha * np.matmul(left, right)),)


class FusedGemm(_Fused):
    def _run(
        self,
        a: Array,
        b: Array,
        c: Array | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        transA: int = 0,  # noqa: N803
        transB: int = 0,  # noqa: N803
        activation: str = "",
        activation_alpha: float = 0.0,
        activation_beta: float = 0.0,
        activation_gamma: float = 0.0,
    ) -> tuple[Array]:
        y = alpha * np.matmul(a.T if transA else a, b.T if transB else b)
        y = y if c is None else y + beta * c
        return (_activated(y, activation, [activation_alpha, activation_beta]),)


class FusedConv(Conv):
    op_domain = DOMAIN
    op_schema = None

    def _run(  # type: ignore[override]
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        added: Array | None = None,
        activation: str = "",
        activation_params: Any = (),
        **options: Any,
    ) -> tuple[Array]:
        (y,) = super()._run(x, weight, bias, **options)
        y = y if added is None else y + added
        return (_activated(y, activation, list(activation_params)),)


def _activated(y: Array, name: str, parameters: list[float]) -> Array:
    if name == "LeakyRelu":
        return np.where(y >= 0, y, parameters[0] * y)
    if name == "Clip":
        return np.clip(y, parameters[0], parameters[1])
    if name == "HardSigmoid":
        return np.clip(parameters[0] * y + parameters[1], 0, 1)
    known: dict[str, Any] = {"": np.asarray, "Relu": _relu, "Sigmoid": sigmoid, "Tanh": np.tanh}
    if name not in known:
        raise NotImplementedError(f"fused activation {name}")
    return np.asarray(known[name](y))


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


class SkipLayerNormalization(_Fused):
    def _run(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array | None = None,
        bias: Array | None = None,
        epsilon: float = 1e-12,
    ) -> tuple[Array, ...]:
        total = x + skip if bias is None else x + skip + bias
        y, mean, inverse = norms.standardised(total, (total.ndim - 1,), epsilon)
        y = y * gamma if beta is None else y * gamma + beta
        return y, mean, inverse, total


class SkipSimplifiedLayerNormalization(_Fused):
    def _run(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        bias: Array | None = None,
        epsilon: float = 1e-12,
    ) -> tuple[Array, ...]:
        total = x + skip if bias is None else x + skip + bias
        y, inverse = norms.over_root_mean_square(total, (total.ndim - 1,), epsilon)
        return y * gamma, np.zeros_like(inverse), inverse, total


class EmbedLayerNormalization(_Fused):
    def _run(
        self,
        ids: Array,
        segments: Array | None,
        words: Array,
        positions: Array,
        segment_table: Array | None = None,
        gamma: Array | None = None,
        beta: Array | None = None,
        mask: Array | None = None,
        position_ids: Array | None = None,
        epsilon: float = 1e-12,
        mask_index_type: int = 0,
    ) -> tuple[Array, ...]:
        rows = np.arange(ids.shape[1])[None] if position_ids is None else position_ids
        total = words[ids] + positions[rows]
        if segments is not None and segment_table is not None:
            total = total + segment_table[segments]
        y = norms.standardised(total, (2,), epsilon)[0]
        y = y if gamma is None else y * gamma
        y = y if beta is None else y + beta
        lengths = np.zeros(ids.shape[0]) if mask is None else mask.sum(1)
        return y, lengths.astype(np.int32), total


OPERATORS: list[type[OpRun]] = [
    Gelu,
    FastGelu,
    BiasGelu,
    QuickGelu,
    FusedMatMul,
    FusedGemm,
    FusedConv,
    SkipLayerNormalization,
    SkipSimplifiedLayerNormalization,
    EmbedLayerNormalization,
]
