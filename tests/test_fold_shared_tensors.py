"""Functional norms whose tensors others use too, and beside branches that become one layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normsurgery as ns
from normsurgery.norms.examples import randomised
from normsurgery.rewriting.rebuilding import restore_originals, restore_rewrites

torch.set_num_threads(1)
BOUND = 1e-9
C = 4


def images(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, C, 6, 5, generator=generator, dtype=torch.float64)


class Leaf(nn.Module):
    """Normalises with the tensors of a module that is not its own."""

    def __init__(self, c: nn.Module, h: nn.BatchNorm2d) -> None:
        super().__init__()
        self.c, self.h = c, h

    def forward(self, x: Tensor) -> Tensor:
        h = self.h
        return F.batch_norm(
            self.c(x), self.h.running_mean, self.h.running_var, self.h.weight, h.bias
        ).relu()


class Plain(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            self.c(x), self.h.running_mean, self.h.running_var, self.h.weight, self.h.bias
        ).relu()


def called_too() -> nn.Module:
    bn, c = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
    return nn.Sequential(Plain(c, bn), Plain(c, bn), c, bn, nn.ReLU())


def two_owners() -> nn.Module:
    bn, c = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
    return nn.Sequential(Plain(c, bn), Plain(c, bn), nn.Conv2d(C, C, 1))


def by_a_local_name() -> nn.Module:
    bn, c = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
    return nn.Sequential(Leaf(c, bn), Leaf(c, bn), nn.Conv2d(C, C, 1))


class Tensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(C, C, 1)
        self.w, self.b = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("m", torch.zeros(C))
        self.register_buffer("v", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.c(x), self.m, self.v, self.w, self.b)


class ReadFromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Tensors()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).relu() * self.block.w.mean()


class SumAndNorm(Tensors):
    """A sum of branches, and a functional norm on the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return (self.n(x) + self.c(x)).relu() * F.batch_norm(
            x, self.m, self.v, self.w, self.b
        ).tanh()


class OneSum(SumAndNorm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.n(x) + self.c(x) + F.batch_norm(x, self.m, self.v, self.w, self.b)).relu()


MODELS = [called_too, two_owners, by_a_local_name, ReadFromAbove, SumAndNorm]


def ready(made: nn.Module, seed: int = 0) -> nn.Module:
    return randomised(made.double().eval(), seed).double().eval()


def require_same(changed: nn.Module, original: nn.Module) -> None:
    for batch in (1, 2, 3, 5):
        x = images(batch)
        with torch.no_grad():
            wanted = original(x)
            assert float((changed(x) - wanted).abs().max() / wanted.abs().max()) < BOUND


@pytest.mark.parametrize("make", [*MODELS, OneSum])
def test_the_model_computes_the_same(make: Callable[[], nn.Module]) -> None:
    model, inputs = ready(make()), (images(2),)
    folded, report = ns.fold(model, inputs=inputs)
    assert report.passed
    assert bool(report.plan.steps) == (make is not called_too)  # whose norms share their tensors
    require_same(folded, model)
    other = ready(make(), 7)
    loaded = copy.deepcopy(folded)
    loaded.load_state_dict(report.keymap.load(other.state_dict()))
    require_same(loaded, other)


@pytest.mark.parametrize("make", [*MODELS, OneSum])
def test_a_second_fold_finds_nothing(make: Callable[[], nn.Module]) -> None:
    inputs = (images(2),)
    folded, _ = ns.fold(ready(make()), inputs=inputs, verify=False)
    assert not ns.fold(folded, inputs=inputs, verify=False)[1].plan.steps


@pytest.mark.parametrize("make", [*MODELS, OneSum])
def test_undone_bit_for_bit(make: Callable[[], nn.Module]) -> None:
    model, inputs = ready(make()), (images(2),)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(images(3))
    _, report = ns.fold(model, inputs=inputs, inplace=True, verify=False)
    report.undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(images(3)), wanted)


@pytest.mark.parametrize("make", [*MODELS, OneSum])
def test_made_again_from_the_plan_and_from_a_file(make: Callable[[], nn.Module]) -> None:
    model, inputs = ready(make()), (images(2),)
    folded, report = ns.fold(model, inputs=inputs, verify=False)
    fresh = ns.rebuild(ready(make(), 3), report)
    fresh.load_state_dict(folded.state_dict())
    require_same(fresh, model)
    restored = restore_rewrites(restore_originals(folded), report)
    require_same(restored, model)


class Groups(nn.Module):
    def __init__(self, h: nn.GroupNorm) -> None:
        super().__init__()
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.h.weight, self.h.bias).relu()


@pytest.mark.parametrize("called", [True, False])
def test_a_swap_leaves_shared_tensors(called: bool) -> None:
    h = nn.GroupNorm(2, C)
    model = ready(nn.Sequential(Groups(h), Groups(h), *([h] if called else [])))
    same, report = ns.swap(model, "groupnorm", inputs=(images(2),))
    assert report.passed and len(report.plan.steps) >= 2
    require_same(same, model)


def test_both_are_carried_out_in_one_forward() -> None:
    _, report = ns.fold(ready(SumAndNorm()), inputs=(images(2),), verify=False)
    assert [(step.site.kind, step.rule) for step in report.plan.steps] == [
        ("sum of branches", "parallel branches"),
        ("batchnorm", "parallel branches"),
        ("batchnorm", "standalone affine"),
    ]


def test_a_graph_that_shares_its_norm() -> None:
    bn, c = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
    graph = fx.symbolic_trace(ready(nn.Sequential(Plain(c, bn)))).eval()
    model = nn.Sequential(graph, nn.Conv2d(C, C, 1).double(), bn, nn.ReLU()).eval()
    folded, _ = ns.fold(model, inputs=(images(2),))
    require_same(folded, model)
