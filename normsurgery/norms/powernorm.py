"""Power normalization: divides by a running root mean square per channel; no centring.

What it computes
    y = x / sqrt(running_square + eps) * weight + bias, per channel, in both modes; a call in
    training then moves `running_square` towards the mean square of the batch. Backward is
    approximate: with x^ = x / sqrt(running_square + eps),
    dx = (g weight - running_product * x^) / sqrt(running_square + eps), where
    `running_product` is a running estimate of mean(g weight x^), which backward moves.

Use it when
    A transformer for language should keep a norm that folds away in inference: the mean of a batch
    of tokens varies too much for a batch norm, its mean square less.

From other norms
    Weight, bias and eps are carried. Option `momentum` (the paper's 1 - alpha). Statistics start at
    1; calibrate or train.

Inference
    scale = weight / sqrt(running_square + eps), shift = bias.

ONNX
    Div, Mul, Add, of what is left of the statistics.

Example
    >>> import torch
    >>> from normsurgery.norms.powernorm import PowerNorm
    >>> PowerNorm(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])

Reference
    Shen, Yao, Gholami, Mahoney and Keutzer, 2020, "PowerNorm: Rethinking Batch Normalization in
    Transformers", arXiv:2003.07845, algorithm 2 (without its warm-up).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from normsurgery.norms.carry import (
    PerChannel,
    all_but,
    along,
    channels,
    eps_of,
    known,
    present,
    scaled,
    settled,
    wanted_affine,
    with_state,
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
    ScaleAndShift,
    Source,
    weight_and_bias,
)

STATE = ("running_square", "running_product")


class _Divide(torch.autograd.Function):
    """x / root, with the approximate gradient, which also moves `product` in training."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, root: Tensor, product: Tensor, momentum: float, training: bool
    ) -> Tensor:
        y = x / root
        ctx.save_for_backward(y, root)
        ctx.product, ctx.momentum, ctx.training = product, momentum, training
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, root = ctx.saved_tensors
        if not ctx.training:
            return g / root, None, None, None, None
        product = ctx.product.reshape(root.shape).to(g.dtype)
        dx = (g - product * y) / root
        over = [d for d, size in enumerate(root.shape) if size == 1]
        square, found = y.square().mean(over), (g * y).mean(over)
        kept = ctx.product * (1 - ctx.momentum * square.to(ctx.product))
        ctx.product.copy_(kept + ctx.momentum * found.to(ctx.product))
        return dx, None, None, None, None


class PowerNorm(PerChannel):
    """Power norm of (..., C), or of (N, C, ...) with `channel_axis=1`.

    Buffers `running_square` and `running_product`, (features,). Raises WrongShape unless the size
    of the channel axis is `features`.
    """

    running_square: Tensor
    running_product: Tensor

    def __init__(
        self, features: int, eps: float = 1e-5, *, momentum: float = 0.1, channel_axis: int = -1
    ) -> None:
        super().__init__(features, channel_axis)
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_square", torch.ones(features))
        self.register_buffer("running_product", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        self.require_channels(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = along(self.running_square, x, self.channel_axis).to(wide.dtype)
        root = (square + self.eps).sqrt()
        if self.training:
            arguments = (wide, root, self.running_product, self.momentum, True)
            y = cast(Tensor, _Divide.apply(*arguments))  # type: ignore[no-untyped-call]
            own = {"running_square": self.running_square}
            self.running_square.copy_(update(wide.detach(), own, vars(self))["running_square"])
        else:
            y = wide / root
        return self.affined(y).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, channel_axis={self.channel_axis}"


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    root = (along(tensors["running_square"], x, settings["channel_axis"]) + settings["eps"]).sqrt()
    return scaled(x / root, tensors, settings)


def update(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Of a forward; `running_product` is moved by backward."""
    square = x.square().mean(all_but(x, settings["channel_axis"]))
    old = tensors["running_square"]
    return {"running_square": old.lerp(square.to(old.dtype), settings["momentum"])}


def gradient(
    x: Tensor,
    g: Tensor,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    training: bool,
) -> dict[str, Tensor]:
    axis = settings["channel_axis"]
    over = all_but(x, axis)
    root = (along(tensors["running_square"], x, axis) + settings["eps"]).sqrt()
    hat = x / root
    inner = g * along(tensors["weight"], x, axis) if "weight" in tensors else g
    correction = along(tensors["running_product"], x, axis) * hat if training else 0.0
    found = {"input": (inner - correction) / root}
    sums = {"weight": (g * hat).sum(over), "bias": g.sum(over)}
    return found | {role: total for role, total in sums.items() if role in tensors}


def affine(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ScaleAndShift:
    scale = (tensors["running_square"] + settings["eps"]).rsqrt()
    weight, bias = weight_and_bias(tensors, settings)
    return scale if weight is None else scale * weight, bias


def read(module: nn.Module) -> Reading:
    assert isinstance(module, PowerNorm)
    settings = known(vars(module), ("eps", "channel_axis", "features", "momentum"))
    return Reading(present(module, "weight", "bias", *STATE), settings)


def build(source: Source, *, init: str = "copy", momentum: float | None = None) -> nn.Module:
    axis, features = channels(source, "powernorm")
    kept = source.settings.get("momentum") if source.kind == "powernorm" else None
    chosen = next((float(m) for m in (momentum, kept) if m is not None), 0.1)
    module = PowerNorm(features, eps_of(source), momentum=chosen, channel_axis=axis)
    module = settled(without(module, *wanted_affine(source, None)), source, init)
    return with_state(module, source, STATE if init == "copy" else ())


def examples() -> tuple[Example, ...]:
    return (
        Example("tokens", lambda: randomised(PowerNorm(6)), ((3, 7, 6), (5, 6))),
        Example("maps", lambda: randomised(PowerNorm(6, channel_axis=1)), ((4, 6, 5, 3),)),
    )


NORM = NormSpec(
    name="powernorm",
    summary="divides by a running root mean square per channel",
    paper="Shen et al. 2020, arXiv:2003.07845",
    classes=(PowerNorm,),
    read=read,
    formula=formula,
    update=update,
    gradient=gradient,
    examples=examples,
    conversions={
        "*": Conversion(build, Fidelity.RETRAIN),
        "powernorm": Conversion(build, Fidelity.IDENTICAL),
    },
    laws=frozenset({Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT, Law.AFFINE_IN_EVAL}),
    onnx=OnnxForm({18: ("Div", "Mul", "Add")}),
    affine=affine,
    tail=True,
)
