"""evonorm-s0: its groups, what it takes over, and the activation it takes in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normsurgery
from normsurgery.errors import CannotConvert, UsageError, WrongShape
from normsurgery.norms.evonorm_s0 import NORM, EvoNormS0
from normsurgery.spec import Fidelity, Source


def batchnorm(shape: tuple[int, ...], axis: int = 1, **settings: Any) -> Source:
    module = nn.BatchNorm2d(shape[axis]).eval()
    nn.init.uniform_(module.weight, 1.5, 2.5)
    nn.init.uniform_(module.bias, -2.5, -1.5)
    settings = {"eps": 1e-3, "channel_axis": axis, "features": shape[axis], **settings}
    tensors = {"weight": module.weight, "bias": module.bias}
    return Source("batchnorm", "net.bn", settings, tensors, shape, module, False, torch.float32)


def by_hand(norm: EvoNormS0, x: Tensor) -> Tensor:
    """The paper's formula, one group of one sample at a time, in plain Python numbers."""
    moved = x.movedim(norm.channel_axis, 1)
    positions = moved.reshape(moved.shape[0], moved.shape[1], -1)
    if norm.channel_axis == -1:  # each position is a sample of its own
        positions = x.reshape(-1, norm.features, 1)
    out = torch.empty_like(positions)
    size = norm.features // norm.num_groups
    for n in range(positions.shape[0]):
        for group in range(norm.num_groups):
            channels = range(group * size, (group + 1) * size)
            values = [v for c in channels for v in positions[n, c].tolist()]
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + norm.eps)
            for c in channels:
                v, gamma, beta = (t[c].item() for t in (norm.v, norm.weight, norm.bias))
                for p, value in enumerate(positions[n, c].tolist()):
                    gate = 1 / (1 + math.exp(-v * value))
                    out[n, c, p] = value * gate / deviation * gamma + beta
    if norm.channel_axis == -1:
        return out.reshape(x.shape)
    return out.reshape(moved.shape).movedim(1, norm.channel_axis)


@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (2, 8, 3, 2)), (1, (2, 8)), (-1, (2, 3, 8)), (-1, (4, 8))]
)
def test_the_formula(axis: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = EvoNormS0(8, num_groups=2, eps=1e-2, channel_axis=axis).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 1.3, 2.6)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    expected = by_hand(norm, x)
    assert ((norm(x) - expected).abs().max() / expected.abs().max()).item() < 1e-10


def test_it_takes_over_weight_bias_eps_and_mode() -> None:
    source = batchnorm((2, 64, 4, 4))
    norm = NORM.conversions["*"].build(source)
    assert isinstance(norm, EvoNormS0)
    assert torch.equal(norm.weight, source.tensors["weight"])
    assert torch.equal(norm.bias, source.tensors["bias"])
    assert (norm.eps, norm.num_groups, norm.training) == (1e-3, 32, False)
    norm(torch.randn(2, 64, 4, 4)).square().sum().backward()
    for parameter in norm.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0


def test_positions_of_tokens_do_not_see_each_other() -> None:
    norm = NORM.conversions["*"].build(batchnorm((2, 5, 16), axis=2, channel_axis=-1))
    x = torch.randn(2, 5, 16)
    changed = x.clone()
    changed[:, 3:] += 7
    assert torch.equal(norm(x)[:, :3], norm(changed)[:, :3])


def test_the_activation_after_it_is_taken_in() -> None:
    conversion = NORM.conversion("batchnorm")
    followed = batchnorm((2, 8, 4, 4), activation_module="net.relu")
    options = conversion.resolve(followed, {})
    assert options == {"num_groups": 8, "absorb": True}
    built = conversion.build(followed, **options)
    ((path, change),) = conversion.companions(followed, built, options).items()
    replaced = change(nn.ReLU(inplace=True).eval())
    assert path == "net.relu" and type(replaced) is nn.Identity and not replaced.training
    assert conversion.companions(followed, built, {"absorb": False}) == {}
    alone = batchnorm((2, 8, 4, 4))
    assert conversion.resolve(alone, {})["absorb"] is False
    assert conversion.companions(alone, built, {}) == {}


def test_options_and_promise() -> None:
    conversion = NORM.conversion("batchnorm")
    source = batchnorm((2, 8, 4, 4))
    assert conversion.option_names() == ("num_groups", "absorb")
    assert conversion.promise(source, {}) is Fidelity.RETRAIN
    assert conversion.build(source, num_groups=2).num_groups == 2


@pytest.mark.parametrize(
    ("shape", "options", "why"),
    [
        ((2, 8, 1, 1), {"num_groups": 4}, "2 element"),
        ((2, 3), {}, "3 element"),
        ((2, 8, 4, 4), {"num_groups": 3}, "equal groups"),
        ((2, 8, 4, 4), {"num_groups": 0}, "equal groups"),
    ],
)
def test_groups_too_small_are_refused(
    shape: tuple[int, ...], options: dict[str, int], why: str
) -> None:
    conversion = NORM.conversion("batchnorm")
    for run in (conversion.build, lambda source, **given: conversion.resolve(source, given)):
        with pytest.raises(CannotConvert, match=why):
            run(batchnorm(shape), **options)


def test_wrong_use_is_said() -> None:
    with pytest.raises(UsageError, match=r"\[1, 2, 3, 6\]"):
        EvoNormS0(6, num_groups=4)
    with pytest.raises(WrongShape, match="axis 1"):
        EvoNormS0(6, num_groups=2)(torch.randn(2, 5, 6))


class Shared(nn.Module):
    """One activation module for two norms, as in a residual block; a private one for the third."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.shared = nn.ReLU(inplace=True)
        self.own = nn.ReLU(inplace=True)
        self.twice = nn.ReLU()
        self.returned = nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.shared(self.norms[0](x))
        x = self.shared(self.norms[1](x) + x)
        x = self.own(self.norms[2](x))
        x = self.norms[3](x)
        x = self.twice(x) + x
        normalised = self.norms[4](x)
        return normalised, self.returned(normalised)


def test_only_an_activation_that_nothing_else_uses_is_taken_in() -> None:
    """Catches: a shared activation made Identity for everyone, and a second reader of the norm."""
    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(2, 8, 4, 4)
    swapped, report = normsurgery.swap(model, to="evonorm-s0", inputs=(x,))
    assert [step.options["absorb"] for step in report.plan.steps] == [
        *(False, False, True, False, False)
    ]
    assert type(swapped.own) is nn.Identity and type(model.own) is nn.ReLU
    for name in ("shared", "twice", "returned"):
        assert type(getattr(swapped, name)) is nn.ReLU
    kept, _ = normsurgery.swap(model, to="evonorm-s0", options={"absorb": False}, inputs=(x,))
    assert type(kept.own) is nn.ReLU
