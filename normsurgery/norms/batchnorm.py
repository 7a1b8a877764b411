"""Batch normalization, per channel over the batch and all positions.

What it computes
    y = (x - mean) / sqrt(var + eps) * weight + bias, per channel. In training mean and (biased) var
    are taken over batch and space; in eval they are the running statistics, which training moved
    by `momentum` (with the unbiased variance). A frozen one uses its running statistics always.

Use it when
    Batches are large (16 samples or more per device) and drawn from one distribution, and the
    model is deployed: in eval it is a scale and a shift and folds into its neighbours. Not for
    small batches, federated learning or differential privacy, where samples must not meet.

From other norms
    Weight, bias and eps are carried; running statistics start at mean 0 and variance 1. From
    `affine` and `identity`, and from an instance norm with running statistics, eval outputs stay.
    With the channels last (tokens) the class is `TokenBatchNorm`; else torch's own for the rank.

Inference
    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale.

ONNX
    One BatchNormalization. Exported in eval mode only: the exporter writes running statistics
    even for a module in training.

Example
    >>> import torch
    >>> from normsurgery.norms.batchnorm import TokenBatchNorm
    >>> norm = TokenBatchNorm(8)
    >>> y = norm(torch.randn(4, 5, 8))
    >>> tuple(y.shape)
    (4, 5, 8)
    >>> bool(y.mean((0, 1)).abs().max() < 1e-5)
    True

Reference
    Ioffe and Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv:1502.03167, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.errors import NoOperator
from normsurgery.norms.carry import (
    all_but,
    along,
    channels,
    dimensions_of,
    eps_of,
    present,
    require_channels,
    require_rank,
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
    Spelling,
    weight_and_bias,
)

BY_RANK: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
STATISTICS = ("running_mean", "running_var")
STATE = (*STATISTICS, "num_batches_tracked")


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of (N, ..., C): per channel over the batch and all positions, channels last.

    Parameters, buffers and momentum are those of `torch.nn.BatchNorm1d`. Raises WrongShape unless
    the last size is `num_features`.
    """

    def forward(self, input: Tensor) -> Tensor:
        cure = "It normalises the last dimension; use BatchNorm1d or 2d if channels come second."
        require_channels("TokenBatchNorm", input, -1, self.num_features, cure, dimensions=2)
        return super().forward(input.reshape(-1, self.num_features)).reshape(input.shape)


class FrozenBatchNorm(nn.Module):
    """Batch norm of (N, C, ...) with constant statistics and affine parameters, all buffers.

    Nothing is trained or updated in either mode. Raises WrongShape unless the second size is
    `num_features`.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        cure = "Channels must be the second dimension; permute the input."
        require_channels("FrozenBatchNorm", input, 1, self.num_features, cure)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    axis = settings["channel_axis"]
    if "running_mean" in tensors and (settings.get("frozen", False) or not training):
        mean, variance = (along(tensors[role], x, axis) for role in STATISTICS)
    else:
        mean, variance = batch_moments(x, axis)
    return scaled((x - mean) / (variance + settings["eps"]).sqrt(), tensors, settings)


def batch_moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, of the rank of `x`."""
    over = all_but(x, axis)
    return x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)


def read(module: nn.Module) -> Reading:
    frozen = isinstance(module, FrozenBatchNorm)
    settings = {
        "eps": module.eps,
        "channel_axis": -1 if isinstance(module, TokenBatchNorm) else 1,
        "features": module.num_features,
        "momentum": None if frozen else module.momentum,
        "frozen": frozen,
    }
    return Reading(present(module, "weight", "bias", *STATE), settings)


def read_call(given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Reading:
    settings = {
        "eps": given.get("eps", given.get("epsilon")),
        "channel_axis": 1,
        "features": shape[1],
        "momentum": given.get("momentum", given.get("exponential_average_factor")),
    }
    return Reading({role: role for role in ("weight", "bias", *STATISTICS)}, settings)


def operator(reading: Reading) -> str:
    if "running_mean" not in reading.tensors:
        raise NoOperator("it takes the statistics of the batch, in eval as well")
    return "BatchNormalization"


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Two to four vectors of C elements in any roles; statistics kept, or taken from the batch."""
    for axis in _axes(shape):
        features = shape[axis]
        vectors = [name for name, size in tensors.items() if _elements(size) == features]
        if len(vectors) > 4:
            continue
        shared = {"channel_axis": axis, "features": features, "momentum": 0.1}
        for roles in (
            ("weight", "bias", *STATISTICS),
            ("weight", *STATISTICS),
            ("bias", *STATISTICS),
            STATISTICS,
        ):
            for names in permutations(vectors, len(roles)):
                by_role = dict(zip(roles, names, strict=True))
                yield Reading(by_role, {**shared, "frozen": True})
                yield Reading(by_role, {**shared, "frozen": False})
        for affine in (("weight", "bias"), ("weight",), ("bias",), ()):
            for names in permutations(vectors, len(affine)):
                yield Reading(dict(zip(affine, names, strict=True)), {**shared, "frozen": False})


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        return ()
    return (1,) if len(shape) == 2 else (1, -1)


def _elements(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def affine(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ScaleAndShift:
    """With running statistics; without them eval normalises by what it is given as well."""
    if "running_var" not in tensors:
        return None
    scale = (tensors["running_var"].reshape(-1) + settings["eps"]).rsqrt()
    weight, bias = weight_and_bias(tensors, settings)
    if weight is not None:
        scale = scale * weight.reshape(-1)
    shift = torch.zeros_like(scale) if bias is None else bias.reshape(-1)
    if "running_mean" in tensors:
        shift = shift - tensors["running_mean"].reshape(-1) * scale
    return scale, shift


def _dimensions(source: Source, dimensions: int | None) -> int:
    """1, 2 or 3 for torch's class of that rank, 0 where the channels are last."""
    axis, _ = channels(source, "batchnorm")
    if axis != 1:
        return 0
    known = dimensions_of(source)
    if dimensions is None and known is not None:
        dimensions = max(1, known)
    return require_rank(source, "batchnorm", dimensions)


def _fresh(
    source: Source, dimensions: int | None, weight: bool, bias: bool, **arguments: Any
) -> nn.Module:
    rank = _dimensions(source, dimensions)
    kind = BY_RANK[rank] if rank else TokenBatchNorm
    module = kind(source.features, affine=weight or bias, **arguments)
    return without(module, weight, bias)


def from_any(
    source: Source,
    *,
    init: str = "copy",
    affine: bool | None = None,
    momentum: float = 0.1,
    dimensions: int | None = None,
) -> nn.Module:
    weight, bias = wanted_affine(source, affine)
    module = _fresh(source, dimensions, weight, bias, eps=eps_of(source), momentum=momentum)
    return settled(module, source, init)


def from_affine(
    source: Source, *, init: str = "copy", momentum: float = 0.1, dimensions: int | None = None
) -> nn.Module:
    """Running statistics that neutralise eps, so that eval outputs stay what they were."""
    weight, bias = wanted_affine(source, None)
    eps = 1e-5
    module = _fresh(source, dimensions, weight, bias, eps=eps, momentum=momentum)
    module = settled(module, source, init)
    module.get_buffer("running_var").fill_(1.0 - eps)
    return module


def from_instancenorm(
    source: Source,
    *,
    init: str = "copy",
    momentum: float | None = None,
    dimensions: int | None = None,
) -> nn.Module:
    """Running statistics are carried where the instance norm keeps them."""
    weight, bias = wanted_affine(source, None)
    kept = source.settings.get("momentum")
    module = _fresh(
        source,
        dimensions,
        weight,
        bias,
        eps=eps_of(source),
        momentum=next((m for m in (momentum, kept) if m is not None), 0.1),
    )
    return with_state(settled(module, source, init), source, STATE)


def from_batchnorm(source: Source, *, init: str = "copy", frozen: bool | None = None) -> nn.Module:
    """The same function as a module; with `frozen=False` a frozen one is trained from here on."""
    kept = source.settings.get("frozen", False) if frozen is None else frozen
    if kept and source.channel_axis == 1:
        return _frozen(source, init)
    weight, bias = wanted_affine(source, None)
    module = _fresh(
        source,
        None,
        weight,
        bias,
        eps=source.eps,
        momentum=source.settings.get("momentum", 0.1),
        track_running_stats="running_mean" in source.tensors,
    )
    return with_state(settled(module, source, init), source, STATE)


def _frozen(source: Source, init: str) -> nn.Module:
    module = FrozenBatchNorm(source.features, eps=source.eps)
    module.to(device=source.device, dtype=source.dtype).train(source.training)
    roles = STATISTICS if init == "reset" else ("weight", "bias", *STATISTICS)
    for role in roles:
        if role in source.tensors:
            getattr(module, role).copy_(source.tensors[role].detach().reshape(-1))
    return module


def _resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    rank = _dimensions(source, options.get("dimensions"))
    return {**options, "dimensions": rank} if rank else dict(options)


def _resolve_own(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """A frozen module that is to become a batch norm is to be one that trains."""
    thaws = source.module is not None and source.settings.get("frozen", False)
    return {"frozen": False, **options} if thaws else dict(options)


def _own_fidelity(source: Source, options: Mapping[str, Any]) -> Fidelity:
    frozen = source.settings.get("frozen", False)
    same = options.get("frozen") in (None, frozen)
    return Fidelity.IDENTICAL if same else Fidelity.EVAL


def keeps_eval(source: Source, options: Mapping[str, Any]) -> Fidelity:
    tracked = "running_mean" in source.tensors and source.eps > 0.0
    return Fidelity.EVAL if tracked else Fidelity.RETRAIN


def examples() -> tuple[Example, ...]:
    def two(**arguments: Any) -> nn.Module:
        return randomised(nn.BatchNorm2d(6, **arguments))

    image = (4, 6, 5, 3)
    return (
        Example("2d", two, (image,)),
        Example("1d", lambda: randomised(nn.BatchNorm1d(6)), ((5, 6), (3, 6, 7))),
        Example("3d", lambda: randomised(nn.BatchNorm3d(6)), ((2, 6, 3, 2, 4),)),
        Example("without affine", partial(two, affine=False), (image,)),
        Example("without bias", lambda: without(two(), True, False), (image,)),
        Example("batch statistics only", partial(two, track_running_stats=False), (image,)),
        Example("frozen", lambda: randomised(FrozenBatchNorm(6)), (image, (4, 6))),
        Example("tokens", lambda: randomised(TokenBatchNorm(6)), ((3, 7, 6), (5, 6))),
    )


NORM = NormSpec(
    name="batchnorm",
    also=("bn",),
    summary="per channel over batch and space, running statistics in eval",
    paper="Ioffe and Szegedy 2015, arXiv:1502.03167",
    classes=(
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        FrozenBatchNorm,
    ),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN, _resolve),
        "batchnorm": Conversion(from_batchnorm, _own_fidelity, _resolve_own),
        "instancenorm": Conversion(from_instancenorm, keeps_eval, _resolve),
        "affine": Conversion(from_affine, Fidelity.EVAL, _resolve),
        "identity": Conversion(from_affine, Fidelity.EVAL, _resolve),
    },
    laws=frozenset(
        {
            Law.SHIFT_INVARIANT,
            Law.SCALE_INVARIANT,
            Law.PERMUTATION_EQUIVARIANT,
            Law.AFFINE_IN_EVAL,
        }
    ),
    onnx=OnnxForm({18: ("BatchNormalization",)}),
    hypotheses=hypotheses,
    operator=operator,
    spellings=(
        Spelling(
            (
                F.batch_norm,
                torch.batch_norm,
                torch.ops.aten.batch_norm.default,
                "aten::native_batch_norm",
                "aten::cudnn_batch_norm",
                "aten::miopen_batch_norm",
                "aten::_native_batch_norm_legit",
                "aten::_native_batch_norm_legit_no_training",
            ),
            read_call,
        ),
    ),
    affine=affine,
    centre="running_mean",
    tail=True,
)
