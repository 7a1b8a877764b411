"""Norms written out in a module of their own, and the models that hold one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(nn.Module):
    """Base of the hand-written norms below: a random weight and perhaps a bias, and an epsilon."""

    def __init__(self, features: int, eps: float = 1e-5, *, bias: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(0.5 + torch.rand(features))
        self.offset = nn.Parameter(torch.randn(features)) if bias else None
        self.epsilon = eps

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.gain if self.offset is None else x * self.gain + self.offset


# --- root mean square, by hand --------------------------------------------------------------------


class RmsByRsqrt(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.gain


class RmsBySqrtAndDivide(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + self.epsilon)


class RmsByPower(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * (x.square().mean(-1, keepdim=True) + self.epsilon).pow(-0.5))


class RmsByProduct(Affine):
    def forward(self, x: Tensor) -> Tensor:
        mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
        return x / (mean + self.epsilon).sqrt() * self.gain


class RmsByReciprocal(Affine):
    def forward(self, x: Tensor) -> Tensor:
        inverse = 1.0 / torch.sqrt(torch.mean(torch.square(x), -1, True) + self.epsilon)
        return self.gain * inverse * x


class RmsOutside(Affine):
    """The epsilon is added to the root."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.gain * x / (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + self.epsilon)
        )


class RmsUpcast(Affine):
    """Normalises in float32, casts back, then scales."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.gain * y.to(x.dtype)


class RmsOfOnePlusWeight(Affine):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (y * (1.0 + self.gain.float())).type_as(x)


class RmsWithoutWeight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class PixelNorm(Affine):
    """Over axis 1 of (N, C, H, W), as image generators do."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.epsilon)
        return y * self.gain[:, None, None]


class RmsInPlace(Affine):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.mul_(torch.rsqrt_(y.pow(2).mean(-1, keepdim=True).add_(self.epsilon)))
        return y.mul_(self.gain)


class _SquareRootMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, root)
        return x / root

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, root = ctx.saved_tensors
        (gradient,) = gradients
        return gradient / root - x * (gradient * x).mean(-1, keepdim=True) / root**3, None


class RmsByAutogradFunction(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return _SquareRootMean.apply(x, self.epsilon) * self.gain


# --- layer norm and its like, by hand -------------------------------------------------------------


class LayerByVariance(Affine):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.scaled((x - mean) / torch.sqrt(variance + self.epsilon))


class LayerByCentredSquares(Affine):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return self.scaled(centred * inverse)


class LayerByVarMean(Affine):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return self.scaled((x - mean) * (variance + self.epsilon) ** -0.5)


class LayerByStd(Affine):
    """Divides by std + eps with the unbiased std, as many tutorials do."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.scaled((x - mean) / (std + self.epsilon))


class LayerUpcast(Affine):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        mean = y.mean(-1, keepdim=True)
        y = (y - mean) / torch.sqrt((y - mean).pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.scaled(y.to(x.dtype))


class LayerOverChannels(Affine):
    """Over axis 1 of (N, C, H, W), written out."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + self.epsilon)
        return self.gain[:, None, None] * y + self.offset[:, None, None]


class LayerPermuted(Affine):
    """Over axis 1 of (N, C, H, W), by permuting there and back."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.permute(0, 2, 3, 1), self.gain.shape, self.gain, self.offset, self.epsilon
        )
        return y.permute(0, 3, 1, 2)


class GroupByHand(Affine):
    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], 4, -1)
        variance, mean = torch.var_mean(y, dim=-1, correction=0, keepdim=True)
        y = ((y - mean) / torch.sqrt(variance + self.epsilon)).reshape(x.shape)
        return y * self.gain[:, None, None] + self.offset[:, None, None]


class InstanceByHand(Affine):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        variance = x.var((2, 3), keepdim=True, unbiased=False)
        y = (x - mean) / torch.sqrt(variance + self.epsilon)
        return y * self.gain[:, None, None] + self.offset[:, None, None]


class FrozenByHand(nn.Module):
    """Batch normalization by stored statistics, as detection models freeze it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", 0.5 + torch.rand(features))
        self.register_buffer("bias", torch.randn(features))
        self.register_buffer("running_mean", torch.randn(features))
        self.register_buffer("running_var", 0.5 + torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return x * scale + shift


class Tokens(nn.Module):
    """A linear layer, the norm, a linear layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(12, 12), norm, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x)))


class Maps(nn.Module):
    """A convolution, the norm, a convolution."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Conv2d(8, 8, 3), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x)))


def settled(norm: nn.Module) -> nn.Module:
    """The norm with affine parameters and running statistics that are not neutral."""
    with torch.no_grad():
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand_like(tensor) + ("bias" in name))
    return norm
