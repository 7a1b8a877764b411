"""The float64 run of a graph: float64 throughout, and right, operator by operator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx.backend.test.loader import load_node_model_tests
from test_onnxfile import FLOAT, HALF, graph_model, linear_model
from torch import Tensor, nn

from normsurgery.errors import CannotRun, UsageError
from normsurgery.inputs import Inputs
from normsurgery.numerics.precision import NotFloat64
from normsurgery.onnxfile import lifting
from normsurgery.onnxfile.feeding import as_tensor, feeds
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.formulas import OPERATORS, norms
from normsurgery.onnxfile.reading import of_proto
from normsurgery.onnxfile.sessions import Session
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.runners import run_float64


def exported(model: nn.Module, inputs: Inputs, opset: int, *, optimize: bool) -> onnx.ModelProto:
    with torch.no_grad():
        program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
    written = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=opset, optimize=optimize
    )
    assert written is not None
    return written.model_proto


def against_torch(
    proto: onnx.ModelProto, model: nn.Module, inputs: Inputs, precision: torch.dtype
) -> dict[str, Verdict]:
    """The graph's float64 outputs against the module's; fp32 constants in a graph are rounded."""
    file = of_proto(proto)
    found = Float64Graph(file).run(feeds(file, inputs))
    truth = run_float64(model, inputs, "eval", seed=0).outputs
    assert len(found) == len(truth)
    pairs = zip(found.values(), truth.items(), strict=True)
    return {name: judge(mine, theirs, precision=precision) for mine, (name, theirs) in pairs}


# --- against ONNX's own cases

# What a float64 run cannot answer, or what their data does not say to eight digits.
NOT_HERE = {
    r"cast(like)?_.*FLOAT(8|4)|cast_e8m0|quantizelinear_float4": "8- and 4-bit floating types",
    r"bernoulli": "random",
    r"bitcast_.*float32": "the bits of a float32",
    r"linear_attention|causal_conv_with_state": "of opset 26, whose reference computes in float32",
    r"tfidfvectorizer|string|strnorm": "of strings, not of tensors",
    r"^adam_multiple": "of training",
    r"^scatter_with|^scatter_without": "Scatter, deprecated in opset 11",
    r"^scan_sum": "Scan of opset 8",
    r"gridsample_bicubic$|roialign_aligned|averagepool_2d_ceil_last_window": "printed to 4 digits",
    r"roialign_mode_max": "computed from a grid in float32",
}


WITHOUT_CASES = {
    "SimplifiedLayerNormalization",  # onnxruntime's
    "Bernoulli",  # random, as the next five
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "LinearAttention",
    "CausalConvWithState",
}


def own_cases() -> dict[str, Any]:
    return {case.name.removeprefix("test_"): case for case in load_node_model_tests()}


def arrays(values: Any) -> list[np.ndarray[Any, Any]] | None:
    """None where one is a sequence, an optional or of strings."""
    found = [
        onnx.numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
        for value in values
    ]
    known = all(isinstance(a, np.ndarray) and a.dtype.kind in "fiubV" for a in found)
    return found if known else None


def case_verdicts(case: Any) -> list[Verdict] | None:
    verdicts = []
    for given, expected in case.data_sets:
        inputs, outputs = arrays(given), arrays(expected)
        if inputs is None or outputs is None:
            return None
        names = [value.name for value in case.model.graph.input]
        found = Float64Graph(case.model).run(dict(zip(names, inputs, strict=False)))
        for output, array in zip(case.model.graph.output, outputs, strict=False):
            if array.dtype.kind != "V" and array.size:
                verdicts.append(judge(as_tensor(array), found[output.name]))
    return verdicts


def test_onnx_node_cases() -> None:
    """All that tensors can answer; each ONNX operator that has a formula here is among them."""
    passed: Counter[str] = Counter()
    wrong = {}
    for name, case in own_cases().items():
        if any(re.search(pattern, name) for pattern in NOT_HERE):
            continue
        verdicts = case_verdicts(case)
        if verdicts is None:
            continue
        bad = [str(verdict) for verdict in verdicts if verdict.passed is False]
        if bad:
            wrong[name] = bad
        passed.update({node.op_type for node in case.model.graph.node})
    assert not wrong
    assert sum(passed.values()) >= 1500
    formulas = {formula.__name__ for formula in OPERATORS if not formula.op_domain}
    assert formulas - set(passed) == WITHOUT_CASES


def test_every_pattern_of_what_is_left_out_is_needed() -> None:
    """Each leaves out a case that would not pass: no more is left out than must be."""
    cases = own_cases()
    for pattern, reason in NOT_HERE.items():
        hit = [case for name, case in cases.items() if re.search(pattern, name)]
        assert any(_does_not_pass(case) for case in hit), (pattern, reason)


def _does_not_pass(case: Any) -> bool:
    try:
        verdicts = case_verdicts(case)
    except (CannotRun, NotFloat64, KeyError):
        return True
    return verdicts is None or any(verdict.passed is False for verdict in verdicts)


# --- against torch, operator by operator


class ManyOperators(nn.Module):
    """What decompositions and transformers' models are made of, one output each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.dilated = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4)
        self.one = nn.Conv1d(6, 4, 3, stride=2, padding=1)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.norms = nn.ModuleList(
            [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)]
        )
        self.response = nn.LocalResponseNorm(3, alpha=0.1, k=1.5)
        self.layer = nn.LayerNorm((6, 6))
        self.rms = nn.RMSNorm(6, eps=1e-5)

    def forward(self, x: Tensor, rows: Tensor) -> dict[str, Tensor]:
        tokens = x.flatten(2).transpose(1, 2)[:, :, :]
        heads = torch.stack([tokens, tokens * 0.5], 1)
        half = self.one(x[:, :, 0].transpose(1, 2).reshape(2, 6, 4))
        return {
            "up": self.up(x),
            "dilated": self.dilated(x),
            "one": half,
            "lstm": self.lstm(x[:, 0])[0],
            "gru": self.gru(x[:, 0])[0],
            **{f"norm{i}": norm(x) for i, norm in enumerate(self.norms)},
            "response": self.response(x),
            "layer": self.layer(x),
            "rms": self.rms(x),
            "attention": F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
            "nearest": F.interpolate(x, scale_factor=2.0),
            "linear": F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
            "cubic": F.interpolate(x, size=(9, 11), mode="bicubic"),
            "average": F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            "counted": F.avg_pool2d(x, 3, 2, 1),
            "adaptive": F.adaptive_avg_pool2d(x, 1),
            "largest": F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            "reflect": F.pad(x, (1, 2, 2, 1), mode="reflect"),
            "replicate": F.pad(x, (1, 2, 2, 1), mode="replicate"),
            "constant": F.pad(x, (1, -1, 0, 2), value=0.3),
            "einsum": torch.einsum("bchw,bdhw->bcd", x, x),
            "triangle": torch.tril(x) + torch.triu(x, 1) * 2,
            "range": torch.arange(6, dtype=x.dtype) * 0.1 + x,
            "cumsum": x.cumsum(-1),
            "top": torch.topk(x, 2, -1)[0],
            "put": x.clone().index_put((rows,), x[rows] * 2),
            "scatter": torch.zeros_like(x).scatter_add(0, (x > 0).long(), x),
            "gather": x.gather(3, (rows * 2)[:, None, None, None].expand(2, 4, 6, 1)),
            "sampled": F.grid_sample(
                x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)), align_corners=False
            ),
            "gelu": F.gelu(x) + F.gelu(x, approximate="tanh"),
            "activations": F.elu(x) + F.softplus(x) + F.mish(x) + F.hardswish(x) + F.selu(x),
            "softmax": x.softmax(-1) + F.log_softmax(x * 300, 1) * 1e-3,
            "masked": x.masked_fill(x > 0, torch.finfo(torch.float32).min).softmax(-1),
            "length": F.normalize(x, dim=1) + x.norm(dim=1, keepdim=True),
            "moments": x.var((2, 3), keepdim=True) + torch.logsumexp(x, 1, keepdim=True),
            "power": (x.abs() + 0.1).pow(0.3) + torch.rsqrt(x.square() + 1e-6),
            "rounded": torch.floor(x * 3) + torch.fmod(x, 0.7) + x.sign(),
        }


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_operators_are_those_of_torch(opset: int) -> None:
    torch.manual_seed(0)
    model = ManyOperators().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5).add_(0.1)
    inputs = Inputs((torch.randn(2, 4, 6, 6), torch.tensor([0, 1])))
    proto = exported(model, inputs, opset, optimize=False)
    verdicts = against_torch(proto, model, inputs, torch.float32)
    assert not {name: str(v) for name, v in verdicts.items() if not v.passed}


def test_without_float32_constants_it_is_float64_to_the_last_digits() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 5), nn.Tanh()
    ).eval()
    inputs = Inputs((torch.randn(2, 3, 4, 4),))
    proto = exported(model, inputs, 20, optimize=False)
    (verdict,) = against_torch(proto, model, inputs, torch.float64).values()
    assert verdict.passed and verdict.max_error < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casts_to_half_precision_are_lifted(dtype: torch.dtype) -> None:
    class Upcasting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (self.weight * normed.to(x.dtype)).to(torch.float16).to(x.dtype)

    torch.manual_seed(0)
    model = Upcasting().to(dtype).eval()
    inputs = Inputs((torch.randn(4, 16, dtype=dtype),))
    proto = exported(model, inputs, 20, optimize=False)
    (verdict,) = against_torch(proto, model, inputs, torch.float32).values()
    assert verdict.passed, str(verdict)


# --- what the runtime writes


def fused_cases() -> dict[str, tuple[list[np.ndarray[Any, Any]], dict[str, Any], list[str]]]:
    """Operator -> inputs, attributes, outputs; a digit at the end tells two cases apart."""
    rng = np.random.default_rng(0)

    def r(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    gemm = {"alpha": 0.5, "beta": 2.0, "transA": 1, "transB": 1, "activation": "Relu"}
    clipped = {**conv, "activation": "HardSigmoid", "activation_params": [0.2, 0.5]}
    tokens = rng.integers(0, 9, (2, 5)).astype(np.int32)
    kinds = rng.integers(0, 2, (2, 5)).astype(np.int32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    x, s = r(2, 5, 8), r(2, 5, 8)
    tables = [r(9, 8), r(5, 8), r(2, 8), r(8), r(8)]
    skip = ["y", "", "", "sum"]
    return {
        "Gelu": ([x], {}, ["y"]),
        "FastGelu": ([x, r(8)], {}, ["y"]),
        "BiasGelu": ([x, r(8)], {}, ["y"]),
        "QuickGelu": ([x], {"alpha": 1.702}, ["y"]),
        "FusedMatMul": ([r(2, 4, 3), r(2, 5, 4)], {"alpha": 0.5, "transA": 1, "transB": 1}, ["y"]),
        "FusedGemm": ([r(4, 3), r(5, 4), r(5)], gemm, ["y"]),
        "FusedConv": ([r(2, 3, 7, 7), r(4, 3, 3, 3), r(4)], {**conv, "activation": "Relu"}, ["y"]),
        "FusedConv2": ([r(2, 3, 7, 7), r(4, 3, 3, 3), r(4), r(2, 4, 7, 7)], clipped, ["y"]),
        "SkipLayerNormalization": ([x, s, r(8), r(8), r(8)], {"epsilon": 1e-3}, skip),
        "SkipSimplifiedLayerNormalization": ([x, s, r(8), r(8)], {"epsilon": 1e-3}, skip),
        "SimplifiedLayerNormalization": ([x, r(8)], {"epsilon": 1e-3, "axis": -1}, ["y", "inv"]),
        "EmbedLayerNormalization": (
            [tokens, kinds, *tables, mask],
            {"epsilon": 1e-12},
            ["y", "lengths", "sum"],
        ),
    }


@pytest.mark.parametrize("name", fused_cases())
def test_fused_operators_are_what_onnxruntime_computes(name: str) -> None:
    arrays_, attributes, outputs = fused_cases()[name]
    operator = name.rstrip("2")
    domain = "" if operator == "SimplifiedLayerNormalization" else "com.microsoft"
    inputs = [f"i{index}" for index in range(len(arrays_))]
    node = helper.make_node(operator, inputs, outputs, domain=domain, **attributes)
    kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays_]
    given = [(n, k, a.shape) for n, k, a in zip(inputs, kinds, arrays_, strict=True)]
    made = [(output, FLOAT, None) for output in outputs if output]
    proto = graph_model([node], given, made, domains=("com.microsoft",))
    if "lengths" in outputs:
        proto.graph.output[1].type.tensor_type.elem_type = TensorProto.INT32
    fed = dict(zip(inputs, arrays_, strict=True))
    truth = Float64Graph(proto).run(fed)
    for output, value in Session(proto, level="off").run(fed).items():
        assert judge(value, truth[output]).passed, output


# --- control flow


def loop_model() -> onnx.ModelProto:
    """Sums that decay, each kept: scan outputs that are scalars and matrices, an outer value."""
    node, value = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Mul", ["state", "decay"], ["decayed"]),
            node("Add", ["decayed", "x"], ["next"]),
            node("ReduceSum", ["next"], ["total"], keepdims=0),
            node("Identity", ["going"], ["still"]),
            node("Identity", ["next"], ["kept"]),
        ],
        "body",
        [
            value("step", TensorProto.INT64, []),
            value("going", TensorProto.BOOL, []),
            value("state", FLOAT, [2, 3]),
        ],
        [
            value("still", TensorProto.BOOL, []),
            value("next", FLOAT, [2, 3]),
            value("total", FLOAT, []),
            value("kept", FLOAT, [2, 3]),
        ],
        [onnx.numpy_helper.from_array(np.array(0.7, np.float32), "decay")],
    )
    then = helper.make_graph(
        [node("Relu", ["last"], ["positive"])], "then", [], [value("positive", FLOAT, [2, 3])]
    )
    other = helper.make_graph(
        [node("Neg", ["last"], ["negative"])], "else", [], [value("negative", FLOAT, [2, 3])]
    )
    nodes = [
        node("Loop", ["times", "", "x"], ["last", "totals", "all"], body=body),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [
        ("times", TensorProto.INT64, []),
        ("flag", TensorProto.BOOL, []),
        ("x", FLOAT, [2, 3]),
    ]
    outputs = [("y", FLOAT, [2, 3]), ("totals", FLOAT, None), ("all", FLOAT, None)]
    return graph_model(nodes, inputs, outputs)


@pytest.mark.parametrize("flag", [True, False])
def test_loops_and_branches_are_what_onnxruntime_computes(flag: bool) -> None:
    fed = {"times": torch.tensor(4), "flag": torch.tensor(flag), "x": torch.randn(2, 3)}
    truth = Float64Graph(loop_model()).run(fed)
    assert truth["totals"].shape == (4,) and truth["all"].shape == (4, 2, 3)
    for name, value in Session(loop_model(), level="off").run(fed).items():
        assert judge(value, truth[name]).passed, name


def test_functions_of_the_model_are_lifted_too() -> None:
    cast = helper.make_node("Cast", ["a"], ["c"])
    cast.attribute.add(name="to", ref_attr_name="kind", type=onnx.AttributeProto.INT)
    inner = [cast, helper.make_node("CastLike", ["c", "a"], ["b"])]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("own", "Through", ["a"], ["b"], inner, opsets, ["kind"])
    node = helper.make_node("Through", ["x"], ["y"], domain="own", kind=HALF)
    proto = graph_model([node], [("x", FLOAT, [3])], [("y", FLOAT, [3])], domains=("own",))
    proto.functions.append(function)
    x = torch.tensor([1e-9, 1 / 3, 1e6])
    assert torch.equal(Float64Graph(proto).run({"x": x})["y"], x.double())


# --- it would notice


def test_a_result_that_is_not_float64_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E5M2)
    proto = graph_model([node], [("x", FLOAT, [3])], [("y", TensorProto.FLOAT8E5M2, [3])])
    with pytest.raises(NotFloat64, match=r"Cast \(node 'y'\) gave float8_e5m2"):
        Float64Graph(proto).run({"x": torch.ones(3)})
    monkeypatch.setattr(lifting, "LOWER", frozenset())  # planted: constants stay as they are
    node = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(HALF_ONES))
    proto = graph_model([node], [], [("c", HALF, [3])])
    with pytest.raises(NotFloat64, match="gave float16"):
        Float64Graph(proto).run({})


HALF_ONES = np.ones(3, np.float16)


@pytest.mark.parametrize("operator", ["RandomNormalLike", "Bernoulli"])
def test_random_numbers_have_no_truth(operator: str) -> None:
    proto = graph_model(
        [helper.make_node(operator, ["x"], ["y"])], [("x", FLOAT, [3])], [("y", FLOAT, [3])]
    )
    with pytest.raises(CannotRun, match="draws random numbers"):
        Float64Graph(proto).run({"x": torch.ones(3)})


Broken = Callable[..., tuple[Any, Any, Any]]


def outside_the_root(x: Any, axes: Any, epsilon: float) -> tuple[Any, Any, Any]:
    scale = 1 / (np.sqrt(x.var(axes, keepdims=True)) + epsilon)
    return (x - x.mean(axes, keepdims=True)) * scale, x.mean(axes, keepdims=True), scale


def unbiased(x: Any, axes: Any, epsilon: float) -> tuple[Any, Any, Any]:
    scale = 1 / np.sqrt(x.var(axes, keepdims=True, ddof=1) + epsilon)
    return (x - x.mean(axes, keepdims=True)) * scale, x.mean(axes, keepdims=True), scale


@pytest.mark.parametrize("fault", [outside_the_root, unbiased, None])
def test_a_wrong_formula_is_noticed(fault: Broken | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault is not None:
        monkeypatch.setattr(norms, "standardised", fault)
    torch.manual_seed(0)
    model = nn.LayerNorm(8).eval()
    inputs = Inputs((torch.randn(3, 8) * 0.3,))
    proto = exported(model, inputs, 20, optimize=False)
    (verdict,) = against_torch(proto, model, inputs, torch.float32).values()
    assert verdict.passed is (fault is None)


def test_values_are_given_by_name_and_unknown_names_refused() -> None:
    graph, x = Float64Graph(linear_model()), {"x": torch.randn(2, 8)}
    found = graph.run(x, ["w", "h", "x"])
    assert list(found) == ["w", "h", "x"]
    assert judge(found["x"] @ found["w"], found["h"]).passed
    assert list(graph.run(x)) == ["y"] and list(graph.run(x, "all")) == ["h", "y"]
    with pytest.raises(UsageError, match="no value 'nowhere'"):
        graph.run(x, ["nowhere"])
    with pytest.raises(CannotRun, match="reads 'x', which nothing gives"):
        graph.run({})


def test_steps_run_one_by_one_give_what_the_whole_gives() -> None:
    graph, x = Float64Graph(loop_model()), torch.randn(2, 3)
    fed = {"times": torch.tensor(2), "flag": torch.tensor(True), "x": x}
    whole = graph.run(fed, "all")
    values: dict[str, Tensor] = {**fed, "x": x.double(), **graph.constants}
    for step in graph.steps:
        values |= step.run(values)
    assert all(torch.equal(values[name], value) for name, value in whole.items())


@pytest.mark.parametrize("storage_order", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pads": 1, "strides": 2},
        {"pads": 1, "strides": 2, "dilations": 2, "ceil_mode": 1},
        {"auto_pad": "SAME_LOWER", "strides": 2},
    ],
)
def test_where_max_pool_found_its_values(
    count: int, storage_order: int, how: dict[str, Any]
) -> None:
    lengths = {"pads": 2 * count, "strides": count, "dilations": count}
    options = {key: [v] * lengths[key] if key in lengths else v for key, v in how.items()}
    node = helper.make_node(
        "MaxPool",
        ["x"],
        ["y", "i"],
        kernel_shape=[3] * count,
        storage_order=storage_order,
        **options,
    )
    x = torch.randint(-9, 9, (2, 3, *(7, 6, 5)[:count]), dtype=torch.float32)
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, list(x.shape))],
        [
            helper.make_tensor_value_info("y", FLOAT, None),
            helper.make_tensor_value_info("i", TensorProto.INT64, None),
        ],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    proto.ir_version = 10
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found, expected = Float64Graph(proto).run({"x": x}), session.run(None, {"x": x.numpy()})
    assert np.array_equal(found["y"], expected[0].astype(np.float64))
    assert np.array_equal(found["i"], expected[1])


def test_max_pool_of_minus_infinity_finds_no_padding() -> None:
    x = torch.full((1, 2, 3, 3), -torch.inf)
    node = helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, list(x.shape))],
        [
            helper.make_tensor_value_info("y", FLOAT, None),
            helper.make_tensor_value_info("i", TensorProto.INT64, None),
        ],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    expected = F.max_pool2d(x, 3, 1, 1, return_indices=True)[1]
    found = Float64Graph(proto).run({"x": x})["i"]
    assert torch.equal(found, expected + 9 * torch.arange(2).reshape(1, 2, 1, 1))
