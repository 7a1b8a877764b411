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

from normsurgery.norms.batchnorm import STATISTICS, affine
from normsurgery.norms.carry import (
    along,
    channels,
    eps_of,
    present,
    require_channels,
    scaled,
    settled,
    wanted_affine,
    without,
)
from normsurgery.norms.examples import randomised
from normsurgery.spec import Conversion, Example, Fidelity, Law, NormSpec, OnnxForm, Reading, Source

R_MAX, D_MAX, MOMENTUM = 3.0, 5.0, 0.1


class BatchRenorm(nn.Module):
    """Batch renormalization of (N, C, ...), or of (..., C) with `channel_axis=-1`.

    Buffers `running_mean` and `running_var` (biased), (features,). Raises WrongShape unless the
    size of the channel axis is `features`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
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
        super().__init__()
        self.features, self.eps, self.momentum = features, eps, momentum
        self.r_max, self.d_max, self.channel_axis = r_max, d_max, channel_axis
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        require_channels("batchrenorm", x, self.channel_axis, self.features)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = {"running_mean": self.running_mean, "running_var": self.running_var}
        y = standardised(wide, own, vars(self), self.training)
        if self.training:
            moved = update(wide.detach(), own, vars(self))
            self.running_mean.copy_(moved["running_mean"])
            self.running_var.copy_(moved["running_var"])
        y = y if self.weight is None else y * along(self.weight, x, self.channel_axis)
        y = y if self.bias is None else y + along(self.bias, x, self.channel_axis)
        return y.to(x.dtype)

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
    mean, variance = _moments(x, axis)
    std = (variance + eps).sqrt()
    r = (std / running_std).clamp(1 / settings["r_max"], settings["r_max"]).detach()
    d = ((mean - running_mean) / running_std).clamp(-settings["d_max"], settings["d_max"])
    y = d.detach() + (x - mean) / std * r
    return y


def _moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    over = [d for d in range(x.dim()) if d != axis % x.dim()]
    return x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return scaled(standardised(x, tensors, settings, training), tensors, settings)


def update(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    moments = (moment.reshape(-1) for moment in _moments(x, settings["channel_axis"]))
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
    over = [d for d in range(x.dim()) if d != axis % x.dim()]
    learned = {r: along(tensors[r], x, axis) for r in ("weight", "bias") if r in tensors}
    running_std = (along(tensors["running_var"], x, axis) + eps).sqrt()
    weighted = g * learned["weight"] if "weight" in learned else g
    found = {"input": weighted / running_std}
    if training:
        mean, variance = _moments(x, axis)
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
    names = ("eps", "channel_axis", "features", "momentum", "r_max", "d_max")
    settings = {name: getattr(module, name) for name in names}
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
    given = {"r_max": r_max, "d_max": d_max, "momentum": momentum}
    kept = {name: source.settings.get(name) if v is None else v for name, v in given.items()}
    known = {name: float(value) for name, value in kept.items() if value is not None}
    module = BatchRenorm(features, eps_of(source), channel_axis=axis, **known)
    module = settled(without(module, *wanted_affine(source, None)), source, init)
    for role in STATISTICS:
        if init == "copy" and role in source.tensors:
            module.get_buffer(role).copy_(source.tensors[role].detach().reshape(-1))
    return module


def _tracked(source: Source, options: Mapping[str, Any]) -> Fidelity:
    tracked = "running_mean" in source.tensors and source.eps > 0.0
    return Fidelity.EVAL if tracked else Fidelity.RETRAIN


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
    attach="norm",
    classes=(BatchRenorm,),
    read=read,
    formula=formula,
    update=update,
    gradient=gradient,
    examples=examples,
    conversions={
        "*": Conversion(build, _tracked),
        "batchrenorm": Conversion(build, Fidelity.IDENTICAL),
    },
    laws=frozenset({Law.PERMUTATION_EQUIVARIANT, Law.AFFINE_IN_EVAL}),
    onnx=OnnxForm({18: ("Sub", "Div", "Mul", "Add")}),
    affine=affine,
    centre="running_mean",
    tail=True,
)
