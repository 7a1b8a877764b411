"""Weights that a norm computes are baked into plain layers, or refused with the reason."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normsurgery as ns
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import Bake
from normsurgery.fold.parametrizations import apply_baked, baked_steps
from normsurgery.fold.running import run
from normsurgery.norms.examples import randomised
from normsurgery.norms.neuronwise import NeuronwiseConv2d, NeuronwiseLinear
from normsurgery.norms.weightstandardization import WeightStandardization
from normsurgery.precision import float64_copy, lifted
from normsurgery.spec import Fidelity
from normsurgery.steps import BakeWeight, Step
from normsurgery.survey import Survey
from normsurgery.treecopy import tree_copy

torch.set_num_threads(1)
PER_CHANNEL = "weightstandardization"


def standardized(weight: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    flat = weight.reshape(1, weight.shape[0], -1)
    scale = None if gain is None else gain.view(-1)
    standard = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=eps)
    return standard.reshape_as(weight)


class PaddingToSize(nn.Module):
    """As much padding as makes the output ceil(size / stride): it depends on the input's size."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            for size in x.shape[-2:]
        )
        ends = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        return F.pad(x, ends)


class BitConv(nn.Conv2d):
    """A convolution as in transformers' BiT: standardized by a batch norm, padded by a module."""

    def __init__(self, *args: int, same: bool = False, eps: float = 1e-6, **rest: int) -> None:
        super().__init__(*args, **rest)
        self.pad = PaddingToSize(self.kernel_size[0], self.stride[0]) if same else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = self.pad(x)
        weight = standardized(self.weight, self.eps)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(nn.Conv2d):
    """As in NFNets: standardized, times a gain per channel and gamma / sqrt(inputs)."""

    def __init__(self, *args: int, gamma: float = 1.7, eps: float = 1e-6, **rest: int) -> None:
        super().__init__(*args, **rest)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.scale = gamma * self.weight[0].numel() ** -0.5
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = standardized(self.weight, self.eps, self.gain * self.scale)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class UnbiasedConv(nn.Conv2d):
    """As in the code beside the paper: the unbiased deviation, eps outside the root, 0.9 kept."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = centred.view(len(weight), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-3
        return super()._conv_forward(x, 0.9 * centred / deviation, bias)


class StandardLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight.float(), self.weight.shape[1:], eps=1e-4)
        return F.linear(x, weight.to(x.dtype), self.bias)


class StandardTransposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = WeightStandardization(output_axis=1, groups=self.groups)(self.weight)
        return F.conv_transpose2d(
            x, weight, self.bias, self.stride, self.padding, 0, self.groups, self.dilation
        )


class TanhConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.tanh(), self.bias)


class ReluConv(BitConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Gainless(nn.Module):
    """Computes with its own weight, and is no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def old(function: Callable[..., nn.Module], module: nn.Module, **options: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(module, **options)


def parametrized(module: nn.Module, **options: int) -> nn.Module:
    parametrize.register_parametrization(module, "weight", WeightStandardization(**options))
    return module


IMAGE, ROWS = (2, 4, 9, 8), (3, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        IMAGE,
        "weightnorm",
    ),
    "weight norm of a transposed convolution": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, stride=2), dim=1),
        IMAGE,
        "weightnorm",
    ),
    "weight norm over the whole weight": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 5), dim=None),
        ROWS,
        "weightnorm",
    ),
    "weight norm by a hook": (
        lambda: old(nn.utils.weight_norm, nn.Conv1d(4, 6, 3, padding_mode="circular", padding=1)),
        (2, 4, 11),
        "weightnorm",
    ),
    "weight norm of no layer": (
        lambda: parametrizations.weight_norm(Gainless()),
        ROWS,
        "weightnorm",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Conv3d(4, 6, 3, bias=False)),
        (2, 4, 5, 6, 7),
        "spectralnorm",
    ),
    "spectral norm of a transposed convolution": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3)),
        IMAGE,
        "spectralnorm",
    ),
    "spectral norm by a hook": (
        lambda: old(nn.utils.spectral_norm, nn.Linear(6, 5)),
        ROWS,
        "spectralnorm",
    ),
    "standardization": (
        lambda: parametrized(nn.Conv2d(4, 6, 3)),
        IMAGE,
        PER_CHANNEL,
    ),
    "standardization of a grouped transposed convolution": (
        lambda: parametrized(nn.ConvTranspose2d(4, 6, 3, groups=2), output_axis=1, groups=2),
        IMAGE,
        PER_CHANNEL,
    ),
    "BiT": (lambda: BitConv(4, 6, 3, stride=2, padding=1, bias=False), IMAGE, PER_CHANNEL),
    "scaled": (lambda: ScaledConv(4, 6, 3, dilation=2, groups=2), IMAGE, PER_CHANNEL),
    "unbiased": (lambda: UnbiasedConv(4, 6, (3, 1), padding="same"), IMAGE, PER_CHANNEL),
    "linear": (lambda: StandardLinear(6, 5), ROWS, PER_CHANNEL),
    "transposed": (lambda: StandardTransposed(4, 6, 3, groups=2), IMAGE, PER_CHANNEL),
}


def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def surveyed(model: nn.Module, shape: tuple[int, ...]) -> Survey:
    dtype = next(model.parameters()).dtype
    return ns.find(model, (drawn(shape).to(dtype),))


def decided(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Step], list[str]]:
    steps, skips = baked_steps(model, surveyed(model, shape))
    return steps, [skip.reason for skip in skips]


def carried_out(model: nn.Module, steps: list[Step]) -> nn.Module:
    done = tree_copy(model, clone=True)
    for step in steps:
        done = apply_baked(done, step)
    return done


def error(model: nn.Module, other: nn.Module, shape: tuple[int, ...]) -> float:
    x = drawn(shape).double()
    with torch.no_grad(), lifted():
        a, b = float64_copy(other)(x), float64_copy(model)(x)
    return float((a - b).abs().max() / b.abs().max())


def random(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(randomised(make())).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_a_computed_weight_is_baked_into_a_plain_layer(name: str) -> None:
    make, shape, kind = LAYERS[name]
    model = random(make).double()
    steps, reasons = decided(model, shape)
    assert [(s.site.kind, s.rule, s.to, s.action) for s in steps] == [
        (kind, "baked weight", "identity", "fold")
    ], reasons
    plain = carried_out(model, steps)
    names = [n for n, p in (("0.weight", True), ("0.bias", has_bias(model))) if p]
    assert list(plain.state_dict()) == names
    assert error(model, plain, shape) < 1e-9
    assert type(plain[0]) is Gainless or type(plain[0]).__module__.startswith("torch.nn.modules")
    assert not decided(plain, shape)[0], "baking again finds nothing to do"


def has_bias(model: nn.Module) -> bool:
    return getattr(model[0], "bias", None) is not None


@pytest.mark.parametrize("name", LAYERS)
def test_the_edits_alone_give_the_same_weight(name: str) -> None:
    make, shape, _ = LAYERS[name]
    model = random(make).double()
    steps, _ = decided(model, shape)
    tensors = dict(model.state_dict())
    again = [Step.from_json(json.loads(json.dumps(step.to_json()))) for step in steps]
    run(again[0].edits, tensors)
    plain = carried_out(model, again).state_dict()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: tuple(t.shape) for name, t in plain.items()
    }
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", LAYERS)
def test_a_meta_model_is_planned_as_a_real_one(name: str) -> None:
    make, shape, _ = LAYERS[name]
    model = random(make)
    steps, reasons = baked_steps(model, surveyed(model, shape))
    meta = tree_copy(model).to("meta")
    found = ns.find(meta, (drawn(shape).to("meta"),))
    meta_steps, meta_reasons = baked_steps(meta, found)
    assert [s.edits for s in meta_steps] == [s.edits for s in steps]
    assert (meta_reasons, reasons) == ([], [])


def test_the_weight_is_cast_once_and_keeps_its_dtype_gradient_and_attributes() -> None:
    layer = randomised(parametrizations.weight_norm(nn.Linear(6, 5))).bfloat16()
    layer.parametrizations.weight.original1.requires_grad_(False)
    layer.parametrizations.weight.original1.no_decay = True
    g, v = (getattr(layer.parametrizations.weight, f"original{n}").double() for n in (0, 1))
    model = nn.Sequential(layer).eval()
    steps, _ = decided(model.float(), ROWS)
    plain = carried_out(model.bfloat16(), steps)
    weight = plain[0].weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (v * (g / v.norm(dim=1, keepdim=True))).bfloat16())
    assert not weight.requires_grad
    assert weight.no_decay


@pytest.mark.parametrize("name", ["weight norm by a hook", "BiT", "standardization"])
def test_hooks_of_the_user_stay_and_the_input_model_is_as_it_was(name: str) -> None:
    make, shape, _ = LAYERS[name]
    model = random(make)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    cls, names = type(model[0]), list(model.state_dict())
    steps, _ = decided(model, shape)
    plain = carried_out(model, steps)
    assert (type(model[0]), list(model.state_dict())) == (cls, names)
    calls.clear()
    plain(drawn(shape))
    assert calls == ["before", "after"]


def test_a_model_that_shares_its_class_with_a_copy_stays_parametrized() -> None:
    model = random(lambda: parametrizations.weight_norm(nn.Linear(6, 5))).double()
    copied = tree_copy(model, clone=True)
    apply_baked(copied, decided(copied, ROWS)[0][0])
    assert parametrize.is_parametrized(model[0], "weight")
    assert error(model, copied, ROWS) < 1e-9


def test_one_of_two_parametrized_tensors_is_baked_and_the_other_stays() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    parametrize.register_parametrization(layer, "bias", nn.Tanh(), unsafe=True)
    model = nn.Sequential(randomised(layer)).eval().double()
    steps, reasons = decided(model, ROWS)
    assert [step.edits[0].target for step in steps] == ["0.weight"]
    assert reasons == [
        "a weight that is computed from others: 0.bias by Tanh, which no rule bakes in"
    ]
    plain = carried_out(model, steps)
    assert error(model, plain, ROWS) < 1e-9
    assert "0.parametrizations.bias.original" in plain.state_dict()


def test_a_plain_layer_loads_its_state_dict_strictly() -> None:
    for name in ("weight norm", "weight norm by a hook", "spectral norm by a hook"):
        make, shape, _ = LAYERS[name]
        model = random(make)
        plain = carried_out(model, decided(model, shape)[0])
        again = carried_out(random(make), decided(model, shape)[0])
        again.load_state_dict(plain.state_dict(), strict=True)
        assert error(plain, again, shape) == 0.0


def tied_pair() -> nn.Module:
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(6, 6)) for _ in range(2)))
    first, second = model[0].parametrizations.weight, model[1].parametrizations.weight
    second.original1 = first.original1
    return randomised(model).eval()


def training_layer() -> nn.Module:
    model = random(lambda: parametrizations.spectral_norm(nn.Linear(6, 5)))
    model[0].parametrizations.weight[0].train()
    return model


def twice() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    parametrizations.spectral_norm(layer)
    return layer


def infinite() -> nn.Module:
    model = random(lambda: parametrizations.weight_norm(nn.Linear(6, 5)))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[0] = 0.0
    return model


def overflowing() -> nn.Module:
    scaled = randomised(ScaledConv(4, 6, 3, gamma=17.0))
    with torch.no_grad():
        scaled.gain.fill_(6e4)
    return nn.Sequential(scaled.half()).eval()


class ReadsWeightV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = old(nn.utils.weight_norm, nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.weight_g.mean()


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Check, str]] = {
    "orthogonal": (
        lambda: random(lambda: parametrizations.orthogonal(nn.Linear(6, 6))),
        ROWS,
        Check.COMPUTED_WEIGHT,
        "0.weight by _Orthogonal",
    ),
    "two on one": (
        lambda: random(twice),
        ROWS,
        Check.COMPUTED_WEIGHT,
        "0.weight has 2 parametrizations",
    ),
    "train mode": (training_layer, ROWS, Check.TRAIN_MODE, "0.weight"),
    "train mode of a hook": (
        lambda: nn.Sequential(old(nn.utils.spectral_norm, nn.Linear(6, 5))).train(),
        ROWS,
        Check.TRAIN_MODE,
        "0.weight",
    ),
    "tied": (
        tied_pair,
        ROWS,
        Check.TIED,
        "0.parametrizations.weight.original1 is also 1.parametrizations.weight.original1",
    ),
    "padding that depends on the input": (
        lambda: random(lambda: BitConv(4, 6, 3, stride=2, same=True)),
        IMAGE,
        Check.NOT_REWRITABLE,
        "0 does more than a plain Conv2d",
    ),
    "more than a convolution": (
        lambda: random(lambda: ReluConv(4, 6, 3)),
        IMAGE,
        Check.NOT_REWRITABLE,
        "0 does more than a plain Conv2d",
    ),
    "a weight of zeros": (infinite, ROWS, Check.NOT_FINITE, "0.weight"),
    "overflow": (overflowing, IMAGE, Check.DTYPE, "0.weight of size"),
    "read by the parent": (
        lambda: randomised(ReadsWeightV()).eval(),
        ROWS,
        Check.NOT_REWRITABLE,
        "reads self.layer.weight_g",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_weight_that_cannot_be_baked_is_refused_with_the_reason(name: str) -> None:
    make, shape, check, where = REFUSED[name]
    model = make()
    steps, reasons = decided(model, shape)
    assert not steps
    assert all(reason.startswith(f"{check.value}: ") for reason in reasons), reasons
    assert any(where in reason for reason in reasons), reasons


def test_a_subclass_that_standardizes_nothing_is_left_alone() -> None:
    model = random(lambda: TanhConv(4, 6, 3))
    assert decided(model, IMAGE) == ([], [])


def test_every_listed_norm_of_a_weight_is_a_step_or_a_skip() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 4, 9, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.layer_norm(self.scale, self.scale.shape[1:])

    model = nn.Sequential(
        randomised(Free()), randomised(BitConv(4, 4, 3)), randomised(ReluConv(4, 4, 3))
    ).eval()
    found = surveyed(model, IMAGE)
    steps, skips = baked_steps(model, found)
    listed = [site for site in found.sites if site.attach == "weight"]
    assert len(listed) == 3
    assert [step.site.index for step in steps] == [listed[1].index]
    assert sorted(skip.path for skip in skips) == ["0", "2"]


def test_an_edit_with_another_eps_is_another_weight() -> None:
    """The proof can fail: a plan whose formula is not the layer's changes the output."""
    model = random(LAYERS["BiT"][0]).double()
    (step,), _ = decided(model, IMAGE)
    bake = step.edits[0]
    assert isinstance(bake, Bake)
    wrong = Bake(bake.target, bake.kind, bake.tensors, {**bake.settings, "eps": 1e-3})
    plain = tree_copy(model, clone=True)
    apply_baked(plain, BakeWeight(step.site, "identity", {}, step.fidelity, edits=(wrong,)))
    assert error(model, plain, IMAGE) > 1e-9


@pytest.mark.parametrize("gate", ["relu", "gelu"])
def test_neuronwise_layers_become_plain_and_their_taps_go(gate: str) -> None:
    act = nn.ReLU() if gate == "relu" else nn.GELU()
    plain = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), act, nn.Flatten(), nn.Linear(252, 5)
    )
    plain = randomised(plain).eval()
    model, _ = ns.swap(plain, "neuronwise", inputs=(drawn(IMAGE),))
    model.eval()
    assert isinstance(model[0], NeuronwiseConv2d)
    assert isinstance(model[4], NeuronwiseLinear)
    steps, reasons = decided(model, IMAGE)
    assert [(s.site.kind, s.to, s.fidelity, s.edits) for s in steps] == [
        ("neuronwise", "identity", Fidelity.FORWARD, ())
    ] * 2, reasons
    stripped = carried_out(model, steps)
    assert [type(module) for module in stripped] == [type(module) for module in plain]
    assert list(stripped.state_dict()) == list(plain.state_dict())
    assert torch.equal(stripped(drawn(IMAGE)), model(drawn(IMAGE)))


def test_a_random_aggregation_becomes_the_norm_on_its_path() -> None:
    plain = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    model, _ = ns.swap(
        plain,
        "randomaggregation",
        options={"candidates": ["batchnorm", "groupnorm"], "eval_path": "batchnorm"},
        inputs=(drawn(IMAGE),),
    )
    model.eval()
    found = surveyed(model, IMAGE)
    (step,), skips = baked_steps(model, found)
    assert not skips
    assert (step.site.index, step.to, step.rule) == (
        found.sites[0].index,
        "batchnorm",
        "inference form",
    )
    stripped = carried_out(model, [step])
    assert list(stripped.state_dict()) == list(plain.state_dict())
    assert torch.equal(stripped(drawn(IMAGE)), model(drawn(IMAGE)))
