"""Layer normalization of a whole sample: over channels and space together, affine per channel.

What it computes
    y = (x - mean) / sqrt(var + eps) * weight + bias for (N, C, ...): mean and biased var of each
    sample over all its channels and positions, weight and bias one per channel. Written by hand it
    also comes as (x - mean) / (std + eps) with the unbiased std; each is read as it is.

Use it when
    A convolutional network must not mix samples and the contrast between channels should stay.
    It fits a trained batch norm best of all batch-independent norms once it is calibrated.

From other norms
    Weight, bias and eps are carried. The result is `torch.nn.GroupNorm(1, C)`, the same function,
    so the file loads without normsurgery; read back from a model that class is a `groupnorm` of one
    group. From a group norm of one group it is the same function. Where channels come last it is
    refused, since it would mix positions.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    As a group norm of one group: InstanceNormalization between Reshapes, Mul, Add; in half
    precision its centred formula, in float32.

Example
    >>> import torch
    >>> from normsurgery.norms.layernorm_chw import LayerNormCHW
    >>> norm = LayerNormCHW(8, unbiased=True, eps_outside=True)
    >>> y = norm(torch.randn(2, 8, 5, 5))
    >>> bool((y.std((1, 2, 3)) - 1).abs().max() < 1e-4)
    True

Reference
    Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv:1607.06450; as one group in
    Wu and He, 2018, "Group Normalization", arXiv:1803.08494, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import WrongShape
from normsurgery.norms.carry import (
    along,
    channels,
    eps_of,
    present,
    refusal,
    require_elements,
    require_eps_in_root,
    scaled,
    settled,
    shares_eps,
    space,
    wanted_affine,
    without,
)
from normsurgery.norms.examples import randomised
from normsurgery.norms.moments import SPELLINGS, by_deviation, spelled_readings, standardised
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


class LayerNormCHW(nn.Module):
    """Norm of each sample of (N, C, ...) by its standard deviation, affine per channel.

    unbiased: the variance divides by n - 1. eps_outside: eps is added to the deviation and not to
    the variance; with neither it is `torch.nn.GroupNorm(1, C)`. Raises WrongShape unless the second
    size is `num_channels`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        *,
        unbiased: bool = False,
        eps_outside: bool = False,
    ) -> None:
        super().__init__()
        self.num_channels, self.eps = num_channels, eps
        self.unbiased, self.eps_outside = unbiased, eps_outside
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise WrongShape(
                "LayerNormCHW",
                x.shape,
                f"(N, {self.num_channels}, ...)",
                "Channels must be the second dimension; permute the input.",
            )
        spelling = {"unbiased": self.unbiased, "eps_outside": self.eps_outside}
        y = by_deviation(x, list(range(1, x.dim())), self.eps, **spelling)
        y = y if self.weight is None else y * along(self.weight, y, 1)
        y = y if self.bias is None else y + along(self.bias, y, 1)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, eps={self.eps}, unbiased={self.unbiased}, "
            f"eps_outside={self.eps_outside}"
        )


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return scaled(standardised(x, list(range(1, x.dim())), settings), tensors, settings)


def read(module: nn.Module) -> Reading:
    """Of a LayerNormCHW, or of a `torch.nn.GroupNorm` of one group."""
    assert isinstance(module, (LayerNormCHW, nn.GroupNorm))
    if isinstance(module, LayerNormCHW):
        spelling = {"eps_outside": module.eps_outside, "unbiased": module.unbiased}
    else:
        spelling = SPELLINGS[0]
    settings = {
        "eps": module.eps,
        "channel_axis": 1,
        "features": module.num_channels,
        **spelling,
    }
    return Reading(present(module, "weight", "bias"), settings)


def operator(reading: Reading) -> str:
    require_eps_in_root(reading)
    return "GroupNormalization"


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Over all but the first of at least three dimensions, vectors of C in either role."""
    if len(shape) > 2:
        settings = {"channel_axis": 1, "features": shape[1]}
        yield from spelled_readings(tensors, shape[1], settings)


def from_any(source: Source, *, init: str = "copy", affine: bool | None = None) -> nn.Module:
    _check(source)
    weight, bias = wanted_affine(source, affine)
    module = nn.GroupNorm(1, source.features, eps=eps_of(source), affine=weight or bias)
    return settled(without(module, weight, bias), source, init)


def _check(source: Source) -> None:
    axis, features = channels(source, "layernorm_chw")
    if axis != 1:
        raise refusal(
            source,
            "layernorm_chw",
            "channels come last here, so statistics over the sample would mix positions",
            "Use layernorm, which stays within each position.",
        )
    require_elements(
        source, "layernorm_chw", features * space(source), "Use batchnorm or affine at this site."
    )


def from_layernorm_chw(source: Source, *, init: str = "copy") -> nn.Module:
    """The same function as a module: for a formula in a forward."""
    unbiased = source.settings.get("unbiased", False)
    outside = source.settings.get("eps_outside", False)
    module: nn.Module
    if unbiased or outside:
        module = LayerNormCHW(
            source.features, eps=source.eps, unbiased=unbiased, eps_outside=outside
        )
    else:
        module = nn.GroupNorm(1, source.features, eps=source.eps)
    return settled(without(module, *wanted_affine(source, None)), source, init)


def _one_group(source: Source, options: Mapping[str, Any]) -> Fidelity:
    one = source.settings["num_groups"] == 1
    return Fidelity.IDENTICAL if one and shares_eps(source) else Fidelity.RETRAIN


def _no_space(source: Source, options: Mapping[str, Any]) -> Fidelity:
    """Of (N, C) inputs a norm over the channels of a position is one of the sample."""
    flat = source.shape is not None and len(source.shape) == 2
    return Fidelity.IDENTICAL if flat and shares_eps(source) else Fidelity.RETRAIN


def examples() -> tuple[Example, ...]:
    image = (2, 6, 5, 3)

    def by_deviation() -> nn.Module:
        return randomised(LayerNormCHW(6, unbiased=True, eps_outside=True))

    return (
        Example("2d", lambda: randomised(nn.GroupNorm(1, 6)), (image, (3, 6), (2, 6, 4))),
        Example("without affine", lambda: nn.GroupNorm(1, 6, affine=False), (image,)),
        Example("mean and std", by_deviation, (image,)),
    )


NORM = NormSpec(
    name="layernorm_chw",
    summary="over channels and space of each sample, affine per channel",
    paper="Ba, Kiros and Hinton 2016, arXiv:1607.06450",
    attach="norm",
    classes=(LayerNormCHW,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "layernorm_chw": Conversion(from_layernorm_chw, Fidelity.IDENTICAL),
        "groupnorm": Conversion(from_any, _one_group),
        "layernorm2d": Conversion(from_any, _no_space),
    },
    laws=frozenset(
        {
            Law.SHIFT_INVARIANT,
            Law.SCALE_INVARIANT,
            Law.BATCH_INDEPENDENT,
            Law.PERMUTATION_EQUIVARIANT,
        }
    ),
    operator=operator,
    onnx=OnnxForm({18: ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add")}),
    hypotheses=hypotheses,
    why_not_affine="its mean and variance are those of each sample, in eval as in training",
)
