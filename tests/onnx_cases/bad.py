"""Faults, one per file. Most of them pass on a random batch with a fixed tolerance.

`why` names what must be said of each; the pairs of `good` and `known` that carry the same graph
without the fault show that it is the fault that is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from onnx_cases.case import Cases, Sides
from onnx_cases.good import (
    ALONE,
    ROWS,
    TOKENS,
    conv_net,
    language_model,
    layer_norm,
    layer_norm_weights,
    linear,
    linear_file,
    with_external_data,
)
from onnx_cases.graphs import (
    edited,
    exported,
    graph,
    node,
    the,
    with_attribute,
    with_weight,
)
from onnx_cases.modules import (
    Formula,
    Formula2,
    HandLayerNorm,
    LanguageModel,
    LlamaRMSNorm,
    randn,
    random_module,
)

BAD = Cases()
TOKENS_OUT = {"y": (torch.float32, ["batch", 6, 16])}
ROWS_OUT = {"y": (torch.float32, ["batch", 16])}
IDS = torch.arange(24).view(4, 6) % 11


# LayerNorm, each constant and each step of it.


def layer_norm_file(eps: float = 1e-5, **weights: Tensor) -> onnx.ModelProto:
    source = layer_norm()
    return graph(
        [node("LayerNormalization", "x weight bias", "y", axis=-1, epsilon=eps)],
        TOKENS,
        TOKENS_OUT,
        {"weight": source.weight, "bias": source.bias, **weights},
    )


def layer_norm_sides(file: onnx.ModelProto, **options: object) -> Sides:
    return Sides(layer_norm(), file, (randn(4, 6, 16),), options)


@BAD.bad("output|epsilon")
def ln_eps_tenfold() -> Sides:
    """eps 1e-4 in place of 1e-5: 5e-5 on a random batch"""
    return layer_norm_sides(layer_norm_file(1e-4))


@BAD.bad("output|epsilon")
def ln_eps_slightly() -> Sides:
    """eps 1e-5 in place of 1.2e-5, on inputs of size 1e3, where it does not show"""
    source = layer_norm(1.2e-5)
    return Sides(source, layer_norm_file(1e-5), (1e3 * randn(4, 6, 16),))


@BAD.bad("output")
def ln_weight_off() -> Sides:
    """one weight of LayerNorm off by 2^-10"""
    weight = layer_norm().weight.detach().clone()
    weight[5] *= 1 + 2**-10
    return layer_norm_sides(layer_norm_file(weight=weight))


@BAD.bad("output")
def ln_weight_halved_precision() -> Sides:
    """weights rounded to fp16 and widened again"""
    return layer_norm_sides(layer_norm_file(weight=layer_norm().weight.half().float()))


@BAD.bad("output")
def ln_bias_dropped() -> Sides:
    """a bias of 1e-4 was dropped"""
    source = layer_norm()
    with torch.no_grad():
        source.bias.copy_(1e-4 * randn(16))
    file = layer_norm_file(bias=torch.zeros(16))
    return Sides(source, file, (randn(4, 6, 16),))


@BAD.bad("output")
def ln_channels_swapped() -> Sides:
    """two channels of the weight are exchanged"""
    weight = layer_norm().weight.detach()[[1, 0, *range(2, 16)]]
    return layer_norm_sides(layer_norm_file(weight=weight))


def layer_norm_by_hand(steps: Sequence[onnx.NodeProto], **constants: float | list[int]) -> Sides:
    """The steps take `centred` (and `x`, `mean`) to `deviation`."""
    file = graph(
        [
            node("ReduceMean", "x axes", "mean"),
            node("Sub", "x mean", "centred"),
            *steps,
            node("Div", "centred deviation", "normal"),
            node("Mul", "normal weight", "scaled"),
            node("Add", "scaled bias", "y"),
        ],
        TOKENS,
        TOKENS_OUT,
        layer_norm_weights(layer_norm(), axes=[-1], eps=1e-5, **constants),  # type: ignore[arg-type]
    )
    return layer_norm_sides(file)


@BAD.bad("mean|constant|output")
def ln_one_pass() -> Sides:
    """E[x^2] - E[x]^2: right on a random batch, NaN on a large mean"""
    return layer_norm_by_hand(
        [
            node("Mul", "x x", "square"),
            node("ReduceMean", "square axes", "moment"),
            node("Mul", "mean mean", "mean2"),
            node("Sub", "moment mean2", "variance"),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
        ]
    )


@BAD.bad("output")
def ln_unbiased() -> Sides:
    """the variance is divided by 15 in place of 16"""
    return layer_norm_by_hand(
        [
            node("Mul", "centred centred", "square"),
            node("ReduceSum", "square axes", "sum"),
            node("Div", "sum count", "variance"),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
        ],
        count=15.0,
    )


@BAD.bad("output")
def ln_eps_outside() -> Sides:
    """eps is added to the deviation, not to the variance"""
    return layer_norm_by_hand(
        [
            node("Mul", "centred centred", "square"),
            node("ReduceMean", "square axes", "variance"),
            node("Sqrt", "variance", "root"),
            node("Add", "root eps", "deviation"),
        ]
    )


@BAD.bad("zeros|constant|not finite|nan")
def ln_eps_deleted() -> Sides:
    """no eps at all"""
    return layer_norm_by_hand(
        [
            node("Mul", "centred centred", "square"),
            node("ReduceMean", "square axes", "variance"),
            node("Sqrt", "variance", "deviation"),
        ]
    )


@BAD.bad("output")
def ln_wrong_axis() -> Sides:
    """normalised over the last two axes, which on a wide batch looks alike"""
    source = random_module(nn.LayerNorm(16, elementwise_affine=False))
    file = graph(
        [node("LayerNormalization", "x ones", "y", axis=-2, epsilon=1e-5)],
        {"x": (torch.float32, ["batch", 16, 16])},
        {"y": (torch.float32, ["batch", 16, 16])},
        {"ones": torch.ones(16, 16)},
    )
    return Sides(source, file, (randn(4, 16, 16),))


@BAD.bad("output")
def ln_in_fp16() -> Sides:
    """computed in fp16 between two casts"""
    source = layer_norm()
    file = graph(
        [
            node("Cast", "x", "x16", to=onnx.TensorProto.FLOAT16),
            node("LayerNormalization", "x16 weight bias", "y16", axis=-1, epsilon=1e-5),
            node("Cast", "y16", "y", to=onnx.TensorProto.FLOAT),
        ],
        TOKENS,
        TOKENS_OUT,
        {"weight": source.weight.half(), "bias": source.bias.half()},
    )
    return layer_norm_sides(file)


# The other norms.


@BAD.bad("output")
def gn_as_instance_norm() -> Sides:
    """one group computed as one group per channel, as TensorRT once did"""
    source = random_module(nn.GroupNorm(1, 8))
    file = graph(
        [
            node("InstanceNormalization", "x ones zeros", "normal", epsilon=1e-5),
            node("Mul", "normal weight", "scaled"),
            node("Add", "scaled bias", "y"),
        ],
        {"x": (torch.float32, ["batch", 8, 5, 5])},
        {"y": (torch.float32, ["batch", 8, 5, 5])},
        {
            "ones": torch.ones(8),
            "zeros": torch.zeros(8),
            "weight": source.weight.view(8, 1, 1),  # type: ignore[operator]
            "bias": source.bias.view(8, 1, 1),  # type: ignore[operator]
        },
    )
    return Sides(source, file, (randn(3, 8, 5, 5),))


def batch_norm_sides(statistics: str = "mean var", eps: float = 1e-5, **change: Tensor) -> Sides:
    source = random_module(nn.BatchNorm2d(8))
    weights: Mapping[str, Tensor] = {
        "weight": source.get_parameter("weight"),
        "bias": source.get_parameter("bias"),
        "mean": source.get_buffer("running_mean"),
        "var": source.get_buffer("running_var"),
        **change,
    }
    file = graph(
        [node("BatchNormalization", f"x weight bias {statistics}", "y", epsilon=eps)],
        {"x": (torch.float32, ["batch", 8, 5, 5])},
        {"y": (torch.float32, ["batch", 8, 5, 5])},
        weights,
    )
    return Sides(source, file, (randn(4, 8, 5, 5),))


@BAD.bad("output")
def bn_eps_tenfold() -> Sides:
    """eps 1e-4 in place of 1e-5, where the variance is about 1"""
    return batch_norm_sides(eps=1e-4)


@BAD.bad("output")
def bn_unbiased_statistics() -> Sides:
    """the running variance is the biased one of a batch of 1000"""
    variance = random_module(nn.BatchNorm2d(8)).get_buffer("running_var")
    return batch_norm_sides(var=variance * 999 / 1000)


@BAD.bad("output")
def bn_batch_statistics() -> Sides:
    """the statistics of the batch in place of the running ones, which are those of the example"""
    x = randn(4, 8, 5, 5)
    source = random_module(nn.BatchNorm2d(8, affine=False))
    source.get_buffer("running_mean").copy_(x.mean((0, 2, 3)))
    source.get_buffer("running_var").copy_(x.var((0, 2, 3), unbiased=False))
    file = graph(
        [
            node("ReduceMean", "x axes", "mean", keepdims=1),
            node("Sub", "x mean", "centred"),
            node("Mul", "centred centred", "square"),
            node("ReduceMean", "square axes", "variance", keepdims=1),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
            node("Div", "centred deviation", "y"),
        ],
        {"x": (torch.float32, ["batch", 8, 5, 5])},
        {"y": (torch.float32, ["batch", 8, 5, 5])},
        {"axes": [0, 2, 3], "eps": 1e-5},
    )
    return Sides(source, file, (x,))


@BAD.bad("output")
def gemma_weight_without_one() -> Sides:
    """an RMSNorm of `1 + weight` written with the weight alone, which was trained to about 1"""
    weight = 1e-3 * randn(16)
    source = Formula(lambda s, x: F.rms_norm(x, (16,), 1 + s.weight, 1e-6), weight=weight)
    file = graph(
        [node("RMSNormalization", "x weight", "y", axis=-1, epsilon=1e-6)],
        TOKENS,
        TOKENS_OUT,
        {"weight": torch.ones(16)},
        opset=23,
    )
    return Sides(source, file, (randn(4, 6, 16),))


@BAD.bad("zeros|not finite|nan")
def l2_unclamped() -> Sides:
    """F.normalize without its lower bound of 1e-12: zeros give NaN"""
    source = Formula(lambda s, x: F.normalize(x, dim=-1))
    file = graph(
        [node("ReduceL2", "x axes", "norm", keepdims=1), node("Div", "x norm", "y")],
        ROWS,
        ROWS_OUT,
        {"axes": [-1]},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("output")
def one_deleted() -> Sides:
    """a multiplication by 1.000009, which the exporter's optimizer takes for one by 1"""
    source = Formula(lambda s, x: x * 1.000009)
    return Sides(source, exported(source, (randn(4, 16),), opset=20), (randn(4, 16),))


# Outputs: number, order, shape, type.


def pair_of_outputs() -> Formula:
    return Formula(lambda s, x: (x * s.weight, x + s.weight), weight=1e-3 * randn(16) + 1)


def pair_file(*outputs: str) -> onnx.ModelProto:
    return graph(
        [node("Mul", "x weight", "product"), node("Add", "x weight", "sum")],
        ROWS,
        {name: (torch.float32, ["batch", 16]) for name in outputs},
        {"weight": pair_of_outputs().weight},
    )


@BAD.bad("1 output|number of outputs|outputs")
def output_missing() -> Sides:
    """one of two outputs is missing"""
    return Sides(pair_of_outputs(), pair_file("product"), (randn(4, 16),))


@BAD.bad("outputs")
def output_added() -> Sides:
    """an output twice"""
    source = Formula(lambda s, x: x * s.weight, weight=pair_of_outputs().weight.detach())
    return Sides(source, pair_file("product", "sum"), (randn(4, 16),))


@BAD.bad("output")
def outputs_swapped() -> Sides:
    """two outputs of one shape are exchanged"""
    return Sides(pair_of_outputs(), pair_file("sum", "product"), (randn(4, 16),))


@BAD.bad("output", "fail or refused")
def no_outputs() -> Sides:
    """neither side returns a tensor: nothing is compared"""
    source = Formula(lambda s, x: (None,))
    file = graph([node("Identity", "x", "y")], ROWS, ROWS_OUT)
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("shape")
def broadcast_rows() -> Sides:
    """one row where the source repeats it for every sample"""
    source = Formula(lambda s, x: s.weight.expand(x.shape[0], 16), weight=randn(1, 16))
    file = graph(
        [
            node("Mul", "x zero", "nothing"),
            node("ReduceMax", "nothing axes", "row"),
            node("Add", "row weight", "y"),
        ],
        ROWS,
        {"y": (torch.float32, [1, 16])},
        {"zero": 0.0, "axes": [0], "weight": source.weight},
    )
    return Sides(source, file, (randn(4, 16),), ALONE)


@BAD.bad("shape")
def keepdim_lost() -> Sides:
    """(batch,) where the source has (batch, 1)"""
    source = Formula(lambda s, x: x.mean(-1, keepdim=True))
    file = graph(
        [node("ReduceMean", "x axes", "y", keepdims=0)],
        ROWS,
        {"y": (torch.float32, ["batch"])},
        {"axes": [-1]},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("float16|dtype|type", "fail or refused")
def dtype_narrowed() -> Sides:
    """float16 where the source returns float32, on values that fp16 holds exactly"""
    source = Formula(lambda s, x: (8 * x).round())
    file = graph(
        [
            node("Mul", "x eight", "eighths"),
            node("Round", "eighths", "whole"),
            node("Cast", "whole", "y", to=onnx.TensorProto.FLOAT16),
        ],
        ROWS,
        {"y": (torch.float16, ["batch", 16])},
        {"eight": 8.0},
    )
    return Sides(source, file, (randn(4, 16),), ALONE)


@BAD.bad("int32|dtype|type", "fail or refused")
def integer_narrowed() -> Sides:
    """int32 where the source returns int64"""
    source = Formula(lambda s, x: x.argmax(-1))
    file = graph(
        [
            node("ArgMax", "x", "index", axis=-1, keepdims=0),
            node("Cast", "index", "y", to=onnx.TensorProto.INT32),
        ],
        ROWS,
        {"y": (torch.int32, ["batch"])},
    )
    return Sides(source, file, (randn(4, 16),))


# Integers and booleans.


@BAD.bad("integers differ")
def integer_off_by_one() -> Sides:
    """counted from one"""
    source = Formula(lambda s, x: x.argmax(-1))
    file = graph(
        [node("ArgMax", "x", "index", axis=-1, keepdims=0), node("Add", "index one", "y")],
        ROWS,
        {"y": (torch.int64, ["batch"])},
        {"one": torch.tensor(1)},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("integers differ")
def argmax_last() -> Sides:
    """the last of several largest values, where torch promises the first"""
    source = Formula(lambda s, x: x.argmax(-1))
    file = graph(
        [node("ArgMax", "x", "y", axis=-1, keepdims=0, select_last_index=1)],
        ROWS,
        {"y": (torch.int64, ["batch"])},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("integers differ")
def division_truncates() -> Sides:
    """-7 // 2 is -4, in the file -3"""
    source = Formula(lambda s, x: x // 2)
    file = graph(
        [node("Div", "x two", "y")],
        {"x": (torch.int64, ["batch", 16])},
        {"y": (torch.int64, ["batch", 16])},
        {"two": torch.tensor(2)},
    )
    return Sides(source, file, (torch.arange(64).view(4, 16) - 32,))


@BAD.bad("integers differ")
def greater_or_equal() -> Sides:
    """x >= 0 in place of x > 0"""
    source = Formula(lambda s, x: x > 0)
    file = graph(
        [node("GreaterOrEqual", "x zero", "y")],
        ROWS,
        {"y": (torch.bool, ["batch", 16])},
        {"zero": 0.0},
    )
    return Sides(source, file, (randn(4, 16),))


# NaN and infinities.


@BAD.bad("not finite|inf")
def infinity_sign() -> Sides:
    """masked with +inf in place of -inf"""
    mask = torch.arange(16) % 3 == 0
    source = Formula(lambda s, x: x.masked_fill(s.mask, float("-inf")), mask=mask)
    file = graph(
        [node("Where", "mask high x", "y")],
        ROWS,
        ROWS_OUT,
        {"mask": mask, "high": float("inf")},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("not finite|nan|inf")
def infinity_made_finite() -> Sides:
    """masked with the largest negative number in place of -inf: a fully masked row is no NaN"""
    mask = torch.zeros(5, 16, dtype=torch.bool)
    mask[2] = True
    source = Formula(lambda s, x: x.masked_fill(s.mask, float("-inf")).softmax(-1), mask=mask)
    file = graph(
        [node("Where", "mask low x", "masked"), node("Softmax", "masked", "y", axis=-1)],
        {"x": (torch.float32, ["batch", 5, 16])},
        {"y": (torch.float32, ["batch", 5, 16])},
        {"mask": mask, "low": float(torch.finfo(torch.float32).min)},
    )
    return Sides(source, file, (randn(4, 5, 16),))


@BAD.bad("nan|not finite")
def nan_swallowed() -> Sides:
    """NaN comes out as 0: only an input with a NaN shows it"""
    source = Formula(lambda s, x: x * s.weight, weight=randn(16))
    file = graph(
        [
            node("Mul", "x weight", "product"),
            node("IsNaN", "product", "bad"),
            node("Where", "bad zero product", "y"),
        ],
        ROWS,
        ROWS_OUT,
        {"zero": 0.0, "weight": source.weight},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("nan|not finite|inf")
def nan_made() -> Sides:
    """a softmax without subtracting the maximum: large inputs give NaN"""
    source = Formula(lambda s, x: x.softmax(-1))
    file = graph(
        [
            node("Exp", "x", "power"),
            node("ReduceSum", "power axes", "sum", keepdims=1),
            node("Div", "power sum", "y"),
        ],
        ROWS,
        ROWS_OUT,
        {"axes": [-1]},
    )
    return Sides(source, file, (randn(4, 16),))


# Matrices, axes, activations.


@BAD.bad("output")
def matrix_transposed() -> Sides:
    """a square matrix that is almost symmetric is multiplied from the other side"""
    base = randn(16, 16)
    weight = base + base.T + 1e-4 * randn(16, 16, seed=4)
    source = Formula(lambda s, x: F.linear(x, s.weight), weight=weight)
    file = graph([node("MatMul", "x weight", "y")], ROWS, ROWS_OUT, {"weight": weight})
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("output")
def perm_transposed() -> Sides:
    """heads and tokens exchanged, there are as many of both"""
    source = Formula(lambda s, x: x.view(-1, 4, 4, 4).transpose(1, 2).reshape(-1, 64))
    file = graph(
        [
            node("Reshape", "x split", "heads"),
            node("Transpose", "heads", "turned", perm=[0, 1, 3, 2]),
            node("Reshape", "turned joined", "y"),
        ],
        {"x": (torch.float32, ["batch", 64])},
        {"y": (torch.float32, ["batch", 64])},
        {"split": [-1, 4, 4, 4], "joined": [-1, 64]},
    )
    return Sides(source, file, (randn(4, 64),))


@BAD.bad("output")
def gelu_approximated() -> Sides:
    """GELU by its tanh approximation: 5e-4"""
    source = Formula(lambda s, x: F.gelu(x))
    file = graph([node("Gelu", "x", "y", approximate="tanh")], ROWS, ROWS_OUT, opset=20)
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("output")
def weight_off() -> Sides:
    """one of 704 weights off by 2^-10"""

    def change(weight: Tensor) -> Tensor:
        weight[7, 20] *= 1 + 2**-10
        return weight

    source = linear()
    return Sides(source, with_weight(linear_file(source), "weight", change), (randn(50, 64),))


@BAD.bad("output")
def external_weight_off() -> Sides:
    """one weight in the external file off by 2^-10"""
    source, file = conv_net()

    def spoil(data: Path) -> None:
        raw = bytearray(data.read_bytes())
        values = np.frombuffer(raw, dtype=np.float32)
        place = next(i for i, v in enumerate(values) if 0.3 < abs(v) < 2)
        values[place] *= 1 + 2**-10
        data.write_bytes(raw)

    return Sides(source, with_external_data(file, spoil), (randn(3, 3, 8, 8),), ALONE)


@BAD.bad("extern|data|read|model.data", "refused")
def external_data_missing() -> Sides:
    """the file of the weights is gone"""
    source, file = conv_net()
    return Sides(source, with_external_data(file, Path.unlink), (randn(3, 3, 8, 8),), ALONE)


@BAD.bad("extern|data|read|size|bytes", "refused")
def external_data_truncated() -> Sides:
    """the file of the weights ends early"""
    source, file = conv_net()

    def spoil(data: Path) -> None:
        data.write_bytes(data.read_bytes()[:-100])

    return Sides(source, with_external_data(file, spoil), (randn(3, 3, 8, 8),), ALONE)


# Models.


@BAD.bad("output")
def model_bias_off() -> Sides:
    """in a whole model, one bias before the GroupNorm off by 2^-10"""
    source, file = conv_net()

    def change(bias: Tensor) -> Tensor:
        bias[3] *= 1 + 2**-10
        return bias

    spoiled = with_weight(file, "blocks.0.3.bias", change)
    return Sides(source, spoiled, (randn(3, 3, 8, 8),))


@BAD.bad("output|epsilon")
def model_eps_off() -> Sides:
    """in a language model, one of three norms has ten times its eps"""
    source, file = language_model()
    return Sides(source, with_attribute(file, "LayerNormalization", 1, epsilon=1e-4), (IDS,))


@BAD.bad("output|epsilon")
def model_eps_off_slightly() -> Sides:
    """one of three norms has an eps of 1.01e-5: only that norm's own hard inputs show it"""
    source, file = language_model()
    return Sides(source, with_attribute(file, "LayerNormalization", 2, epsilon=1.01e-5), (IDS,))


@BAD.bad("overflow|fp16|device|inf|finite|output", "fail or undecided")
def cast_lost() -> Sides:
    """the upcast to float32 was lost: squares of 300 overflow on a device that computes in fp16"""
    source = random_module(LlamaRMSNorm(16)).half()
    nodes = [
        node("Mul", "x x", "square"),
        node("ReduceMean", "square axes", "moment"),
        node("Add", "moment eps", "shifted"),
        node("Sqrt", "shifted", "root"),
        node("Div", "x root", "normal"),
        node("Mul", "normal weight", "y"),
    ]
    half = (torch.float16, ["batch", 6, 16])
    file = graph(
        nodes,
        {"x": half},
        {"y": half},
        {"axes": [-1], "eps": torch.tensor(1e-6).half(), "weight": source.weight},
    )
    return Sides(source, file, (randn(4, 6, 16).half(),))


@BAD.bad("output|batch|run|raises|shape")
def mask_of_one_length() -> Sides:
    """another sequence length is promised, and the causal mask is that of the example"""
    source = random_module(LanguageModel())
    file = edited(language_model()[1], promise_sequence)
    return Sides(source, file, (torch.arange(36).view(4, 9) % 11,))


def promise_sequence(found: onnx.GraphProto) -> None:
    for port in (*found.input, *found.output):
        port.type.tensor_type.shape.dim[1].ClearField("dim_value")
        port.type.tensor_type.shape.dim[1].dim_param = "sequence"
    del found.value_info[:]


# What was baked in.


@BAD.bad("batch", "fail")
def batch_baked_reshape() -> Sides:
    """a dynamic batch is declared, and a Reshape has the example's"""
    source = random_module(nn.GroupNorm(4, 8, affine=False))
    file = graph(
        [
            node("Reshape", "x groups", "grouped"),
            node("InstanceNormalization", "grouped ones zeros", "normal", epsilon=1e-5),
            node("Reshape", "normal maps", "y"),
        ],
        {"x": (torch.float32, ["batch", 8, 5, 5])},
        {"y": (torch.float32, ["batch", 8, 5, 5])},
        {
            "groups": [3, 4, -1],
            "maps": [3, 8, 5, 5],
            "ones": torch.ones(4),
            "zeros": torch.zeros(4),
        },
    )
    return Sides(source, file, (randn(3, 8, 5, 5),))


@BAD.bad("batch 7")
def batch_baked_slice() -> Sides:
    """no more than the example's four samples come out"""
    source = Formula(lambda s, x: x * s.weight, weight=randn(16))
    file = graph(
        [node("Mul", "x weight", "product"), node("Slice", "product from to", "y")],
        ROWS,
        {"y": (torch.float32, ["some", 16])},
        {"weight": source.weight, "from": [0], "to": [4]},
    )
    return Sides(source, file, (randn(4, 16),))


@BAD.bad("output")
def input_baked() -> Sides:
    """the second input is declared, and its value in the example is used"""
    y = randn(4, 16, seed=2)
    source = Formula2(lambda s, x, y: x * y)
    file = graph(
        [node("Mul", "x constant", "out")],
        {"x": (torch.float32, [4, 16]), "y": (torch.float32, [4, 16])},
        {"out": (torch.float32, [4, 16])},
        {"constant": y},
    )
    return Sides(source, file, (randn(4, 16), y))


@BAD.bad("output")
def scale_baked() -> Sides:
    """a scale that depends on the input has the value it has on the example"""
    x = randn(4, 16)
    source = Formula(lambda s, x: x / x.abs().amax(-1, keepdim=True).clamp(min=1e-3))
    file = graph(
        [node("Div", "x scale", "y")],
        {"x": (torch.float32, [4, 16])},
        {"y": (torch.float32, [4, 16])},
        {"scale": x.abs().amax(-1, keepdim=True)},
    )
    return Sides(source, file, (x,))


@BAD.bad("output")
def branch_frozen() -> Sides:
    """a branch that depends on the data was taken once and for all"""
    source = Formula(lambda s, x: x * 2 if bool(x.sum() > 0) else x)
    file = graph(
        [node("Mul", "x two", "y")],
        {"x": (torch.float32, [4, 16])},
        {"y": (torch.float32, [4, 16])},
        {"two": 2.0},
    )
    return Sides(source, file, (randn(4, 16).abs(),))


# Randomness.


@BAD.bad("random|two runs|differ|output")
def noise_in_file() -> Sides:
    """noise of 1e-6 is drawn in the file"""
    source = layer_norm()
    noise = helper.make_node("RandomNormalLike", ["x"], ["noise"], name="noise", scale=1e-3)
    file = graph(
        [
            node("LayerNormalization", "x weight bias", "normal", axis=-1, epsilon=1e-5),
            noise,
            node("Add", "normal noise", "y"),
        ],
        TOKENS,
        TOKENS_OUT,
        layer_norm_weights(source),  # type: ignore[arg-type]
    )
    return Sides(source, file, (randn(4, 6, 16),))


@BAD.bad("random|seed|differ|output")
def noise_in_source() -> Sides:
    """the source draws noise in eval mode, the file does not"""
    source = Formula(lambda s, x: x + 0.1 * torch.randn_like(x))
    file = graph([node("Identity", "x", "y")], ROWS, ROWS_OUT)
    return Sides(source, file, (randn(4, 16),))


# Two files.


@BAD.bad("zeros|constant|tiny|subnormal|not finite|nan")
def optimizer_deleted_eps() -> Sides:
    """two files, before and after the optimizer that deletes eps 1e-12"""
    source = random_module(HandLayerNorm(16, 1e-12))
    x = (randn(4, 6, 16),)
    return Sides(exported(source, x, opset=20, optimize=False), exported(source, x, opset=20), x)


@BAD.bad("output")
def bias_dropped_between_files() -> Sides:
    """two files, and in the second one Add is gone"""

    def drop(found: onnx.GraphProto) -> None:
        the(found, "Gemm").input[2] = "nothing"
        found.initializer.append(
            onnx.numpy_helper.from_array(np.zeros(11, dtype=np.float32), "nothing")
        )

    source = linear()
    return Sides(linear_file(source), edited(linear_file(source), drop), (randn(8, 64),))


@BAD.bad("not ONNX|read|parse|protobuf", "refused")
def not_onnx() -> Sides:
    """a file that is no ONNX file"""
    path = with_external_data(conv_net()[1])
    path.write_bytes(b"this is not a graph")
    return Sides(conv_net()[0], path, (randn(3, 3, 8, 8),))
