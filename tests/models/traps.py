"""Small models, each of which a naive replacement of norms gets wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm


def nothing_neutral(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and statistics, far from 0 and 1: no fault can hide behind a default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(0.3 + 1.5 * drawn)
    return model


class Convolutional(nn.Module):
    """conv, BatchNorm2d, relu, twice, and a classifier. Input (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8, eps=1e-3)
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.head(self.block(x).mean((2, 3)))


class Tied(nn.Module):
    """One norm under three names: two of this module, one inside a child. Called three times."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(8)
        self.norm1 = norm
        self.norm2 = norm
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.block(self.norm1(x)))


class SharedWeight(nn.Module):
    """Two norm modules with one weight, which a plain multiplication uses too. Input (N, L, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.norm2 = nn.LayerNorm(8)
        self.norm2.weight = self.norm1.weight
        self.scale = self.norm1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.norm1(x) * self.scale)


class Parts(nn.Module):
    """Norms that differ in all that a new module must inherit. Input (N, L, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.LayerNorm(8)
        self.frozen = nn.LayerNorm(8)
        self.frozen.requires_grad_(False)
        self.bias_only = nn.LayerNorm(8)
        self.bias_only.weight.requires_grad_(False)
        self.bare = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.bias_only(self.frozen(self.plain(x))))


class ReadsWeight(nn.Module):
    """Computes with the norm's tensors itself, through a method and a loop. Input (N, L, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.norms = nn.ModuleList([nn.LayerNorm(8)])
        self.called = nn.LayerNorm(8)
        self.typed = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.typed.weight.dtype)
        return self.typed(self.called(self._fused(x)))

    def _fused(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = F.layer_norm(x, (8,), norm.weight, norm.bias)
        norm = self.norm
        return F.layer_norm(x, (8,), norm.weight, norm.bias, norm.eps)


class HeldInList(nn.Module):
    """Runs its norm through a plain list, which the module tree does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.other = nn.LayerNorm(8)
        self.steps = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.other(x)


class NotDeepCopyable(nn.Module):
    """After a forward it holds an activation and an old-style weight_norm's computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = weight_norm(nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.linear(x)
        return self.norm(self.seen)


class DataDependent(nn.Module):
    """A branch on data, with a norm in each arm. Input (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.LayerNorm(8)
        self.negative = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if bool(x.sum() > 0) else self.negative(x)


class Causal(nn.Module):
    """Position i sees positions up to i only; as long as it is wide. Input (N, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        past = x.cumsum(1)
        return self.mix(self.norm(past))


class BatchNormSubclass(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class PrivateNorm(nn.Module):
    """A model whose norm has a buffer that is not saved. Input (N, 8, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        mean: Any = self.norm.running_mean
        del self.norm.running_mean
        self.norm.register_buffer("running_mean", mean, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)
