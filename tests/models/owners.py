"""Forwards that hold a norm as a call or a formula, each of which a careless rewrite breaks."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.rewriting.owner import OwnerCall

C = 12


def x(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*(shape or (2, 5, C)))


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))
        self.p, self.n, self.last = 0.3, 0, None


class IfTraining(Affine):
    def forward(self, x):
        h = self.fc(x)
        if self.training:
            h = h * 2
        return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)


class Dropout(Affine):
    def forward(self, x):
        h = F.dropout(self.fc(x), self.p, self.training)
        return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5) + 1


class NoneDefault(Affine):
    def forward(self, x, mask=None):
        h = self.fc(x)
        if mask is not None:
            h = h * mask
        return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)


class StarArguments(Affine):
    def forward(self, *args):
        h = self.fc(args[0])
        h = F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)
        return (h, *args[1:])


class StarKeywords(Affine):
    def forward(self, x, **kwargs):
        h = F.layer_norm(self.fc(x), (C,), self.weight, self.bias, 1e-5)
        return h * kwargs.get("scale", 1.0)


@dataclasses.dataclass
class Out:
    state: Tensor
    count: int = 0


class DataclassOutput(Affine):
    def forward(self, x, return_dict=True):
        h = F.layer_norm(self.fc(x), (C,), self.weight, self.bias, 1e-5)
        return Out(h, 3) if return_dict else (h, 3)


class Parent(Affine):
    def forward(self, x):
        return self.fc(x)


class Super(Parent):
    def forward(self, x):
        h = super().forward(x)
        return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)


class PrivateNames(Affine):
    def __init__(self) -> None:
        super().__init__()
        self.__factor = 1.5

    def forward(self, x):
        h = self.fc(x) * self.__factor
        return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)


def closure_class(factor: float) -> type:
    class Closure(Affine):
        def forward(self, x):
            h = self.fc(x) * factor
            return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)

    return Closure


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs) * 2

    return wrapper


ran_decorators = []


def counted(limit):
    def decorate(function):
        ran_decorators.append(function)
        calls = 0

        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs) + limit

        return wrapper

    return decorate


class Decorated(Affine):
    @counted(3.0)
    @doubled
    @torch.no_grad()
    def forward(self, x, *, scale: float = 1.5):
        h = self.fc(x) * scale
        return F.layer_norm(
            h,
            (C,),
            self.weight,
            self.bias,
            1e-5,
        )


class Counter(Affine):
    def forward(self, x):
        self.n += 1
        self.last = self.fc(x)
        h = F.layer_norm(self.last, (C,), self.weight, self.bias, 1e-5)
        return h * self.n


class Loop(Affine):
    def forward(self, x):
        for _ in range(3):
            x = F.layer_norm(x, (C,), self.weight, self.bias, 1e-5)
            x = self.fc(x)
        return x


class Branch(Affine):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 3
        return F.layer_norm(self.fc(x), (C,), self.weight, self.bias, 1e-5)


CALL = "F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)"
OF_FC = "F.layer_norm(self.fc(x), (C,), self.weight, self.bias, 1e-5)"
ONE = [OwnerCall((x(),))]
OWNERS = {
    "if self.training": (IfTraining, CALL, {"name": "h"}, ONE),
    "dropout with self.training": (Dropout, CALL, {"name": "h"}, ONE),
    "None default": (
        NoneDefault,
        CALL,
        {"name": "h"},
        [OwnerCall((x(),)), OwnerCall((x(), x())), OwnerCall((x(),), {"mask": x()})],
    ),
    "*args": (StarArguments, CALL, {"name": "h"}, [OwnerCall((x(),)), OwnerCall((x(), 7))]),
    "**kwargs": (
        StarKeywords,
        OF_FC,
        {"origin": "self.fc(x)"},
        [OwnerCall((x(),)), OwnerCall((x(),), {"scale": 3.0})],
    ),
    "dataclass output": (
        DataclassOutput,
        OF_FC,
        {"origin": "self.fc(x)"},
        [OwnerCall((x(),)), OwnerCall((x(), False))],
    ),
    "super()": (Super, CALL, {"name": "h"}, ONE),
    "private names": (PrivateNames, CALL, {"name": "h"}, ONE),
    "closure": (closure_class(1.7), CALL, {"name": "h"}, ONE),
    "decorators": (
        Decorated,
        CALL,
        {"name": "h"},
        [OwnerCall((x(),)), OwnerCall((x(),), {"scale": 0.5})],
    ),
    "counter attribute": (
        Counter,
        "F.layer_norm(self.last, (C,), self.weight, self.bias, 1e-5)",
        {"origin": "self.last"},
        ONE,
    ),
    "loop": (
        Loop,
        "F.layer_norm(x, (C,), self.weight, self.bias, 1e-5)",
        {"name": "x"},
        ONE,
    ),
    "branch on data": (
        Branch,
        OF_FC,
        {"origin": "self.fc(x)"},
        [OwnerCall((x(),)), OwnerCall((x() - 5,))],
    ),
}


class Formula(Affine):
    """A hand-written LayerNorm inside a block's forward."""

    def forward(self, x):
        h = self.fc(x)
        mean = h.mean(-1, keepdim=True)
        var = (h - mean).pow(2).mean(-1, keepdim=True)
        y = (h - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias
        return y + x


class Rebound(Affine):
    """The name of the normalised value is bound to something else before the output."""

    def forward(self, x):
        x = self.fc(x)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x * scale
        x = x * self.weight
        return x + 0


class InPlace(Affine):
    """The normalised value is overwritten before the output."""

    def forward(self, x):
        h = self.fc(x)
        mean = h.mean(-1, keepdim=True)
        var = h.var(-1, unbiased=False, keepdim=True)
        h -= mean
        h /= torch.sqrt(var + 1e-5)
        h *= self.weight
        return h + self.bias


FORMULA = "(h - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias"
