"""What the norms of a weight compute, in float64: the formulas of `Bake`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from normsurgery.fold.edits import Bake
from normsurgery.norms.weightstandardization import as_weight, per_output

RELATIVE = 1e-10  # float64 against float64


def baked(edit: Bake, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that `edit` writes, of its tensors by role, in their own dtype (float64)."""
    return FORMULAS[edit.kind](tensors, edit.settings)


def _weight_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """v g / |v|, the norm taken over all axes but `dim`; over all of them where dim is -1."""
    direction, dim = tensors["v"], settings["dim"]
    axes = [axis for axis in range(direction.dim()) if axis != dim]
    length = direction.square().sum(axes, keepdim=True).sqrt()
    return direction * (tensors["g"] / length)


def _spectral_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """W / (u W v), with W as a matrix whose rows are `dim`."""
    weight = tensors["weight"]
    matrix = weight.movedim(settings["dim"], 0).flatten(1)
    return weight / (tensors["u"] @ (matrix @ tensors["v"]))


def standardization(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """(W - mean) / deviation per output channel, times `scale`, times `gain` if there is one.

    correction: 1 where the variance is the unbiased one. eps_in_root: False where eps is added to
    the standard deviation.
    """
    weight, eps = tensors["weight"], settings["eps"]
    axis = settings["output_axis"]
    rows = per_output(weight, axis, settings["groups"])
    inputs = tuple(range(2, rows.dim()))
    count = rows[0, 0].numel() - settings["correction"]
    centred = rows - rows.mean(inputs, keepdim=True)
    variance = centred.square().sum(inputs, keepdim=True) / count
    deviation = (variance + eps).sqrt() if settings["eps_in_root"] else variance.sqrt() + eps
    standard = centred / deviation * settings["scale"]
    if "gain" in tensors:
        standard = standard * tensors["gain"].reshape(*rows.shape[:2], *[1] * len(inputs))
    return as_weight(standard, axis).reshape(weight.shape)


FORMULAS: Mapping[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor]] = {
    "weightnorm": _weight_norm,
    "spectralnorm": _spectral_norm,
    "weightstandardization": standardization,
}


def standardization_settings(
    eps: float,
    *,
    output_axis: int = 0,
    groups: int = 1,
    correction: int = 0,
    eps_in_root: bool = True,
    scale: float = 1.0,
) -> dict[str, Any]:
    """The settings of a weight standardization, complete."""
    return {
        "eps": eps,
        "output_axis": output_axis,
        "groups": groups,
        "correction": correction,
        "eps_in_root": eps_in_root,
        "scale": scale,
    }


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|; infinite where the shapes differ or a value is not finite."""
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    if not b.numel():
        return 0.0
    size = float(b.abs().max())
    return float((a - b).abs().max()) / size if size else float(a.abs().max())
