"""A method that normalises and that forward calls at several places: each place is a norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import UsageError
from normsurgery.norms.examples import randomised

torch.set_num_threads(1)
BOUND = 1e-9
C = 4


def images(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, C, 6, 5, generator=generator, dtype=torch.float64)


class Helper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.c2 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.w, self.b = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("m", torch.zeros(C))
        self.register_buffer("v", torch.ones(C))

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.m, self.v, self.w, self.b)


class BatchNormAct(nn.BatchNorm2d):
    """As timm writes it: torch's own function in a subclass, and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        tracked = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return x.relu()


class SuperAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def by_function(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    statistics = (norm.running_mean, norm.running_var)
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, norm.training, 0.1, norm.eps)


class HelperAct(nn.BatchNorm2d):
    """A function outside the class that is handed the module, in a method of its own."""

    def normed(self, x: Tensor) -> Tensor:
        return by_function(x, self)

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x).relu()


@pytest.mark.parametrize("cls", [BatchNormAct, SuperAct, HelperAct])
def test_a_norm_in_a_subclass_of_a_norm_is_swapped_and_folded(cls: type[nn.Module]) -> None:
    """Left a BatchNorm2d without statistics, it would crash whoever finds norms by class."""
    model = nn.Sequential(nn.Conv2d(C, C, 1), cls(C)).double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    model.eval()
    x = images(4)
    swapped, report = ns.swap(model, "groupnorm", inputs=(x,))
    assert report.passed and "norm_0.weight" in swapped[1].state_dict()
    affine, _ = ns.swap(model, "affine", inputs=(x,))
    folded, _ = ns.fold(model, inputs=(x,))
    for same in (affine, folded):
        assert float((same(x) - model(x)).detach().abs().max()) < BOUND
    for changed in (swapped, affine, folded):
        assert not isinstance(changed[1], nn.BatchNorm2d)
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(changed))(x)
        torch.optim.swa_utils.update_bn([x], changed)
    again, _ = ns.swap(model, "batchnorm", inputs=(x,))
    for trained in (again, model):
        trained.train()(3 * x)
        trained.eval()
    assert float((again(x) - model(x)).detach().abs().max()) < BOUND


class TwoPlaces(Helper):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.c(x)).relu()
        return self.norm(self.c2(y)).relu()


class OneLine(Helper):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.c2(self.norm(self.c(x)).relu())).relu()


class InALoop(Helper):
    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.c, self.c2):
            x = self.norm(conv(x)).relu()
        return x


class ByHand(Helper):
    def norm(self, x: Tensor) -> Tensor:
        y = x - x.mean((2, 3), keepdim=True)
        scale = torch.rsqrt(y.pow(2).mean((2, 3), keepdim=True) + 1e-5)
        return y * scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.c(x)).relu()
        return self.norm(self.c2(y)).relu()


class Uneven(Helper):
    """In its second run the method does more: that run's value is not the norm's."""

    def norm(self, x: Tensor, more: bool = False) -> Tensor:
        y = F.batch_norm(x, self.m, self.v, self.w, self.b)
        return y * 2 if more else y

    def forward(self, x: Tensor) -> Tensor:
        for more in (False, True):
            x = self.norm(self.c(x), more).relu()
        return x


def ready(made: nn.Module) -> nn.Module:
    return randomised(made.double().eval(), 0).double().eval()


def require_same(changed: nn.Module, original: nn.Module) -> None:
    for batch in (1, 2, 3, 5):
        x = images(batch)
        with torch.no_grad():
            wanted = original(x)
            assert float((changed(x) - wanted).abs().max() / wanted.abs().max()) < BOUND


@pytest.mark.parametrize("cls", [TwoPlaces, OneLine, InALoop, Uneven])
def test_a_fold_takes_every_place_or_none(cls: type[nn.Module]) -> None:
    model, inputs = ready(cls()), (images(2),)
    folded, report = ns.fold(model, inputs=inputs)
    assert report.passed is not False
    require_same(folded, model)
    assert not ns.fold(folded, inputs=inputs, verify=False)[1].plan.steps


def test_both_places_are_folded() -> None:
    _, report = ns.fold(ready(TwoPlaces()), inputs=(images(2),))
    assert [step.site.label for step in report.plan.steps] == ["#line1", "#line2"]
    assert [step.to for step in report.plan.steps] == ["identity", "identity"]


def test_a_fold_is_undone() -> None:
    model, inputs = ready(TwoPlaces()), (images(2),)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(images(3))
    _, report = ns.fold(model, inputs=inputs, inplace=True)
    report.undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(images(3)), wanted)


class Groups:
    """A norm that is the same in both modes, so that any swap of it can be proven."""

    w: Tensor
    b: Tensor

    def norm(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.w, self.b)


class TwoPlacesOfGroups(Groups, TwoPlaces):
    pass


class OneLineOfGroups(Groups, OneLine):
    pass


class InALoopOfGroups(Groups, InALoop):
    pass


@pytest.mark.parametrize("cls", [TwoPlacesOfGroups, OneLineOfGroups, InALoopOfGroups])
def test_a_swap_reaches_every_place(cls: type[nn.Module]) -> None:
    model, inputs = ready(cls()), (images(2),)
    same, report = ns.swap(model, "groupnorm", inputs=inputs)
    assert report.passed
    require_same(same, model)
    other, _ = ns.swap(model, "identity", inputs=inputs)
    plain = model.c2(model.c(images(3)).relu()).relu()
    torch.testing.assert_close(other(images(3)), plain)


def test_a_swap_that_cannot_be_proven_is_refused() -> None:
    """The call never trains; the module that would take its place does."""
    with pytest.raises(UsageError, match="differs"):
        ns.swap(ready(TwoPlaces()), "batchnorm", inputs=(images(2),))


def test_a_formula_in_a_method_is_swapped_at_every_place() -> None:
    model, inputs = ready(ByHand()), (images(2),)
    assert [site.calls for site in ns.find(model, inputs)] == [1, 1]
    other, _ = ns.swap(model, "identity", inputs=inputs)
    x = images(3)
    torch.testing.assert_close(other(x), model.c2(model.c(x).relu()).relu())


def test_the_sites_of_a_method() -> None:
    inputs = (images(2),)
    assert [s.calls for s in ns.find(ready(TwoPlaces()), inputs)] == [1, 1]
    assert [s.calls for s in ns.find(ready(InALoop()), inputs)] == [2]
    assert not list(ns.find(ready(Uneven()), inputs))
