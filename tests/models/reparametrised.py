"""Networks whose authors reparametrise them for inference, module by module as timm has them.

RepVGG (Ding et al. 2021), MobileOne (Vasu et al. 2023), FastViT (Vasu et al. 2023), RepViT (Wang et
al. 2024), EfficientViT (Liu et al. 2023), with few channels. `own(model)` is how many convolutions
and linears their own reparametrisation leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.norms.examples import randomised


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm that is called by function, and an activation behind it."""

    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU() if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1,
            self.eps,
        )
        return self.act(self.drop(x))


class ConvNormAct(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        apply_act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn = BatchNormAct2d(outputs, apply_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class RepVggBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        same = inputs == outputs and stride == 1
        self.reparam_conv = None
        self.identity = BatchNormAct2d(outputs, apply_act=False) if same else None
        self.conv_kxk = ConvNormAct(inputs, outputs, 3, stride, apply_act=False)
        self.conv_1x1 = ConvNormAct(inputs, outputs, 1, stride, apply_act=False)
        self.drop_path, self.attn, self.act = nn.Identity(), nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.act(self.attn(self.reparam_conv(x)))
        if self.identity is None:
            x = self.conv_1x1(x) + self.conv_kxk(x)
        else:
            identity = self.identity(x)
            x = self.conv_1x1(x) + self.conv_kxk(x)
            x = self.drop_path(x)
            x += identity
        return self.act(self.attn(x))


class MobileOneBlock(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        branches: int = 1,
        scale: bool = True,
        attn: bool = False,
        apply_act: bool = True,
    ) -> None:
        super().__init__()
        same = inputs == outputs and stride == 1
        self.num_conv_branches = branches
        self.reparam_conv = None
        self.identity = BatchNormAct2d(outputs, apply_act=False) if same else None
        self.conv_kxk = (
            nn.ModuleList(
                ConvNormAct(inputs, outputs, kernel, stride, groups, apply_act=False)
                for _ in range(branches)
            )
            if branches
            else None
        )
        self.conv_scale = (
            ConvNormAct(inputs, outputs, 1, stride, groups, apply_act=False)
            if kernel > 1 and scale
            else None
        )
        self.attn = SqueezeExcite(outputs) if attn else nn.Identity()
        self.act = nn.ReLU() if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.act(self.attn(self.reparam_conv(x)))
        identity_out = self.identity(x) if self.identity is not None else 0
        scale_out = self.conv_scale(x) if self.conv_scale is not None else 0
        out = scale_out
        if self.conv_kxk is not None:
            for rc in self.conv_kxk:
                out += rc(x)
        if self.identity is not None:
            out += identity_out
        return self.act(self.attn(out))


class LayerScale2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepMixer(nn.Module):
    """x + gamma * (mixer(x) - norm(x)), one depthwise convolution in inference."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reparam_conv = None
        rest = {"groups": channels, "apply_act": False}
        self.norm = MobileOneBlock(channels, channels, 3, branches=0, scale=False, **rest)
        self.mixer = MobileOneBlock(channels, channels, 3, **rest)
        self.layer_scale = LayerScale2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class ConvMlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvNormAct(channels, channels, 7, groups=channels, apply_act=False)
        self.fc1, self.fc2 = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, channels, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token_mixer, self.mlp = RepMixer(channels), ConvMlp(channels)
        self.layer_scale = LayerScale2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class ReparamLargeKernelConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reparam_conv = None
        self.large_conv = ConvNormAct(inputs, outputs, 7, 2, inputs, apply_act=False)
        self.small_conv = ConvNormAct(inputs, outputs, 3, 2, inputs, apply_act=False)
        self.se, self.act = nn.Identity(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            out = self.reparam_conv(x)
        else:
            out = self.large_conv(x)
            if self.small_conv is not None:
                out = out + self.small_conv(x)
        return self.act(self.se(out))


class RepConditionalPosEnc(nn.Module):
    """A convolution and the identity: no norm is in it, and it stays as its author wrote it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pos_enc = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pos_enc(x) + x


class ConvNorm(nn.Sequential):
    """A convolution without bias and a plain batch norm, as `c` and `bn`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)


class RepVggDw(nn.Module):
    """bn(3x3 + 1x1 + identity), depthwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, 3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class RepVitMlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(channels, 16), ConvNorm(16, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))


class RepViTBlock(nn.Module):
    def __init__(self, channels: int, se: bool) -> None:
        super().__init__()
        self.token_mixer = RepVggDw(channels)
        self.se = SqueezeExcite(channels) if se else nn.Identity()
        self.channel_mixer = RepVitMlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.token_mixer(x))
        return x + self.channel_mixer(x)


class CascadedGroupAttention(nn.Module):
    """Heads that attend one after the other, each on what the one before gave it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        part = channels // heads
        self.qkvs = nn.ModuleList(ConvNorm(part, 3 * part) for _ in range(heads))
        self.dws = nn.ModuleList(ConvNorm(part, part, 3, groups=part) for _ in range(heads))
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.qkvs), dim=1)
        given, found = parts[0], []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            if i > 0:
                given = given + parts[i]
            q, k, v = qkv(given).chunk(3, dim=1)
            q = dw(q)
            attn = (q.flatten(2).transpose(-2, -1) @ k.flatten(2)).softmax(-1)
            given = (v.flatten(2) @ attn.transpose(-2, -1)).view_as(v)
            found.append(given)
        return self.proj(torch.cat(found, 1))


class Residual(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class Classifier(nn.Module):
    def __init__(self, channels: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def repvgg() -> nn.Module:
    return Classifier(
        8, RepVggBlock(3, 6, 2), RepVggBlock(6, 6), RepVggBlock(6, 8, 2), RepVggBlock(8, 8)
    )


def _mobileone(branches: int, attn: bool) -> nn.Module:
    rest = {"branches": branches, "attn": attn}
    return Classifier(
        8,
        MobileOneBlock(3, 6, 3, 2),
        MobileOneBlock(6, 6, 3, 1, 6, **rest),
        MobileOneBlock(6, 8, 1, **rest),
        MobileOneBlock(8, 8, 3, 2, 8, **rest),
        MobileOneBlock(8, 8, 1, **rest),
    )


def fastvit() -> nn.Module:
    return Classifier(
        8,
        MobileOneBlock(3, 6, 3, 2),
        MobileOneBlock(6, 6, 3, 2, 6),
        MobileOneBlock(6, 6, 1),
        RepMixerBlock(6),
        ReparamLargeKernelConv(6, 12),
        MobileOneBlock(12, 8, 1),
        RepConditionalPosEnc(8),
        RepMixerBlock(8),
    )


def repvit() -> nn.Module:
    return Classifier(
        8, ConvNorm(3, 8, 3, 2), nn.GELU(), RepViTBlock(8, True), RepViTBlock(8, False)
    )


def efficientvit() -> nn.Module:
    return Classifier(
        8,
        ConvNorm(3, 8, 3, 2),
        nn.ReLU(),
        Residual(ConvNorm(8, 8, 3, groups=8)),
        Residual(nn.Sequential(ConvNorm(8, 16), nn.ReLU(), ConvNorm(16, 8))),
        Residual(CascadedGroupAttention(8, 2)),
    )


# name -> (model, layers that its authors' reparametrisation leaves)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "RepVGG": (repvgg, 4 + 1),
    "MobileOne s0": (lambda: _mobileone(4, False), 5 + 1),
    "MobileOne s4": (lambda: _mobileone(1, True), 5 + 4 * 2 + 1),
    "FastViT": (fastvit, 3 + (1 + 3) + 2 + 1 + (1 + 3) + 1),
    "RepViT": (repvit, 1 + (1 + 2 + 2) + (1 + 2) + 1),
    "EfficientViT": (efficientvit, 1 + 1 + 2 + (2 * 2 + 1) + 1),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network in eval mode and float64, with random values, and an input."""
    generator = torch.Generator().manual_seed(3)
    model = randomised(NETWORKS[name][0](), seed).double().eval()
    return model, torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
