"""Norms that are folded with others: two calls of one norm, a norm that reads a norm, and norms
around branches that become one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgery as ns
from normsurgery.folding.checks import Check
from normsurgery.norms.examples import randomised

EXACT = 1e-9  # relative, float64 against float64


def ready(model: nn.Module) -> nn.Module:
    return randomised(model, 0).double().eval()


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def differs(folded: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got = model(x), folded(x)
    return float((got - wanted).abs().max() / wanted.abs().max())


def fates(report: ns.Report) -> dict[str, str]:
    """What became of each norm, by label: what is left of it, or the reason why it stays."""
    done = {step.site.label: f"{step.to} {step.rule}" for step in report.plan.steps}
    return done | {skip.path: skip.reason for skip in report.plan.skips}


# --- two calls of one norm ----------------------------------------------------------------------


class Calls(nn.Module):
    """F.batch_norm with the same tensors behind each layer of a row; `eps` may differ."""

    def __init__(self, layers: Callable[[], list[nn.Module]], eps: tuple[float, ...]) -> None:
        super().__init__()
        self.layers, self.eps = nn.ModuleList(layers()), eps
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps[0]).relu()
        x = self.layers[1](x)
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps[1]).relu()


class SecondForLargeBatches(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps[0]).relu()
        x = self.layers[1](x)
        if x.shape[0] < 2:
            return x
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps[1]).relu()


def shared() -> list[nn.Module]:
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    return [convolution, convolution]


def apart() -> list[nn.Module]:
    return [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)]


def test_two_calls_of_one_norm_behind_one_layer_are_folded_together() -> None:
    model, x = ready(Calls(shared, (1e-3, 1e-3))), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert list(fates(report).values()) == ["identity into producer"] * 2
    assert [len(step.edits) for step in report.plan.steps] == [3, 0]
    assert report.passed
    assert differs(folded, model, images(5, 4, 6, 5)) < EXACT


def test_behind_layers_of_their_own_each_is_folded_alone() -> None:
    model, x = ready(Calls(apart, (1e-3, 1e-3))), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert list(fates(report).values()) == ["identity into producer"] * 2
    assert all(step.edits for step in report.plan.steps)
    assert differs(folded, model, images(5, 4, 6, 5)) < EXACT


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: Calls(shared, (1e-3, 1e-2)), {}),
        (lambda: Calls(shared, (1e-3, 1e-3)), {"only": [0]}),
        (lambda: SecondForLargeBatches(shared, (1e-3, 1e-3)), {}),
    ],
    ids=["another eps", "one left out", "one depends on the batch"],
)
def test_they_stay_where_they_are_not_one_norm_everywhere(
    model: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    built, x = ready(model()), images(2, 4, 6, 5)
    folded, report = ns.fold(built, inputs=(x,), **options)
    assert not any("into" in fate for fate in fates(report).values()), fates(report)
    for batch in (1, 2, 5):
        assert differs(folded, built, images(batch, 4, 6, 5)) < EXACT


class NextToOne(Calls):
    """Another norm behind the second call takes that call up; the first is then alone."""

    def __init__(self) -> None:
        super().__init__(shared, (1e-3, 1e-3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps[0]).relu()
        x = self.layers[1](x)
        x = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps[1])
        return self.norm(x).relu()


def test_a_norm_whose_twin_is_gone_shares_its_tensors_with_nobody() -> None:
    model, x = ready(NextToOne()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert not report.plan.skips
    assert differs(folded, model, images(5, 4, 6, 5)) < EXACT
    assert not ns.fold(folded, inputs=(x,))[1].plan.steps


# --- a norm that reads a norm -------------------------------------------------------------------


class Read(nn.Module):
    """`first`'s output is read by `second` and by a convolution; a relu is in front."""

    def __init__(self, first: nn.Module, second: nn.Module, more: nn.Module | None = None) -> None:
        super().__init__()
        self.more = more
        self.first, self.second, self.conv = first, second, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.relu())
        y = self.second(x) * self.conv(x).sigmoid()
        return y if self.more is None else y + self.more(x.tanh())


SECONDS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4, eps=1e-3),
    "without weight": lambda: nn.BatchNorm2d(4, affine=False),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(
        4, affine=True, track_running_stats=True
    ),
}


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("first", ["batch norm", "group norm"])
def test_a_norm_with_statistics_takes_up_the_norm_it_reads(first: str, second: str) -> None:
    made = nn.BatchNorm2d(4) if first == "batch norm" else nn.GroupNorm(2, 4)
    model, x = ready(Read(made, SECONDS[second]())), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    left = "identity" if first == "batch norm" else "groupnorm"
    assert fates(report)["first"] == f"{left} into consumers"
    assert report.passed
    assert differs(folded, model, images(5, 4, 6, 5)) < EXACT
    assert not ns.fold(folded, inputs=(x,))[1].plan.steps


class OnlyShift(nn.Module):
    """A learned bias in front of a batch norm and of a convolution: the mean takes it up."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = Shift()
        self.second, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shift(x.relu())
        return self.second(x) * self.conv(x).sigmoid()


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_a_shift_alone_goes_to_the_mean() -> None:
    model, x = ready(OnlyShift()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert fates(report)["shift"] == "identity into consumers"
    assert differs(folded, model, x) < EXACT
    (edits,) = (step.edits for step in report.plan.steps if step.site.label == "shift")
    assert {edit.target for edit in edits} == {"second.running_mean", "conv.bias"}


class ReadAgain(Read):
    """`second` is called on another value too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.second(x.tanh())


def twice() -> nn.Module:
    return ReadAgain(nn.BatchNorm2d(4), nn.BatchNorm2d(4))


def tied() -> nn.Module:
    model = Read(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model.more.weight = model.second.weight
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (twice, Check.CALLED_AGAIN),
        (tied, Check.NON_LINEAR),
        (lambda: Read(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)), Check.NON_LINEAR),
    ],
    ids=["called elsewhere", "tied", "computes statistics"],
)
def test_what_reads_it_must_be_its_own_and_affine(
    build: Callable[[], nn.Module], reason: Check
) -> None:
    model, x = ready(build()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    (step,) = (step for step in report.plan.steps if step.site.label == "first")
    assert step.to == "affine"
    assert any(note.startswith(reason.value) for note in step.notes), step.notes
    assert differs(folded, model, x) < EXACT


@pytest.mark.parametrize("first", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_tied_norms_stay_right_when_ties_may_be_cut(first: nn.Module) -> None:
    model, x = tied(), images(2, 4, 6, 5)
    model.first = first
    ready(model)
    folded, report = ns.fold(model, inputs=(x,), untie=True)
    assert report.passed
    assert differs(folded, model, x) < EXACT


def test_a_norm_left_in_train_mode_takes_up_nothing() -> None:
    model, x = ready(Read(nn.BatchNorm2d(4), nn.BatchNorm2d(4))), images(3, 4, 6, 5)
    model.second.train()
    second = model.second.running_mean.clone()
    _, report = ns.fold(model, inputs=(x,), verify=False)
    assert not any("into" in fate for fate in fates(report).values()), fates(report)
    assert torch.equal(model.second.running_mean, second)


class ReadInTraining(Read):
    """What reads `first` computes with the batch, as a call."""

    def forward(self, x: Tensor) -> Tensor:
        x, norm = self.first(x.relu()), self.second
        statistics = norm.running_mean.clone(), norm.running_var.clone()
        y = F.batch_norm(x, *statistics, norm.weight, norm.bias, training=True)
        return y * self.conv(x).sigmoid()


def test_a_call_that_computes_with_the_batch_takes_up_nothing() -> None:
    model, x = ready(ReadInTraining(nn.BatchNorm2d(4), nn.BatchNorm2d(4))), images(3, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert not any("into" in fate for fate in fates(report).values()), fates(report)
    assert differs(folded, model, x) < EXACT


class Scaled(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class OneOfItsOwn(nn.Module):
    """A norm without a weight is called twice, a learned scale behind one of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scaled = nn.BatchNorm2d(4, affine=False), Scaled(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.scaled(self.norm(x.relu())).relu()).relu()


class OnItself(nn.Module):
    """A norm without a weight reads what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)))


@pytest.mark.parametrize("build", [OneOfItsOwn, OnItself])
def test_a_weight_is_created_for_all_calls_of_a_norm_or_for_none(
    build: Callable[[], nn.Module],
) -> None:
    model, x = ready(build()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert fates(report)["norm"] == "affine standalone affine"
    assert differs(folded, model, images(5, 4, 6, 5)) < EXACT


class ReadByBatch(nn.Module):
    """One image alone takes another way past `first`, whose scale `second` would take up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.relu())
        y = self.second(x).relu()
        return y * (self.conv(x) if x.shape[0] != 1 else x.tanh()).sigmoid()


def test_what_another_batch_refuses_is_decided_again_without() -> None:
    model, x = ready(ReadByBatch()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert set(fates(report).values()) == {"affine standalone affine"}
    assert any("in the call with batch 1" in note for s in report.plan.steps for note in s.notes)
    for batch in (1, 2, 5):
        assert differs(folded, model, images(batch, 4, 6, 5)) < EXACT
    assert not ns.fold(folded, inputs=(x,))[1].plan.steps


class Padded(nn.Module):
    """The reader of `first` is replaced by a padding before `first` can be decided."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.padded, self.plain = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.shift = Shift()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.relu())
        return self.padded(self.second(x)) * self.plain(self.shift(x)).sigmoid()


def test_a_norm_that_became_a_padding_takes_up_nothing_more() -> None:
    model, x = ready(Padded()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,), pad="explicit")
    assert fates(report)["second"] == "identity into consumers, explicit padding"
    assert fates(report)["first"] == "affine standalone affine"
    assert differs(folded, model, x) < EXACT


# --- norms around branches that become one layer ------------------------------------------------


class Around(nn.Module):
    """`before` -> the input itself, scaled, plus a convolution without a bias -> `behind`."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.before, self.behind = nn.GroupNorm(2, 4), nn.BatchNorm2d(4)
        self.scaled = Scaled(4, 1, 1)
        self.conv = nn.Conv2d(4, 4, 2 * padding + 1, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.behind(self.scaled(x) + self.conv(x)).relu()


class AroundByBatch(nn.Module):
    """Another batch size runs something else in front."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Around()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.relu() if x.shape[0] == 2 else x.tanh())


class BehindByBatch(AroundByBatch):
    """The same; what is behind the branches wants a bias of the layer that they become."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.before = nn.Tanh()


class BranchesByBatch(Around):
    """Another batch size leaves a branch out."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if x.shape[0] != 2:
            return self.behind(self.conv(y)).relu()
        return self.behind(self.scaled(y) + self.conv(y)).relu()


@pytest.mark.parametrize("build", [Around, AroundByBatch])
def test_norms_around_branches_go_into_the_layer_that_these_become(
    build: Callable[[], nn.Module],
) -> None:
    model, x = ready(build()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    made = {label.removeprefix("inner."): fate for label, fate in fates(report).items()}
    assert made["before"] == "groupnorm into consumers"
    assert made["behind"] == "identity into producer"
    assert not any(isinstance(module, Scaled) for module in folded.modules())
    assert report.passed
    for batch in (1, 2, 5):
        assert differs(folded, model, images(batch, 4, 6, 5)) < EXACT
    assert not ns.fold(folded, inputs=(x,))[1].plan.steps
    again, _ = ns.fold(ready(build()), plan=ns.Plan.from_json(report.plan.to_json()), inputs=(x,))
    assert differs(again, model, x) < EXACT


def test_a_bias_that_a_merged_layer_is_given_later_holds_for_another_batch() -> None:
    model, x = ready(BehindByBatch()), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    assert fates(report)["inner.behind"] == "identity into producer"
    for batch in (1, 2, 5):
        assert differs(folded, model, images(batch, 4, 6, 5)) < EXACT


def test_what_pads_with_zeros_takes_up_no_shift_but_the_norm_behind_goes() -> None:
    model, x = ready(Around(padding=1)), images(2, 4, 6, 5)
    folded, report = ns.fold(model, inputs=(x,))
    made = fates(report)
    assert made["before"].startswith(Check.ZERO_PADDING.value)
    assert made["behind"] == "identity into producer"
    assert differs(folded, model, images(5, 4, 6, 5)) < EXACT


def test_a_branch_that_another_batch_leaves_out_keeps_the_norms() -> None:
    model, x = ready(BranchesByBatch()), images(2, 4, 6, 5)
    folded, _ = ns.fold(model, inputs=(x,))
    for batch in (1, 2, 5):
        assert differs(folded, model, images(batch, 4, 6, 5)) < EXACT
