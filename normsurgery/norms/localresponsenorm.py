"""Local response normalization: divides by the energy of neighbouring channels.

What it computes
    y = x / (k + alpha / size * sum(x^2))^beta, the sum over the `size` channels around each one at
    the same position (size // 2 before it, (size - 1) // 2 after it; beyond the ends there is
    nothing). No statistic is centred and nothing is learned.

Use it when
    A model in the manner of AlexNet or GoogLeNet is to be kept or studied. As a replacement for
    another norm it is of historical interest: it does not keep activations at one scale.

From other norms
    Weight, bias and eps are dropped. Channels second or last, as the source has them.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    Mul, Unsqueeze, Pad, AveragePool, Squeeze, Mul, Add, Pow, Div between Reshapes, as torch writes
    it; never LRN, whose window reaches further to the other side where `size` is even.

Example
    >>> import torch
    >>> from normsurgery.norms.localresponsenorm import LocalResponseNorm
    >>> x = torch.full((1, 4, 1), 2.0)
    >>> y = LocalResponseNorm(1, alpha=2.0, beta=0.5, k=1.0)(x)  # 2 / sqrt(1 + 2 * 4)
    >>> round(y[0, 0, 0].item(), 4)
    0.6667

Reference
    Krizhevsky, Sutskever and Hinton, 2012, "ImageNet Classification with Deep Convolutional Neural
    Networks", section 3.3, whose alpha is torch's and ONNX's divided by `size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.errors import WrongShape
from normsurgery.norms.carry import channels, refusal, settled
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


class LocalResponseNorm(nn.LocalResponseNorm):
    """Local response norm of (N, C, ...), or of (..., C) with `channel_axis=-1`.

    Half precision is computed in float32, for which torch has a kernel on the CPU. `features` is
    the number of channels if it is known; then another one raises WrongShape, as does an input with
    fewer than two dimensions.
    """

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        channel_axis: int = 1,
        features: int | None = None,
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.channel_axis, self.features = channel_axis, features

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2 or self.features not in (None, input.shape[self.channel_axis]):
            channel = self.features or "C"
            raise WrongShape(
                "LocalResponseNorm",
                input.shape,
                f"(N, {channel}, ...)" if self.channel_axis == 1 else f"(N, ..., {channel})",
                f"Its channel_axis is {self.channel_axis}; permute the input or set it.",
            )
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        second = x.movedim(self.channel_axis, 1)
        flat = second.flatten(2) if second.dim() > 2 else second.unsqueeze(2)
        energy = F.local_response_norm(flat, self.size, self.alpha, self.beta, self.k)
        y: Tensor = energy.reshape(second.shape).movedim(1, self.channel_axis).to(input.dtype)
        channels_last = input.dim() == 4 and not input.is_contiguous()
        if channels_last and input.is_contiguous(memory_format=torch.channels_last):
            return y.contiguous(memory_format=torch.channels_last)
        return y.contiguous()


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    axis, size = settings["channel_axis"] % x.dim(), int(settings["size"])
    squares = x.square().movedim(axis, -1)
    around = F.pad(squares, (size // 2, (size - 1) // 2)).unfold(-1, size, 1)
    mean = around.mean(-1).movedim(-1, axis)
    y: Tensor = x / (settings["k"] + settings["alpha"] * mean) ** settings["beta"]
    return y


def read(module: nn.Module) -> Reading:
    assert isinstance(module, nn.LocalResponseNorm)
    settings: dict[str, Any] = {
        "eps": 0.0,
        "channel_axis": getattr(module, "channel_axis", 1),
        "size": module.size,
        "alpha": module.alpha,
        "beta": module.beta,
        "k": module.k,
    }
    if getattr(module, "features", None) is not None:
        settings["features"] = module.features
    return Reading({}, settings)


def from_any(
    source: Source,
    *,
    init: str = "copy",
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> nn.Module:
    axis, features = channels(source, "localresponsenorm")
    if size < 1:
        raise refusal(
            source,
            "localresponsenorm",
            f"a window of {size} channels has nothing in it",
            "Set size to 1 or more.",
        )
    module = LocalResponseNorm(size, alpha, beta, k, channel_axis=axis, features=features)
    return settled(module, source, init)


def from_localresponsenorm(source: Source, *, init: str = "copy") -> nn.Module:
    """The same function as a module of ours."""
    given = source.settings
    module = LocalResponseNorm(
        given["size"],
        given["alpha"],
        given["beta"],
        given["k"],
        channel_axis=source.channel_axis,
        features=given.get("features"),
    )
    return settled(module, source, init)


def examples() -> tuple[Example, ...]:
    def strong(**arguments: Any) -> nn.Module:
        return LocalResponseNorm(3, alpha=0.7, beta=0.6, k=1.3, **arguments)

    return (
        Example("channels second", lambda: strong(features=6), ((2, 6, 5, 3), (3, 6))),
        Example("tokens", lambda: strong(channel_axis=-1, features=12), ((2, 5, 12),)),
        Example(
            "even size",
            lambda: LocalResponseNorm(4, alpha=0.7, beta=0.6, k=1.3, features=6),
            ((2, 6, 5, 3),),
        ),
    )


NORM = NormSpec(
    name="localresponsenorm",
    also=("lrn",),
    summary="divides by the energy of neighbouring channels",
    paper="Krizhevsky, Sutskever and Hinton 2012",
    classes=(nn.LocalResponseNorm,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "localresponsenorm": Conversion(from_localresponsenorm, Fidelity.IDENTICAL),
    },
    laws=frozenset({Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}),
    onnx=OnnxForm(
        {
            18: (
                *("Reshape", "Mul", "Unsqueeze", "Pad", "AveragePool", "Squeeze"),
                *("Mul", "Add", "Pow", "Div", "Reshape"),
            )
        }
    ),
    why_not_affine="it divides by the energy of each position, in eval as in training",
)
