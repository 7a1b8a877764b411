"""Instance normalization, per channel over the space of each sample.

What it computes
    y = (x - mean) / sqrt(var + eps) * weight + bias for (N, C, ...), mean and biased var of each
    channel of each sample over its positions. With running statistics, eval uses those instead, as
    a batch norm does; training moves them by the mean over the batch.

Use it when
    The contrast of each image should be removed (style transfer, image generation). It deletes
    the mean of each channel, which a classifier with global pooling reads, so it fits those badly.

From other norms
    Weight, bias and eps are carried; the result keeps no running statistics. From a group norm of
    as many groups as channels it is the same function. Refused on maps of 3 or fewer positions,
    where it would be constant or pass no gradient, and where channels come last, where it would
    mix positions.

Inference
    Without running statistics it depends on the input in eval as in training. With them,
    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale.

ONNX
    One InstanceNormalization; with running statistics one BatchNormalization. In bfloat16 and
    float64, for which onnxruntime has no kernel, its centred formula.

Example
    >>> import torch
    >>> from normsurgery.norms.instancenorm import formula
    >>> x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    >>> settings = {"eps": 1e-5, "channel_axis": 1, "features": 3}
    >>> bool(formula(x, {}, settings, True).mean((2, 3)).abs().max() < 1e-12)
    True

Reference
    Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", arXiv:1607.08022, equation 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.norms.batchnorm import STATE, STATISTICS, affine
from normsurgery.norms.carry import (
    along,
    channels,
    dimensions_of,
    eps_of,
    identical_if,
    present,
    refusal,
    require_elements,
    require_rank,
    scaled,
    settled,
    shares_eps,
    space,
    wanted_affine,
    with_state,
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

BY_RANK: dict[int, type[nn.Module]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    if "running_mean" in tensors and not training:
        mean, variance = (along(tensors[role], x, 1) for role in STATISTICS)
        return scaled((x - mean) / (variance + settings["eps"]).sqrt(), tensors, settings)
    return scaled(standardised(x, list(range(2, x.dim())), settings), tensors, settings)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
    settings = {
        "eps": module.eps,
        "channel_axis": 1,
        "features": module.num_features,
        "momentum": module.momentum,
    }
    return Reading(present(module, "weight", "bias", *STATE), settings)


def sample_rank(module: nn.Module) -> int | None:
    return next((rank + 1 for rank, cls in BY_RANK.items() if isinstance(module, cls)), None)


def read_call(given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Reading:
    settings = {
        "eps": given["eps"],
        "channel_axis": 1,
        "features": shape[1],
        "momentum": given["momentum"],
    }
    statistics = () if given["use_input_stats"] else STATISTICS
    return Reading({role: role for role in ("weight", "bias", *statistics)}, settings)


def operator(reading: Reading) -> str:
    """With running statistics it is, in eval, a batch norm."""
    tracked = "running_mean" in reading.tensors
    return "BatchNormalization" if tracked else "InstanceNormalization"


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Without running statistics, vectors of C elements in either role."""
    if len(shape) > 2:
        settings = {"channel_axis": 1, "features": shape[1], "momentum": 0.1}
        yield from affine_readings(tensors, shape[1], settings)


def _dimensions(source: Source, dimensions: int | None) -> int:
    axis, _ = channels(source, "instancenorm")
    if axis != 1:
        raise refusal(
            source,
            "instancenorm",
            "channels come last here, so statistics over space would mix positions",
            "Use layernorm or groupnorm, which stay within each position.",
        )
    if dimensions is None:
        dimensions = dimensions_of(source)
    if source.shape is not None and source.kind != "instancenorm":
        cure = "Use groupnorm, whose groups span channels, or batchnorm."
        require_elements(source, "instancenorm", space(source), cure)
    return require_rank(source, "instancenorm", dimensions)


def from_any(
    source: Source,
    *,
    init: str = "copy",
    affine: bool | None = None,
    dimensions: int | None = None,
) -> nn.Module:
    kind = BY_RANK[_dimensions(source, dimensions)]
    weight, bias = wanted_affine(source, affine)
    module = kind(source.features, eps=eps_of(source), affine=weight or bias)
    return settled(without(module, weight, bias), source, init)


def from_instancenorm(source: Source, *, init: str = "copy") -> nn.Module:
    """The same function as a module: for a call or a formula in a forward."""
    kind = BY_RANK[_dimensions(source, None)]
    weight, bias = wanted_affine(source, None)
    module = kind(
        source.features,
        eps=source.eps,
        momentum=source.settings.get("momentum", 0.1),
        affine=weight or bias,
        track_running_stats="running_mean" in source.tensors,
    )
    module = settled(without(module, weight, bias), source, init)
    return with_state(module, source, STATE)


def _resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**options, "dimensions": _dimensions(source, options.get("dimensions"))}


def _from_each_channel(source: Source, options: Mapping[str, Any]) -> Fidelity:
    each = source.settings["num_groups"] == source.features
    return identical_if(each and shares_eps(source))


def examples() -> tuple[Example, ...]:
    def two(**arguments: Any) -> nn.Module:
        return randomised(nn.InstanceNorm2d(6, **arguments))

    image = (3, 6, 5, 3)
    tracked = partial(two, affine=True, track_running_stats=True)
    return (
        Example("2d", partial(two, affine=True), (image,)),
        Example("1d", lambda: randomised(nn.InstanceNorm1d(6, affine=True)), ((3, 6, 7),)),
        Example("3d", lambda: randomised(nn.InstanceNorm3d(6, affine=True)), ((2, 6, 3, 2, 4),)),
        Example("without affine", two, (image,)),
        Example("without bias", lambda: without(two(affine=True), True, False), (image,)),
        Example("running statistics", tracked, (image,)),
    )


NORM = NormSpec(
    name="instancenorm",
    also=("in",),
    summary="per channel over the space of each sample",
    paper="Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022",
    classes=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    read=read,
    sample_rank=sample_rank,
    formula=formula,
    examples=examples,
    tail=True,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN, _resolve),
        "instancenorm": Conversion(from_instancenorm, Fidelity.IDENTICAL),
        "groupnorm": Conversion(from_any, _from_each_channel, _resolve),
    },
    laws=LAWS,
    onnx=OnnxForm({18: ("InstanceNormalization",)}),
    hypotheses=hypotheses,
    operator=operator,
    spellings=(
        Spelling(
            (F.instance_norm, torch.instance_norm, torch.ops.aten.instance_norm.default),
            read_call,
        ),
    ),
    affine=affine,
    centre="running_mean",
)
