"""Blocks whose parallel branches are one convolution in inference, written as their authors do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normsurgery.norms.affine import Affine
from normsurgery.norms.examples import randomised


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    block = nn.Sequential()
    padding = kernel // 2
    block.add_module(
        "conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    )
    block.add_module("bn", nn.BatchNorm2d(outputs))
    return block


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and identity, each with a batch norm; `deploy` would be the form after merging."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        same = inputs == outputs and stride == 1
        self.nonlinearity = nn.ReLU()
        self.se = nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(inputs) if same else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))


class TwoArmedBlock(RepVGGBlock):
    """The same with an `if` for blocks that have an identity, as in another library."""

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_identity is None:
            x = self.rbr_1x1(x) + self.rbr_dense(x)
        else:
            identity = self.rbr_identity(x)
            x = self.rbr_dense(x) + self.rbr_1x1(x)
            x += identity
        return self.nonlinearity(self.se(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]


class MobileOneBlock(nn.Module):
    """Several convolutions of the kernel, one of 1x1, and the identity, added up in a loop."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, branches: int = 3
    ) -> None:
        super().__init__()
        self.inference_mode = False
        self.num_conv_branches = branches
        self.activation = nn.ReLU()
        self.se = SqueezeExcite(outputs)
        same = inputs == outputs and stride == 1
        self.rbr_skip = nn.BatchNorm2d(inputs) if same else None
        self.rbr_conv = nn.ModuleList(
            conv_bn(inputs, outputs, 3, stride, groups) for _ in range(branches)
        )
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.inference_mode:
            return self.activation(self.se(self.reparam_conv(x)))
        identity_out = 0
        if self.rbr_skip is not None:
            identity_out = self.rbr_skip(x)
        scale_out = 0
        if self.rbr_scale is not None:
            scale_out = self.rbr_scale(x)
        out = scale_out + identity_out
        for ix in range(self.num_conv_branches):
            out += self.rbr_conv[ix](x)
        return self.activation(self.se(out))


class LoopInBranchBlock(MobileOneBlock):
    """The loop stands in an `if`, and a residual that stays is added behind it."""

    def forward(self, x: Tensor) -> Tensor:
        identity_out = self.rbr_skip(x) if self.rbr_skip is not None else 0
        scale_out = self.rbr_scale(x)
        out = scale_out + identity_out
        if self.rbr_conv is not None:
            for branch in self.rbr_conv:
                out = out + branch(x)
        return self.activation(out)


class Summed(nn.Module):
    """sum(...) over a list of branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class Stacked(Summed):
    """A loop that begins with 0."""

    def forward(self, x: Tensor) -> Tensor:
        out = 0
        for branch in self.branches:
            out = out + branch(x)
        return out.relu()


class ACBlock(nn.Module):
    """A square kernel beside a row and a column."""

    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        super().__init__()
        rest = {"bias": False, "dilation": dilation}
        wide = dilation
        self.square_conv = nn.Conv2d(inputs, outputs, 3, padding=wide, **rest)
        self.square_bn = nn.BatchNorm2d(outputs)
        self.ver_conv = nn.Conv2d(inputs, outputs, (3, 1), padding=(wide, 0), **rest)
        self.ver_bn = nn.BatchNorm2d(outputs)
        self.hor_conv = nn.Conv2d(inputs, outputs, (1, 3), padding=(0, wide), **rest)
        self.hor_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        square = self.square_bn(self.square_conv(x))
        vertical = self.ver_bn(self.ver_conv(x))
        horizontal = self.hor_bn(self.hor_conv(x))
        return square + vertical + horizontal


class Residual(nn.Module):
    """A plain residual around two branches: only the branches are one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = conv_bn(channels, channels, 3)
        self.b = conv_bn(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a(x) + self.b(x))


class TwoSums(nn.Module):
    """Two sums in one forward, the second of what the first gives, under the same name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = conv_bn(channels, channels, 3)
        self.b = conv_bn(channels, channels, 1)
        self.c = conv_bn(channels, 5, 3, 2)
        self.d = conv_bn(channels, 5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.b(x)
        x = x.relu()
        x = self.c(x) + self.d(x)
        return x.relu()


def one_dimension() -> nn.Module:
    return Summed(
        nn.Sequential(nn.Conv1d(6, 6, 5, padding=2, groups=3), nn.BatchNorm1d(6)),
        nn.Sequential(nn.Conv1d(6, 6, 1, groups=3, bias=False), nn.BatchNorm1d(6)),
        nn.BatchNorm1d(6),
    )


def three_dimensions() -> nn.Module:
    return Summed(
        nn.Sequential(nn.Conv3d(4, 6, 3, stride=2, padding=1), nn.BatchNorm3d(6)),
        nn.Sequential(nn.Conv3d(4, 6, 1, stride=2, bias=False), nn.BatchNorm3d(6)),
    )


def linears() -> nn.Module:
    return Summed(
        nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
    )


IMAGE = (2, 4, 9, 8)
# name -> (block, shape of its input, branches of each sum)
MERGED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "RepVGG": (lambda: RepVGGBlock(4, 4), IMAGE, (3,)),
    "RepVGG with a stride": (lambda: RepVGGBlock(4, 6, 2), IMAGE, (2,)),
    "RepVGG in groups": (lambda: RepVGGBlock(4, 4, groups=2), IMAGE, (3,)),
    "RepVGG with two arms": (lambda: TwoArmedBlock(4, 4), IMAGE, (3,)),
    "RepVGG with two arms and a stride": (lambda: TwoArmedBlock(4, 6, 2), IMAGE, (2,)),
    "MobileOne": (lambda: MobileOneBlock(4, 4), IMAGE, (5,)),
    "MobileOne depthwise": (lambda: MobileOneBlock(4, 4, groups=4), IMAGE, (5,)),
    "MobileOne with a stride": (lambda: MobileOneBlock(4, 4, 2, groups=4), IMAGE, (4,)),
    "a loop in a branch": (lambda: LoopInBranchBlock(4, 4), IMAGE, (5,)),
    "ACNet": (lambda: ACBlock(4, 6), IMAGE, (3,)),
    "ACNet dilated": (lambda: ACBlock(4, 6, 2), IMAGE, (3,)),
    "a residual": (lambda: Residual(4), IMAGE, (2,)),
    "two sums": (lambda: TwoSums(4), IMAGE, (2, 2)),
    "a loop from 0": (
        lambda: Stacked(conv_bn(4, 4, 3), conv_bn(4, 4, 5), nn.BatchNorm2d(4)),
        IMAGE,
        (3,),
    ),
    "one dimension": (one_dimension, (2, 6, 11), (3,)),
    "three dimensions": (three_dimensions, (2, 4, 5, 6, 7), (2,)),
    "linears": (linears, (7, 6), (3,)),
    "linears on rows": (
        lambda: Summed(nn.Linear(6, 6), nn.Linear(6, 6, bias=False), Affine(6, channel_axis=-1)),
        (2, 3, 6),
        (3,),
    ),
}


def example(name: str) -> tuple[nn.Module, Tensor]:
    """A model around the block, in eval mode and float64, and an input."""
    make, shape, _ = MERGED[name]
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(randomised(make())).double().eval()
    return model, torch.randn(shape, generator=generator, dtype=torch.float64)
