"""Layer normalization over the channels of each pixel of (N, C, H, W).

What it computes
    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and biased var over the second dimension,
    at each position alone; any number of spatial dimensions, or none.

Use it when
    A convolutional network should normalise as transformers do (ConvNeXt). Do not mistake it for
    `layernorm_chw`, which takes statistics over channels and space together.

From other norms
    Weight, bias and eps are carried. Where channels come last it is `torch.nn.LayerNorm`. From
    `layernorm`, and from a group norm of one group that stays within a position, it is the same
    function.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    Transpose, LayerNormalization, Transpose.

Example
    >>> import torch
    >>> from normsurgery.norms.layernorm2d import LayerNorm2d
    >>> norm = LayerNorm2d(8)
    >>> y = norm(torch.randn(2, 8, 5, 5))
    >>> bool(y.mean(1).abs().max() < 1e-5)
    True

Reference
    Liu et al., 2022, "A ConvNet for the 2020s", arXiv:2201.03545, section 2.6; the norm itself
    Ba, Kiros and Hinton, 2016, arXiv:1607.06450, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.norms.carry import (
    channels,
    eps_of,
    identical_if,
    require_elements,
    require_eps_in_root,
    scaled,
    settled,
    shares_eps,
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
    within_position,
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


class LayerNorm2d(ByDeviation):
    """Layer norm over axis 1 of (N, C, ...). Output keeps the input's dtype and memory format."""

    cure = "It normalises the second dimension; use LayerNorm if channels come last."

    def forward(self, x: Tensor) -> Tensor:
        if self.unbiased or self.eps_outside:
            return super().forward(x)
        self.require_channels(x, self.cure)
        last = x.movedim(1, -1)
        y = F.layer_norm(last, (self.features,), self.weight, self.bias, self.eps).movedim(-1, 1)
        return y.contiguous() if x.is_contiguous() else y


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return scaled(standardised(x, [1], settings), tensors, settings)


def operator(reading: Reading) -> str:
    require_eps_in_root(reading)
    return "LayerNormalization"


def from_any(source: Source, *, init: str = "copy", affine: bool | None = None) -> nn.Module:
    axis, features = channels(source, "layernorm2d")
    require_elements(source, "layernorm2d", features, "Use batchnorm or affine at this site.")
    weight, bias = wanted_affine(source, affine)
    module: nn.Module
    if axis == 1:
        module = LayerNorm2d(features, eps=eps_of(source))
    else:
        module = nn.LayerNorm(features, eps=eps_of(source), elementwise_affine=weight or bias)
    return settled(without(module, weight, bias), source, init)


def from_layernorm2d(source: Source, *, init: str = "copy") -> nn.Module:
    """The same function as a module: for a formula in a forward."""
    module = LayerNorm2d(source.features, source.eps, **spelling_of(source.settings))
    return settled(without(module, *wanted_affine(source, None)), source, init)


def _standard(source: Source, options: Mapping[str, Any]) -> Fidelity:
    one = len(source.settings["normalized_shape"]) == 1
    return identical_if(one and shares_eps(source))


def examples() -> tuple[Example, ...]:
    image = (2, 6, 5, 3)
    return (
        Example("2d", lambda: randomised(LayerNorm2d(6)), (image, (3, 6, 4))),
        Example("without bias", lambda: without(randomised(LayerNorm2d(6)), True, False), (image,)),
        Example("without affine", lambda: without(LayerNorm2d(6), False, False), (image,)),
        Example(
            "mean and std",
            lambda: randomised(LayerNorm2d(6, unbiased=True, eps_outside=True)),
            (image,),
        ),
    )


NORM = NormSpec(
    name="layernorm2d",
    also=("ln2d",),
    summary="over the channels of each pixel of (N, C, H, W)",
    paper="Liu et al. 2022, arXiv:2201.03545; Ba, Kiros and Hinton 2016, arXiv:1607.06450",
    classes=(LayerNorm2d,),
    read=read,
    formula=formula,
    examples=examples,
    tail=True,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "layernorm2d": Conversion(from_layernorm2d, Fidelity.IDENTICAL),
        "layernorm": Conversion(from_any, _standard),
        "groupnorm": Conversion(from_any, within_position),
        "layernorm_chw": Conversion(from_any, within_position),
    },
    laws=LAWS,
    operator=operator,
    onnx=OnnxForm({18: ("Transpose", "LayerNormalization", "Transpose")}),
    hypotheses=hypotheses,
    why_not_affine="its mean and variance are those of each position, in eval as in training",
)
