"""Correct pairs, most of them such that some fixed tolerance in use today rejects them.

They differ from their source by the order of summation, by the operators a formula is spelled in,
or by a type: never by what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onnx_cases.case import Cases, Sides
from onnx_cases.graphs import exported, graph, node
from onnx_cases.modules import (
    ConvNet,
    Formula,
    Formula2,
    GemmaRMSNorm,
    HandLayerNorm,
    LanguageModel,
    LlamaRMSNorm,
    randn,
    random_module,
)

GOOD = Cases()
ALONE = {"hard": False}
FOLDER = TemporaryDirectory(prefix="onnx_cases_")  # removed when the interpreter ends
TOKENS = {"x": (torch.float32, ["batch", 6, 16])}
ROWS = {"x": (torch.float32, ["batch", 16])}


def layer_norm(eps: float = 1e-5) -> nn.LayerNorm:
    module = random_module(nn.LayerNorm(16, eps=eps))
    assert isinstance(module, nn.LayerNorm)
    return module


def layer_norm_weights(module: nn.LayerNorm, **more: float | list[int]) -> dict[str, object]:
    return {"weight": module.weight, "bias": module.bias, **more}


# LayerNorm, spelled as exporters and optimizers spell it.


@GOOD.good(alarms=True)
def ln_decomposed() -> Sides:
    """none: LayerNorm as nine operators, on a mean of 1e4"""
    source = layer_norm()
    file = graph(
        [
            node("ReduceMean", "x axes", "mean"),
            node("Sub", "x mean", "centred"),
            node("Mul", "centred centred", "square"),
            node("ReduceMean", "square axes", "variance"),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
            node("Div", "centred deviation", "normal"),
            node("Mul", "normal weight", "scaled"),
            node("Add", "scaled bias", "y"),
        ],
        TOKENS,
        {"y": (torch.float32, ["batch", 6, 16])},
        layer_norm_weights(source, axes=[-1], eps=1e-5),
    )
    return Sides(source, file, (randn(4, 6, 16) + 1e4,))


@GOOD.good(alarms=True)
def ln_reciprocal() -> Sides:
    """none: Pow, Reciprocal and Mul in place of Mul and Div, affine folded into one Mul"""
    source = layer_norm()
    file = graph(
        [
            node("ReduceMean", "x axes", "mean"),
            node("Sub", "x mean", "centred"),
            node("Pow", "centred two", "square"),
            node("ReduceMean", "square axes", "variance"),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
            node("Reciprocal", "deviation", "scale"),
            node("Mul", "scale weight", "gain"),
            node("Mul", "centred gain", "scaled"),
            node("Add", "scaled bias", "y"),
        ],
        TOKENS,
        {"y": (torch.float32, ["batch", 6, 16])},
        layer_norm_weights(source, axes=[-1], eps=1e-5, two=2.0),
    )
    return Sides(source, file, (randn(4, 6, 16) + 1e3,))


@GOOD.good(alarms=True)
def skip_layer_norm() -> Sides:
    """none: onnxruntime fuses Add and LayerNormalization, which has ten times LayerNorm's error"""
    source = Formula2(
        lambda s, x, y: F.layer_norm(x + y, (16,), s.weight, s.bias),
        weight=layer_norm().weight.detach(),
        bias=layer_norm().bias.detach(),
    )
    file = graph(
        [
            node("Add", "x y", "sum"),
            node("LayerNormalization", "sum weight bias", "out", axis=-1, epsilon=1e-5),
        ],
        {**TOKENS, "y": (torch.float32, ["batch", 6, 16])},
        {"out": (torch.float32, ["batch", 6, 16])},
        {"weight": source.weight, "bias": source.bias},
    )
    return Sides(source, file, (randn(4, 6, 16) + 1e3, randn(4, 6, 16, seed=2)))


@GOOD.good(alarms=True)
def near_zero() -> Sides:
    """none: what is left of the difference of two norms is rounding alone"""
    source = Formula(
        lambda s, x: F.layer_norm(1e3 + x, (16,)) - F.layer_norm(x, (16,)) + s.weight,
        weight=1e-6 * randn(16),
    )
    file = graph(
        [
            node("Add", "x offset", "far"),
            node("LayerNormalization", "far ones", "normal1", axis=-1, epsilon=1e-5),
            node("LayerNormalization", "x ones", "normal2", axis=-1, epsilon=1e-5),
            node("Sub", "normal1 normal2", "difference"),
            node("Add", "difference weight", "y"),
        ],
        ROWS,
        {"y": (torch.float32, ["batch", 16])},
        {"ones": torch.ones(16), "weight": source.weight, "offset": 1e3},
    )
    return Sides(source, file, (randn(50, 16),))


# BatchNorm, folded and spelled out.


@GOOD.good()
def bn_as_affine() -> Sides:
    """none: BatchNorm folded in float64 into one scale and one shift, inputs of size 1e3"""
    source = random_module(nn.BatchNorm2d(8))
    assert isinstance(source, nn.BatchNorm2d)
    assert source.running_var is not None and source.running_mean is not None
    scale = source.weight.double() / (source.running_var.double() + source.eps).sqrt()
    shift = source.bias.double() - scale * source.running_mean.double()
    file = graph(
        [node("Mul", "x scale", "scaled"), node("Add", "scaled shift", "y")],
        {"x": (torch.float32, ["batch", 8, 5, 5])},
        {"y": (torch.float32, ["batch", 8, 5, 5])},
        {"scale": scale.float().view(8, 1, 1), "shift": shift.float().view(8, 1, 1)},
    )
    return Sides(source, file, (1e3 * randn(200, 8, 5, 5),))


@GOOD.good(alarms=True)
def instance_norm_batched() -> Sides:
    """none: InstanceNorm with eps 1e-5 on a mean of 1e3"""
    source = random_module(nn.InstanceNorm2d(8, affine=True))
    file = graph(
        [node("InstanceNormalization", "x weight bias", "y", epsilon=1e-5)],
        {"x": (torch.float32, ["batch", 8, "height", "width"])},
        {"y": (torch.float32, ["batch", 8, "height", "width"])},
        {"weight": source.weight, "bias": source.bias},
    )
    return Sides(source, file, (randn(3, 8, 7, 5) + 1e3,))


@GOOD.good(alarms=True)
def gn_centred() -> Sides:
    """none: GroupNorm as the centred decomposition that the runtime has no kernel for"""
    source = random_module(nn.GroupNorm(4, 8))
    file = graph(
        [
            node("Reshape", "x groups", "grouped"),
            node("ReduceMean", "grouped axes", "mean"),
            node("Sub", "grouped mean", "centred"),
            node("Mul", "centred centred", "square"),
            node("ReduceMean", "square axes", "variance"),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
            node("Div", "centred deviation", "normal"),
            node("Reshape", "normal maps", "shaped"),
            node("Mul", "shaped weight", "scaled"),
            node("Add", "scaled bias", "y"),
        ],
        {"x": (torch.float32, ["batch", 8, 5, 5])},
        {"y": (torch.float32, ["batch", 8, 5, 5])},
        {
            "groups": [0, 4, -1],
            "maps": [-1, 8, 5, 5],
            "axes": [2],
            "eps": 1e-5,
            "weight": source.weight.view(8, 1, 1),  # type: ignore[operator]
            "bias": source.bias.view(8, 1, 1),  # type: ignore[operator]
        },
    )
    return Sides(source, file, (randn(3, 8, 5, 5) + 1e3,))


# Size of the numbers.


def linear(scale: float = 1.0) -> Formula:
    weight = scale * randn(11, 64) / 8
    return Formula(lambda s, x: F.linear(x, s.weight, s.bias), weight=weight, bias=randn(11))


def linear_file(source: Formula) -> onnx.ModelProto:
    return graph(
        [node("Gemm", "x weight bias", "y", transB=1)],
        {"x": (torch.float32, ["batch", 64])},
        {"y": (torch.float32, ["batch", 11])},
        {"weight": source.weight, "bias": source.bias},
    )


def shuffled_file(source: Formula) -> onnx.ModelProto:
    """The products are added up in another order, so that no machine gives torch's own bits."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return graph(
        [
            node("Gather", "x order", "shuffled", axis=1),
            node("Gemm", "shuffled weight bias", "y", transB=1),
        ],
        {"x": (torch.float32, ["batch", 64])},
        {"y": (torch.float32, ["batch", 11])},
        {"order": order, "weight": source.weight[:, order], "bias": source.bias},  # type: ignore[index]
    )


@GOOD.good(alarms=True)
def logits_1e4() -> Sides:
    """none: logits of size 1e4, whose last place is 1e-3"""
    source = linear(1e4)
    return Sides(source, shuffled_file(source), (randn(50, 64),))


@GOOD.good(alarms=True)
def logits_1e8() -> Sides:
    """none: logits of size 1e8 differ by whole units"""
    source = linear(1e8)
    return Sides(source, shuffled_file(source), (randn(50, 64),))


@GOOD.good()
def cancelling_sum() -> Sides:
    """none: a sum of 256 numbers that cancel, in another order"""
    source = Formula(lambda s, x: x.sum(-1))
    file = graph(
        [node("ReduceSum", "x axes", "y", keepdims=0)],
        {"x": (torch.float32, ["batch", 256])},
        {"y": (torch.float32, ["batch"])},
        {"axes": [-1]},
    )
    return Sides(source, file, (100 * randn(100, 256),))


@GOOD.good()
def softmax_logs() -> Sides:
    """none: log-probabilities of -1e4, and some of 0"""
    source = Formula(lambda s, x: F.log_softmax(5e3 * x, -1))
    file = graph(
        [node("Mul", "x factor", "scaled"), node("LogSoftmax", "scaled", "y", axis=-1)],
        ROWS,
        {"y": (torch.float32, ["batch", 16])},
        {"factor": 5e3},
    )
    return Sides(source, file, (randn(30, 16),))


# NaN and infinities that belong there.


@GOOD.good(alarms=True)
def masked_logits() -> Sides:
    """none: masked logits are -inf on both sides"""
    mask = torch.arange(16) % 3 == 0
    source = Formula(lambda s, x: x.masked_fill(s.mask, float("-inf")), mask=mask)
    file = graph(
        [node("Where", "mask low x", "y")],
        ROWS,
        {"y": (torch.float32, ["batch", 16])},
        {"mask": mask, "low": float("-inf")},
    )
    return Sides(source, file, (randn(4, 16),))


@GOOD.good(alarms=True)
def fully_masked_row() -> Sides:
    """none: a softmax of a row that is all -inf is NaN on both sides"""
    mask = torch.zeros(5, 16, dtype=torch.bool)
    mask[2] = True
    source = Formula(lambda s, x: x.masked_fill(s.mask, float("-inf")).softmax(-1), mask=mask)
    file = graph(
        [node("Where", "mask low x", "masked"), node("Softmax", "masked", "y", axis=-1)],
        {"x": (torch.float32, ["batch", 5, 16])},
        {"y": (torch.float32, ["batch", 5, 16])},
        {"mask": mask, "low": float("-inf")},
    )
    return Sides(source, file, (randn(4, 5, 16),))


@GOOD.good(alarms=True)
def logarithm() -> Sides:
    """none: NaN below zero and -inf at zero, on both sides"""
    source = Formula(lambda s, x: torch.log(x))
    file = graph([node("Log", "x", "y")], ROWS, {"y": (torch.float32, ["batch", 16])})
    return Sides(source, file, (randn(4, 16),))


# Integers, booleans, other types.


@GOOD.good()
def argmax_tie() -> Sides:
    """none: two classes with one weight tie on every input, and the first of them is right"""
    weight, bias = randn(11, 64), randn(11, seed=3)
    weight[6], bias[6] = weight[2], bias[2]
    bias[[2, 6]] += 30
    source = Formula(
        lambda s, x: F.linear(x, s.weight, s.bias).argmax(-1), weight=weight, bias=bias
    )
    file = graph(
        [
            node("Gemm", "x weight bias", "logits", transB=1),
            node("ArgMax", "logits", "y", axis=-1, keepdims=0),
        ],
        {"x": (torch.float32, ["batch", 64])},
        {"y": (torch.int64, ["batch"])},
        {"weight": source.weight, "bias": source.bias},
    )
    return Sides(source, file, (randn(8, 64),))


@GOOD.good()
def mixed_outputs() -> Sides:
    """none: float, integer and boolean outputs"""
    source = Formula(lambda s, x: (x.relu(), (x * 8).round().to(torch.int32), x > 0))
    file = graph(
        [
            node("Relu", "x", "rest"),
            node("Mul", "x eight", "eighths"),
            node("Round", "eighths", "whole"),
            node("Cast", "whole", "count", to=onnx.TensorProto.INT32),
            node("Greater", "x zero", "positive"),
        ],
        ROWS,
        {
            "rest": (torch.float32, ["batch", 16]),
            "count": (torch.int32, ["batch", 16]),
            "positive": (torch.bool, ["batch", 16]),
        },
        {"eight": 8.0, "zero": 0.0},
    )
    return Sides(source, file, (randn(4, 16),), ALONE)


@GOOD.good()
def float64_model() -> Sides:
    """none: a float64 model and a float64 file"""
    source = linear().double()
    file = graph(
        [node("Gemm", "x weight bias", "y", transB=1)],
        {"x": (torch.float64, ["batch", 64])},
        {"y": (torch.float64, ["batch", 11])},
        {"weight": source.weight, "bias": source.bias},
    )
    return Sides(source, file, (randn(8, 64).double(),))


# Half precision.


def half(module: nn.Module, x: Tensor, opset: int = 18) -> Sides:
    source = random_module(module).half()
    return Sides(source, exported(source, (x.half(),), opset=opset), (x.half(),))


@GOOD.good(alarms=True)
def ln_fp16() -> Sides:
    """none: an fp16 LayerNorm; half an ulp of fp16 is 5e-4"""
    return half(nn.LayerNorm(64), randn(4, 50, 64) + 10)


@GOOD.good(alarms=True)
def gn_fp16() -> Sides:
    """none: an fp16 GroupNorm on a mean of 30"""
    return half(nn.GroupNorm(4, 8), randn(3, 8, 5, 5) + 30)


@GOOD.good(alarms=True)
def llama_fp16() -> Sides:
    """none: an fp16 language model whose RMSNorm upcasts"""
    source = random_module(LanguageModel(LlamaRMSNorm)).half()
    ids = torch.arange(24).view(4, 6) % 11
    return Sides(source, exported(source, (ids,)), (ids,))


@GOOD.good(alarms=True)
def bf16_rms() -> Sides:
    """none: a bf16 RMSNorm that upcasts, one ulp is 1/128"""
    source = random_module(GemmaRMSNorm(64)).bfloat16()
    x = (3 * randn(4, 50, 64)).bfloat16()
    return Sides(source, exported(source, (x,)), (x,))


# Whole models.


def with_large_head(model: nn.Module) -> nn.Module:
    """Logits of size 1e3, as confident classifiers have them."""
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(1e3)
    return model


@cache
def conv_net() -> tuple[nn.Module, onnx.ModelProto]:
    source = with_large_head(random_module(ConvNet()))
    return source, exported(source, (randn(3, 3, 8, 8),))


@GOOD.good()
def conv_net_hard() -> Sides:
    """none: convolutions, BatchNorm, GroupNorm, dynamic batch"""
    source, file = conv_net()
    return Sides(source, file, (randn(20, 3, 8, 8),))


@GOOD.good(alarms=True)
def deep_conv_net() -> Sides:
    """none: twelve residual blocks on inputs of size 100; rounding grows, well-behaved"""
    source = with_large_head(random_module(ConvNet(blocks=12)))
    x = 100 * randn(20, 3, 6, 6)
    return Sides(source, exported(source, (x,), opset=20), (x,), ALONE)


@GOOD.good(alarms=True)
def deep_linear() -> Sides:
    """none: thirty linear layers with a LayerNorm each"""
    source = random_module(
        nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(30)])
    )
    with torch.no_grad():
        source.get_parameter("29.1.weight").mul_(1e3)
    nodes, weights, last = [], {}, "x"
    for index in range(30):
        names = [f"{index}.0.weight", f"{index}.0.bias", f"{index}.1.weight", f"{index}.1.bias"]
        weights |= {name: source.get_parameter(name) for name in names}
        nodes += [
            node("Gemm", f"{last} {names[0]} {names[1]}", f"linear{index}", transB=1),
            node(
                "LayerNormalization",
                f"linear{index} {names[2]} {names[3]}",
                f"norm{index}",
                epsilon=1e-5,
            ),
        ]
        last = f"norm{index}"
    outputs = {last: (torch.float32, ["batch", 16])}
    return Sides(source, graph(nodes, ROWS, outputs, weights), (randn(50, 16),), ALONE)


@cache
def language_model() -> tuple[nn.Module, onnx.ModelProto]:
    source = with_large_head(random_module(LanguageModel()))
    return source, exported(source, (torch.arange(24).view(4, 6) % 11,))


@GOOD.good(alarms=True)
def language_model_hard() -> Sides:
    """none: token ids, causal mask of -inf, LayerNorm, GELU, dynamic batch"""
    return Sides(*language_model(), (torch.arange(120).view(20, 6) % 11,))


@GOOD.good()
def bert_eps() -> Sides:
    """none: eps 1e-12 in every norm, all of them attributes"""
    norm = partial(nn.LayerNorm, eps=1e-12)
    source = random_module(LanguageModel(norm))
    ids = torch.arange(24).view(4, 6) % 11
    return Sides(source, exported(source, (ids,), opset=20), (ids,))


# Files.


@GOOD.good()
def raw_and_optimised() -> Sides:
    """none: two files, one of them before the exporter's optimizer"""
    source, _ = conv_net()
    x = randn(3, 3, 8, 8)
    return Sides(exported(source, (x,), optimize=False), conv_net()[1], (x,))


@GOOD.good()
def external_data() -> Sides:
    """none: the weights are in a second file"""
    source, file = conv_net()
    return Sides(source, with_external_data(file), (randn(20, 3, 8, 8),), ALONE)


def with_external_data(file: onnx.ModelProto, spoil: Callable[[Path], None] | None = None) -> Path:
    """`file` on disk with its weights beside it, the bytes of which `spoil` may change."""
    folder = Path(mkdtemp(dir=FOLDER.name))
    copied = onnx.ModelProto()
    copied.CopyFrom(file)
    onnx.save_model(
        copied,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="model.data",
        size_threshold=64,
    )
    if spoil is not None:
        spoil(folder / "model.data")
    return folder / "model.onnx"


@GOOD.good(alarms=True)
def static_batch() -> Sides:
    """none: the file takes batch 4 only and promises no more"""
    source = random_module(HandLayerNorm(16, 1e-5))
    x = randn(4, 16) + 1e3
    return Sides(source, exported(source, (x,), dynamic=False), (x,))


@GOOD.good()
def dynamic_size() -> Sides:
    """none: height and width are dynamic"""
    source = random_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)))
    file = graph(
        [
            node("Conv", "x kernel shift", "maps"),
            node("InstanceNormalization", "maps weight bias", "y", epsilon=1e-5),
        ],
        {"x": (torch.float32, ["batch", 3, "height", "width"])},
        {"y": (torch.float32, ["batch", 8, "h", "w"])},
        {
            "kernel": source[0].weight,  # type: ignore[index]
            "shift": source[0].bias,  # type: ignore[index]
            "weight": source[1].weight,  # type: ignore[index]
            "bias": source[1].bias,  # type: ignore[index]
        },
    )
    return Sides(source, file, (randn(2, 3, 9, 7),))


@GOOD.good()
def renamed_ports() -> Sides:
    """none: inputs in another order and under the forward's names, outputs under new names"""
    source = Formula2(lambda s, x, y: {"difference": x - 2 * y, "ratio": x / (1 + y * y)})
    file = graph(
        [
            node("Mul", "y two", "twice"),
            node("Sub", "x twice", "out_a"),
            node("Mul", "y y", "square"),
            node("Add", "square one", "below"),
            node("Div", "x below", "out_b"),
        ],
        {"y": ROWS["x"], "x": ROWS["x"]},
        {"out_a": (torch.float32, ["batch", 16]), "out_b": (torch.float32, ["batch", 16])},
        {"one": 1.0, "two": 2.0},
    )
    return Sides(source, file, (randn(4, 16), randn(4, 16, seed=2)))


@GOOD.good()
def similarity() -> Sides:
    """none: every sample is compared with every other, as contrastive models do"""
    source = Formula2(lambda s, x, y: x @ y.transpose(0, 1))
    file = graph(
        [node("Transpose", "y", "turned", perm=[1, 0]), node("MatMul", "x turned", "out")],
        {"x": ROWS["x"], "y": ROWS["x"]},
        {"out": (torch.float32, ["batch", "batch"])},
    )
    return Sides(source, file, (1e3 * randn(50, 16), randn(50, 16, seed=2)))
