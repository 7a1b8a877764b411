"""What norms share: per-channel scale and shift in a formula, and carrying them to a new module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from normsurgery.errors import CannotConvert, NoOperator, WrongShape
from normsurgery.spec import Fidelity, Reading, Source

AnyModule = TypeVar("AnyModule", bound=nn.Module)

SMALLEST_GROUP = (
    4  # with 3 or fewer elements the gradient of a normalised group is zero or infinite
)
AFFINE_ROLES = ("weight", "bias")


def along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    """`vector` of any shape with C elements (or one), shaped to broadcast along `axis` of `x`."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return vector.reshape(shape)


def all_but(x: Tensor, axis: int) -> list[int]:
    """The dimensions of `x` other than `axis`."""
    return [d for d in range(x.dim()) if d != axis % x.dim()]


def require_channels(
    norm: str, x: Tensor, axis: int, features: int, cure: str = "", dimensions: int = 1
) -> None:
    """Raise WrongShape unless `x` has `features` along `axis`, and at least so many dimensions."""
    if x.dim() > max(axis, -axis - 1, dimensions - 1) and x.shape[axis] == features:
        return
    first = "N, ..." if dimensions > 1 else "..."
    raise WrongShape(
        norm,
        x.shape,
        f"(N, {features}, ...)" if axis == 1 else f"({first}, {features})",
        cure or f"Its channels are along axis {axis}; permute the input or set it.",
    )


def affined(y: Tensor, module: nn.Module, axis: int) -> Tensor:
    """`y * weight + bias` along the channel axis; the module has None where it has none."""
    weight, bias = module.weight, module.bias
    y = y if weight is None else y * along(cast(Tensor, weight), y, axis)
    return y if bias is None else y + along(cast(Tensor, bias), y, axis)


class PerChannel(nn.Module):
    """A module with a weight and a bias per channel, of (N, C, ...) or, with -1, of (..., C)."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, features: int, channel_axis: int) -> None:
        super().__init__()
        self.features, self.channel_axis = features, channel_axis
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def require_channels(self, x: Tensor, cure: str = "") -> None:
        require_channels(type(self).__name__, x, self.channel_axis, self.features, cure)

    def affined(self, y: Tensor) -> Tensor:
        return affined(y, self, self.channel_axis)


def scaled(y: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """`y * (weight + weight_offset) + bias` along the channel axis, as far as there are such."""
    axis = settings["channel_axis"]
    if "weight" in tensors:
        y = y * (along(tensors["weight"], y, axis) + settings.get("weight_offset", 0.0))
    if "bias" in tensors:
        y = y + along(tensors["bias"], y, axis)
    return y


def present(module: nn.Module, *roles: str) -> dict[str, str]:
    """Roles whose attribute of that name is a tensor on the module, as `Reading.tensors` wants."""
    return {role: role for role in roles if getattr(module, role, None) is not None}


def known(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of these names that have a value: settings of a module's attributes, and back again
    the arguments it is made with, where both go by one name."""
    return {name: values[name] for name in names if values.get(name) is not None}


def require_eps_in_root(reading: Reading) -> None:
    """Raise NoOperator where the deviation is another one than that of ONNX's operators."""
    if reading.settings.get("eps_outside") or reading.settings.get("unbiased"):
        raise NoOperator("eps stands outside the root: ONNX has no operator for it")


def refusal(source: Source, to: str, why: str, cure: str) -> CannotConvert:
    return CannotConvert(source.where, source.kind, to, why, cure)


def channels(source: Source, to: str, *, any_axis: bool = False) -> tuple[int, int]:
    """The channel axis (1 or -1, or with `any_axis` any) and the number of channels of the norm
    that is replaced.

    Raises CannotConvert where they are unknown, or where the norm spans several dimensions.
    """
    if len(source.settings.get("normalized_shape", ())) > 1:
        raise refusal(
            source,
            to,
            f"it normalises over {list(source.settings['normalized_shape'])} at once, "
            "and which of these dimensions is the channel is not known",
            "Leave this site out, or use identity.",
        )
    if "channel_axis" not in source.settings or "features" not in source.settings:
        raise refusal(
            source,
            to,
            "its channel axis and size are not known",
            "Give inputs that reach this site.",
        )
    if not any_axis and source.channel_axis not in (1, -1):
        raise refusal(
            source,
            to,
            f"it normalises dimension {source.channel_axis}, neither the second nor the last",
            "Leave this site out, or use identity.",
        )
    return source.channel_axis, source.features


def space(source: Source) -> int:
    """Positions per channel and sample in the smallest recorded input; 1 for tokens or unknown."""
    if source.shape is None or source.channel_axis != 1:
        return 1
    return math.prod(source.shape[2:])


# Of space, by torch's classes: also where the model is not run, or on one sample alone.
_BY_CLASS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.BatchNorm1d, nn.InstanceNorm1d), 1),
    ((nn.BatchNorm2d, nn.InstanceNorm2d), 2),
    ((nn.BatchNorm3d, nn.InstanceNorm3d), 3),
)


def dimensions_of(source: Source) -> int | None:
    """Dimensions of space: of the class, else of the recorded input; None where neither tells."""
    for classes, dimensions in _BY_CLASS:
        if isinstance(source.module, classes):
            return dimensions
    return None if source.shape is None else len(source.shape) - 2


def require_rank(source: Source, to: str, dimensions: int | None) -> int:
    """Refuse dimensions of space for which torch has no class of its own."""
    if dimensions in (1, 2, 3):
        return dimensions
    raise refusal(
        source,
        to,
        "torch has one class each for 1, 2 and 3 dimensions of space, and which is not known",
        "Give example inputs, or set dimensions=1, 2 or 3.",
    )


def require_elements(source: Source, to: str, elements: int, cure: str) -> None:
    """Refuse a norm with so few elements per statistic that it is constant or has no gradient."""
    if elements >= SMALLEST_GROUP:
        return
    known = "" if source.shape is not None else " (no input shape was recorded)"
    raise refusal(
        source,
        to,
        f"only {elements} element(s) would share one mean and variance{known}, "
        "so the output would be constant or have no useful gradient",
        cure,
    )


def eps_of(source: Source, default: float = 1e-5) -> float:
    """The source's eps where it is added to a second moment, as here; else `default`."""
    of_a_length = source.kind == "l2norm" or source.settings.get("eps_outside", False)
    eps = float(source.settings.get("eps") or 0.0)
    return default if of_a_length or eps == 0.0 else eps


def shares_eps(source: Source) -> bool:
    """Whether source and result add the same eps to the same biased variance."""
    different = ("eps_outside", "unbiased")
    return not any(source.settings.get(key) for key in different) and source.eps > 0.0


def identical_if(same: bool) -> Fidelity:
    return Fidelity.IDENTICAL if same else Fidelity.RETRAIN


def wanted_affine(source: Source, affine: bool | None) -> tuple[bool, bool]:
    """Whether the result gets a weight and a bias: as the source has them, unless `affine` says."""
    if affine is not None:
        return affine, affine
    return "weight" in source.tensors, "bias" in source.tensors


def effective(source: Source, role: str, sizes: Sequence[int] = ()) -> Tensor | None:
    """The source's scale (`weight + weight_offset`) or shift in float64, or None if it has none.

    Its shape is `sizes`, by default (features,); a single number is spread over it.
    """
    if role not in source.tensors:
        return None
    shape = torch.Size(sizes or (source.features,))
    value = source.tensors[role].detach().double()
    if role == "weight":
        value = value + source.settings.get("weight_offset", 0.0)
    return value.reshape(shape) if value.numel() == shape.numel() else value.expand(shape)


def settled(
    module: AnyModule, source: Source, init: str, values: Mapping[str, Tensor | None] | None = None
) -> AnyModule:
    """The module in the dtype, on the device and in the mode of the source, its parameters filled.

    With `init="copy"` every weight or bias the module has takes the source's effective one (or
    the one in `values`); `"reset"` leaves it fresh. `requires_grad` is the source's either way.
    """
    dtype = source.dtype or torch.get_default_dtype()
    module.to(device=source.device, dtype=dtype)
    for role in AFFINE_ROLES:
        parameter = getattr(module, role, None)
        if not isinstance(parameter, nn.Parameter):
            continue
        value = effective(source, role) if values is None else values.get(role)
        if init == "copy" and value is not None:
            kept = value.to(device=parameter.device, dtype=dtype, copy=True).reshape(
                parameter.shape
            )
            parameter = nn.Parameter(kept)
            setattr(module, role, parameter)
        if role in source.tensors:
            parameter.requires_grad_(source.tensors[role].requires_grad)
    return module.train(source.training)


def with_state(module: AnyModule, source: Source, roles: Iterable[str]) -> AnyModule:
    """The module with the source's buffers of these roles, as far as the source has them."""
    for role in roles:
        if role in source.tensors:
            kept = source.tensors[role].detach()
            setattr(module, role, kept.reshape(module.get_buffer(role).shape).clone())
    return module


def without(module: AnyModule, weight: bool, bias: bool) -> AnyModule:
    """The module with the parameters that are not wanted registered as None."""
    for role, wanted in (("weight", weight), ("bias", bias)):
        if not wanted:
            module.register_parameter(role, None)
    return module
