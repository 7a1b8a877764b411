"""Hand-written modules that the random models are built from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrozenBatchNorm(nn.Module):
    """A batch norm that is a multiply-add over buffers."""

    def __init__(self, channels: int, dims: int, eps: float) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        self.eps = eps
        self.view = (1, -1) + (1,) * dims

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(self.view) + shift.reshape(self.view)


class HandRMSNorm(nn.Module):
    """The root mean square norm as language models write it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class OnePlusRMSNorm(nn.Module):
    """The same with a weight that is stored less one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (1.0 + self.weight)


class Affine(nn.Module):
    """A scale and a shift per channel, of axis 1 (`dims` axes follow) or of the last axis."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.view = (-1,) + (1,) * dims

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(self.view) + self.bias.view(self.view)
