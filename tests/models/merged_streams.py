"""Models with norms around branches that become one layer, and what is to become of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Fates = Mapping[str, tuple[str, str]]  # label of a norm -> what it becomes, and by which rule


class Scaled(nn.Module):
    """x * by: a norm that only scales."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Branches(nn.Module):
    """Two linear branches of one input, each scaled."""

    def __init__(self, *, first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5) if first else None
        self.p1, self.p2 = nn.Linear(5, 5, bias=bias), nn.Linear(5, 5, bias=bias)
        self.s1, self.s2 = Scaled(5), Scaled(5)

    def before(self, x: Tensor) -> Tensor:
        return x if self.fc is None else F.gelu(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        u = self.before(x)
        return self.s1(self.p1(u)) + self.s2(self.p2(u))


class BesideIdentity(Branches):
    def forward(self, x: Tensor) -> Tensor:
        u = self.before(x)
        return self.p1(u) + self.s2(u)


class Residual(nn.Module):
    """A stream of tokens that the branches write to."""

    def __init__(self, branches: nn.Module) -> None:
        super().__init__()
        self.emb, self.mlp, self.head = nn.Linear(5, 5), branches, nn.Linear(5, 5)
        self.n, self.nf = nn.LayerNorm(5), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.mlp(self.n(h))
        out: Tensor = self.head(self.nf(h))
        return out


class OneNorm(Residual):
    """The same norm everywhere: its weights go into the branches, whose merge is then centred."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.mlp(self.n(h))
        out: Tensor = self.head(self.n(h))
        return out


class Image(nn.Module):
    """Convolutions in parallel that make the tokens of a stream."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
        self.b, self.bn = nn.Conv2d(4, 4, 1, groups=groups), nn.BatchNorm2d(4)
        self.n, self.nf = nn.LayerNorm(4), nn.LayerNorm(4)
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.bn(self.a(x)) + self.b(x)).flatten(2).transpose(1, 2)
        h = h + self.fc(self.n(h))
        out: Tensor = self.head(self.nf(h))
        return out


class Pads(nn.Module):
    """A scale beside a convolution that pads."""

    def __init__(self) -> None:
        super().__init__()
        self.sc, self.conv = Scaled(4, 1, 1), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.sc(x) + self.conv(x)


def conv_bn(kernel: int) -> nn.Module:
    conv = nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4))


class Convolutions(nn.Module):
    """Two convolutions of what a norm gives, multiplied with what the norm reads."""

    def __init__(self, kernel: int, norm: nn.Module) -> None:
        super().__init__()
        self.n, self.a, self.b = norm, conv_bn(3), conv_bn(kernel)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return x * (self.a(y) + self.b(y))


class Asks(Convolutions):
    """Its forward asks a branch for more than a number can give: they stay two layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return self.a(y).contiguous() + self.b(y)


class Unread(nn.Module):
    """What `d` makes of the norm's output goes nowhere; its other call does."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.d, self.c = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x.relu())
        self.d(y).mean()
        return self.c(y) * self.d(x.tanh())


IMAGE, TOKENS = (4, 6, 5), (3, 5)
RMS, PAD = {"rmsnorm": True}, {"pad": "explicit"}
TO_RMS = ("rmsnorm", "residual stream")
GONE, MERGE = ("identity", "into producer"), ("identity", "parallel branches")
PADDED = ("identity", "into consumers, explicit padding")
KEPT = ("layernorm", "into consumers")
Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], Fates]

_SCALED = {"mlp.s1": GONE, "mlp.s2": GONE, "mlp.p2": MERGE}
_BESIDE = {"mlp.p1": MERGE, "mlp.s2": MERGE}
_BOTH = {"n": TO_RMS, "nf": TO_RMS}
_TWO = {"a.1": GONE, "b.1": GONE, "a.0": MERGE}
_EQUAL = {"a.1": GONE, "b.1": GONE, "b.0": MERGE}  # the last that has room


def inside(fates: Fates) -> Fates:
    """The same in the second place of an nn.Sequential."""
    return {f"1.{k}": fate for k, fate in fates.items()}


def row(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), *modules, nn.ReLU())


CASES: dict[str, Case] = {
    "scaled branches write to a stream": (
        lambda: Residual(Branches()),
        TOKENS,
        RMS,
        _SCALED | _BOTH,
    ),
    "without biases": (lambda: Residual(Branches(bias=False)), TOKENS, RMS, _SCALED | _BOTH),
    "a branch beside a scale": (lambda: Residual(BesideIdentity()), TOKENS, RMS, _BESIDE | _BOTH),
    "a bias that a norm in front makes": (
        lambda: Residual(Branches(first=False, bias=False)),
        TOKENS,
        RMS,
        _SCALED | _BOTH,
    ),
    "a norm in front of a branch beside a scale": (
        lambda: Residual(BesideIdentity(first=False, bias=False)),
        TOKENS,
        RMS,
        _BESIDE | _BOTH,
    ),
    "one norm in all places": (
        lambda: OneNorm(Branches(first=False)),
        TOKENS,
        RMS,
        _SCALED | {"n": TO_RMS},
    ),
    "convolutions make a stream": (
        lambda: Image(1),
        IMAGE,
        RMS,
        {"bn": GONE, "a": MERGE} | _BOTH,
    ),
    "groups have no common mean": (
        lambda: Image(4),
        IMAGE,
        RMS,
        {"bn": GONE, "a": MERGE, "n": KEPT, "nf": KEPT},
    ),
    "a norm in front of a convolution beside a scale": (
        lambda: row(nn.BatchNorm2d(4), Pads()),
        IMAGE,
        PAD,
        {"1": PADDED, "2.conv": MERGE, "2.sc": MERGE},
    ),
    "kernels of one size": (
        lambda: row(Convolutions(3, nn.BatchNorm2d(4))),
        IMAGE,
        PAD,
        inside(_EQUAL | {"n": PADDED}),
    ),
    "kernels of two sizes": (
        lambda: row(Convolutions(1, nn.BatchNorm2d(4))),
        IMAGE,
        PAD,
        inside(_TWO | {"n": PADDED}),
    ),
    "of the model itself": (
        lambda: Convolutions(1, nn.BatchNorm2d(4)),
        IMAGE,
        PAD,
        _TWO | {"n": PADDED},
    ),
    "a norm that computes more than a scale": (
        lambda: row(Convolutions(3, nn.GroupNorm(2, 4))),
        IMAGE,
        PAD,
        inside(_EQUAL | {"n": ("groupnorm", PADDED[1])}),
    ),
    "branches that stay apart": (
        lambda: row(Asks(3, nn.BatchNorm2d(4))),
        IMAGE,
        PAD,
        inside({"a.1": GONE, "b.1": GONE, "n": PADDED}),
    ),
    "a call that leads nowhere": (
        Unread,
        IMAGE,
        {},
        {"n": ("identity", "into consumers"), "d": ("affine", "standalone affine")},
    ),
}
