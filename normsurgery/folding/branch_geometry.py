"""The geometry of the one layer that parallel branches become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from normsurgery.flow.nodes import arguments, operator, shape
from normsurgery.flow.operators import CONVOLUTION
from normsurgery.folding.checks import Check
from normsurgery.folding.ground import Ground, Refused
from normsurgery.folding.kernels import Geometry, Sizes, room_for

if TYPE_CHECKING:
    from normsurgery.folding.parallel_branches import Branch


def merged_geometry(
    ground: Ground, branches: Sequence[Branch]
) -> tuple[Geometry, tuple[Sizes, ...]]:
    """The geometry that has room for all kernels, and where each of them lies in it.

    branches: a layer is among them. Raises Refused: AXIS, ZERO_PADDING.
    """
    first = next(branch for branch in branches if branch.layer is not None)
    weights = [b.layer.weight.tensor for b in branches if b.layer is not None]
    if len({(w.dtype, tuple(w.shape[:2]), w.dim(), w.device) for w in weights}) > 1:
        raise Refused(Check.AXIS, "its branches have different channels, groups or dtypes")
    given = [_geometry(branch, first) for branch in branches]
    if len({(found.groups, found.stride) for found in given}) > 1:
        raise Refused(Check.AXIS, "its branches have different strides or groups")
    for branch in branches:
        _require_same_channels(ground, branch, first, given[0].groups)
    return room_for(given)


def _geometry(branch: Branch, first: Branch) -> Geometry:
    """Of the branch's layer; of a norm, that of an identity beside the layer of `first`."""
    found = branch.layer or first.layer
    assert found is not None
    if operator(found.node) != CONVOLUTION:
        return Geometry((), (), (), (), 1)
    kernel = tuple(found.weight.tensor.shape[2:])
    if branch.layer is None:
        one, none = (1,) * len(kernel), (0,) * len(kernel)
        return Geometry(one, one, none, one, found.groups)
    given = [arguments(found.node)[place] for place in (3, 4, 5)]
    stride, padding, dilation = (
        tuple(int(n) for n in sizes) * (len(kernel) // len(sizes)) for sizes in given
    )
    return Geometry(kernel, stride, padding, dilation, found.groups)


def _require_same_channels(ground: Ground, branch: Branch, first: Branch, groups: int) -> None:
    """A norm's channels are those that the layer reads, and those that it makes."""
    if branch.run is None or first.layer is None:
        return
    weight, settings = first.layer.weight.tensor, branch.run.site.settings
    rank = len(shape(branch.source))
    same_axis = (int(settings["channel_axis"]) - first.layer.channel_axis) % rank == 0
    sizes = {int(settings["features"]), weight.shape[0], weight.shape[1] * groups}
    if not same_axis or len(sizes) > 1:
        raise Refused(Check.AXIS, f"{branch.path} has other channels than the sum")
