"""What looks like a norm and is none, or is one that no registered formula explains."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from models.spellings.by_hand import Affine
from torch import Tensor, nn


class SqueezeAndExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class GlobalResponse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + self.weight * x * (size / (size.mean(1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        return weights @ v


class SumToOne(nn.Module):
    """Divides by the sum: a normalization of probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        positive = F.softplus(x)
        return positive / positive.sum(-1, keepdim=True)


class LayerNorm(nn.Module):
    """A feed-forward block with a misleading name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12))
        self.linear, self.eps = nn.Linear(12, 12), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x)) * self.weight


class NamedOnly(nn.LayerNorm):
    """A subclass of LayerNorm that does not normalise."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class StandardisesInput(nn.Module):
    """Subtracts a stored mean and divides by a stored deviation: preprocessing, no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(8, 1, 1))
        self.register_buffer("deviation", 0.5 + torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class Distances(nn.Module):
    """A radial basis: lengths are taken, nothing is divided by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(x[..., None, :] - self.centres).norm(dim=-1))


class DividesByDeviation(Affine):
    """Over the standard deviation without subtracting the mean. No registered norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.epsilon))


class UnitBall(nn.Module):
    """Shortens what is longer than 1 and leaves the rest: not the L2 norm it resembles."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)


class Gated(Affine):
    """Normalises what a gate was multiplied into: no plain RMSNorm of its input."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class PassesGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 24), Gated(12)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear(x).chunk(2, -1)
        return self.norm(value, gate)


class PartialRms(Affine):
    """pRMSNorm: the root mean square of a part scales the whole. No registered norm."""

    def forward(self, x: Tensor) -> Tensor:
        part = x[..., : x.shape[-1] // 3]
        return self.gain * x * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + self.epsilon)


class CubicMean(Affine):
    """Divides by a root of a second moment and of a first one together. No registered norm."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.mean(-1, keepdim=True), x.pow(2).mean(-1, keepdim=True)
        return self.gain * x / torch.sqrt(second + 0.3 * first.square() + self.epsilon)
