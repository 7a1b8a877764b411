"""Laws of fold on small models: what comes out, what its report can do, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgery as ns
from normsurgery.errors import UsageError
from normsurgery.folding.checks import Check
from normsurgery.report import Report

BOUND = 1e-9


def unsettled(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and float64, with statistics and affine parameters far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + 0.3)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.double().eval()


class Residual(nn.Module):
    """Pre-norm blocks on a stream, with a position embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.position = nn.Parameter(torch.zeros(7, 8))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )


class CalledTwice(nn.Module):
    """One convolution, and the same batch norm behind each of its two calls, as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.scale, self.shift = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.scale, self.shift, eps=1e-3)
        x = F.batch_norm(self.conv(x.relu()), self.mean, self.var, self.scale, self.shift, eps=1e-3)
        return x.relu()


class NormOfNorm(nn.Module):
    """What a norm gives is read by a layer, and by a batch norm without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4, affine=False)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.relu())
        return self.second(x) * self.conv(x).sigmoid()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class AroundBranches(nn.Module):
    """A norm before two branches that become one layer without a bias, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.scale, self.linear = Scale(), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.behind(self.scale(x) + self.linear(x)).relu()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "convolutions": (convolutional, lambda: torch.randn(2, 3, 9, 8, dtype=torch.float64), {}),
    "stream": (Residual, lambda: torch.randn(3, 7, 5, dtype=torch.float64), {}),
    "stream to rmsnorm": (
        Residual,
        lambda: torch.randn(3, 7, 5, dtype=torch.float64),
        {"rmsnorm": True},
    ),
    "one norm in two calls": (
        CalledTwice,
        lambda: torch.randn(2, 3, 9, 8, dtype=torch.float64),
        {},
    ),
    "norm of a norm": (
        NormOfNorm,
        lambda: torch.randn(2, 4, 9, 8, dtype=torch.float64),
        {},
    ),
    "norms around branches": (
        AroundBranches,
        lambda: torch.randn(5, 6, dtype=torch.float64),
        {},
    ),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)
        ),
        lambda: torch.randn(2, 3, 9, 8, dtype=torch.float64),
        {},
    ),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor, dict[str, Any]]:
    """A model, another of the same structure with other values, inputs, and options."""
    build, inputs, options = MODELS[request.param]
    torch.manual_seed(3)
    return unsettled(build()), unsettled(build(), 1), inputs(), options


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def test_what_is_folded_computes_the_same(case: Any) -> None:
    model, _, x, options = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded, report = ns.fold(model, inputs=(x,), **options)
    assert report.passed and report.plan.steps and not report.plan.skips
    for given in (x, x[:1], torch.cat([x, 2 * x])):
        assert relative(folded(given), model(given)) < BOUND
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(folded, type(model))


def test_folding_again_finds_nothing_to_do(case: Any) -> None:
    model, _, x, options = case
    folded, _ = ns.fold(model, inputs=(x,), **options)
    again, report = ns.fold(folded, inputs=(x,), **options)
    assert not report.plan.steps
    assert again.state_dict().keys() == folded.state_dict().keys()


def test_loading_and_folding_commute(case: Any) -> None:
    model, other, x, options = case
    _, report = ns.fold(model, inputs=(x,), **options)
    wanted, _ = ns.fold(other, inputs=(x,), **options)
    loaded = report.keymap.load(other.state_dict())
    assert loaded.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_structure_is_made_again_without_weights(case: Any) -> None:
    model, other, x, options = case
    folded, report = ns.fold(model, inputs=(x,), **options)
    read = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert read.plan == report.plan
    fresh = ns.rebuild(other, read)
    fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh(x), folded(x))


def test_a_plan_from_a_file_does_the_same(case: Any) -> None:
    model, _, x, options = case
    folded, report = ns.fold(model, inputs=(x,), **options)
    plan = ns.Plan.from_json(json.loads(json.dumps(report.plan.to_json())))
    again, _ = ns.fold(model, plan=plan, inputs=(x,))
    assert torch.equal(again(x), folded(x))


def test_a_change_in_place_is_taken_back_bit_for_bit(case: Any) -> None:
    model, _, x, options = case
    before = dict(model.state_dict())
    modules = list(model.modules())
    folded, report = ns.fold(model, inputs=(x,), inplace=True, **options)
    assert folded is model and model.state_dict().keys() != before.keys()
    assert report.undo() is model
    assert list(model.state_dict()) == list(before)
    assert all(t.data_ptr() == before[name].data_ptr() for name, t in model.state_dict().items())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_stream_becomes_rmsnorm_without_weights() -> None:
    model = unsettled(Residual())
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    folded, _ = ns.fold(model, inputs=(x,), rmsnorm=True)
    norms = [m for m in folded.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    assert [type(norm) for norm in norms] == [nn.RMSNorm] * 3
    assert all(norm.weight is None for norm in norms)
    assert relative(folded(x), model(x)) < 1e-12


def test_identities_are_taken_out_and_no_name_moves() -> None:
    model = unsettled(convolutional())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    kept, _ = ns.fold(model, inputs=(x,))
    pruned, report = ns.fold(model, inputs=(x,), prune=True)
    assert [name for name, _ in pruned.named_children()] == ["0", "2", "4", "6", "7", "8"]
    assert pruned.state_dict().keys() == kept.state_dict().keys()
    assert torch.equal(pruned(x), kept(x))
    assert any("taken out" in note for note in report.notes)


def test_a_model_in_train_mode_is_refused_unless_told() -> None:
    model = unsettled(convolutional()).train()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"eval=True"):
        ns.fold(model, inputs=(x,))
    folded, report = ns.fold(model, inputs=(x,), eval=True)
    assert model.training and not folded.training
    assert any("switched to eval mode" in note for note in report.notes)
    assert relative(folded(x), copy.deepcopy(model).eval()(x)) < BOUND


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda m: m[0].weight.data.__setitem__((0, 0, 0, 0), float("nan")), Check.NOT_FINITE),
        (lambda m: m[1].running_var.fill_(-1.0), Check.NOT_FINITE),
    ],
    ids=["nan in the weight", "negative variance"],
)
def test_values_that_cannot_be_folded_are_refused(
    spoil: Callable[[Any], Any], check: Check
) -> None:
    model = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    spoil(model)
    _, report = ns.fold(model, inputs=(torch.randn(2, 3, 9, 8, dtype=torch.float64),), verify=False)
    (skip,) = report.plan.skips
    assert skip.reason.startswith(check.value)


def test_a_dtype_that_cannot_hold_the_weight_is_refused() -> None:
    model = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].running_var.fill_(1e-12)
    model[1].eps = 1e-12
    model[1].weight.data.fill_(1.0)
    model = model.half()
    model[1].running_var.fill_(0.0)
    x = torch.randn(2, 3, 9, 8).half()
    _, report = ns.fold(model, inputs=(x,), verify=False)
    (skip,) = report.plan.skips
    assert skip.reason.startswith(Check.DTYPE.value) and "fp32" in skip.reason


def test_only_what_is_selected_is_folded() -> None:
    model = unsettled(convolutional())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    folded, report = ns.fold(model, inputs=(x,), only=["1", "3"], exclude=["3"])
    assert [step.site.path for step in report.plan.steps] == ["1"]
    assert {skip.reason for skip in report.plan.skips} == {"not selected"}
    assert relative(folded(x), model(x)) < BOUND


def test_a_plan_of_the_other_verb_is_refused() -> None:
    model = unsettled(convolutional())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    _, swapped = ns.swap(model, "identity", inputs=(x,))
    _, folded = ns.fold(model, inputs=(x,))
    with pytest.raises(UsageError, match="no plan of a fold"):
        ns.fold(model, plan=swapped.plan, inputs=(x,))
    with pytest.raises(UsageError, match=r"fold\(plan"):
        ns.swap(model, plan=folded.plan, inputs=(x,))


class ByBatch(Residual):
    """A stream that holds something else where the batch is one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        if x.shape[0] == 1:
            x = torch.exp(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


def test_a_stream_that_one_batch_size_breaks_is_not_centred_in_part() -> None:
    model = unsettled(ByBatch())
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    folded, report = ns.fold(model, inputs=(x,), rmsnorm=True)
    assert report.passed
    for given in (x, x[:1]):
        assert relative(folded(given), model(given)) < BOUND


class Numbers(nn.Module):
    """A batch norm behind arithmetic with numbers, and one in front of it."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, behind: bool) -> None:
        super().__init__()
        self.between, self.behind = between, behind
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.norm(self.between(y)) if self.behind else self.between(self.norm(y.relu()))
        return self.last(y.tanh() if self.behind else y)


ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "3y - 1": lambda y: y * 3 - 1,
    "2 - y": lambda y: 2 - y,
    "(y + 4) / 5": lambda y: (y + 4) / 5,
    "y plus twice 0.5": lambda y: torch.add(y, 0.5, alpha=2),
    "y less twice 0.5": lambda y: torch.sub(y, 0.5, alpha=2),
}


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_a_norm_folds_across_arithmetic_with_numbers(name: str, behind: bool) -> None:
    model = unsettled(Numbers(ARITHMETIC[name], behind=behind))
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    folded, report = ns.fold(model, inputs=(x,))
    assert [step.to for step in report.plan.steps] == ["identity"]
    assert relative(folded(x), model(x)) < BOUND


class Masked(nn.Module):
    """What a norm of a scale alone gives is masked before the layer that reads it."""

    def __init__(self, value: float, *, bias: bool = False) -> None:
        super().__init__()
        self.value = value
        self.norm: nn.Module = nn.LayerNorm(4) if bias else nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.arange(x.shape[1])[:, None] % 2 == 0
        return self.head(self.norm(x).masked_fill(hidden, self.value))


def test_a_scale_crosses_a_mask_of_zeros() -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    model = unsettled(Masked(0.0))
    folded, report = ns.fold(model, inputs=(x,))
    assert [step.options for step in report.plan.steps] == [{"affine": False}]
    assert relative(folded(x), model(x)) < BOUND


@pytest.mark.parametrize("model", [Masked(1.0), Masked(0.0, bias=True)])
def test_nothing_crosses_a_mask_of_ones_and_no_shift_one_of_zeros(model: nn.Module) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert not ns.fold(unsettled(model), inputs=(x,))[1].plan.steps
