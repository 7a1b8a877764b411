"""What any correct computation in a type may be off: the truth with every step moved by rounding.

One rounding for what an operation gives; for a sum of n numbers, which a runtime may add up in any
order, as much as adding them one after another is off on average: sqrt(n / 3) roundings of their
mean size (n partial sums that grow evenly, each rounded once). A norm of values with a large mean
is off by that times mean / deviation, whatever the kernel; one that takes the variance as
E[x^2] - E[x]^2 is off by the square of it, which is how the two are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from onnx import NodeProto


def moved(tensor: Tensor, rounding: float, generator: torch.Generator) -> Tensor:
    """Every value larger or smaller by `rounding`, relatively, at random."""
    return tensor * (1 + _signs(tensor, generator) * rounding)


def summed(
    tensor: Tensor,
    dims: Sequence[int],
    rounding: float,
    generator: torch.Generator,
    groups: int = 0,
) -> Tensor:
    """Every value moved by as much as the mean over `dims` is off where it is summed naively.

    groups: of the channels (axis 1), each with a mean of its own over all that is in it.
    """
    if groups and tensor.numel():
        grouped = tensor.reshape(tensor.shape[0], groups, -1)
        return summed(grouped, [2], rounding, generator).reshape(tensor.shape)
    if not dims or tensor.numel() == 0:
        return moved(tensor, rounding, generator)
    terms = math.prod(tensor.shape[dim] for dim in dims)
    sizes = tensor.abs().mean(tuple(dims), keepdim=True)
    off = rounding * max(1.0, math.sqrt(terms / 3)) * torch.where(sizes.isfinite(), sizes, 0.0)
    return moved(tensor, rounding, generator) + _signs(tensor, generator) * off


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1


def shaken(rounding: float, seed: int) -> TorchDispatchMode:
    """Inside, every operation of torch on tensors is off as if it rounded by `rounding`."""
    return _Shaken(rounding, seed)


class _Shaken(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, rounding: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        dims = _SUMS.get(func._schema.name.removeprefix("aten::"))
        if dims is not None and _is_floating(args[0]):
            over = dims(args, kwargs or {})
            groups = args[6] if "group_norm" in func._schema.name else 0
            given = summed(args[0], over, self._rounding, self._generator, groups)
            args = (given, *args[1:])
        result = func(*args, **(kwargs or {}))
        reads = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        computes = reads and not any(r.alias_info for r in func._schema.returns)
        computes &= func._schema.name.removeprefix("aten::") not in _EXACT
        return tree_map(self._move, result) if computes else result

    def _move(self, value: Any) -> Any:
        if not _is_floating(value) or value.numel() == 0:
            return value
        return moved(value, self._rounding, self._generator)


def shaken_inputs(
    node: NodeProto, values: Mapping[str, Tensor], rounding: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The floating values that a node of a graph reads, moved as above."""
    found = {}
    for place, name in enumerate(node.input):
        value = values.get(name)
        if value is None or not value.is_floating_point() or name in found:
            continue
        over = _dims_of_node(node, value, values) if place == 0 else []
        groups = _groups_of_node(node) if place == 0 else 0
        found[name] = summed(value, over, rounding, generator, groups)
    return found


# What these give needs no rounding: whole numbers, or values that they only choose or copy.
_CHOOSING = "max min amax amin maximum minimum clamp clamp_min clamp_max relu sort topk where"
_COPYING = "cat stack index index_select gather embedding masked_fill flip roll repeat clone"
_EXACT = frozenset(
    (
        *("round", "floor", "ceil", "trunc", "sign", "neg", "abs"),
        *_CHOOSING.split(),
        *_COPYING.split(),
        *("_to_copy", "constant_pad_nd", "max_pool2d_with_indices"),
    )
)


def _all(args: Any, kwargs: Any) -> list[int]:
    return list(range(args[0].dim()))


def _listed(args: Any, kwargs: Any) -> list[int]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or dims == []:
        return _all(args, kwargs)
    dims = [dims] if isinstance(dims, int) else dims
    return [dim % args[0].dim() for dim in dims] if args[0].dim() else []


def _third(args: Any, kwargs: Any) -> list[int]:
    return _listed((args[0], *args[2:]), kwargs)


def _last(args: Any, kwargs: Any) -> list[int]:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return list(range(args[0].dim() - len(shape), args[0].dim()))


def _within_channels(args: Any, kwargs: Any) -> list[int]:
    """Of batch statistics; running ones are no sums, but their mean and deviation are given."""
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    return [0, *range(2, args[0].dim())] if training is True else []


def _within_channels_legit(args: Any, kwargs: Any) -> list[int]:
    return [0, *range(2, args[0].dim())]


def _spatial(args: Any, kwargs: Any) -> list[int]:
    return list(range(2, args[0].dim()))


_SUMS: dict[str, Callable[[Any, Any], list[int]]] = {
    "mean": _listed,
    "sum": _listed,
    "var": _listed,
    "var_mean": _listed,
    "std": _listed,
    "std_mean": _listed,
    "linalg_vector_norm": _third,
    "norm": _third,
    "native_layer_norm": _last,
    "_fused_rms_norm": _last,
    "native_group_norm": _all,  # by group
    "native_batch_norm": _within_channels,
    "_native_batch_norm_legit": _within_channels_legit,
    "_native_batch_norm_legit_functional": _within_channels_legit,
    "_adaptive_avg_pool2d": _spatial,
    "_adaptive_avg_pool3d": _spatial,
    "avg_pool2d": _spatial,
}


def _dims_of_node(node: NodeProto, value: Tensor, values: Mapping[str, Tensor]) -> list[int]:
    """What an ONNX node sums over; nothing where it is no sum."""
    dims = list(range(value.dim()))
    attributes = {a.name: a for a in node.attribute}
    if node.op_type.startswith("Reduce"):
        axes = list(attributes["axes"].ints) if "axes" in attributes else []
        if len(node.input) > 1 and node.input[1] in values:
            axes = [int(axis) for axis in values[node.input[1]].flatten()]
        return [axis % value.dim() for axis in axes] if axes and dims else dims
    if node.op_type in ("InstanceNormalization", "GlobalAveragePool", "AveragePool"):
        return dims[2:]
    if node.op_type in _OVER_LAST:
        axis = attributes["axis"].i if "axis" in attributes else -1
        return dims[axis:] if dims else []
    return []


def _groups_of_node(node: NodeProto) -> int:
    if node.op_type not in ("GroupNormalization", "GroupNorm"):
        return 0
    return next((a.i for a in node.attribute if a.name in ("num_groups", "groups")), 0)


_OVER_LAST = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "MeanVarianceNormalization",
    }
)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
