"""Llama's RMS norm as one torch operator: normalise in float32, cast back, then times the weight.

`torch.rms_norm` multiplies by the weight in float32 and casts then, so in half precision it is
another function. ONNX's RMSNormalization is this one (its `stash_type` 1), and with an operator
of its own it can be written as such: `normsurgery::rms_norm_cast_first`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@torch.library.custom_op("normsurgery::rms_norm_cast_first", mutates_args=())
def rms_norm_cast_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of `x` over the dimensions of `weight`, its last ones; shape and dtype of `x`."""
    wide = x.float() if x.dtype in HALF else x
    over = list(range(-weight.dim(), 0))
    y = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    return y.to(x.dtype) * weight


@rms_norm_cast_first.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


RMS_NORM_CAST_FIRST = torch.ops.normsurgery.rms_norm_cast_first.default


class CastFirstRMSNorm(nn.Module):
    """RMS norm over the last dimensions of (..., *weight.shape) that casts before the weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = RMS_NORM_CAST_FIRST(x, self.weight, self.eps)
        return y


class WideRMSNorm(nn.Module):
    """RMS norm over the last dimensions, all of it in float32, and cast back to the input's type.

    `weight` is float32, so that a scale of `1 + weight` is not rounded to half precision.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight.float())

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALF else x
        weight = self.weight.to(wide.dtype)
        y = torch.rms_norm(wide, list(weight.shape), weight, self.eps)
        return y.to(x.dtype)
