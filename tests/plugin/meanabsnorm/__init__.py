"""Mean absolute normalization: divides by the mean absolute value of each position.

What it computes
    y = x / (mean |x| + eps) * weight, the mean over the last dimension.

Use it when
    Squares would overflow.

From other norms
    Weight and eps are carried; a bias is dropped.

Inference
    It depends on the input in eval as in training.

ONNX
    Abs, ReduceMean, Add, Div, Mul.

Example
    >>> import torch
    >>> from meanabsnorm import MeanAbsNorm
    >>> y = MeanAbsNorm(8)(torch.randn(2, 8))
    >>> bool((y.abs().mean(-1) - 1).abs().max() < 1e-4)
    True

Reference
    None: it exists to show how a third party adds a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import CannotConvert, WrongShape
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


class MeanAbsNorm(nn.Module):
    """Divides (..., C) by its mean absolute value. Raises WrongShape unless C is `features`."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.features:
            raise WrongShape(
                "MeanAbsNorm", x.shape, f"(..., {self.features})", "Permute the input."
            )
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = wide / (wide.abs().mean(-1, keepdim=True) + self.eps) * self.weight
        return y.to(x.dtype)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    y = x / (x.abs().mean(-1, keepdim=True) + settings["eps"])
    return y * tensors["weight"] if "weight" in tensors else y


def read(module: nn.Module) -> Reading:
    settings = {"eps": module.eps, "channel_axis": -1, "features": module.features}
    return Reading({"weight": "weight"}, settings)


def from_any(source: Source, *, init: str = "copy", eps: float = 1e-6) -> nn.Module:
    if source.settings.get("channel_axis") != -1:
        raise CannotConvert(
            source.where, source.kind, "meanabsnorm", "channels are not last", "Use rmsnorm."
        )
    module = MeanAbsNorm(source.features, eps)
    module.to(dtype=source.dtype, device=source.device).train(source.training)
    weight = source.tensors.get("weight")
    if init == "copy" and weight is not None and weight.numel() == source.features:
        module.weight.data.copy_(weight.detach().reshape(-1))
    return module


def examples() -> tuple[Example, ...]:
    def module() -> nn.Module:
        norm = MeanAbsNorm(12)
        norm.weight.data.copy_(torch.linspace(1.5, 3.0, 12))
        return norm

    return (Example("tokens", module, ((2, 5, 12), (3, 12))),)


NORM = NormSpec(
    name="meanabsnorm",
    summary="divides by the mean absolute value",
    paper="",
    attach="norm",
    classes=(MeanAbsNorm,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "meanabsnorm": Conversion(from_any, Fidelity.IDENTICAL),
    },
    laws=frozenset({Law.SCALE_INVARIANT, Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}),
    onnx=OnnxForm({18: ("Abs", "ReduceMean", "Add", "Div", "Mul")}),
    why_not_affine="its mean absolute value is that of each position",
)
