"""Kernels of parallel convolutions, laid into one: how large it is, and where each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normsurgery.folding.checks import Check
from normsurgery.folding.ground import Refused

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """How a convolution of `groups` reads its input, by spatial dimension; of a linear, ()."""

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int


@dataclass(frozen=True)
class _Side:
    """One spatial dimension of a convolution."""

    kernel: int
    padding: int
    dilation: int


def room_for(given: Sequence[Geometry]) -> tuple[Geometry, tuple[Sizes, ...]]:
    """The smallest geometry that has room for all, of equal stride and groups, and the place of
    each kernel in it. Raises Refused where they do not lie on one grid, around one centre."""
    axes = range(len(given[0].kernel))
    sides = [_common([_side(one, axis) for one in given]) for axis in axes]
    largest = Geometry(
        tuple(side.kernel for side in sides),
        given[0].stride,
        tuple(side.padding for side in sides),
        tuple(side.dilation for side in sides),
        given[0].groups,
    )
    places = tuple(
        tuple(
            (side.padding - one.padding[axis]) // side.dilation for axis, side in enumerate(sides)
        )
        for one in given
    )
    return largest, places


def _side(geometry: Geometry, axis: int) -> _Side:
    return _Side(geometry.kernel[axis], geometry.padding[axis], geometry.dilation[axis])


def _common(sides: Sequence[_Side]) -> _Side:
    """The side of the convolution that pads most, if the others lie within it.

    A kernel of one has no dilation. The sums of all have the same size for every input only if the
    kernels reach equally far to both ends.
    """
    dilations = {side.dilation for side in sides if side.kernel > 1} or {1}
    if len(dilations) > 1:
        raise Refused(Check.AXIS, "its kernels are dilated differently")
    (dilation,) = dilations
    largest = max(sides, key=lambda side: side.padding)
    for side in sides:
        more, rest = divmod(largest.padding - side.padding, dilation)
        if rest or side.kernel + 2 * more != largest.kernel:
            raise Refused(Check.ZERO_PADDING, "its kernels do not lie around one centre")
    return _Side(largest.kernel, largest.padding, dilation)
