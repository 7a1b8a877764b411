"""The numbers of a Vector: a scale or a shift per channel, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normsurgery.edits.types import Vector
from normsurgery.errors import UsageError
from normsurgery.flow.operations import run as run_operations
from normsurgery.numerics.precision import NotFloat64, lifted
from normsurgery.spec import get, weight_and_bias

# So far out the scale alone decides the value: a shift 1e70 times the scale does not disturb it.
FAR = 2.0**300
# What the recorded operations may differ by, relative, from the affine function read off them.
AFFINE_BOUND = 1e-9


def values(vector: Vector, tensors: Mapping[str, Tensor]) -> Tensor:
    """The vector's elements, float64, shape (n,), from its tensors by role (float64).

    Raises UsageError where the recorded operations do not run or are no per-channel affine
    function, or where the vector's size cannot be known.
    """
    plain = _unindexed(vector, tensors)
    if vector.part == "shift":
        plain = plain * vector.factor
    if vector.offset:
        scale = _unindexed(replace(vector, part="scale", offset=0.0), tensors)
        plain = plain + vector.offset * (scale - 1.0)
    if vector.index is None:
        return plain
    _require_inside(vector, plain)
    # The neutral element stands last, where -1 finds it.
    padded = torch.cat([plain, plain.new_full((1,), _neutral(vector))])
    return padded[torch.tensor(vector.index, dtype=torch.long, device=plain.device)]


def _neutral(vector: Vector) -> float:
    return 1.0 if vector.part == "scale" else 0.0


def _require_inside(vector: Vector, plain: Tensor) -> None:
    assert vector.index is not None
    outside = [i for i in vector.index if not -1 <= i < plain.numel()]
    if outside:
        raise UsageError(
            f"channel {outside[0]} is not one of the {plain.numel()} channels of {_named(vector)}. "
            "The edits were made for another model; make the plan again."
        )


def _unindexed(vector: Vector, tensors: Mapping[str, Tensor]) -> Tensor:
    if vector.operations is not None:
        scale, shift = _of_operations(vector, tensors)
        return scale if vector.part == "scale" else shift
    _require_equal_sizes(vector, tensors)
    parts_of = get(vector.kind).scale_and_shift if vector.kind else weight_and_bias
    parts = parts_of({role: t.detach() for role, t in tensors.items()}, vector.settings)
    if parts is None:
        raise UsageError(
            f"with {_named(vector)} a {vector.kind} is no scale and shift. Make the plan again."
        )
    part = parts[0] if vector.part == "scale" else parts[1]
    features = vector.settings.get("features")
    if part is None:
        return torch.full((_known(vector, features),), _neutral(vector), dtype=torch.float64)
    plain = part.reshape(-1)
    return plain if plain.numel() > 1 or features is None else plain.expand(int(features))


def _require_equal_sizes(vector: Vector, tensors: Mapping[str, Tensor]) -> None:
    """A single number stands for all channels; otherwise each tensor has one for every channel."""
    if len({tensor.numel() for tensor in tensors.values()} - {1}) <= 1:
        return
    sizes = ", ".join(f"{vector.tensors[role]} {tuple(t.shape)}" for role, t in tensors.items())
    raise UsageError(
        f"the tensors of one {vector.part} have different sizes: {sizes}. "
        "The edits were planned for a model of other sizes; make the plan again."
    )


def _known(vector: Vector, features: Any) -> int:
    if features is None:
        raise UsageError(
            f"how many channels {_named(vector)} has is not known. Give `features` in its settings."
        )
    return int(features)


def _of_operations(vector: Vector, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift of what was recorded, run in float64 whatever it was cast to.

    f(1) - f(0) would lose what the shift is larger than the scale; far out nothing is lost.
    """
    features = _known(vector, vector.settings.get("features"))
    shape, axis = _probe_shape(vector, features)
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    zero = torch.zeros(shape, dtype=torch.float64, device=device)
    # No two neighbours are equal, in any direction, so that what a channel takes from others shows.
    uneven = torch.linspace(-1.0, 2.0, zero.numel(), dtype=torch.float64, device=device)
    uneven = uneven.square().reshape(shape)
    at_zero, far, near, measured = (
        _run(vector, x, tensors) for x in (zero, zero + FAR, zero - FAR, uneven)
    )
    slope = far / (2 * FAR) - near / (2 * FAR)
    _require_affine(vector, uneven * slope + at_zero, measured)
    return _per_channel(slope, axis), _per_channel(at_zero, axis)


def _per_channel(y: Tensor, axis: int) -> Tensor:
    """One element for each index of `axis`, where all others are equal."""
    return y.movedim(axis, 0).flatten(1)[:, 0].clone()


def _probe_shape(vector: Vector, features: int) -> tuple[list[int], int]:
    """Of the recorded rank, the channels along their axis and two of everything else."""
    axis = int(vector.settings.get("channel_axis", 1))
    recorded = vector.settings.get("shape")
    rank = max(axis + 1, -axis, 2) if recorded is None else len(recorded)
    shape = [2] * rank
    shape[axis] = features
    return shape, axis % rank


def _run(vector: Vector, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    assert vector.operations is not None
    try:
        with lifted():
            y = run_operations(vector.operations, x, tensors)
    except (RuntimeError, LookupError, AttributeError, TypeError, NotFloat64) as error:
        raise UsageError(
            f"the recorded operations of {_named(vector)} do not run on an input of shape "
            f"{tuple(x.shape)} ({type(error).__name__}: {error}). Make the plan again."
        ) from error
    if y.shape != x.shape:
        raise UsageError(
            f"the recorded operations of {_named(vector)} turn {tuple(x.shape)} into "
            f"{tuple(y.shape)}, so they are no scale and shift per channel. Leave this site out."
        )
    return y


def _require_affine(vector: Vector, wanted: Tensor, measured: Tensor) -> None:
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    error = float((measured - wanted).abs().max()) if wanted.numel() else 0.0
    if error <= AFFINE_BOUND * size:
        return
    raise UsageError(
        f"the recorded operations of {_named(vector)} are no scale and shift per channel: they "
        f"differ from one by {error:.1e} where its values reach {size:.1e}. Leave this site out."
    )


def _named(vector: Vector) -> str:
    names = ", ".join(vector.tensors.values())
    return f"the {vector.part} made of {names}" if names else f"the {vector.part} without tensors"
