"""What each operator is to a channel: the one table that finding and folding read."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from torch import fx

from normsurgery.flow.nodes import operator


class Kind(Enum):
    """What an operator does with the channels of its input."""

    SAME = auto()  # the same numbers in the same places: another type, layout or object
    RESHAPE = auto()
    PERMUTE = auto()
    REPEAT = auto()
    RESTRIDE = auto()
    SLICE = auto()  # a part along one axis, or all its parts, or (a shuffle) in another order
    GATHER = auto()  # from elsewhere along other axes
    PAD = auto()
    AVERAGE = auto()
    MASK = auto()  # some elements become a number
    SCALE = auto()  # times or over another tensor or a number
    ADD = auto()
    ADD_PRODUCT = auto()
    JOIN = auto()
    LAYER = auto()  # a product with a weight
    TABLE = auto()  # rows of a weight
    NORM = auto()
    DROPOUT = auto()
    POWER = auto()
    ACTIVATION = auto()  # one number in, one number out
    NON_LINEAR = auto()


_NAMES: Mapping[Kind, str] = {
    Kind.SAME: "_to_copy alias clone contiguous detach lift lift_fresh positive to",
    Kind.RESHAPE: "_reshape_alias _reshape_copy _unsafe_view flatten reshape squeeze unflatten "
    "unsqueeze view view_as",
    Kind.PERMUTE: "movedim permute swapaxes t transpose",
    Kind.REPEAT: "expand expand_as repeat",
    Kind.RESTRIDE: "as_strided",
    Kind.SLICE: "channel_shuffle chunk narrow select slice split split_with_sizes unbind",
    Kind.GATHER: "flip index index_select roll",
    Kind.PAD: "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d",
    # Every output of an interpolation is a mean of inputs with weights that sum to one.
    Kind.AVERAGE: "mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    Kind.MASK: "masked_fill",
    Kind.SCALE: "mul div neg",
    Kind.ADD: "add sub rsub",
    Kind.ADD_PRODUCT: "addcmul",
    Kind.JOIN: "cat",
    Kind.LAYER: "convolution mm bmm addmm linear _grouped_mm",
    Kind.TABLE: "embedding",
    Kind.NORM: "_fused_rms_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm native_batch_norm native_group_norm native_layer_norm",
    Kind.DROPOUT: "native_dropout",
    Kind.POWER: "exp pow reciprocal rsqrt sqrt",
    Kind.ACTIVATION: "celu elu gelu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish "
    "relu selu sigmoid silu softplus softsign tanh",
    Kind.NON_LINEAR: "relu6 _prelu_kernel abs square clamp clamp_min "
    "_softmax _log_softmax max_pool2d_with_indices max_pool3d_with_indices _adaptive_max_pool "
    "adaptive_max_pool2d",
}
KINDS: Mapping[str, Kind] = {
    **{f"aten::{name}": kind for kind, names in _NAMES.items() for name in names.split()},
    "pad": Kind.PAD,
    "transformers::grouped_mm_fallback": Kind.LAYER,
}

VIEWS = frozenset({Kind.SAME, Kind.RESHAPE, Kind.PERMUTE})
# The same numbers, however often.
SAME_NUMBERS = VIEWS | {Kind.REPEAT}

# Of a layer: the places of (input, weight, bias) among its arguments; None: it takes none.
LAYER_ARGUMENTS: Mapping[str, tuple[int, int, int | None]] = {
    "aten::convolution": (0, 1, 2),
    "aten::mm": (0, 1, None),
    "aten::bmm": (0, 1, None),
    "aten::addmm": (1, 2, 0),
    "aten::linear": (0, 1, 2),
    "aten::_grouped_mm": (0, 1, None),
    "transformers::grouped_mm_fallback": (0, 1, None),
}
CONVOLUTION = "aten::convolution"


def kind_of(operation: fx.Node) -> Kind | None:
    """None for an operator of which nothing is known."""
    return KINDS.get(operator(operation))


def activation_of(operation: fx.Node) -> str | None:
    """The name of the activation that an operation is, as `relu`."""
    found = kind_of(operation) is Kind.ACTIVATION
    return operator(operation).removeprefix("aten::") if found else None
