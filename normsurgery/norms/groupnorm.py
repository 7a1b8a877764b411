"""Group normalization, over groups of channels and the space of each sample.

What it computes
    The C channels are split into `num_groups` groups of neighbours; each group of each sample is
    centred and divided by sqrt(var + eps) over its channels and all positions; then per channel
    times weight plus bias. Where channels come last (tokens), groups lie within the channels of one
    position, so that no position sees another.

Use it when
    Batch norm is ruled out (small batches, federated learning, differential privacy, detection) in
    a convolutional network.

From other norms
    Weight, bias and eps are carried. `num_groups` is, unless set, the largest divisor of C up to 32
    that leaves 8 or more elements per group, else the largest that leaves more than 3; fewer are
    refused, since 2 elements normalise to plus and minus 1 and pass no gradient. With one group
    from `layernorm_chw`, and with C groups from `instancenorm`, it is the same function. With the
    channels second the result is `torch.nn.GroupNorm`, else `TokenGroupNorm`.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    InstanceNormalization between Reshapes, Mul, Add; in half precision its centred formula, in
    float32. Never GroupNormalization: where a runtime has no kernel for it (onnxruntime on the CPU)
    its function body runs, whose variance E[x^2] - E[x]^2 is NaN for a large mean.

Example
    >>> import torch
    >>> from normsurgery.norms.groupnorm import TokenGroupNorm
    >>> norm = TokenGroupNorm(2, 16)
    >>> x = torch.randn(1, 3, 16)
    >>> later = x.clone()
    >>> later[:, 2] = 0.0
    >>> torch.equal(norm(x)[:, :2], norm(later)[:, :2])
    True

Reference
    Wu and He, 2018, "Group Normalization", arXiv:1803.08494, equations 1 to 3 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.norms.carry import (
    SMALLEST_GROUP,
    channels,
    eps_of,
    identical_if,
    present,
    refusal,
    require_channels,
    require_elements,
    scaled,
    settled,
    shares_eps,
    space,
    wanted_affine,
    without,
)
from normsurgery.norms.examples import randomised
from normsurgery.norms.moments import LAWS, affine_readings, standardised
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    NormSpec,
    OnnxForm,
    Reading,
    Source,
    Spelling,
)

MOST_GROUPS = 32  # the paper's default
GOOD_GROUP = 8  # elements per group from which the gradient of a random input is tame


class TokenGroupNorm(nn.GroupNorm):
    """Group norm of (N, ..., C) within each position, channels last.

    Parameters are those of `torch.nn.GroupNorm`. Raises WrongShape unless the last size is
    `num_channels`.
    """

    def forward(self, input: Tensor) -> Tensor:
        cure = "It normalises the last dimension; use GroupNorm if channels come second."
        require_channels("TokenGroupNorm", input, -1, self.num_channels, cure, dimensions=2)
        positions = input.reshape(-1, self.num_channels)
        y = F.group_norm(positions, self.num_groups, self.weight, self.bias, self.eps)
        return y.reshape(input.shape)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    groups, size = settings["num_groups"], settings["features"] // settings["num_groups"]
    if settings["channel_axis"] == 1:
        grouped = x.reshape(x.shape[0], groups, size, *x.shape[2:])
        over = list(range(2, grouped.dim()))
    else:
        grouped, over = x.reshape(*x.shape[:-1], groups, size), [-1]
    return scaled(standardised(grouped, over, settings).reshape(x.shape), tensors, settings)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, nn.GroupNorm)
    settings = {
        "eps": module.eps,
        "channel_axis": -1 if isinstance(module, TokenGroupNorm) else 1,
        "features": module.num_channels,
        "num_groups": module.num_groups,
    }
    return Reading(present(module, "weight", "bias"), settings)


def read_call(given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Reading:
    settings = {
        "eps": given["eps"],
        "channel_axis": 1,
        "features": shape[1],
        "num_groups": int(given["num_groups"] if "num_groups" in given else given["group"]),
    }
    return Reading({"weight": "weight", "bias": "bias"}, settings)


def operator(reading: Reading) -> str:
    return "GroupNormalization"


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Every number of groups but C, which is an instance norm; vectors of C in either role.

    One group is a layer norm of the sample, which is tried before this unless the class says more.
    """
    for axis in (1, -1) if len(shape) > 2 else (-1,) if shape else ():
        features = shape[axis]
        for groups in divisors(features)[:-1]:
            settings = {"channel_axis": axis, "features": features, "num_groups": groups}
            yield from affine_readings(tensors, features, settings)


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def chosen_groups(features: int, space: int) -> int | None:
    """The largest divisor up to 32 that leaves 8, else 4 elements per group; None if none does."""
    for smallest in (GOOD_GROUP, SMALLEST_GROUP):
        fitting = [
            groups
            for groups in divisors(features)
            if groups <= MOST_GROUPS and features // groups * space >= smallest
        ]
        if fitting:
            return fitting[-1]
    return None


def _groups(source: Source, num_groups: int | None) -> int:
    _, features = channels(source, "groupnorm")
    positions = space(source)
    cure = "Use batchnorm or affine at this site."
    if num_groups is None:
        groups = chosen_groups(features, positions)
        if groups is None:
            require_elements(source, "groupnorm", features * positions, cure)
            return 1
        return groups
    if num_groups < 1 or features % num_groups:
        raise refusal(
            source,
            "groupnorm",
            f"{features} channels cannot be split into {num_groups} equal groups",
            f"num_groups may be one of {divisors(features)}.",
        )
    best = chosen_groups(features, positions)
    cure = f"At most num_groups={best} is sound here." if best else cure
    require_elements(source, "groupnorm", features // num_groups * positions, cure)
    return num_groups


def from_any(
    source: Source,
    *,
    init: str = "copy",
    num_groups: int | None = None,
    affine: bool | None = None,
) -> nn.Module:
    return _built(source, init, _groups(source, num_groups), eps_of(source), affine)


def from_groupnorm(
    source: Source, *, init: str = "copy", num_groups: int | None = None
) -> nn.Module:
    """The same function as a module, for a call or a formula; or another number of groups."""
    groups = source.settings["num_groups"] if num_groups is None else _groups(source, num_groups)
    return _built(source, init, groups, source.eps, None)


def _built(source: Source, init: str, groups: int, eps: float, affine: bool | None) -> nn.Module:
    weight, bias = wanted_affine(source, affine)
    kind = nn.GroupNorm if source.channel_axis == 1 else TokenGroupNorm
    module = kind(groups, source.features, eps=eps, affine=weight or bias)
    return settled(without(module, weight, bias), source, init)


def _resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**options, "num_groups": _groups(source, options.get("num_groups"))}


def _same_groups(source: Source, options: Mapping[str, Any]) -> Fidelity:
    groups = options.get("num_groups")
    same = groups is None or groups == source.settings["num_groups"]
    return identical_if(same)


def _as_one_group(source: Source, options: Mapping[str, Any]) -> Fidelity:
    """One group is a norm of the whole sample, or at tokens of the whole position."""
    several = len(source.settings.get("normalized_shape", ())) > 1
    if several or not shares_eps(source):
        return Fidelity.RETRAIN
    one = _groups(source, options.get("num_groups")) == 1
    flat = source.shape is not None and len(source.shape) == 2
    same_elements = source.kind == "layernorm_chw" or source.channel_axis == -1 or flat
    return identical_if(one and same_elements)


def _as_many_groups(source: Source, options: Mapping[str, Any]) -> Fidelity:
    """As many groups as channels is an instance norm."""
    each = _groups(source, options.get("num_groups")) == source.features
    return identical_if(each and "running_mean" not in source.tensors and shares_eps(source))


def examples() -> tuple[Example, ...]:
    image = (2, 12, 5, 3)
    return (
        Example("2d", lambda: randomised(nn.GroupNorm(3, 12)), (image, (3, 12), (2, 12, 4))),
        Example("tokens", lambda: randomised(TokenGroupNorm(3, 12)), ((2, 5, 12), (3, 12))),
        Example(
            "without bias",
            lambda: without(randomised(nn.GroupNorm(3, 12)), True, False),
            (image,),
        ),
        Example("without affine", lambda: nn.GroupNorm(3, 12, affine=False), (image,)),
        Example("one group", lambda: randomised(nn.GroupNorm(1, 12)), (image,)),
        Example("a group per channel", lambda: randomised(nn.GroupNorm(12, 12)), (image,)),
    )


NORM = NormSpec(
    name="groupnorm",
    also=("gn",),
    summary="over groups of channels and space of each sample",
    paper="Wu and He 2018, arXiv:1803.08494",
    classes=(nn.GroupNorm,),
    read=read,
    formula=formula,
    examples=examples,
    tail=True,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN, _resolve),
        "groupnorm": Conversion(from_groupnorm, _same_groups),
        "instancenorm": Conversion(from_any, _as_many_groups, _resolve),
        "layernorm_chw": Conversion(from_any, _as_one_group, _resolve),
        "layernorm": Conversion(from_any, _as_one_group, _resolve),
        "layernorm2d": Conversion(from_any, _as_one_group, _resolve),
    },
    laws=LAWS,
    operator=operator,
    spellings=(
        Spelling(
            (
                F.group_norm,
                torch.group_norm,
                torch.ops.aten.group_norm.default,
                "aten::native_group_norm",
            ),
            read_call,
        ),
    ),
    onnx=OnnxForm({18: ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add")}),
    hypotheses=hypotheses,
    why_not_affine="its mean and variance are those of each sample, in eval as in training",
)
