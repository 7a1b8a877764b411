"""What the norms of a weight compute, in float64: the formulas of `Bake`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from normsurgery.fold.edits import Bake
from normsurgery.spec import get

RELATIVE = 1e-10  # float64 against float64


def baked(edit: Bake, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that `edit` writes, of its tensors by role, in their own dtype (float64)."""
    if edit.kind in FORMULAS:
        return FORMULAS[edit.kind](tensors, edit.settings)
    bake = get(edit.kind).bake
    assert bake is not None, f"{edit.kind} bakes no weight"
    return bake(tensors, edit.settings)


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


# Of torch's own parametrizations, which no registered norm is.
FORMULAS: Mapping[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor]] = {
    "weightnorm": _weight_norm,
    "spectralnorm": _spectral_norm,
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
