"""Which operations a scale and a shift per channel may cross, and under which condition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from normsurgery.fold.channels import SLICES, Shape
from normsurgery.fold.checks import Check
from normsurgery.graph.nodes import argument, arguments, inputs_of, operator, shape, tensor

_POOLS = frozenset(f"aten::avg_pool{n}d" for n in (1, 2, 3))
_ADAPTIVE = frozenset(
    f"aten::{name}{n}d" for name in ("adaptive_avg_pool", "_adaptive_avg_pool") for n in (1, 2, 3)
)
# Every output of an interpolation is a mean of inputs with weights that sum to one.
_INTERPOLATIONS = frozenset(
    f"aten::{name}"
    for name in (
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    )
)
AVERAGES = _POOLS | _ADAPTIVE | _INTERPOLATIONS | {"aten::mean"}
# These take elements from elsewhere along axes other than the channels'.
GATHERS = frozenset({"aten::index_select", "aten::roll", "aten::flip", "aten::index"})
PADDINGS = frozenset(
    {"pad", "aten::constant_pad_nd"}
    | {f"aten::{name}_pad{n}d" for name in ("reflection", "replication") for n in (1, 2, 3)}
)
_NON_LINEAR = frozenset(
    f"aten::{name}"
    for name in (
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "_prelu_kernel",
        "elu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "tanh",
        "hardswish",
        "hardsigmoid",
        "softplus",
        "exp",
        "abs",
        "pow",
        "square",
        "sqrt",
        "rsqrt",
        "clamp",
        "clamp_min",
        "_softmax",
        "_log_softmax",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "_adaptive_max_pool",
        "adaptive_max_pool2d",
        "native_layer_norm",
        "native_group_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_fused_rms_norm",
    )
)


def why_not(node: fx.Node) -> Check:
    """The check that a node fails through which nothing can be handed on."""
    return Check.NON_LINEAR if operator(node) in _NON_LINEAR else Check.UNKNOWN


def picks(node: fx.Node) -> bool:
    """Whether the node hands on a part of its input, or several."""
    return operator(node) in SLICES


def number_of(node: fx.Node) -> float | None:
    """The number that a node multiplies its one tensor with; None where it is no plain number."""
    if operator(node) == "aten::neg":
        return -1.0
    other = argument(node, 1, "other")
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return None
    if operator(node) == "aten::mul":
        return float(other)
    rounded = node.kwargs.get("rounding_mode") is not None
    return None if rounded or other == 0 else 1.0 / float(other)


def pads_with_values(node: fx.Node) -> bool:
    """Whether what is padded in are values of the input itself."""
    if operator(node) == "pad":
        return str(argument(node, 2, "mode", "constant")) != "constant"
    return operator(node) != "aten::constant_pad_nd"


def padded_axes(node: fx.Node, rank: int) -> set[int]:
    """The axes that are padded at all, on these inputs."""
    amounts = _amounts(node)
    return {rank - 1 - place // 2 for place, amount in enumerate(amounts) if amount}


def _amounts(node: fx.Node) -> Sequence[int]:
    name = "pad" if operator(node) in ("pad", "aten::constant_pad_nd") else "padding"
    amounts: Sequence[int] = argument(node, 1, name)
    return amounts


def averages_evenly(node: fx.Node) -> bool:
    """Whether the weights of every mean sum to one, so that a shift stays a shift."""
    if operator(node) not in _POOLS:
        return True
    padding = argument(node, 3, "padding") or ()
    counts_zeros = argument(node, 5, "count_include_pad", True)
    return argument(node, 6, "divisor_override") is None and not (any(padding) and counts_zeros)


def averaged_forwards(node: fx.Node, channels: Tensor, after: Shape) -> Tensor | None:
    """The channels of a mean, from those of its input; None where it runs over the channels."""
    axes = _averaged(node, channels.dim())
    if any(channels.shape[axis] != 1 for axis in axes):
        return None
    if len(after) == channels.dim():
        return channels
    keep = [size for axis, size in enumerate(channels.shape) if axis not in axes]
    return channels.reshape(keep)


def averaged_backwards(node: fx.Node, channels: Tensor, before: Shape) -> Tensor | None:
    """The channels of the input of a mean; None where it runs over the channels."""
    axes = _averaged(node, len(before))
    if channels.dim() == len(before):
        return None if any(channels.shape[axis] != 1 for axis in axes) else channels
    sizes = iter(channels.shape)
    return channels.reshape([1 if axis in axes else next(sizes) for axis in range(len(before))])


def _averaged(node: fx.Node, rank: int) -> set[int]:
    """The axes over which a node takes means."""
    if operator(node) != "aten::mean":
        return set(range(2, rank))
    dims = argument(node, 1, "dim", None)
    return {int(axis) % rank for axis in dims} if dims else set(range(rank))


def gathered_axes(node: fx.Node) -> set[int] | None:
    """The axes along which a node takes elements from elsewhere; None where that is not known."""
    rank = len(shape(inputs_of(node)[0]))
    if operator(node) == "aten::index_select":
        return {int(arguments(node)[1]) % rank}
    if operator(node) == "aten::roll":
        dims = argument(node, 2, "dims", [])
        return {int(axis) % rank for axis in dims} if dims else None
    if operator(node) == "aten::flip":
        return {int(axis) % rank for axis in arguments(node)[1]}
    indices = arguments(node)[1]
    if len(indices) != 1 or indices[0] is None:
        return None
    # One index in front: a gather of rows, or of what a mask of one dimension picks.
    return {0} if tensor(indices[0]).dim() == 1 else None
