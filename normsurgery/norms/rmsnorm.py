"""Root mean square normalization: divides by the root mean square, no centring.

What it computes
    y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimensions, or over the
    second one. `weight_offset` is 1 where the weight is stored around 0 (Gemma). `cast` tells what
    half precision does: "none" computes in the input's type, "float32" normalises in float32,
    casts back and then multiplies by the weight (Llama), "float32_weight" multiplies in float32
    and then casts back (torch, Gemma, OLMo). With `eps_outside` it is x / (rms + eps).

Use it when
    As in today's language models: cheaper than a layer norm, and its weight folds into what reads
    it.

From other norms
    Weight and eps are carried; a bias is dropped. From another RMS norm `weight_offset` may be set
    to 0, which stores the effective weight. From an L2 norm without eps the weight 1/sqrt(C) makes
    it the same function. The result is `torch.nn.RMSNorm` where that computes the same.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    Pow, ReduceMean, Add, Sqrt, Div, Mul below opset 23 (the spelling that onnxruntime fuses),
    RMSNormalization from there on. The operator multiplies by the weight after the cast, as Llama
    does; what casts after the weight (torch, Gemma) is written in float32 between two casts.

Example
    >>> import torch
    >>> from normsurgery.norms.rmsnorm import RMSNorm
    >>> norm = RMSNorm(8, weight_offset=1.0, cast="float32")
    >>> y = norm(torch.randn(2, 5, 8))
    >>> bool((y.square().mean(-1) - 1).abs().max() < 1e-3)
    True

Reference
    Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.errors import NoOperator, UsageError
from normsurgery.norms.carry import (
    along,
    channels,
    effective,
    eps_of,
    identical_if,
    known,
    present,
    refusal,
    require_channels,
    require_eps_in_root,
    settled,
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
    Spelling,
)

Cast = Literal["none", "float32", "float32_weight"]
CASTS: tuple[Cast, ...] = ("none", "float32", "float32_weight")
NATIVE_CAST: Cast = "float32_weight"  # what torch.nn.RMSNorm does
HALF = (torch.float16, torch.bfloat16)


class RMSNorm(nn.Module):
    """RMS norm over one axis, with a weight offset and a cast order.

    Accepts (..., C), or (N, C, ...) with `channel_axis=1`; the output has the input's dtype and
    memory format. With `elementwise_affine=False` there is no weight. Raises WrongShape unless the
    size of the channel axis is `features`, and UsageError for an unknown `cast`.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        features: int,
        eps: float = 1e-6,
        *,
        channel_axis: int = -1,
        weight_offset: float = 0.0,
        cast: str = NATIVE_CAST,
        eps_outside: bool = False,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        if cast not in CASTS:
            raise UsageError(f"RMSNorm has no cast {cast!r}. Choose one of {', '.join(CASTS)}.")
        self.features, self.eps, self.channel_axis = features, eps, channel_axis
        self.weight_offset, self.cast, self.eps_outside = weight_offset, cast, eps_outside
        neutral = torch.full((features,), 1.0 - weight_offset)
        self.register_parameter("weight", nn.Parameter(neutral) if elementwise_affine else None)

    def forward(self, x: Tensor) -> Tensor:
        require_channels("RMSNorm", x, self.channel_axis, self.features)
        wide = x.float() if self.cast != "none" and x.dtype in HALF else x
        mean_square = wide.square().mean(self.channel_axis, keepdim=True)
        if self.eps_outside:
            y = wide / (mean_square.sqrt() + self.eps)
        else:
            y = wide * (mean_square + self.eps).rsqrt()
        if self.cast == "float32":
            y = y.to(x.dtype)
        if self.weight is not None:
            weight = self.weight if self.cast != "float32_weight" else self.weight.to(wide.dtype)
            weight = weight + self.weight_offset if self.weight_offset else weight
            y = y * along(weight, x, self.channel_axis)
        return y.to(x.dtype) if self.cast != "float32" else y

    def extra_repr(self) -> str:
        return (
            f"{self.features}, eps={self.eps}, channel_axis={self.channel_axis}, "
            f"weight_offset={self.weight_offset}, cast={self.cast}, "
            f"eps_outside={self.eps_outside}"
        )


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    axis = settings["channel_axis"]
    sizes = settings.get("normalized_shape", [settings["features"]])
    over = [1] if axis == 1 else list(range(-len(sizes), 0))
    eps: float = settings["eps"]
    mean_square = x.square().mean(over, keepdim=True)
    outside = settings.get("eps_outside", False)
    y = x / (mean_square.sqrt() + eps if outside else (mean_square + eps).sqrt())
    if "weight" not in tensors:
        return y
    weight: Tensor = tensors["weight"] + settings.get("weight_offset", 0.0)
    several = len(sizes) > 1 and weight.numel() > 1
    return y * (weight.reshape(sizes) if several else along(weight, x, axis))


def read(module: nn.Module) -> Reading:
    assert isinstance(module, (nn.RMSNorm, RMSNorm))
    if isinstance(module, RMSNorm):
        names = ("eps", "channel_axis", "features", "weight_offset", "cast", "eps_outside")
        settings = known(vars(module), names)
        sizes = [module.features]
    else:
        sizes = list(module.normalized_shape)
        settings = {
            "eps": _torch_eps(module),
            "channel_axis": -1,
            "features": sizes[-1],
            "weight_offset": 0.0,
            "cast": NATIVE_CAST,
            "eps_outside": False,
        }
    if settings["channel_axis"] == -1:
        settings["normalized_shape"] = sizes
    return Reading(present(module, "weight"), settings)


def _torch_eps(module: nn.RMSNorm) -> float:
    """Torch resolves eps=None by the type it computes in, which is float32 for half precision."""
    if module.eps is not None:
        return module.eps
    double = module.weight is not None and module.weight.dtype == torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


def read_call(given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Reading:
    sizes = [int(size) for size in given["normalized_shape"]]
    eps = given["eps"]
    if eps is None:  # half types are computed in float32, and with its epsilon
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    settings = {
        "eps": eps,
        "channel_axis": -1,
        "features": sizes[-1],
        "normalized_shape": sizes,
    }
    return Reading({"weight": "weight"}, settings)


def operator(reading: Reading) -> str:
    require_eps_in_root(reading)
    if reading.settings["channel_axis"] != -1:
        raise NoOperator("over the second dimension: ONNX has no operator for it")
    return "RMSNormalization"


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Over the last k dimensions or the second, any fitting tensor or number as the weight.

    The cast order is not told here: all three are one function in float64.
    """
    for axis, sizes in _spans(shape):
        settings: dict[str, Any] = {"channel_axis": axis, "features": sizes[-1]}
        if axis == -1:
            settings["normalized_shape"] = sizes
        allowed = (1, torch.Size(sizes).numel())
        fitting = [n for n, size in tensors.items() if torch.Size(size).numel() in allowed]
        for outside, offset in product((False, True), (0.0, 1.0)):
            spelling = {**settings, "weight_offset": offset, "eps_outside": outside}
            for name in fitting:
                yield Reading({"weight": name}, spelling)
            if offset == 0.0:
                yield Reading({}, spelling)


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, list[int]]]:
    for count in range(1, max(2, len(shape))):
        yield -1, list(shape[-count:])
    if len(shape) > 2:
        yield 1, [shape[1]]


def _sound(source: Source) -> tuple[int, list[int]]:
    """The channel axis and the sizes that are normalised, refused where there is one element."""
    if source.kind == "layernorm":
        sizes = list(source.settings["normalized_shape"])
        axis = -1
    else:
        axis, features = channels(source, "rmsnorm")
        sizes = [features]
    if math.prod(sizes) == 1:
        raise refusal(
            source,
            "rmsnorm",
            "only one element would be normalised, so the output would be its sign",
            "Use affine at this site.",
        )
    return axis, sizes


def _weighted(source: Source, affine: bool | None) -> bool:
    return "weight" in source.tensors if affine is None else affine


def from_any(source: Source, *, init: str = "copy", affine: bool | None = None) -> nn.Module:
    axis, sizes = _sound(source)
    weighted = _weighted(source, affine)
    module: nn.Module
    if axis == 1:
        module = RMSNorm(sizes[0], eps_of(source), channel_axis=1, elementwise_affine=weighted)
    else:
        module = nn.RMSNorm(sizes, eps=eps_of(source), elementwise_affine=weighted)
    return settled(module, source, init, {"weight": effective(source, "weight", sizes)})


def from_l2norm(source: Source, *, init: str = "copy") -> nn.Module:
    """x / length is x / rms / sqrt(C); eps is added to the sum there and to the mean here."""
    axis, sizes = _sound(source)
    eps = source.eps
    if source.settings.get("eps_clamp", True) or source.settings.get("eps_outside"):
        eps = eps**2
    module: nn.Module
    if axis == 1:
        module = RMSNorm(sizes[0], eps / sizes[0], channel_axis=1)
    else:
        module = nn.RMSNorm(sizes, eps=eps / sizes[0])
    weight = torch.full((sizes[0],), sizes[0] ** -0.5, dtype=torch.float64)
    return settled(module, source, init, {"weight": weight})


def from_rmsnorm(
    source: Source,
    *,
    init: str = "copy",
    weight_offset: float | None = None,
    cast: str | None = None,
) -> nn.Module:
    """The same function, as a module or with its weight stored otherwise."""
    settings = source.settings
    offset = float(settings.get("weight_offset", 0.0) if weight_offset is None else weight_offset)
    order = cast or settings.get("cast", NATIVE_CAST)
    sizes = list(settings.get("normalized_shape", [source.features]))
    weighted = "weight" in source.tensors
    outside = settings.get("eps_outside", False)
    # Orders of casts are one function where there is nothing to cast.
    native = order == NATIVE_CAST or (cast is None and source.dtype not in (None, *HALF))
    plain = source.channel_axis == -1 and offset == 0.0 and native and not outside
    module: nn.Module
    if plain or (len(sizes) > 1 and not outside):
        module = nn.RMSNorm(sizes, eps=source.eps, elementwise_affine=weighted)
        offset = 0.0
    else:
        module = RMSNorm(
            source.features,
            source.eps,
            channel_axis=source.channel_axis,
            weight_offset=offset,
            cast=order,
            eps_outside=outside,
            elementwise_affine=weighted,
        )
    weight = effective(source, "weight", sizes)
    return settled(module, source, init, {"weight": None if weight is None else weight - offset})


def _near_zero(source: Source, options: Mapping[str, Any]) -> Fidelity:
    elsewhere = source.settings.get("eps_clamp", True) or source.settings.get("eps_outside")
    same = (source.eps == 0.0 or not elsewhere) and source.settings.get("p", 2.0) == 2.0
    return identical_if(same)


def examples() -> tuple[Example, ...]:
    tokens, image = (2, 5, 12), (2, 6, 5, 3)

    def llama() -> nn.Module:
        return randomised(RMSNorm(12, cast="float32"))

    def gemma() -> nn.Module:
        return randomised(RMSNorm(12, weight_offset=1.0))

    return (
        Example("torch", lambda: randomised(nn.RMSNorm(12, eps=1e-6)), (tokens, (3, 12))),
        Example("eps by type", lambda: randomised(nn.RMSNorm(12)), (tokens,)),
        Example("two dimensions", lambda: randomised(nn.RMSNorm([4, 3], eps=1e-6)), ((2, 4, 3),)),
        Example("cast before the weight", llama, (tokens,)),
        Example("weight around zero", gemma, (tokens,)),
        Example("no cast", lambda: randomised(RMSNorm(12, cast="none")), (tokens,)),
        Example("without weight", lambda: RMSNorm(12, elementwise_affine=False), (tokens,)),
        Example("eps outside", lambda: randomised(RMSNorm(12, eps_outside=True)), (tokens,)),
        Example("channels second", lambda: randomised(RMSNorm(6, channel_axis=1)), (image,)),
    )


NORM = NormSpec(
    name="rmsnorm",
    also=("rms",),
    summary="divides by the root mean square, no centring",
    paper="Zhang and Sennrich 2019, arXiv:1910.07467",
    classes=(nn.RMSNorm, RMSNorm),
    read=read,
    formula=formula,
    examples=examples,
    tail=True,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "rmsnorm": Conversion(from_rmsnorm, Fidelity.IDENTICAL),
        "l2norm": Conversion(from_l2norm, _near_zero),
    },
    laws=frozenset(
        {
            Law.SCALE_INVARIANT,
            Law.BATCH_INDEPENDENT,
            Law.PERMUTATION_EQUIVARIANT,
            Law.ROTATION_EQUIVARIANT,
        }
    ),
    operator=operator,
    casts=CASTS,
    spellings=(
        Spelling(
            (
                F.rms_norm,
                torch.rms_norm,
                torch.ops.aten.rms_norm.default,
                "aten::_fused_rms_norm",
            ),
            read_call,
        ),
    ),
    onnx=OnnxForm(
        {
            18: ("Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"),
            23: ("RMSNormalization",),
        }
    ),
    hypotheses=hypotheses,
    why_not_affine="its root mean square is that of each position, in eval as in training",
)
