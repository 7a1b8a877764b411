"""Small source models, none of them neutral: weights, statistics and affines are random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def random_module(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with every parameter and statistic drawn anew: vectors around 1, variances in
    [0.5, 2], matrices of unit gain."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for tensor in module.parameters():
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 0
            tensor.copy_(normal(tensor) / fan_in**0.5 if fan_in else 1 + 0.3 * normal(tensor))
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(normal(tensor))
            if name.endswith("running_var"):
                tensor.copy_(0.5 + 1.5 * torch.rand(tensor.shape, generator=generator))
    return module.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Formula(nn.Module):
    """A function of one input and of tensors: `Formula(lambda s, x: x * s.weight, weight=...)`."""

    def __init__(self, formula: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.formula = formula
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


class Formula2(Formula):
    """The same of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.formula(self, x, y)


class HandLayerNorm(nn.Module):
    """As people write it: centred, eps inside the root."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


class HalfRMSNorm(nn.Module):
    """RMSNorm that forgets to upcast: squares of 300 are infinite in fp16."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaRMSNorm(nn.Module):
    """Upcasts, normalises, casts back, then multiplies by the weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(nn.Module):
    """`1 + weight`, all of it in float32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class RankUpRMSNorm(nn.Module):
    """Its weight has one dimension more than its input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class BatchOnly(nn.Module):
    """BatchNorm by the statistics of the batch, whatever the mode: a hard-coded training=True."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, mean, variance, training=True)


class ConvNet(nn.Module):
    """Convolutions, BatchNorm and GroupNorm, a residual, a linear head."""

    def __init__(self, channels: int = 8, blocks: int = 1, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 1),
                nn.GroupNorm(4, channels),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """One head, causal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        length = scores.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(mask, float("-inf"))
        out: Tensor = self.out(scores.softmax(-1) @ value)
        return out


class Block(nn.Module):
    def __init__(self, size: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attention = norm(size), Attention(size)
        self.norm2 = norm(size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class LanguageModel(nn.Module):
    """Token ids to logits, pre-norm."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        size: int = 16,
        blocks: int = 1,
        vocabulary: int = 11,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.blocks = nn.Sequential(*[Block(size, norm) for _ in range(blocks)])
        self.norm = norm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(ids))))
        return logits


class StandardizedConv(nn.Conv2d):
    """Weight standardization: BiT, NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)
