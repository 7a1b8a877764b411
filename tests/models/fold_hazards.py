"""The 57 models on which folding a norm goes wrong elsewhere, and some more. All in eval mode.

The names are those under which seven other tools were measured: a norm in every place where one can
be absorbed, and in places where absorbing it changes what the model computes. Statistics and affine
parameters are random and far from neutral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import weight_norm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Hazard:
    """One model and what it can be called with.

    shapes: of its input; the first is the example it is folded with, the others must be right too.
    dtype: of the input in the model's own precision.
    exports: torch.export takes it.
    training: it is handed over in train mode.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...] = ((2, 4, 8, 8), (1, 4, 8, 8), (3, 4, 9, 6))
    dtype: torch.dtype = torch.float32
    exports: bool = True
    training: bool = False

    def build(self) -> nn.Module:
        """The same model, with the same values, at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return far_from_neutral(self.make()).train(self.training)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One input per shape, around 0.5, -0.5, 0.5, ...: both arms of a branch on the sign run.

        In float64 they hold what the model's own precision holds.
        """
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(shape, generator=generator) for shape in self.shapes]
        shifted = [x + (0.5, -0.5)[i % 2] for i, x in enumerate(drawn)]
        return tuple(x.to(self.dtype).to(dtype) for x in shifted)


def far_from_neutral(model: nn.Module) -> nn.Module:
    """Vectors of size 0.5 to 2 and random sign, variances of 0.3 to 3; kernels stay as drawn."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or sum(size > 1 for size in tensor.shape) != 1:
                continue
            drawn = torch.rand(tensor.shape)
            signs = torch.randint(0, 2, tensor.shape) * 2 - 1
            is_variance = name.endswith("running_var")
            tensor.copy_(0.3 + 2.7 * drawn if is_variance else signs * (0.5 + 1.5 * drawn))
    return model


def conv(inputs: int = 4, outputs: int = 8, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def bn(**options: object) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8, **options)


def bn_in(**options: object) -> nn.BatchNorm2d:
    """Over the input's 4 channels."""
    return nn.BatchNorm2d(4, **options)


def row(*modules: Callable[[], nn.Module], **options: object) -> Hazard:
    """The modules one after the other."""
    return Hazard(lambda: nn.Sequential(*(make() for make in modules)), **options)


def one_dimensional(*modules: Callable[[], nn.Module]) -> Hazard:
    return row(*modules, shapes=((2, 4, 9), (1, 4, 9), (3, 4, 6)))


def three_dimensional(*modules: Callable[[], nn.Module]) -> Hazard:
    return row(*modules, shapes=((2, 4, 5, 4, 6), (1, 4, 5, 4, 6), (2, 4, 3, 5, 4)))


def vectors(*modules: Callable[[], nn.Module]) -> Hazard:
    return row(*modules, shapes=((3, 6), (1, 6), (5, 6)))


# Several calls, several consumers.


class SharedConv(nn.Module):
    """One convolution, called twice; each call goes to a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), bn(), bn()

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv(x)))
        return torch.cat([first, torch.sigmoid(self.bn2(self.conv(x.flip(-1))))], 1)


class SharedUnderTwoNames(SharedConv):
    """The same, and each call has its own name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv(x)))
        return torch.cat([first, torch.sigmoid(self.bn2(self.again(x.flip(-1))))], 1)


class SharedHead(nn.Module):
    """The head of a detector: the same convolution and norm on two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(padding=1), bn()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.bn(self.conv(F.max_pool2d(x, 2)))


class NormOnOneCall(nn.Module):
    """One convolution, called twice; only one call is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn(self.conv(x)))
        return torch.cat([first, torch.sigmoid(self.conv(x.flip(-1)))], 1)


class SharedNorm(nn.Module):
    """Two convolutions, one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = conv(), conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.bn(self.conv1(x))), self.bn(self.conv2(x))], 1)


class TiedWeights(nn.Module):
    """Two convolutions with one weight and a norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(outputs=4), bn_in()
        self.conv2, self.bn2 = conv(outputs=4), bn_in()
        self.conv2.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class TiedToOneWithoutNorm(nn.Module):
    """Two convolutions with one weight; the second has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv(outputs=4), bn_in(), conv(outputs=4)
        self.conv2.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.bn1(self.conv1(x))))


class SecondConsumer(nn.Module):
    """What the convolution gives is used with and without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([torch.relu(self.bn(y)), torch.sigmoid(y)], 1)


class NormReadTwice(nn.Module):
    """What the norm gives is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.cat([torch.relu(y), torch.sigmoid(y)], 1)


# Calls that are not calls of modules.


class Functional(nn.Module):
    """F.batch_norm on tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        mean, var, batch = self.running_mean, self.running_var, self.training
        return torch.relu(F.batch_norm(y, mean, var, self.scale, self.shift, batch, 0.1, 1e-3))


class FunctionalByName(Functional):
    """The running statistics, in train mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(
            F.batch_norm(
                input=self.conv(x),
                running_mean=self.running_mean,
                running_var=self.running_var,
                bias=self.shift,
                weight=self.scale,
                training=False,
                eps=1e-3,
            )
        )


class FunctionalTraining(Functional):
    """The statistics of the batch, in eval mode too. Momentum 0: no call changes the model."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var, y = self.running_mean, self.running_var, self.conv(x)
        return F.batch_norm(y, mean, var, self.scale, self.shift, training=True, momentum=0.0)


class FunctionalConv(nn.Module):
    """F.conv2d on parameters of its own, then a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.offset = nn.Parameter(torch.zeros(8))
        self.bn = bn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(F.conv2d(x, self.kernel, self.offset, padding=1)))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=x))


# Before a convolution, and across what commutes.


class NormBeforeTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv1, self.conv2 = bn_in(), conv(), conv(kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(x)
        return self.conv1(y), self.conv2(y)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = conv(outputs=3), conv(outputs=5), bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.conv1(x), self.conv2(x)], 1))


# Norms and convolutions of other classes.


class NormAndActivation(nn.BatchNorm2d):
    """Norm, dropout and activation in one class."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Dropout(0.3), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or not self.track_running_stats
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(x, mean, var, self.weight, self.bias, batch, 0.1, self.eps)
        return self.act(self.drop(y))


class FrozenNorm(nn.Module):
    """A batch norm that cannot be trained: four buffers, a multiplication and an addition."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        variance = self.running_var.reshape(shape)
        scale = self.weight.reshape(shape) * (variance + self.eps).rsqrt()
        shift = self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale
        return x * scale + shift


class StandardizedConv(nn.Conv2d):
    """Each filter is normalised by a batch norm in train mode, and scaled by a learned gain."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        self.factor = (inputs * 9) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        filters = self.weight.reshape(1, self.out_channels, -1)
        gain = self.gain.flatten() * self.factor
        filters = F.batch_norm(filters, None, None, gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, filters.reshape_as(self.weight), self.bias, padding=self.padding)


# Hooks, branches, dtypes.


class Hooked(nn.Module):
    def __init__(self, hooked: str) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.get_submodule(hooked).register_forward_hook(doubled)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


class DataBranch(nn.Module):
    """A branch on data, after and beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        if bool(x.mean() > 0):
            y = y.flip(-1)
        return y


class DataBranchAroundNorm(DataBranch):
    """A branch on data that decides whether the norm runs."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if bool(x.mean() > 0):
            y = self.bn(y)
        return torch.relu(y)


class ShapeBranch(DataBranch):
    """A branch on the size of the image, before the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 7:
            x = F.max_pool2d(x, 2)
        y = self.bn(self.conv(x))
        return torch.relu(y)


class BatchBranchAroundNorm(DataBranch):
    """One image is not normalised. The example has two."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.shape[0] > 1:
            y = self.bn(y)
        return torch.relu(y)


class BatchBranchReadsConv(DataBranch):
    """With three images the convolution has a second consumer. The example has two."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = torch.relu(self.bn(y))
        if x.shape[0] > 2:
            z = torch.maximum(z, y)
        return z


class WrittenAfterwards(DataBranch):
    """What the norm read is written over, and read again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = torch.relu(self.bn(y))
        return torch.cat([z, y.sigmoid_()], 1)


class HalfThenFull(nn.Module):
    """A convolution in half precision, a norm in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv().half(), bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class HalfOverflow(nn.Module):
    """Weights near the largest of half precision, which hardly any scale leaves finite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        nn.init.uniform_(self.conv.weight, -4e4, 4e4)
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x * 1e-4))


# Beyond the 57.


class TransposedTokens(nn.Module):
    """A linear on the last axis, whose features are axis 1 when the norm sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.linear(x).transpose(1, 2)))


class EmbeddedTokens(nn.Module):
    """A norm over the features of an embedding. Input: any numbers, of which the sign is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bn = nn.Embedding(2, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding((x > 0).long())
        return torch.relu(self.bn(tokens.flatten(0, 1)))


def frozen() -> nn.Module:
    return nn.Sequential(conv(), bn()).requires_grad_(False)


def bfloat16() -> nn.Module:
    return nn.Sequential(conv(), bn(), nn.ReLU(), conv(8, 4)).bfloat16()


HAZARDS: dict[str, Hazard] = {
    "control conv+bn": row(conv, bn),
    "grouped conv": row(lambda: conv(groups=2), bn),
    "depthwise conv": row(lambda: conv(groups=4), bn),
    "conv1d+bn1d": one_dimensional(lambda: nn.Conv1d(4, 8, 3), lambda: nn.BatchNorm1d(8)),
    "conv3d+bn3d": three_dimensional(lambda: nn.Conv3d(4, 8, 2), lambda: nn.BatchNorm3d(8)),
    "conv_transpose2d g=1": row(lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), bn),
    "conv_transpose2d g=2": row(lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), bn),
    "conv_transpose2d depthwise": row(lambda: nn.ConvTranspose2d(4, 8, 3, groups=4), bn),
    "conv_transpose1d": one_dimensional(
        lambda: nn.ConvTranspose1d(4, 8, 3, stride=2), lambda: nn.BatchNorm1d(8)
    ),
    "conv_transpose3d": three_dimensional(
        lambda: nn.ConvTranspose3d(4, 8, 2, bias=False), lambda: nn.BatchNorm3d(8)
    ),
    "linear+bn1d (N,C)": vectors(lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8)),
    "linear+bn1d (N,C,L), C==out (valid to refuse)": row(
        lambda: nn.Linear(5, 8),
        lambda: nn.BatchNorm1d(8),
        nn.ReLU,
        shapes=((2, 8, 5), (1, 8, 5), (3, 8, 5)),
    ),
    "linear + bn affine=False": vectors(
        lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8, affine=False)
    ),
    "conv + bn affine=False": row(conv, lambda: bn(affine=False)),
    "conv + bn(bias=False) [torch>=2.13]": row(conv, lambda: bn(bias=False)),
    "linear + bn(bias=False)": vectors(
        lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8, bias=False)
    ),
    "bn track_running_stats=False (must refuse)": row(
        conv, lambda: bn(track_running_stats=False), nn.ReLU
    ),
    "shared conv, two different bn (must refuse or copy)": Hazard(SharedConv),
    "shared conv + shared bn (head on 2 levels)": Hazard(SharedHead),
    "shared conv, bn on one call only (must refuse or copy)": Hazard(NormOnOneCall),
    "shared bn, two convs": Hazard(SharedNorm),
    "tied weights: c1.weight is c2.weight": Hazard(TiedWeights),
    "tied weights, one side without bn": Hazard(TiedToOneWithoutNorm),
    "conv output has 2 consumers (must refuse)": Hazard(SecondConsumer),
    "bn output has 2 consumers": Hazard(NormReadTwice),
    "functional F.batch_norm": Hazard(Functional),
    "functional F.batch_norm, kwargs": Hazard(FunctionalByName),
    "functional F.conv2d + bn": Hazard(FunctionalConv),
    "module kwargs call bn(input=conv(input=x))": Hazard(ByKeyword),
    "F.batch_norm training=True (must refuse)": Hazard(FunctionalTraining),
    "bn -> conv, padding 0 (forward fold)": row(bn_in, conv),
    "bn -> conv, zero padding 1 (must refuse or pad)": row(bn_in, lambda: conv(padding=1)),
    "bn -> conv, reflect padding (exact fold possible)": row(
        bn_in, lambda: conv(padding=1, padding_mode="reflect")
    ),
    "bn -> 1x1 grouped conv": row(bn_in, lambda: conv(kernel=1, groups=2)),
    "bn -> linear": vectors(lambda: nn.BatchNorm1d(6), lambda: nn.Linear(6, 8)),
    "bn -> two convs": Hazard(NormBeforeTwo),
    "bn -> relu -> conv (must refuse; bn can become scale)": row(bn_in, nn.ReLU, conv),
    "cat(conv, conv) -> bn": Hazard(Concatenated),
    "conv -> avgpool -> bn (commutes)": row(conv, lambda: nn.AvgPool2d(2), bn),
    "conv -> flatten(2) -> bn1d": row(conv, lambda: nn.Flatten(2), lambda: nn.BatchNorm1d(8)),
    "conv -> dropout(eval) -> bn": row(conv, lambda: nn.Dropout(0.4), bn),
    "conv -> bn -> bn": row(conv, bn, bn),
    "conv + InstanceNorm tracking stats": row(
        conv, lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    ),
    "timm BatchNormAct2d (subclass with act)": row(conv, lambda: NormAndActivation(8)),
    "SyncBatchNorm": row(conv, lambda: nn.SyncBatchNorm(8)),
    "torchvision FrozenBatchNorm2d": row(conv, lambda: FrozenNorm(8)),
    "conv subclass (timm ScaledStdConv2d)": row(lambda: StandardizedConv(4, 8), bn),
    "weight_norm parametrized conv": row(lambda: weight_norm(conv()), bn),
    "old hook weight_norm conv": row(lambda: hooked_weight_norm(conv()), bn),
    "forward hook on bn (doubles output)": Hazard(lambda: Hooked("bn")),
    "forward hook on conv (doubles output)": Hazard(lambda: Hooked("conv")),
    "data-dependent control flow": Hazard(DataBranch, exports=False),
    "shape-dependent control flow": Hazard(ShapeBranch),
    "bf16 model": Hazard(bfloat16, dtype=torch.bfloat16),
    "fp16 conv, fp32 bn (mixed)": Hazard(HalfThenFull, dtype=torch.float16),
    "train-mode model given (should say so)": row(conv, bn, training=True),
    "bn module with requires_grad=False / frozen conv": Hazard(frozen),
}

BEYOND: dict[str, Hazard] = {
    "shared conv under two names, two different bn": Hazard(SharedUnderTwoNames),
    "a branch on data decides whether the bn runs": Hazard(DataBranchAroundNorm, exports=False),
    "a branch on the batch decides whether the bn runs": Hazard(BatchBranchAroundNorm),
    "a branch on the batch hides a second consumer": Hazard(BatchBranchReadsConv),
    "conv output written in place after the bn": Hazard(WrittenAfterwards),
    "conv -> bn -> relu in place": row(conv, bn, lambda: nn.ReLU(inplace=True)),
    "conv -> avgpool that counts its zero padding -> bn": row(
        conv, lambda: nn.AvgPool2d(3, stride=1, padding=1), bn
    ),
    "conv -> maxpool -> bn": row(conv, lambda: nn.MaxPool2d(2), bn),
    "linear -> transpose -> bn1d (N,C,L)": Hazard(
        TransposedTokens, ((2, 7, 5), (1, 7, 5), (3, 4, 5))
    ),
    "embedding -> bn": Hazard(EmbeddedTokens, ((2, 7), (1, 7), (3, 4))),
}
