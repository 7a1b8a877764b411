"""EvoNorm-S0: normalization and activation in one layer, found by search; no batch statistics.

What it computes
    `y = x * sigmoid(v * x) / std_g(x) * weight + bias`. `std_g = sqrt(var + eps)` is taken over
    each group of channels and the space of each sample, biased variance, eps 1e-5; it divides the
    gated `x`, which is not centred. `v`, `weight`, `bias` have one value per channel; `v` is 1 at
    the start, so the numerator is SiLU.

Use it when
    A convolutional network of norm-and-activation pairs is trained with small batches, or on
    examples that must not see each other. On tokens (channel axis -1) the groups lie within each
    position.

From other norms
    From any norm on channel axis 1 or -1. `weight`, `bias` and eps are carried; the function
    changes (`RETRAIN`). It is the activation too: the activation module that reads only this norm
    (`source.settings["activation_module"]`) becomes Identity, unless `absorb=False`. Options
    `num_groups` (the largest divisor up to 32 that leaves enough elements per group), `absorb`.

Inference
    The same as in training. It is not affine in `x`, so nothing folds into it.

ONNX
    A composite of 23 operators: Sigmoid for the gate, two ReduceMean, Sqrt and Reciprocal for the
    group deviation, Reshape between channels and groups, and six for the size of the batch.

Example
    >>> import torch
    >>> from normsurgery.norms.evonorm_s0 import EvoNormS0
    >>> EvoNormS0(64, num_groups=32)(torch.randn(2, 64, 7, 7)).shape
    torch.Size([2, 64, 7, 7])

Reference
    Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", NeurIPS 2020,
    arXiv 2004.02967, table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import UsageError
from normsurgery.norms.carry import (
    along,
    channels,
    eps_of,
    present,
    refusal,
    require_channels,
    require_elements,
    scaled,
    settled,
    space,
)
from normsurgery.norms.examples import randomised
from normsurgery.norms.groupnorm import chosen_groups, divisors
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    Law,
    NormSpec,
    OnnxForm,
    Reading,
    Source,
)


class EvoNormS0(nn.Module):
    """`x * sigmoid(v * x) / group_std(x) * weight + bias`, in the dtype of `x`.

    x: (N, C, ...) with `channel_axis` 1, (..., C) with -1; C = `features`. Parameters `v`,
    `weight`, `bias`: (features,). The deviation is computed in float32 at least. Raises WrongShape
    where the channel axis has another size, UsageError where `num_groups` does not divide it.
    """

    def __init__(
        self, features: int, *, num_groups: int = 32, eps: float = 1e-5, channel_axis: int = 1
    ) -> None:
        super().__init__()
        if num_groups < 1 or features % num_groups:
            raise UsageError(
                f"evonorm-s0: {features} channels cannot be split into {num_groups} equal groups. "
                f"num_groups may be one of {divisors(features)}."
            )
        self.features = features
        self.num_groups = num_groups
        self.eps = eps
        self.channel_axis = channel_axis
        self.v = nn.Parameter(torch.empty(features))
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.v)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.channel_axis
        require_channels("evonorm-s0", x, axis, self.features)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gated = wide * torch.sigmoid(along(self.v, x, axis) * wide)
        grouped, over = in_groups(wide, self.num_groups, axis)
        variance = grouped.var(over, correction=0, keepdim=True)
        normalised = gated.reshape(grouped.shape) * torch.rsqrt(variance + self.eps)
        y = normalised.reshape(x.shape) * along(self.weight, x, axis) + along(self.bias, x, axis)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.features}, num_groups={self.num_groups}, eps={self.eps}, "
            f"channel_axis={self.channel_axis}"
        )


def in_groups(x: Tensor, num_groups: int, channel_axis: int) -> tuple[Tensor, tuple[int, ...]]:
    """`x` with its channels split into (groups, size), and the dimensions a group spans."""
    if channel_axis == 1:
        size = x.shape[1] // num_groups
        grouped = x.reshape(x.shape[0], num_groups, size, *x.shape[2:])
        return grouped, tuple(range(2, grouped.dim()))
    return x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups), (-1,)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    """Float64 truth; the same in both modes."""
    axis = settings["channel_axis"]
    grouped, over = in_groups(x, settings["num_groups"], axis)
    centred = grouped - grouped.mean(over, keepdim=True)
    variance = (centred * centred).mean(over, keepdim=True)
    divided = (grouped / (variance + settings["eps"]).sqrt()).reshape(x.shape)
    gate = 1 / (1 + torch.exp(-along(tensors["v"], x, axis) * x))
    return scaled(divided * gate, tensors, settings)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, EvoNormS0)
    settings = {
        "eps": module.eps,
        "channel_axis": module.channel_axis,
        "features": module.features,
        "num_groups": module.num_groups,
    }
    return Reading(present(module, "v", "weight", "bias"), settings)


def groups_for(source: Source, wanted: int | None) -> int:
    """The number of groups, chosen or checked: more than 3 elements must share a deviation."""
    _, features = channels(source, "evonorm-s0")
    positions = space(source)
    best = chosen_groups(features, positions)
    groups = (best or 1) if wanted is None else wanted
    if groups < 1 or features % groups:
        raise refusal(
            source,
            "evonorm-s0",
            f"{features} channels cannot be split into {groups} equal groups",
            f"num_groups may be one of {divisors(features)}.",
        )
    cure = f"At most num_groups={best} is sound here." if best else "Use affine or dyt here."
    require_elements(source, "evonorm-s0", features // groups * positions, cure)
    return groups


def build(
    source: Source,
    *,
    init: str = "copy",
    num_groups: int | None = None,
    absorb: bool = True,
) -> EvoNormS0:
    """An EvoNorm-S0 on the source's channels; `absorb` is carried out by `companions`."""
    groups = groups_for(source, num_groups)
    axis, features = channels(source, "evonorm-s0")
    norm = EvoNormS0(features, num_groups=groups, eps=eps_of(source), channel_axis=axis)
    return settled(norm, source, init)


def resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    absorb = bool(options.get("absorb", True)) and "activation_module" in source.settings
    groups = groups_for(source, options.get("num_groups"))
    return {"num_groups": groups, "absorb": absorb}


def companions(
    source: Source, built: nn.Module, options: Mapping[str, Any]
) -> Mapping[str, Callable[[nn.Module], nn.Module]]:
    """The activation that the norm computes from now on, at its path, becomes Identity."""
    path = source.settings.get("activation_module")
    if path is None or not options.get("absorb", True):
        return {}
    return {path: lambda activation: nn.Identity().train(activation.training)}


def examples() -> tuple[Example, ...]:
    return (
        Example(
            "maps",
            lambda: randomised(EvoNormS0(12, num_groups=3)),
            ((2, 12, 5, 3), (1, 12, 1, 1)),
        ),
        Example(
            "tokens",
            lambda: randomised(EvoNormS0(12, num_groups=2, channel_axis=-1)),
            ((3, 5, 12),),
        ),
    )


OPERATORS = (
    *("Shape", "Mul", "Sigmoid", "Mul", "Reshape"),  # the gated input, in groups
    *("ReduceMean", "Sub", "Mul", "ReduceMean"),  # the variance
    *("Shape", "Reshape", "Concat", "Reshape", "Concat", "Expand", "Reshape"),  # sizes and shapes
    *("Add", "Sqrt", "Reciprocal", "Mul", "Reshape"),
    *("Mul", "Add"),
)

NORM = NormSpec(
    name="evonorm-s0",
    also=("evonorms0",),
    summary="norm and activation in one, per group of channels",
    paper="arXiv 2004.02967",
    classes=(EvoNormS0,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={"*": Conversion(build, Fidelity.RETRAIN, resolve, companions)},
    laws=frozenset({Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}),
    onnx=OnnxForm({18: OPERATORS}),
    why_not_affine="it divides by a statistic of each sample and gates with a sigmoid",
)
