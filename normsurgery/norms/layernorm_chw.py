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

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normsurgery.norms.carry import (
    channels,
    eps_of,
    identical_if,
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
from normsurgery.norms.moments import (
    LAWS,
    ByDeviation,
    hypotheses,
    read,
    spelling_of,
    standardised,
)
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    NormSpec,
    OnnxForm,
    Reading,
    Source,
)


class LayerNormCHW(ByDeviation):
    """Norm of each sample of (N, C, ...) by its standard deviation, affine per channel.

    With neither `unbiased` nor `eps_outside` it is `torch.nn.GroupNorm(1, C)`.
    """

    cure = "Channels must be the second dimension; permute the input."

    def __init__(
        self, features: int, eps: float = 1e-5, *, unbiased: bool = False, eps_outside: bool = False
    ) -> None:
        super().__init__(features, eps, unbiased=unbiased, eps_outside=eps_outside)

    def over(self, x: Tensor) -> list[int]:
        return list(range(1, x.dim()))


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return scaled(standardised(x, list(range(1, x.dim())), settings), tensors, settings)


def operator(reading: Reading) -> str:
    require_eps_in_root(reading)
    return "GroupNormalization"


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
    spelling = spelling_of(source.settings)
    module: nn.Module
    if any(spelling.values()):
        module = LayerNormCHW(source.features, source.eps, **spelling)
    else:
        module = nn.GroupNorm(1, source.features, eps=source.eps)
    return settled(without(module, *wanted_affine(source, None)), source, init)


def _one_group(source: Source, options: Mapping[str, Any]) -> Fidelity:
    one = source.settings["num_groups"] == 1
    return identical_if(one and shares_eps(source))


def _no_space(source: Source, options: Mapping[str, Any]) -> Fidelity:
    """Of (N, C) inputs a norm over the channels of a position is one of the sample."""
    flat = source.shape is not None and len(source.shape) == 2
    return identical_if(flat and shares_eps(source))


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
    laws=LAWS,
    operator=operator,
    onnx=OnnxForm({18: ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add")}),
    hypotheses=hypotheses,
    why_not_affine="its mean and variance are those of each sample, in eval as in training",
)
