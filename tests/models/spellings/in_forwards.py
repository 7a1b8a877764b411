"""Norms that are a call or a formula in the forward of a larger module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CallsLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.scale = nn.Parameter(0.5 + torch.rand(12))
        self.shift = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.layer_norm(self.linear(x), (12,), self.scale, self.shift, 1e-3)


class CallsRmsNorm(CallsLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.rms_norm(self.linear(x), (12,), self.scale, 1e-4)


class CallsNormalize(CallsLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x), dim=-1)


class DividesByLength(CallsLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y / y.norm(p=2, dim=-1, keepdim=True)


class WritesLayerNorm(CallsLayerNorm):
    """The formula stands in the forward of the block, over several statements."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        mean = y.mean(-1, keepdim=True)
        variance = (y - mean).square().mean(-1, keepdim=True)
        normal = (y - mean) * torch.rsqrt(variance + 1e-3)
        return x + normal * self.scale + self.shift


def normalised(x: Tensor, features: int) -> Tensor:
    return F.layer_norm(x, (features,))


class CallsWrapper(CallsLayerNorm):
    """The call stands in a function outside any module."""

    def forward(self, x: Tensor) -> Tensor:
        return normalised(self.linear(x), 12) * self.scale


class CallsTwice(CallsLayerNorm):
    """One place of a loop, run three times."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.layer_norm(self.linear(x), (12,), self.scale, self.shift, 1e-3)
        return x


class CallsOnOneLine(CallsLayerNorm):
    """Two norms in one expression; only the columns of the source tell them apart."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (12,), self.scale) @ F.layer_norm(self.linear(x), (12,)).mT


class CallsInComprehension(CallsLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return sum(F.layer_norm(y, (12,), self.scale, self.shift) for y in (x, self.linear(x)))


class CallsInTraining(CallsLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            y = F.layer_norm(y, (12,), self.scale, self.shift, 1e-3)
        return y


def both_normalised(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(first, dim=-1), F.normalize(second, dim=-1)


class CallsFunctionOfTwo(CallsLayerNorm):
    """A function outside any forward that normalises two tensors at once."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = both_normalised(x, self.linear(x))
        return q @ k.mT


class Modulated(CallsLayerNorm):
    """Adaptive layer norm: the modulation depends on the input and is not part of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        condition = self.linear(x.mean(1, keepdim=True))
        return F.layer_norm(x, (12,), eps=1e-6) * (1 + condition) + condition


class CallsBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.scale = nn.Parameter(0.5 + torch.rand(8))
        self.shift = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", 0.5 + torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.batch_norm(
            y, self.mean, self.variance, self.scale, self.shift, self.training, 0.1, 1e-3
        )
        return F.relu(y)


class CallsGroupNorm(CallsBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(self.conv(x), 2, self.scale, self.shift, 1e-3)


class CallsInstanceNorm(CallsBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(self.conv(x), weight=self.scale, bias=self.shift, eps=1e-3)


class NormalisesWeight(CallsBatchNorm):
    """A convolution whose weight is standardised by `batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        flat = weight.reshape(1, weight.shape[0], -1)
        flat = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8)
        return F.conv2d(x, flat.reshape_as(weight), self.conv.bias)


class NormThenActivation(nn.BatchNorm2d):
    """Batch norm and its activation in one class."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class OwnBatchNormThenActivation(nn.BatchNorm2d):
    """The same, with the call written out."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return F.silu(y)
