"""A norm in front of convolutions that pad: with pad="explicit" it is folded, exactly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgery as ns
from normsurgery import artefacts
from normsurgery.errors import UsageError
from normsurgery.folding.channel_pad import ChannelPad
from normsurgery.folding.checks import Check
from normsurgery.norms.examples import randomised
from normsurgery.plans import Plan
from normsurgery.report import Report
from normsurgery.verifying import judge

EXACT = 1e-9  # relative, float64 against float64
RULE = "into consumers, explicit padding"
SIZES = {1: ((9,), (6,)), 2: ((8, 8), (5, 7)), 3: ((5, 4, 6), (3, 5, 4))}
Make = Callable[[], nn.Module]


def row(*modules: Make) -> Make:
    return lambda: nn.Sequential(*(make() for make in modules))


def conv(outputs: int = 6, kernel: Any = 3, **options: Any) -> Make:
    return lambda: nn.Conv2d(4, outputs, kernel, **{"padding": 1, **options})


class TwoReaders(nn.Module):
    """Two convolutions read the norm's output."""

    def __init__(self, first: Make, second: Make) -> None:
        super().__init__()
        self.bn, self.first, self.second = nn.BatchNorm2d(4), first(), second()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        a, b = self.first(y), self.second(y)
        return torch.cat([a.flatten(1), b.flatten(1)], 1)


class TwoLevels(nn.Module):
    """The norm and its convolution run on two values; the convolution has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x)) + self.again(self.bn(x.flip(-1)))


class AlsoReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(x)
        return y, self.conv(y)


class Functional(nn.Module):
    """A convolution by function, whose padding is a number in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.weight = nn.BatchNorm2d(4), nn.Parameter(torch.empty(6, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.bn(x), self.weight, padding=1)


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, (1, 1))


class PaddedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(self.bn(x), (1, 1, 1, 1)))


class OneOfTwoPads(nn.Module):
    """The norm runs twice, and only one of its convolutions pads."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(self.bn(x)), self.second(self.bn(x.flip(-1)))
        return torch.cat([a.flatten(1), b.flatten(1)], 1)


def bn(**options: Any) -> Make:
    return lambda: nn.BatchNorm2d(4, **options)


class ReadsItsSize(nn.Module):
    """The size of what the norm gives decides what the model gives."""

    def __init__(self, ask: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.bn, self.conv, self.ask = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), ask

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        width = self.ask(y)
        return self.conv(y) * (2.0 if width > 100 else 1.0)


class ByHand(nn.Module):
    """A scale and a shift that are no class of anybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.first.view(-1, 1, 1) + self.second.view(-1, 1, 1)


def last(x: Tensor) -> int:
    return x.shape[-1]


def rows(x: Tensor) -> int:
    return x.size(2)


def elements(x: Tensor) -> int:
    return x.numel()


# name -> model, number of dimensions that are padded, elements padded on a batch of two of the
# first size, by hand: 2 samples of 4 channels of what the padded size has more.
FOLDED: dict[str, tuple[Make, int, int]] = {
    "bn conv": (row(bn(), conv()), 2, 8 * (100 - 64)),
    "without bias": (row(bn(), conv(bias=False)), 2, 8 * (100 - 64)),
    "bn without affine": (row(bn(affine=False), conv()), 2, 8 * (100 - 64)),
    "uneven": (row(bn(), conv(kernel=(3, 5), padding=(2, 1))), 2, 8 * (120 - 64)),
    "strided, dilated": (row(bn(), conv(stride=2, dilation=2)), 2, 8 * (100 - 64)),
    "grouped": (row(bn(), conv(8, groups=2)), 2, 8 * (100 - 64)),
    "depthwise": (row(bn(), conv(4, groups=4)), 2, 8 * (100 - 64)),
    "same": (row(bn(), conv(padding="same")), 2, 8 * (100 - 64)),
    "same, even kernel": (row(bn(), conv(kernel=(2, 4), padding="same")), 2, 8 * (99 - 64)),
    "dropout between": (row(bn(), lambda: nn.Dropout(0.3), conv()), 2, 8 * (100 - 64)),
    "1d": (row(lambda: nn.BatchNorm1d(4), lambda: nn.Conv1d(4, 6, 3, padding=2)), 1, 8 * 4),
    "3d": (
        row(lambda: nn.BatchNorm3d(4), lambda: nn.Conv3d(4, 6, 3, padding=(1, 0, 2))),
        3,
        8 * (7 * 4 * 10 - 5 * 4 * 6),
    ),
    "two convolutions": (lambda: TwoReaders(conv(), conv(8, stride=2)), 2, 8 * (100 - 64)),
    "two levels": (TwoLevels, 2, 2 * 8 * (100 - 64)),
    "frozen between relus": (row(nn.ReLU, bn(), conv(), nn.ReLU), 2, 8 * (100 - 64)),
    "group norm": (row(lambda: nn.GroupNorm(2, 4), conv()), 2, 8 * (100 - 64)),
}

REFUSED: dict[str, tuple[Make, Check, str]] = {
    "transposed": (
        row(bn(), lambda: nn.ConvTranspose2d(4, 6, 3, padding=1)),
        Check.ZERO_PADDING,
        "transposed",
    ),
    "maximum between": (row(bn(), lambda: nn.MaxPool2d(2), conv()), Check.NON_LINEAR, "max_pool"),
    "average between": (
        row(bn(), lambda: nn.AvgPool2d(3, 1, 1), conv()),
        Check.ZERO_PADDING,
        "averages zeros in",
    ),
    "one pads": (lambda: TwoReaders(conv(), conv(kernel=1, padding=0)), Check.ZERO_PADDING, "by"),
    "other amounts": (
        lambda: TwoReaders(conv(), conv(kernel=5, padding=2)),
        Check.ZERO_PADDING,
        "different amounts",
    ),
    "other amounts in another call": (OneOfTwoPads, Check.ZERO_PADDING, "called again"),
    "another reader": (
        lambda: TwoReaders(conv(), nn.Sigmoid),
        Check.ZERO_PADDING,
        "sigmoid in second reads",
    ),
    "returned": (AlsoReturned, Check.RETURNED, "bn"),
    "a function": (Functional, Check.ZERO_PADDING, "no module of torch's"),
    "a class of its own": (
        row(bn(), lambda: OwnConv(4, 6, 3, padding=1)),
        Check.ZERO_PADDING,
        "no module of torch's",
    ),
    "its shape is read": (lambda: ReadsItsSize(last), Check.ZERO_PADDING, "size"),
    "its size is read": (lambda: ReadsItsSize(rows), Check.ZERO_PADDING, "size"),
    "its elements are counted": (lambda: ReadsItsSize(elements), Check.ZERO_PADDING, "size"),
    "padded by hand": (PaddedByHand, Check.ZERO_PADDING, "pads with a constant"),
}


def built(make: Make, dtype: torch.dtype = torch.float64, seed: int = 5) -> nn.Module:
    return randomised(make(), seed).to(dtype).eval()


def drawn(dimensions: int, batch: int, place: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 4, *SIZES[dimensions][place])
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def folded(model: nn.Module, dimensions: int = 2, **options: Any) -> tuple[nn.Module, Report]:
    x = drawn(dimensions, 2, 0, next(model.parameters()).dtype)
    return ns.fold(model, inputs=(x,), pad="explicit", **options)


def relative_error(candidate: Tensor, reference: Tensor) -> float:
    assert candidate.shape == reference.shape
    return float((candidate - reference).detach().abs().max() / reference.detach().abs().max())


def equal_outputs(first: nn.Module, second: nn.Module, dimensions: int = 2) -> None:
    for batch in (1, 2, 3):
        for place in (0, 1):
            x = drawn(dimensions, batch, place)
            assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", FOLDED)
def test_the_padding_is_written_out(name: str) -> None:
    make, dimensions, elements = FOLDED[name]
    model = built(make)
    changed, report = folded(model, dimensions)
    (step,) = report.plan.steps
    assert step.rule == RULE and not report.plan.skips and report.passed
    assert f"pads {elements} elements explicitly" in step.notes[0]
    for batch in (1, 2, 3):
        for place in (0, 1):
            x = drawn(dimensions, batch, place)
            assert relative_error(changed(x), model(x)) < EXACT
    convolutions = [m for m in changed.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert all(m.padding == (0,) * dimensions for m in convolutions)
    pads = [m for m in changed.modules() if isinstance(m, ChannelPad)]
    assert [p.value.shape for p in pads] == [(4,)]
    assert not folded(changed, dimensions)[1].plan.steps


@pytest.mark.parametrize("name", FOLDED)
def test_the_keymap_and_a_rebuilt_model_agree_with_the_fold(name: str, tmp_path: Path) -> None:
    make, dimensions, _ = FOLDED[name]
    changed, report = folded(built(make), dimensions)
    other = built(make, seed=11)
    again = folded(other, dimensions)[0]
    loaded = report.keymap.load(other.state_dict())
    assert {n: t.shape for n, t in loaded.items()} == {
        n: t.shape for n, t in again.state_dict().items()
    }
    assert all(torch.equal(loaded[n], t) for n, t in again.state_dict().items())
    report.plan.save(tmp_path / "plan.json")
    fresh = ns.rebuild(make().double().eval(), Plan.load(tmp_path / "plan.json"))
    fresh.load_state_dict(changed.state_dict())
    equal_outputs(fresh, changed, dimensions)


def test_a_rebuilt_model_may_have_no_values_yet() -> None:
    """On the meta device, and with the scale of zero that some models begin with."""
    make = FOLDED["bn conv"][0]
    changed, report = folded(built(make))
    with torch.device("meta"):
        empty = make().double().eval()
    zero = make().double().eval()
    nn.init.zeros_(zero[0].weight)
    for fresh in (empty, zero):
        rebuilt = ns.rebuild(fresh, report)
        rebuilt.load_state_dict(changed.state_dict(), assign=True)
        equal_outputs(rebuilt, changed)


@pytest.mark.parametrize("name", REFUSED)
def test_where_padding_cannot_be_written_out_it_is_said(name: str) -> None:
    make, check, words = REFUSED[name]
    model = built(make)
    changed, report = folded(model)
    (step,) = report.plan.steps
    assert step.to == "affine" and step.notes[0].startswith(check.value)
    assert words in step.notes[0]
    x = drawn(2, 3, 1)
    for got, wanted in zip(changed(x), model(x), strict=True):
        assert relative_error(got, wanted) < EXACT


def test_a_scale_of_zero_is_refused() -> None:
    """No value in front of the norm becomes zero; the weights are as they were."""
    model = built(FOLDED["bn conv"][0])
    with torch.no_grad():
        model[0].weight[2] = 0.0
    changed, report = folded(model)
    (skip,) = report.plan.skips
    assert skip.reason.startswith(Check.NOT_FINITE.value) and "1 of 4 channels" in skip.reason
    assert not report.plan.steps and torch.equal(changed[1].weight, model[1].weight)
    keymap = folded(built(FOLDED["bn conv"][0]))[1].keymap
    with pytest.raises(ns.errors.NormsurgeryError, match="scale of zero"):
        keymap.load(model.state_dict())


def test_a_padding_that_half_precision_cannot_hold_is_refused() -> None:
    model = built(FOLDED["bn conv"][0], torch.float16)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 1e-3, 200.0
    _, report = folded(model)
    (skip,) = report.plan.skips
    assert skip.reason.startswith(Check.DTYPE.value) and "fp32" in skip.hint


def test_without_the_option_it_stays_and_the_option_is_checked() -> None:
    model = built(FOLDED["bn conv"][0])
    (step,) = ns.fold(model, inputs=(drawn(2, 2, 0),))[1].plan.steps
    assert step.to == "affine" and step.notes[0].startswith(Check.ZERO_PADDING.value)
    with pytest.raises(UsageError, match="refuse, explicit"):
        ns.fold(model, inputs=(drawn(2, 2, 0),), pad="explicitly")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bn conv", "same, even kernel", "group norm"])
def test_in_lower_precision_it_is_as_right_as_it_was(name: str, dtype: torch.dtype) -> None:
    model = built(FOLDED[name][0], dtype)
    changed, report = folded(model)
    assert report.plan.steps[0].rule == RULE and report.passed
    assert changed(drawn(2, 3, 1, dtype)).dtype == dtype


def test_undo_puts_norm_and_padding_back() -> None:
    model = built(FOLDED["two convolutions"][0])
    before = copy.deepcopy(model)
    norm = model.bn
    changed, report = folded(model, inplace=True)
    assert changed is model and isinstance(model.bn, ChannelPad)
    report.undo()
    assert model.bn is norm and model.first.padding == (1, 1)
    assert repr(model) == repr(before)
    equal_outputs(model, before)


def test_it_pickles_and_is_saved(tmp_path: Path) -> None:
    changed, _ = folded(built(FOLDED["bn conv"][0]))
    equal_outputs(pickle.loads(pickle.dumps(changed)), changed)
    torch.save(changed, tmp_path / "m.pt")
    equal_outputs(artefacts.load(tmp_path / "m.pt").model, changed)


def test_it_exports_for_every_size_without_a_norm_or_arithmetic() -> None:
    changed, _ = folded(built(FOLDED["uneven"][0]))
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        changed, (drawn(2, 2, 0),), dynamic_shapes=({0: free, 2: free, 3: free},)
    )
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    kept = {"aten.conv2d.default", "aten.cat.default", "aten.expand.default"}
    moved = {"aten.view.default", "aten.reshape.default"}
    arithmetic = {name for name in names if name.startswith("aten.")} - kept - moved
    assert not {name for name in arithmetic if not name.startswith("aten.sym_size")}
    x = drawn(2, 3, 1)
    assert relative_error(program.module()(x), changed(x)) < EXACT


def test_it_becomes_onnx(tmp_path: Path) -> None:
    changed = folded(built(FOLDED["uneven"][0], torch.float32))[0]
    x = drawn(2, 2, 0, torch.float32)
    torch.onnx.export(changed, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted, truth = changed(x), copy.deepcopy(changed).double()(x.double())
    assert judge(torch.from_numpy(got), truth, wanted).passed


def test_an_affine_known_by_its_operations_alone_stays_right() -> None:
    model = built(row(ByHand, conv()))
    changed, report = folded(model)
    assert report.passed and not any("pad" in step.options for step in report.plan.steps)
    assert relative_error(changed(drawn(2, 3, 1)), model(drawn(2, 3, 1))) < EXACT
