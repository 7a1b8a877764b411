"""Batch renormalization: a batch norm whose training is tied to its running statistics.

What it computes
    In training y = ((x - mean) / std * r + d) * weight + bias per channel, with the batch's mean
    and std = sqrt(var + eps) (biased), r = std / running_std clamped to [1/r_max, r_max] and
    d = (mean - running_mean) / running_std clamped to [-d_max, d_max], both constants to backward.
    Without the clamps that is the norm by the running statistics. In eval it is a batch norm.

Use it when
    Batches are small or not drawn independently, and a batch norm trains to something else than it
    computes in eval. Start with r_max 1 and d_max 0 (a batch norm) and open both while training;
    the paper goes to 3 and 5.

From other norms
    Weight, bias and eps are carried; running statistics too where the source keeps them, so eval
    outputs of a batch norm stay. Options `r_max`, `d_max`, `momentum`.

Inference
    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale.

ONNX
    Mul and Add, of what is left of the statistics.

Example
    >>> import torch
    >>> from normsurgery.norms.batchrenorm import BatchRenorm
    >>> BatchRenorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])

Reference
    Ioffe, 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models", arXiv:1702.03275, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.norms.batchnorm import STATISTICS, affine, batch_moments, keeps_eval
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
from normsurgery.spec import Conversion, Example, Fidelity, Law, NormSpec, OnnxForm, Reading, Source

R_MAX, D_MAX, MOMENTUM = 3.0, 5.0, 0.1
OPTIONS = ("momentum", "r_max", "d_max")


class BatchRenorm(PerChannel):
    """Batch renormalization of (N, C, ...), or of (..., C) with `channel_axis=-1`.

    Buffers `running_mean` and `running_var` (biased), (features,). Raises WrongShape unless the
    size of the channel axis is `features`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        *,
        momentum: float = MOMENTUM,
        r_max: float = R_MAX,
        d_max: float = D_MAX,
        channel_axis: int = 1,
    ) -> None:
        super().__init__(features, channel_axis)
        self.eps, self.momentum, self.r_max, self.d_max = eps, momentum, r_max, d_max
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        self.require_channels(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = {"running_mean": self.running_mean, "running_var": self.running_var}
        y = standardised(wide, own, vars(self), self.training)
        if self.training:
            moved = update(wide.detach(), own, vars(self))
            self.running_mean.copy_(moved["running_mean"])
            self.running_var.copy_(moved["running_var"])
        return self.affined(y).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, r_max={self.r_max}, d_max={self.d_max}"


def standardised(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    """Before weight and bias."""
    axis, eps = settings["channel_axis"], settings["eps"]
    running_mean, running_var = (along(tensors[role], x, axis).to(x.dtype) for role in STATISTICS)
    running_std = (running_var + eps).sqrt()
    y: Tensor
    if not training:
        y = (x - running_mean) / running_std
        return y
    mean, variance = batch_moments(x, axis)
    std = (variance + eps).sqrt()
    r = (std / running_std).clamp(1 / settings["r_max"], settings["r_max"]).detach()
    d = ((mean - running_mean) / running_std).clamp(-settings["d_max"], settings["d_max"])
    y = d.detach() + (x - mean) / std * r
    return y


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return scaled(standardised(x, tensors, settings, training), tensors, settings)


def update(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    moments = (moment.reshape(-1) for moment in batch_moments(x, settings["channel_axis"]))
    return {
        role: tensors[role].lerp(moment.to(tensors[role].dtype), settings["momentum"])
        for role, moment in zip(STATISTICS, moments, strict=True)
    }


def gradient(
    x: Tensor,
    g: Tensor,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    training: bool,
) -> dict[str, Tensor]:
    """Of the paper's algorithm 1: with x^ = (x - mean) / std, g^ = g weight r,
    dx = (g^ - mean(g^) - x^ mean(g^ x^)) / std; in eval g weight / running_std."""
    axis, eps = settings["channel_axis"], settings["eps"]
    over = all_but(x, axis)
    learned = {r: along(tensors[r], x, axis) for r in ("weight", "bias") if r in tensors}
    running_std = (along(tensors["running_var"], x, axis) + eps).sqrt()
    weighted = g * learned["weight"] if "weight" in learned else g
    found = {"input": weighted / running_std}
    if training:
        mean, variance = batch_moments(x, axis)
        std = (variance + eps).sqrt()
        hat = (x - mean) / std
        r = torch.minimum(std / running_std, torch.full_like(std, settings["r_max"]))
        ghat = weighted * torch.maximum(r, torch.full_like(std, 1 / settings["r_max"]))
        means = (t.mean(over, keepdim=True) for t in (ghat, ghat * hat))
        found["input"] = (ghat - next(means) - hat * next(means)) / std
    y = standardised(x, tensors, settings, training)
    sums = {"weight": (g * y).sum(over), "bias": g.sum(over)}
    return found | {role: sums[role] for role in learned}


def read(module: nn.Module) -> Reading:
    assert isinstance(module, BatchRenorm)
    settings = known(vars(module), ("eps", "channel_axis", "features", *OPTIONS))
    return Reading(present(module, "weight", "bias", *STATISTICS), settings)


def build(
    source: Source,
    *,
    init: str = "copy",
    r_max: float | None = None,
    d_max: float | None = None,
    momentum: float | None = None,
) -> nn.Module:
    axis, features = channels(source, "batchrenorm")
    given = known({"r_max": r_max, "d_max": d_max, "momentum": momentum}, OPTIONS)
    options = known({**source.settings, **given}, OPTIONS)
    module = BatchRenorm(features, eps_of(source), channel_axis=axis, **options)
    module = settled(without(module, *wanted_affine(source, None)), source, init)
    return with_state(module, source, STATISTICS if init == "copy" else ())


def examples() -> tuple[Example, ...]:
    image = (4, 6, 5, 3)
    return (
        Example("maps", lambda: randomised(BatchRenorm(6)), (image, (5, 6))),
        Example("clamped", lambda: randomised(BatchRenorm(6, r_max=1.05, d_max=0.1)), (image,)),
        Example("tokens", lambda: randomised(BatchRenorm(6, channel_axis=-1)), ((3, 7, 6),)),
    )


NORM = NormSpec(
    name="batchrenorm",
    summary="batch norm whose training is tied to its running statistics",
    paper="Ioffe 2017, arXiv:1702.03275",
    classes=(BatchRenorm,),
    read=read,
    formula=formula,
    update=update,
    gradient=gradient,
    examples=examples,
    conversions={
        "*": Conversion(build, keeps_eval),
        "batchrenorm": Conversion(build, Fidelity.IDENTICAL),
    },
    laws=frozenset({Law.PERMUTATION_EQUIVARIANT, Law.AFFINE_IN_EVAL}),
    onnx=OnnxForm({18: ("Sub", "Div", "Mul", "Add")}),
    affine=affine,
    centre="running_mean",
    tail=True,
)
