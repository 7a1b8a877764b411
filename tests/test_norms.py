"""What the registry-wide laws do not ask of the classical norms: options, refusals, inheritance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normsurgery import spec
from normsurgery.errors import CannotConvert, UsageError
from normsurgery.norms.affine import Affine
from normsurgery.norms.batchnorm import FrozenBatchNorm, TokenBatchNorm
from normsurgery.norms.carry import without
from normsurgery.norms.examples import randomised
from normsurgery.norms.groupnorm import TokenGroupNorm, chosen_groups
from normsurgery.norms.l2norm import L2Norm
from normsurgery.norms.layernorm import StdLayerNorm
from normsurgery.norms.layernorm2d import LayerNorm2d
from normsurgery.norms.layernorm_chw import LayerNormCHW
from normsurgery.norms.rmsnorm import RMSNorm
from normsurgery.spec import Fidelity, Source
from normsurgery.testing import check_conversion, random_input, source_of
from normsurgery.verifying.judge import judge

CLASSICAL = (
    "batchnorm",
    "layernorm",
    "layernorm2d",
    "layernorm_chw",
    "groupnorm",
    "instancenorm",
    "rmsnorm",
    "l2norm",
    "affine",
    "identity",
)


def source(kind: str, module: nn.Module, shape: tuple[int, ...]) -> Source:
    return source_of(spec.get(kind), module.double(), shape, "block.norm")


def convert(to: str, origin: Source, init: str = "copy", **options: Any) -> nn.Module:
    conversion = spec.get(to).conversion(origin.kind)
    assert conversion is not None
    resolved = dict(conversion.resolve(origin, options) if conversion.resolve else options)
    return conversion.build(origin, init=init, **resolved)


# --- exact pairs, with the options that make them exact ------------------------------------------

INSTANCE = nn.InstanceNorm2d(6, affine=True)
EXACT: list[tuple[str, nn.Module, tuple[int, ...], str, Mapping[str, Any]]] = [
    (
        "instancenorm",
        nn.InstanceNorm2d(6, affine=True),
        (2, 6, 5, 3),
        "groupnorm",
        {"num_groups": 6},
    ),
    ("layernorm_chw", nn.GroupNorm(1, 6), (2, 6, 5, 3), "groupnorm", {"num_groups": 1}),
    ("layernorm", nn.LayerNorm(12), (2, 5, 12), "groupnorm", {"num_groups": 1}),
    ("layernorm2d", LayerNorm2d(6), (4, 6), "groupnorm", {"num_groups": 1}),
    ("layernorm2d", LayerNorm2d(6), (4, 6), "layernorm_chw", {}),
    ("groupnorm", nn.GroupNorm(1, 6), (2, 6, 5, 3), "layernorm_chw", {}),
    ("groupnorm", nn.GroupNorm(6, 6), (2, 6, 5, 3), "instancenorm", {}),
    ("groupnorm", TokenGroupNorm(1, 12), (2, 5, 12), "layernorm", {}),
    ("groupnorm", nn.GroupNorm(1, 12), (3, 12), "layernorm", {}),
    ("rmsnorm", RMSNorm(12, weight_offset=1.0), (2, 5, 12), "rmsnorm", {"weight_offset": 0.0}),
    ("rmsnorm", RMSNorm(12), (2, 5, 12), "rmsnorm", {"weight_offset": 1.0}),
    ("l2norm", L2Norm(eps=0.0, features=12), (2, 5, 12), "rmsnorm", {}),
    ("l2norm", L2Norm(1, 1e-3, features=6, eps_clamp=False), (2, 6, 5), "rmsnorm", {}),
    ("batchnorm", FrozenBatchNorm(6), (2, 6, 5, 3), "affine", {}),
    ("identity", nn.Identity(), (2, 6, 5, 3), "affine", {}),
]


@pytest.mark.parametrize(("kind", "module", "shape", "to", "options"), EXACT)
def test_exact_pair_is_promised_and_measured_identical(
    kind: str, module: nn.Module, shape: tuple[int, ...], to: str, options: Mapping[str, Any]
) -> None:
    origin = source(kind, randomised(module), shape)
    conversion = spec.get(to).conversion(kind)
    assert conversion is not None
    assert conversion.promise(origin, options) is Fidelity.IDENTICAL
    if origin.eps == 0.0 and kind == "l2norm":  # constants are fine, zeros are 0/0 on both sides
        new = convert(to, origin, **options)
        x = random_input(shape)
        assert judge(new(x), module(x)).passed
        return
    check_conversion(spec.get(to), origin, random_input(shape), options)


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_other_numbers_of_groups_are_not_promised(groups: int) -> None:
    origin = source("groupnorm", randomised(nn.GroupNorm(1, 12)), (2, 12, 5, 3))
    check_conversion(
        spec.get("groupnorm"), origin, random_input((2, 12, 5, 3)), {"num_groups": groups}
    )


def test_llama_rms_norm_with_the_offset_taken_out_is_torchs_own_class() -> None:
    origin = source("rmsnorm", randomised(RMSNorm(12, weight_offset=1.0)), (2, 5, 12))
    assert type(convert("rmsnorm", origin, weight_offset=0.0)) is nn.RMSNorm
    kept = convert("rmsnorm", origin)
    assert isinstance(kept, RMSNorm)
    assert kept.weight_offset == 1.0


# --- the number of groups ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "space", "groups"),
    [
        (64, 49, 32),
        (512, 1, 32),
        (128, 1, 16),
        (48, 1, 6),
        (48, 16, 24),
        (17, 49, 17),
        (17, 4, 1),
        (6, 2, 1),
        (34, 64, 17),
        (7, 1, 1),
        (4, 1, 1),
        (3, 1, None),
        (2, 1, None),
        (2, 2, 1),
    ],
)
def test_groups_are_the_most_up_to_32_that_leave_enough_elements(
    features: int, space: int, groups: int | None
) -> None:
    assert chosen_groups(features, space) == groups


def test_the_smallest_recorded_input_decides_the_groups() -> None:
    module = nn.BatchNorm2d(64)
    assert convert("groupnorm", source("batchnorm", module, (1, 64, 7, 7))).num_groups == 32
    assert convert("groupnorm", source("batchnorm", module, (1, 64, 1, 1))).num_groups == 8


def test_unknown_shape_counts_channels_only() -> None:
    origin = replace(source("batchnorm", nn.BatchNorm2d(64), (1, 64, 7, 7)), shape=None)
    assert convert("groupnorm", origin).num_groups == 8


def test_the_plan_shows_what_would_be_chosen() -> None:
    conversion = spec.get("groupnorm").conversion("batchnorm")
    assert conversion is not None and conversion.resolve is not None
    origin = source("batchnorm", nn.BatchNorm2d(48), (1, 48, 4, 4))
    assert conversion.resolve(origin, {}) == {"num_groups": 24}
    assert conversion.resolve(origin, {"num_groups": 4}) == {"num_groups": 4}


# --- refusals ------------------------------------------------------------------------------------

REFUSED: list[tuple[str, nn.Module, tuple[int, ...], str, Mapping[str, Any], str]] = [
    ("batchnorm", nn.BatchNorm2d(8), (1, 8, 1, 1), "instancenorm", {}, "1 element"),
    ("batchnorm", nn.BatchNorm1d(8), (4, 8), "instancenorm", {}, "1 element"),
    ("batchnorm", nn.BatchNorm2d(8), (1, 8, 3, 1), "instancenorm", {}, "3 element"),
    ("batchnorm", nn.BatchNorm1d(8), (4, 8), "groupnorm", {"num_groups": 4}, "2 element"),
    ("batchnorm", nn.BatchNorm2d(3), (1, 3, 1, 1), "groupnorm", {}, "3 element"),
    ("batchnorm", nn.BatchNorm2d(8), (1, 8, 4, 4), "groupnorm", {"num_groups": 3}, "equal groups"),
    ("batchnorm", nn.BatchNorm2d(3), (1, 3, 8, 8), "layernorm2d", {}, "3 element"),
    ("batchnorm", nn.BatchNorm2d(2), (1, 2, 8, 8), "layernorm", {}, "2 element"),
    ("batchnorm", nn.BatchNorm2d(3), (1, 3, 1, 1), "layernorm_chw", {}, "3 element"),
    ("batchnorm", nn.BatchNorm2d(1), (1, 1, 8, 8), "rmsnorm", {}, "its sign"),
    ("batchnorm", nn.BatchNorm2d(1), (1, 1, 8, 8), "l2norm", {}, "its sign"),
    ("layernorm", nn.LayerNorm(8), (2, 5, 8), "instancenorm", {}, "mix positions"),
    ("layernorm", nn.LayerNorm(8), (2, 5, 8), "layernorm_chw", {}, "mix positions"),
    ("layernorm", nn.LayerNorm([8, 4, 4]), (2, 8, 4, 4), "groupnorm", {}, "several|at once"),
    ("l2norm", L2Norm(2, features=4), (2, 8, 4, 4), "groupnorm", {}, "neither the second nor"),
]


@pytest.mark.parametrize(("kind", "module", "shape", "to", "options", "why"), REFUSED)
def test_what_would_be_constant_or_wrong_is_refused(
    kind: str,
    module: nn.Module,
    shape: tuple[int, ...],
    to: str,
    options: Mapping[str, Any],
    why: str,
) -> None:
    with pytest.raises(CannotConvert, match=why) as refused:
        convert(to, source(kind, module, shape), **options)
    assert "block.norm" in str(refused.value)
    assert refused.value.cure


def test_what_is_refused_really_has_no_gradient() -> None:
    """The reason for the rule: two elements normalise to plus and minus one."""
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    y = nn.GroupNorm(4, 8, eps=0.0).double()(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert judge(y.detach().abs(), torch.ones_like(y)).passed
    assert float(x.grad.abs().max()) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("to", ["batchnorm", "instancenorm"])
def test_torchs_class_is_not_guessed_where_the_rank_is_unknown(to: str) -> None:
    origin = replace(source("groupnorm", nn.GroupNorm(4, 16), (1, 16, 5, 5)), shape=None)
    with pytest.raises(CannotConvert, match=r"dimensions=1, 2 or 3"):
        convert(to, origin)
    assert type(convert(to, origin, dimensions=3)).__name__.endswith("3d")


def test_an_unknown_option_lists_the_valid_ones() -> None:
    conversion = spec.get("groupnorm").conversion("batchnorm")
    assert conversion is not None
    with pytest.raises(UsageError, match=r"'groups'.*num_groups, affine"):
        conversion.check_options({"groups": 4}, "groupnorm")


# --- what is carried -----------------------------------------------------------------------------

CARRIED = ("batchnorm", "groupnorm", "layernorm2d", "layernorm_chw", "instancenorm", "rmsnorm")


@pytest.mark.parametrize("to", CARRIED)
def test_weight_bias_eps_type_mode_and_frozen_parameters_are_carried(to: str) -> None:
    old = randomised(nn.BatchNorm2d(16, eps=3e-4)).eval().half()
    assert old.weight is not None and old.bias is not None
    old.weight.requires_grad_(False)
    origin = Source(
        "batchnorm",
        "norm",
        {"eps": 3e-4, "channel_axis": 1, "features": 16, "momentum": 0.1},
        {"weight": old.weight, "bias": old.bias},
        shape=(2, 16, 5, 5),
        training=False,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    new = convert(to, origin)
    assert torch.equal(new.weight, old.weight)
    assert new.weight is not old.weight
    assert new.weight.data_ptr() != old.weight.data_ptr()
    assert not new.weight.requires_grad
    assert new.weight.dtype == torch.float16
    assert new.eps == 3e-4
    assert not new.training
    if to != "rmsnorm":
        assert torch.equal(new.bias, old.bias)
        assert new.bias.requires_grad


@pytest.mark.parametrize("to", CARRIED)
def test_reset_starts_fresh_in_the_same_type_and_frozen_state(to: str) -> None:
    old = randomised(nn.BatchNorm2d(16)).bfloat16()
    old.weight.requires_grad_(False)
    origin = source_of(spec.get("batchnorm"), old, (2, 16, 5, 5), "norm")
    new = convert(to, replace(origin, dtype=torch.bfloat16), init="reset")
    assert torch.equal(new.weight, torch.ones(16, dtype=torch.bfloat16))
    assert not new.weight.requires_grad


@pytest.mark.parametrize("to", ["groupnorm", "layernorm2d", "layernorm_chw", "instancenorm"])
def test_a_missing_bias_stays_missing_and_can_be_asked_for(to: str) -> None:
    """torch 2.13's `bias=False` norms: a weight, and bias None."""
    origin = source(
        "batchnorm", without(randomised(nn.BatchNorm2d(16)), True, False), (2, 16, 5, 5)
    )
    assert convert(to, origin).bias is None
    added = convert(to, origin, affine=True)
    assert torch.equal(added.bias, torch.zeros(16, dtype=torch.float64))
    assert convert(to, origin, affine=False).weight is None


def test_the_effective_scale_is_carried_not_the_stored_one() -> None:
    """Gemma stores weight - 1."""
    old = randomised(RMSNorm(12, weight_offset=1.0))
    assert old.weight is not None
    new = convert("layernorm", source("rmsnorm", old, (2, 5, 12)))
    assert torch.equal(new.weight, old.weight.detach() + 1.0)


def test_a_broadcast_or_scalar_weight_is_spread_over_the_channels() -> None:
    weight = torch.full((1, 6, 1, 1), 3.0)
    origin = Source(
        "layernorm2d",
        "norm",
        {"eps": 1e-6, "channel_axis": 1, "features": 6},
        {"weight": nn.Parameter(weight), "bias": nn.Parameter(torch.tensor(2.0))},
        shape=(2, 6, 4, 4),
        dtype=torch.float32,
    )
    new = convert("groupnorm", origin)
    assert torch.equal(new.weight, torch.full((6,), 3.0))
    assert torch.equal(new.bias, torch.full((6,), 2.0))


def test_an_eps_that_means_something_else_is_not_carried() -> None:
    """std + 1e-2 is not sqrt(var + 1e-2), and a length is not a variance."""
    outside = source("layernorm", StdLayerNorm(12, eps=1e-2), (2, 5, 12))
    assert convert("rmsnorm", outside).eps == 1e-5
    length = source("l2norm", L2Norm(features=12, eps=1e-2), (2, 5, 12))
    assert convert("layernorm", length).eps == 1e-5


@pytest.mark.parametrize("to", CLASSICAL)
@pytest.mark.parametrize("device", ["meta"])
def test_conversions_work_without_values(to: str, device: str) -> None:
    """A plan for a model that does not fit in memory is made on the meta device."""
    old = nn.BatchNorm2d(16, device=device)
    origin = source_of(spec.get("batchnorm"), old, (2, 16, 5, 5), "norm")
    new = convert(to, replace(origin, dtype=torch.float32, device=torch.device(device)))
    assert all(tensor.is_meta for tensor in (*new.parameters(), *new.buffers()))


@pytest.mark.parametrize(
    ("kind", "module", "shape", "to", "expected"),
    [
        ("batchnorm", nn.BatchNorm2d(16), (1, 16, 5, 5), "groupnorm", nn.GroupNorm),
        ("batchnorm", nn.BatchNorm2d(16), (1, 16, 5, 5), "layernorm_chw", nn.GroupNorm),
        ("batchnorm", nn.BatchNorm2d(16), (1, 16, 5, 5), "instancenorm", nn.InstanceNorm2d),
        ("batchnorm", nn.BatchNorm2d(16), (1, 16, 5, 5), "layernorm", LayerNorm2d),
        ("batchnorm", nn.BatchNorm1d(16), (1, 16), "layernorm", nn.LayerNorm),
        ("layernorm", nn.LayerNorm(16), (1, 5, 16), "rmsnorm", nn.RMSNorm),
        ("layernorm", nn.LayerNorm(16), (1, 5, 16), "groupnorm", TokenGroupNorm),
        ("layernorm", nn.LayerNorm(16), (1, 5, 16), "batchnorm", TokenBatchNorm),
        ("groupnorm", nn.GroupNorm(4, 16), (1, 16, 5), "batchnorm", nn.BatchNorm1d),
        ("groupnorm", nn.GroupNorm(4, 16), (1, 16, 5, 5, 5), "batchnorm", nn.BatchNorm3d),
        ("groupnorm", TokenGroupNorm(4, 16), (1, 16, 16), "groupnorm", TokenGroupNorm),
    ],
)
def test_torchs_own_class_wherever_it_computes_the_same(
    kind: str, module: nn.Module, shape: tuple[int, ...], to: str, expected: type
) -> None:
    """Of a sequence as long as it has channels the axis is the source's, not a matching size."""
    assert type(convert(to, source(kind, module, shape))) is expected


# --- own classes against torch's -----------------------------------------------------------------


def moved(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def test_token_batch_norm_trains_as_batch_norm_with_channels_second() -> None:
    """Outputs, running statistics and the batch counter."""
    tokens, reference = TokenBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for seed in range(3):
        x = random_input((4, 5, 6), seed)
        assert judge(tokens(x), reference(moved(x)).movedim(1, -1)).passed
    assert judge(tokens.running_mean, reference.running_mean).passed
    assert judge(tokens.running_var, reference.running_var).passed
    assert int(tokens.num_batches_tracked) == 3
    x = random_input((4, 5, 6), 9)
    assert judge(tokens.eval()(x), reference.eval()(moved(x)).movedim(1, -1)).passed


def test_a_group_norm_of_tokens_does_not_see_the_future() -> None:
    """Plain GroupNorm accepts (N, L, C) silently when L == C and mixes positions."""
    x = random_input((2, 8, 8))
    later = x.clone()
    later[:, 5] += 3.0
    own, plain = TokenGroupNorm(2, 8).double(), nn.GroupNorm(2, 8).double()
    assert torch.equal(own(x)[:, :5], own(later)[:, :5])
    assert not torch.equal(plain(x)[:, :5], plain(later)[:, :5])


def test_a_frozen_batch_norm_does_not_move_in_training() -> None:
    norm = randomised(FrozenBatchNorm(6)).train()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(random_input((4, 6, 5)).float())
    assert not list(norm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cast_orders_are_told_apart_by_bits(dtype: torch.dtype) -> None:
    """Multiply after or before the cast: Llama's and torch's order differ in half precision."""
    x = random_input((64, 48)).to(dtype)
    weight = randomised(RMSNorm(48)).to(dtype).state_dict()
    outputs = {}
    for cast in ("none", "float32", "float32_weight"):
        norm = RMSNorm(48, cast=cast).to(dtype)
        norm.load_state_dict(weight)
        outputs[cast] = norm(x)
    torchs = nn.RMSNorm(48, eps=1e-6).to(dtype)
    torchs.load_state_dict(weight)
    assert torch.equal(outputs["float32_weight"], torchs(x))
    wide = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(outputs["float32"], wide.to(dtype) * weight["weight"])
    assert not torch.equal(outputs["float32"], outputs["float32_weight"])
    assert not torch.equal(outputs["none"], outputs["float32_weight"])


def test_an_unknown_cast_order_is_refused() -> None:
    with pytest.raises(UsageError, match="float32_weight"):
        RMSNorm(8, cast="float64")


def test_eps_none_of_torchs_rms_norm_is_that_of_the_type() -> None:
    read = spec.get("rmsnorm").read
    assert read(nn.RMSNorm(8)).settings["eps"] == torch.finfo(torch.float32).eps
    assert read(nn.RMSNorm(8).bfloat16()).settings["eps"] == torch.finfo(torch.float32).eps
    assert read(nn.RMSNorm(8).double()).settings["eps"] == torch.finfo(torch.float64).eps


def test_layer_norm_of_samples_by_deviation_equals_group_norm_without_its_options() -> None:
    x = random_input((2, 6, 5, 3))
    assert judge(LayerNormCHW(6).double()(x), nn.GroupNorm(1, 6).double()(x)).passed


def test_affine_on_the_last_axis_is_not_taken_for_the_second() -> None:
    x = random_input((2, 6, 6))
    second, last = (randomised(Affine(6, channel_axis=axis)).double() for axis in (1, -1))
    assert torch.equal(second(x).movedim(1, -1), last(x.movedim(1, -1)))
    assert not torch.equal(second(x), last(x))


# --- readings of hand-written modules ------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_four_vectors_of_any_name_are_a_frozen_batch_norm(order: tuple[int, ...]) -> None:
    values = [random_input((6,), seed).abs() + 0.5 for seed in range(4)]
    weight, bias, mean, variance = (values[index] for index in order)
    x = random_input((2, 6, 5, 3))

    def put(vector: Tensor) -> Tensor:
        return vector.reshape(1, 6, 1, 1)

    expected = (x - put(mean)) / (put(variance) + 1e-5).sqrt() * put(weight) + put(bias)
    batchnorm = spec.get("batchnorm")
    assert batchnorm.hypotheses is not None
    named = {f"buffer{index}": value for index, value in enumerate(values)}
    found = [
        reading
        for reading in batchnorm.hypotheses(tuple(x.shape), dict.fromkeys(named, (6,)))
        if judge(
            batchnorm.formula(
                x,
                {role: named[name] for role, name in reading.tensors.items()},
                {**reading.settings, "eps": 1e-5},
                True,
            ),
            expected,
        ).passed
    ]
    assert [reading.tensors for reading in found] == [
        {
            "weight": f"buffer{order[0]}",
            "bias": f"buffer{order[1]}",
            "running_mean": f"buffer{order[2]}",
            "running_var": f"buffer{order[3]}",
        }
    ]
    assert found[0].settings["frozen"] is True


@pytest.mark.parametrize("name", [name for name in CLASSICAL if spec.get(name).hypotheses])
def test_hypotheses_stay_few_enough_to_try(name: str) -> None:
    """Each that uses all tensors is one evaluation of a formula, for every candidate of a model."""
    readings = spec.get(name).hypotheses
    assert readings is not None
    vectors = {"a": (768,), "b": (768,)} if name not in ("rmsnorm", "l2norm") else {}
    for shape in ((2, 768, 3, 5), (2, 5, 768)):
        whole = [r for r in readings(shape, vectors) if len(r.tensors) == len(vectors)]
        assert len(whole) <= 40
