"""Scales and shifts that are no norm: folded where a batch norm would be, else left alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers_zoo import models, randomise

import normsurgery as ns
from normsurgery.find import locate
from normsurgery.fold.ground import Choices
from normsurgery.fold.planning import plan_fold
from normsurgery.fold.unlisted import is_unlisted, with_unlisted
from normsurgery.inputs import Inputs, as_inputs, flatten_outputs
from normsurgery.norms.examples import randomised
from normsurgery.plan import Plan

torch.set_num_threads(1)
BOUND = 1e-9
C = 6


class Scaled(nn.Module):
    """LayerScale: the last axis of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ScaledChannels(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.gamma.view(1, -1, *[1] * (x.dim() - 2)) * x


class OneScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return -x * self.scale


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias - x


class Renormalised(nn.Module):
    """Batch renorm: in training it corrects the batch's statistics, in eval it is affine."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_std", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.running_mean, self.running_std
        if self.training:
            mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
        y = (x - mean[None, :, None, None]) / std[None, :, None, None]
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class Powered(nn.Module):
    """Power norm: divided by the root of a running second moment, nothing subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_phi", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        y = x / (self.running_phi + 1e-3).sqrt()[:, None, None]
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Frozen(nn.Module):
    """One multiplication and one addition, by numbers made of the statistics."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "deviation"):
            self.register_buffer(name, torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.deviation.reciprocal()
        shift = self.bias - self.mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class Twice(ScaledChannels):
    """c + 2 * x, in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.gamma.view(1, -1, 1, 1), x, alpha=2)


class Block(nn.Module):
    """Producer, affine, something that is not linear, consumer."""

    def __init__(self, middle: nn.Module, kind: str = "conv2d") -> None:
        super().__init__()
        make = {
            "conv2d": lambda a, b: nn.Conv2d(a, b, 3, groups=2 if b == C else 1, bias=False),
            "conv1d": lambda a, b: nn.Conv1d(a, b, 3),
            "up": lambda a, b: nn.ConvTranspose2d(a, b, 2, groups=2),
            "linear": lambda a, b: nn.Linear(a, b, bias=False),
        }[kind]
        self.first, self.middle, self.last = make(4, C), middle, make(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.first(x))))


SHAPES = {"conv2d": (2, 4, 9, 9), "conv1d": (2, 4, 9), "up": (2, 4, 5, 5), "linear": (2, 3, 4)}


def ready(model: nn.Module) -> nn.Module:
    return randomised(model).double().eval()


def example(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize(
    ("middle", "kind"),
    [
        (ScaledChannels, "conv2d"),
        (ScaledChannels, "conv1d"),
        (Scaled, "linear"),
        (OneScale, "linear"),
        (OneScale, "up"),
        (Shifted, "conv2d"),
        (Renormalised, "conv2d"),
        (Twice, "conv2d"),
        (Powered, "up"),
        (Frozen, "conv2d"),
    ],
)
def test_it_goes_into_the_layer_before(middle, kind):
    model, x = ready(Block(middle(), kind)), example(SHAPES[kind])
    folded, report = ns.fold(model, inputs=(x,))
    (step,) = report.plan.steps
    assert (step.rule, step.to, step.site.path) == ("into producer", "identity", "middle")
    assert isinstance(folded.middle, nn.Identity) and not report.plan.skips
    assert report.evidence.passed and error(folded(x), model(x)) < BOUND
    moved = report.keymap.load(model.state_dict())
    assert moved.keys() == folded.state_dict().keys()
    assert all(torch.equal(moved[name], t) for name, t in folded.state_dict().items())
    plan = Plan.from_json(json.loads(json.dumps(report.plan.to_json())))
    assert plan == report.plan
    again, _ = ns.fold(model, plan=plan, inputs=(x,))
    assert torch.equal(again(x), folded(x))
    assert not ns.fold(folded, inputs=(x,))[1].plan.steps


class Ahead(nn.Module):
    """Fixed statistics of the data, in front of everything."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.middle, self.first = Powered(), nn.Conv2d(C, 4, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.middle(x))


def test_it_goes_into_the_layers_behind_where_nothing_is_padded():
    model, x = ready(Ahead(0)), example((2, C, 7, 7))
    folded, report = ns.fold(model, inputs=(x,))
    assert [step.rule for step in report.plan.steps] == ["into consumers"]
    assert error(folded(x), model(x)) < BOUND
    left, report = ns.fold(ready(Ahead(1)), inputs=(x,))
    assert not report.plan.steps and not report.plan.skips and type(left.middle) is Powered


class PerElement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(C, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class OnData(ScaledChannels):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


class InPlace(ScaledChannels):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma.view(1, -1, 1, 1))


class Inverted(ScaledChannels):
    def forward(self, x: Tensor) -> Tensor:
        return self.gamma.view(1, -1, 1, 1) / x


class Squared(ScaledChannels):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1) * x


class Counting(ScaledChannels):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Borrowed(nn.Module):
    """Its scale belongs to another module."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = [nn.Parameter(torch.full((C, 1, 1), 1.7, dtype=torch.float64))]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.outside[0]


@pytest.mark.parametrize(
    "middle", [PerElement, OnData, InPlace, Inverted, Squared, Counting, Borrowed]
)
def test_what_is_not_affine_by_its_own_numbers_stays(middle):
    model, x = ready(Block(middle())), example(SHAPES["conv2d"])
    folded, report = ns.fold(model, inputs=(x,))
    assert not report.plan.steps and not report.plan.skips
    assert type(folded.middle) is middle and torch.equal(folded(x), model(x))


class Watched(Block):
    """The producer's output is read before the scale as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.relu(self.middle(y))).sum() + y.sum()


def hooked(model: nn.Module) -> nn.Module:
    model.middle.register_forward_hook(lambda module, args, output: None)
    return model


def in_train_mode(model: nn.Module) -> nn.Module:
    model.middle.train()
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: ready(Watched(ScaledChannels())),
        lambda: hooked(ready(Block(ScaledChannels()))),
        lambda: in_train_mode(ready(Block(ScaledChannels()))),
    ],
    ids=["read elsewhere", "hook", "train mode"],
)
def test_where_a_fold_is_refused_nothing_is_said(build):
    model, x = build(), example(SHAPES["conv2d"])
    folded, report = ns.fold(model, inputs=(x,))
    assert not report.plan.steps and not report.plan.skips
    assert type(folded.middle) is type(model.middle)


class Shared(nn.Module):
    """One scale behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.a, self.b = Scaled(), nn.Linear(4, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.b(torch.tanh(self.scale(self.a(x)))))


def test_what_find_lists_as_unexplained_is_a_skip_where_it_is_not_folded():
    """In train mode it is a norm that no formula explains; a fold looks at eval mode alone."""
    model, x = in_train_mode(ready(Block(Renormalised()))), example(SHAPES["conv2d"])
    survey = ns.find(model, (x,))
    plan = ns.plan(survey, model, fold=True, inputs=(x,))
    assert not plan.steps and [skip.path for skip in plan.skips] == ["middle"]
    assert plan.skips == survey.skips
    assert not ns.fold(model, inputs=(x,))[1].plan.steps


def test_a_shared_scale_goes_into_all_it_follows():
    model, x = ready(Shared()), example((2, 3, 4))
    folded, report = ns.fold(model, inputs=(x,))
    assert len(report.plan.steps) == 1 and isinstance(folded.scale, nn.Identity)
    assert error(folded(x), model(x)) < BOUND


def test_it_is_not_listed_and_can_be_left_out():
    model, x = ready(Block(Powered())), example(SHAPES["conv2d"])
    assert not ns.find(model, (x,)).sites
    sites = with_unlisted(locate(model, Inputs((x,), {}))).survey.sites
    assert [is_unlisted(site) for site in sites] == [True]
    assert not ns.fold(model, inputs=(x,), exclude="middle")[1].plan.steps
    kept = plan_fold(model, Inputs((x,), {}), choices=Choices(keep_classes=True))
    assert not kept.steps and not kept.skips


def test_layer_scale_no_longer_stands_between_a_vision_transformer_and_rmsnorm():
    row = models()["dinov2"]
    model = row.build()
    randomise(model)
    model = model.eval().double()
    inputs = as_inputs(row.inputs()).to(dtype=torch.float64)
    folded, report = ns.fold(model, inputs=inputs, rmsnorm=True, verify=False)
    found = [(step.rule, step.to) for step in report.plan.steps]
    assert found.count(("into producer", "identity")) == 4
    assert found.count(("residual stream", "rmsnorm")) == 5 == len(found) - 4
    assert not report.plan.skips
    with torch.no_grad():
        wanted, got = (flatten_outputs(inputs.call(which)) for which in (model, folded))
    assert all(error(got[name], wanted[name]) < BOUND for name in wanted)
