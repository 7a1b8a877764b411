"""ONNX files: reading them, feeding them, running them; what cannot be is said in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from normsurgery.errors import CannotRead
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.feeding import DoesNotFit, as_array, as_tensor, feeds
from normsurgery.onnxfile.origins import Origin, origin
from normsurgery.onnxfile.reading import (
    all_nodes,
    floating_values,
    norm_operators,
    of_proto,
    read,
    value_types,
)
from normsurgery.onnxfile.sessions import Session
from normsurgery.verifying.judge import same_bits

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
Value = tuple[str, int, Any]


def graph_model(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[Value],
    outputs: Iterable[Value],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    *,
    opset: int = 20,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def linear_model(size: int = 8) -> onnx.ModelProto:
    """y = LayerNormalization(x @ w), with weights large enough to be put into another file."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((size, size)).astype(np.float32),
        "scale": rng.standard_normal(size).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="node_matmul"),
        helper.make_node("LayerNormalization", ["h", "scale"], ["y"], name="node_norm", axis=-1),
    ]
    values = [("x", FLOAT, ["batch", size])], [("y", FLOAT, ["batch", size])]
    return graph_model(nodes, *values, weights)


def with_external_data(folder: Path, size: int = 64) -> Path:
    path = folder / "model.onnx"
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(linear_model(size), path, **options)
    return path


# --- reading


def test_a_file_is_read_with_its_ports_opset_and_norms(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(), path)
    file = read(path)
    assert (file.path, file.opset) == (str(path), 20)
    assert [(p.name, p.dtype, p.shape) for p in file.inputs] == [("x", torch.float32, ("batch", 8))]
    assert str(file.outputs[0]) == "float32[batch, 8]"
    assert norm_operators(file.proto) == {"LayerNormalization": 1}


def test_external_data_is_loaded_and_computes_the_same(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    x = {"x": torch.randn(3, 64)}
    for held in (read(path).proto, onnx.load(path)):
        assert same_bits(Session(held).run(x)["y"], Session(linear_model(64)).run(x)["y"])


def broken(case: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(linear_model(), path)
    whole = path.read_bytes()
    if case == "missing":
        path.unlink()
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif case == "text":
        path.write_text("this is no model, it is a letter to a friend\n" * 9, encoding="utf-8")
    elif case == "zeros":
        path.write_bytes(bytes(4096))
    elif case == "pickle":
        torch.save({"a": torch.ones(3)}, path)
    elif case == "weights missing":
        path = with_external_data(folder)
        (folder / "weights.bin").unlink()
    elif case == "weights truncated":
        path = with_external_data(folder)
        data = (folder / "weights.bin").read_bytes()
        (folder / "weights.bin").write_bytes(data[:100])
    return path


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "there is no such ONNX file"),
        ("empty", "0 bytes"),
        ("truncated", "truncated"),
        ("text", "not an ONNX file"),
        ("zeros", "not an ONNX"),
        ("pickle", "not an ONNX"),
        ("weights missing", "'weights.bin', which is not beside it"),
        ("weights truncated", "'weights.bin' is truncated"),
    ],
)
def test_what_is_no_readable_file_is_said_in_one_sentence(
    case: str, says: str, tmp_path: Path
) -> None:
    path = broken(case, tmp_path)
    with pytest.raises(CannotRead) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and says in text
    assert "\n" not in text and text.endswith(".")


def invalid(case: str) -> onnx.ModelProto:
    x: list[Value] = [("x", FLOAT, [2, 3])]
    y: list[Value] = [("y", FLOAT, [2, 3])]
    node = helper.make_node
    if case == "domain":
        nodes = [node("Foo", ["x"], ["y"], name="node_foo", domain="my.ops")]
        return graph_model(nodes, x, y, domains=("my.ops",))
    if case == "dtype":
        return graph_model([node("Relu", ["x"], ["y"])], x, [("y", HALF, [2, 3])])
    if case == "shapes":
        weights = {"w": np.ones((4, 3), np.float32)}
        return graph_model([node("MatMul", ["x", "w"], ["y"])], x, y, weights)
    if case == "operator":
        return graph_model([node("Nope", ["x"], ["y"])], x, y)
    if case == "order":
        return graph_model([node("Relu", ["z"], ["y"])], x, y)
    if case == "opset":
        return graph_model([node("Relu", ["x"], ["y"])], x, y, opset=999)
    if case == "old opset":  # bfloat16 came to InstanceNormalization with opset 22
        one: list[Value] = [("scale", BF16, [3]), ("bias", BF16, [3])]
        nodes = [node("InstanceNormalization", ["x", "scale", "bias"], ["y"])]
        return graph_model(nodes, [("x", BF16, [2, 3, 4]), *one], [("y", BF16, [2, 3, 4])])
    if case == "sequence":
        proto = graph_model([node("SequenceConstruct", ["x", "x"], ["y"])], x, y)
        proto.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", FLOAT, None))
        return proto
    assert case == "string"
    nodes = [node("StringConcat", ["x", "x"], ["y"])]
    return graph_model(nodes, [("x", TensorProto.STRING, [2])], [("y", TensorProto.STRING, [2])])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("domain", "node 'node_foo' is a Foo of the domain 'my.ops'"),
        ("dtype", "Inferred elem type differs from existing elem type"),
        ("shapes", "Incompatible dimensions for matrix multiplication"),
        ("operator", "No Op registered for Nope"),
        ("order", "topologically sorted"),
        ("opset", "opset 999, the installed onnx"),
        ("old opset", "InstanceNormalization"),
        ("sequence", "output 'y' is a sequence; only tensors"),
        ("string", "input 'x' holds STRING"),
    ],
)
def test_an_invalid_model_is_refused_with_the_checkers_reason(case: str, says: str) -> None:
    with pytest.raises(CannotRead) as caught:
        of_proto(invalid(case), "model.onnx")
    text = str(caught.value)
    assert says in text, text
    assert text.startswith("model.onnx: ") and "\n" not in text and text.endswith(".")


def test_norm_operators_count_functions_by_their_calls_and_subgraphs_once() -> None:
    norm = helper.make_node("LayerNormalization", ["a", "s"], ["b"], axis=-1)
    function = helper.make_function(
        "own", "Normed", ["a", "s"], ["b"], [norm], [helper.make_opsetid("", 20)]
    )
    body = helper.make_graph(
        [helper.make_node("LpNormalization", ["x"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    nodes = [
        helper.make_node("Normed", ["x", "scale"], ["p"], domain="own"),
        helper.make_node("Normed", ["p", "scale"], ["q"], domain="own"),
        helper.make_node("If", ["flag"], ["r"], then_branch=body, else_branch=body),
        helper.make_node("SkipLayerNormalization", ["q", "r", "scale"], ["y"], domain=MICROSOFT),
    ]
    proto = graph_model(
        nodes,
        [("x", FLOAT, [2, 3]), ("flag", TensorProto.BOOL, [])],
        [("y", FLOAT, [2, 3])],
        {"scale": np.ones(3, np.float32)},
        domains=("own", MICROSOFT),
    )
    proto.functions.append(function)
    found = norm_operators(proto)
    assert found == {"LayerNormalization": 2, "LpNormalization": 2, "SkipLayerNormalization": 1}
    assert sum(node.op_type == "LayerNormalization" for node in all_nodes(proto)) == 1


MICROSOFT = "com.microsoft"


def test_value_types_are_inferred_without_the_weights() -> None:
    proto = linear_model(64)
    types = value_types(proto)
    assert (types["h"].dtype, types["h"].shape) == (torch.float32, ("batch", 64))
    assert (types["w"].shape, types["x"].shape) == ((64, 64), ("batch", 64))
    assert floating_values(proto) == ("h", "y")
    assert len(proto.graph.initializer) == 2


def test_origin_is_the_innermost_module_and_the_users_line() -> None:
    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)  # type: ignore[no-any-return]

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1.0  # type: ignore[no-any-return]

    model = Outer().eval()
    program = torch.onnx.export(model, (torch.randn(2, 8),), dynamo=True, verbose=False)
    assert program is not None
    nodes = {node.op_type: node for node in program.model_proto.graph.node}
    found = origin(nodes["LayerNormalization"])
    assert (found.fx_node, found.module) == ("layer_norm", "inner.norm")
    assert found.source.endswith("in forward: return self.norm(x)  # type: ignore[no-any-return]")
    assert Path(__file__).name in found.source
    entry = helper.make_node("Relu", ["x"], ["y"])
    assert origin(entry) == Origin("", "", "")
    for key, value in {"normsurgery.module": "a.b", "normsurgery.source": "m.py:1"}.items():
        entry.metadata_props.add(key=key, value=value)
    assert origin(entry) == Origin("", "a.b", "m.py:1")


# --- feeding


def two_inputs() -> Any:
    node = helper.make_node("Add", ["hidden", "mask"], ["y"])
    inputs: list[Value] = [("hidden", FLOAT, ["n", 4]), ("mask", FLOAT, ["n", 4])]
    return of_proto(graph_model([node], inputs, [("y", FLOAT, ["n", 4])]), "two.onnx")


def test_inputs_go_by_name_where_they_can_and_by_order_else() -> None:
    file, a, b = two_inputs(), torch.zeros(2, 4), torch.ones(2, 4)

    def first_is(inputs: Inputs, order: tuple[str, ...] | None, expected: Tensor) -> bool:
        fed = feeds(file, inputs, order)
        assert list(fed) == ["hidden", "mask"]
        return same_bits(as_tensor(fed["hidden"]), expected)

    assert first_is(Inputs((a, b)), None, a)
    assert first_is(Inputs((), {"mask": b, "hidden": a}), None, a)
    assert first_is(Inputs((b, a)), ("mask", "hidden"), a)  # the forward's own order
    assert first_is(Inputs((), {"q": b, "p": a}), ("p", "q"), a)  # other names, that order
    assert first_is(Inputs((b,), {"hidden": a}), None, a)
    assert first_is(Inputs(({"x": a, "y": [b]}, 3, None)), None, a)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (Inputs((torch.ones(2, 4),)), "takes 2 inputs (hidden: float32[n, 4], mask"),
        (Inputs((torch.ones(2, 4),) * 3), "but 3 were given"),
        (Inputs((torch.ones(2, 4), torch.ones(2, 5))), "input 'mask' takes float32[n, 4]"),
        (Inputs((torch.ones(2, 4), torch.ones(3, 4))), "n = 2 from hidden"),
        (Inputs((torch.ones(2, 4), torch.ones(2, 4).double())), "given float64[2, 4]"),
        (Inputs((torch.ones(2, 4), torch.ones(4))), "given float32[4]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name_shape_and_dtype(
    inputs: Inputs, says: str
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        feeds(two_inputs(), inputs)
    assert says in str(caught.value) and "two.onnx" in str(caught.value)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e5m2],
    ids=str,
)
def test_arrays_keep_the_bits_of_tensors(dtype: torch.dtype) -> None:
    for tensor in (torch.randn(3, 5).to(dtype), torch.zeros(0, 2).to(dtype)):
        back = as_tensor(as_array(tensor))
        assert back.dtype == dtype and back.shape == tensor.shape
        assert as_array(back).tobytes() == as_array(tensor).tobytes()


def test_python_numbers_are_fed_where_the_graph_has_inputs_for_them() -> None:
    node = helper.make_node("Mul", ["x", "by"], ["y"])
    inputs: list[Value] = [("x", FLOAT, [2]), ("by", FLOAT, [])]
    file = of_proto(graph_model([node], inputs, [("y", FLOAT, [2])]))
    fed = feeds(file, Inputs((torch.ones(2), 3.0)))
    assert fed["by"].dtype == np.float32 and fed["by"].shape == ()
