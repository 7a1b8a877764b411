"""Layer normalization, over the last dimensions of each position.

What it computes
    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and biased var over the last dimensions.
    Written by hand it also comes as (x - mean) / (std + eps), with the unbiased std, and with a
    weight stored as `weight - 1`; each is read as it is.

Use it when
    Each position (token) must be normalised alone: transformers, recurrent networks, batch size 1.

From other norms
    Weight, bias and eps are carried. Where channels come second (a site in a convolutional network)
    it normalises the channels of each position, as `layernorm2d` does; for the norm over
    channels and space together say `layernorm_chw`. From `layernorm2d`, and from a group norm of
    one group that stays within a position, it is the same function.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    One LayerNormalization.

Example
    >>> import torch
    >>> from normsurgery.norms.layernorm import StdLayerNorm
    >>> norm = StdLayerNorm(8, eps=1e-6)
    >>> y = norm(torch.randn(2, 5, 8))
    >>> bool((y.std(-1) - 1).abs().max() < 1e-4)
    True

Reference
    Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv:1607.06450, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.norms.carry import (
    channels,
    effective,
    eps_of,
    identical_if,
    present,
    require_elements,
    require_eps_in_root,
    settled,
    shares_eps,
    wanted_affine,
    without,
)
from normsurgery.norms.examples import randomised
from normsurgery.norms.layernorm2d import LayerNorm2d
from normsurgery.norms.moments import (
    LAWS,
    ByDeviation,
    spelled_readings,
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
    Spelling,
)


class StdLayerNorm(ByDeviation):
    """Layer norm over the last dimension by its standard deviation: (x - mean) / (std + eps)."""

    axis = -1
    cure = "It normalises the last dimension; permute the input."

    def __init__(
        self, features: int, eps: float = 1e-6, *, unbiased: bool = True, eps_outside: bool = True
    ) -> None:
        super().__init__(features, eps, unbiased=unbiased, eps_outside=eps_outside)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    sizes = settings["normalized_shape"]
    over = list(range(-len(sizes), 0))
    y = standardised(x, over, settings)
    if "weight" in tensors:
        y = y * (_shaped(tensors["weight"], sizes) + settings.get("weight_offset", 0.0))
    if "bias" in tensors:
        y = y + _shaped(tensors["bias"], sizes)
    return y


def _shaped(vector: Tensor, sizes: list[int]) -> Tensor:
    return vector.reshape(sizes) if vector.numel() == torch.Size(sizes).numel() else vector


def read(module: nn.Module) -> Reading:
    assert isinstance(module, (nn.LayerNorm, StdLayerNorm))
    sizes = [module.features] if isinstance(module, StdLayerNorm) else list(module.normalized_shape)
    settings = {"eps": module.eps, **_over(sizes), **spelling_of(vars(module))}
    return Reading(present(module, "weight", "bias"), settings)


def _over(sizes: list[int]) -> dict[str, Any]:
    return {"channel_axis": -1, "features": sizes[-1], "normalized_shape": sizes}


def read_call(given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Reading:
    sizes = [int(size) for size in given["normalized_shape"]]
    return Reading({"weight": "weight", "bias": "bias"}, {"eps": given["eps"], **_over(sizes)})


def operator(reading: Reading) -> str:
    require_eps_in_root(reading)
    return "LayerNormalization"


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Over the last k dimensions, every spelling, tensors of that size in either role."""
    for count in range(1, max(2, len(shape))):
        sizes = list(shape[-count:])
        yield from spelled_readings(tensors, torch.Size(sizes).numel(), _over(sizes))


def from_any(source: Source, *, init: str = "copy", affine: bool | None = None) -> nn.Module:
    axis, features = channels(source, "layernorm")
    require_elements(source, "layernorm", features, "Use batchnorm or affine at this site.")
    weight, bias = wanted_affine(source, affine)
    module: nn.Module
    if axis == 1 and not _flat(source):
        module = LayerNorm2d(features, eps=eps_of(source))
    else:
        module = nn.LayerNorm(features, eps=eps_of(source), elementwise_affine=weight or bias)
    return settled(without(module, weight, bias), source, init)


def from_layernorm(source: Source, *, init: str = "copy") -> nn.Module:
    """The same function as a module: for a call or a formula in a forward."""
    sizes, spelling = list(source.settings["normalized_shape"]), spelling_of(source.settings)
    weight, bias = wanted_affine(source, None)
    module: nn.Module
    if any(spelling.values()):
        if len(sizes) > 1:
            channels(source, "layernorm")
        module = StdLayerNorm(sizes[-1], eps=source.eps, **spelling)
    else:
        module = nn.LayerNorm(sizes, eps=source.eps, elementwise_affine=weight or bias)
    values = {role: effective(source, role, sizes) for role in ("weight", "bias")}
    return settled(without(module, weight, bias), source, init, values)


def _flat(source: Source) -> bool:
    """Whether inputs are (N, C), where the second dimension is the last one too."""
    return source.shape is not None and len(source.shape) == 2


def _standard(source: Source, options: Mapping[str, Any]) -> Fidelity:
    return identical_if(shares_eps(source))


def examples() -> tuple[Example, ...]:
    tokens = (2, 5, 12)
    return (
        Example("last dimension", lambda: randomised(nn.LayerNorm(12)), (tokens, (3, 12))),
        Example("several dimensions", lambda: randomised(nn.LayerNorm([4, 3, 5])), ((2, 4, 3, 5),)),
        Example("without affine", lambda: nn.LayerNorm(12, elementwise_affine=False), (tokens,)),
        Example("without bias", lambda: randomised(nn.LayerNorm(12, bias=False)), (tokens,)),
        Example("mean and std", lambda: randomised(StdLayerNorm(12)), (tokens,)),
    )


NORM = NormSpec(
    name="layernorm",
    also=("ln",),
    summary="over the last dimensions of each position",
    paper="Ba, Kiros and Hinton 2016, arXiv:1607.06450",
    classes=(nn.LayerNorm, StdLayerNorm),
    read=read,
    formula=formula,
    examples=examples,
    tail=True,
    without_mean="rmsnorm",
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "layernorm": Conversion(from_layernorm, Fidelity.IDENTICAL),
        "layernorm2d": Conversion(from_any, _standard),
        "groupnorm": Conversion(from_any, within_position),
        "layernorm_chw": Conversion(from_any, within_position),
    },
    laws=LAWS,
    operator=operator,
    spellings=(
        Spelling(
            (
                F.layer_norm,
                torch.layer_norm,
                torch.ops.aten.layer_norm.default,
                "aten::native_layer_norm",
            ),
            read_call,
        ),
    ),
    onnx=OnnxForm({18: ("LayerNormalization",)}),
    hypotheses=hypotheses,
    why_not_affine="its mean and variance are those of each position, in eval as in training",
)
