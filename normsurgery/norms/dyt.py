"""DyT, dynamic tanh: a learned squashing instead of a normalization.

What it computes
    `y = gamma * tanh(alpha * x) + beta`, elementwise; `alpha` is one learned scalar (0.5 at the
    start), `gamma` and `beta` have one value per channel. There are no statistics: not over the
    batch, not over the channels.

Use it when
    A reduction is what costs (streaming, small hardware, one pass over the activations) and you
    can train. It was proposed for pre-norm transformers. The input's scale is not removed, so
    `alpha` and the learning rate matter more than with a norm. It tends to help where data is
    scarce and to hurt where it is plentiful.

From other norms
    From any norm on channel axis 1 or -1. `gamma` takes the source's effective weight, `beta` its
    bias. The function changes (`RETRAIN`): train, or calibrate first. Option `alpha`.

Inference
    The same as in training. It is not affine in `x`, so nothing folds into it; `gamma` and `beta`
    fold into a linear consumer.

ONNX
    Mul, Tanh, Mul, Add at every opset.

Example
    >>> import torch
    >>> from normsurgery.norms.dyt import DynamicTanh
    >>> DynamicTanh(768)(torch.randn(2, 5, 768)).shape
    torch.Size([2, 5, 768])

Reference
    Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization", CVPR 2025, arXiv 2503.10622.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.norms.carry import (
    affined,
    channels,
    present,
    refusal,
    require_channels,
    scaled,
    settled,
    wanted_affine,
    without,
)
from normsurgery.norms.examples import randomised
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


class DynamicTanh(nn.Module):
    """`weight * tanh(alpha * x) + bias` with a scalar `alpha`, in the dtype of `x`.

    x: any shape with `features` along `channel_axis`. Parameters: `alpha` (1,), `weight` and `bias`
    (features,), either of which may be None. Raises WrongShape where the channel axis has another
    size.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, features: int, *, channel_axis: int = -1, alpha: float = 0.5) -> None:
        super().__init__()
        self.features = features
        self.channel_axis = channel_axis
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.initial_alpha)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        require_channels("dyt", x, self.channel_axis, self.features)
        return affined(torch.tanh(self.alpha * x), self, self.channel_axis).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, channel_axis={self.channel_axis}"


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    """Float64 truth; the same in both modes."""
    return scaled(torch.tanh(x * tensors["alpha"]), tensors, settings)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, DynamicTanh)
    settings = {"channel_axis": module.channel_axis, "features": module.features, "eps": 0.0}
    return Reading(present(module, "alpha", "weight", "bias"), settings)


def build(source: Source, *, init: str = "copy", alpha: float = 0.5) -> DynamicTanh:
    """A DyT on the source's channels; `alpha` must be finite and positive."""
    axis, features = channels(source, "dyt")
    if not 0.0 < float(alpha) < float("inf"):
        raise refusal(
            source,
            "dyt",
            f"with alpha={alpha} the output is constant or flipped",
            "Use a positive alpha, 0.5 by default.",
        )
    return settled(DynamicTanh(features, channel_axis=axis, alpha=float(alpha)), source, init)


def from_dyt(source: Source, *, init: str = "copy") -> DynamicTanh:
    """The same function; with `init="reset"` its parameters are fresh."""
    axis, features = channels(source, "dyt")
    weight, bias = wanted_affine(source, None)
    module = settled(without(DynamicTanh(features, channel_axis=axis), weight, bias), source, init)
    alpha = source.tensors["alpha"]
    if init == "copy":
        value = alpha.detach().to(module.alpha.dtype, copy=True).reshape(1)
        module.alpha = nn.Parameter(value)
    module.alpha.requires_grad_(alpha.requires_grad)
    return module


def resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"alpha": 0.5, **options}


def examples() -> tuple[Example, ...]:
    return (
        Example("tokens", lambda: randomised(DynamicTanh(12)), ((3, 5, 12), (1, 1, 12))),
        Example("maps", lambda: randomised(DynamicTanh(6, channel_axis=1)), ((2, 6, 5, 3),)),
    )


NORM = NormSpec(
    name="dyt",
    also=("dynamictanh",),
    summary="tanh of a learned scale, no statistics",
    paper="arXiv 2503.10622",
    classes=(DynamicTanh,),
    read=read,
    formula=formula,
    examples=examples,
    tail=True,
    conversions={
        "*": Conversion(build, Fidelity.RETRAIN, resolve),
        "dyt": Conversion(from_dyt, Fidelity.IDENTICAL),
    },
    laws=frozenset({Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}),
    onnx=OnnxForm({18: ("Mul", "Tanh", "Mul", "Add")}),
    why_not_affine="tanh is not linear in its input",
)
