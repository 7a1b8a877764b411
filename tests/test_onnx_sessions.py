"""Sessions of onnxruntime: levels, inner values, half precision, missing kernels, large files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from test_onnxfile import BF16, FLOAT, HALF, graph_model, linear_model, with_external_data

from normsurgery.errors import CannotRun, UnknownName, UsageError
from normsurgery.onnxfile import reading, sessions
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import floating_values, norm_operators, of_proto, read
from normsurgery.onnxfile.sessions import LEVELS, Session, missing_provider, optimised
from normsurgery.verifying.judge import judge, same_bits


def spelled_out() -> onnx.ModelProto:
    """A LayerNormalization spelled out, which onnxruntime fuses at level basic."""
    node = helper.make_node
    nodes = [
        node("ReduceMean", ["x", "axes"], ["mean"], name="mean"),
        node("Sub", ["x", "mean"], ["centred"], name="sub"),
        node("Pow", ["centred", "two"], ["squares"], name="pow"),
        node("ReduceMean", ["squares", "axes"], ["variance"], name="var"),
        node("Add", ["variance", "eps"], ["shifted"], name="add"),
        node("Sqrt", ["shifted"], ["deviation"], name="sqrt"),
        node("Div", ["centred", "deviation"], ["normed"], name="div"),
        node("Mul", ["normed", "scale"], ["scaled"], name="mul"),
        node("Add", ["scaled", "bias"], ["y"], name="bias_add"),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "axes": np.array([-1]),
        "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32),
        "scale": rng.standard_normal(8).astype(np.float32),
        "bias": rng.standard_normal(8).astype(np.float32),
    }
    return graph_model(nodes, [("x", FLOAT, ["n", 8])], [("y", FLOAT, ["n", 8])], weights)


def test_off_is_the_graph_as_written_and_the_other_levels_are_not() -> None:
    proto = spelled_out()
    written = [node.op_type for node in proto.graph.node]
    assert [node.op_type for node in optimised(proto, "off").graph.node] == written
    for level in LEVELS[1:]:
        assert norm_operators(optimised(proto, level)) == {"LayerNormalization": 1}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_right_and_gives_the_same_bits_twice(level: str) -> None:
    proto, x = spelled_out(), {"x": torch.randn(5, 8) + 3}
    truth = Float64Graph(proto).run(x)["y"]
    session = Session(proto, level=level)
    first, second = session.run(x)["y"], session.run(x)["y"]
    assert judge(first, truth).passed
    assert same_bits(first, second)


def test_all_inner_values_come_from_one_session_in_their_own_dtypes() -> None:
    proto, x = spelled_out(), {"x": torch.randn(5, 8)}
    names = floating_values(proto)
    found = Session(proto, level="off", also=names).run(x)
    assert list(found) == ["y", *names[:-1]]
    truth = Float64Graph(proto).run(x, "all")
    for name in names:
        assert found[name].dtype == torch.float32
        assert judge(found[name], truth[name]).passed, name
    assert len(proto.graph.output) == 1


def test_only_what_is_wanted_is_returned() -> None:
    session = Session(spelled_out(), level="off", also=["mean", "normed"])
    assert list(session.run({"x": torch.ones(2, 8)}, wanted=["normed"])) == ["normed"]


def through_half(kind: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=FLOAT),
        helper.make_node("Mul", ["wide", "wide"], ["squared"]),
        helper.make_node("Cast", ["squared"], ["y"], to=kind),
    ]
    return graph_model(nodes, [("x", kind, ["n", 3])], [("y", kind, ["n", 3])])


@pytest.mark.parametrize(("kind", "dtype"), [(BF16, torch.bfloat16), (HALF, torch.float16)])
@pytest.mark.parametrize("rows", [4, 0])
def test_half_types_go_in_and_come_out(kind: int, dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 3).to(dtype)
    found = Session(of_proto(through_half(kind)), also=["squared"]).run({"x": x})
    assert found["y"].dtype == dtype and found["squared"].dtype == torch.float32
    assert same_bits(found["y"], (x.float() * x.float()).to(dtype))


def test_integers_and_booleans_go_in_and_come_out() -> None:
    nodes = [helper.make_node("Where", ["keep", "ids", "other"], ["y"])]
    ids = TensorProto.INT64
    inputs = [("keep", TensorProto.BOOL, [3]), ("ids", ids, [3]), ("other", ids, [3])]
    proto = graph_model(nodes, inputs, [("y", ids, [3])])
    keep, kept, other = torch.tensor([True, False, True]), torch.arange(3), -torch.ones(3).long()
    found = Session(proto).run({"keep": keep, "ids": kept, "other": other})
    assert torch.equal(found["y"], torch.tensor([0, -1, 2]))


def sentence(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text and text.endswith(".")
    return text


def test_a_missing_kernel_names_operator_runner_and_dtype() -> None:
    node = helper.make_node("Mul", ["x", "x"], ["y"], name="node_mul")
    proto = graph_model([node], [("x", BF16, [2])], [("y", BF16, [2])])
    with pytest.raises(CannotRun) as caught:
        Session(of_proto(proto, "m.onnx"))
    text = sentence(caught.value)
    for part in ("m.onnx", "CPUExecutionProvider", "Mul", "bfloat16", "'node_mul'", "Export in"):
        assert part in text
    assert caught.value.exit_code == 3


def test_a_kernel_that_fails_on_the_input_names_the_node() -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="node_view")
    weights = {"shape": np.array([2, 4])}
    proto = graph_model([node], [("x", FLOAT, ["n", 3])], [("y", FLOAT, None)], weights)
    with pytest.raises(CannotRun) as caught:
        Session(proto).run({"x": torch.ones(2, 3)})
    assert "Reshape (node 'node_view') fails" in sentence(caught.value)
    with pytest.raises(CannotRun, match=r"Reshape \(node 'node_view'\) fails in float64"):
        Float64Graph(proto).run({"x": torch.ones(2, 3)})


def test_a_graph_that_the_runtime_rejects_is_said_so() -> None:
    node = helper.make_node("Nothing", ["x"], ["y"], domain="com.microsoft")
    proto = graph_model(
        [node], [("x", FLOAT, [2])], [("y", FLOAT, [2])], domains=("com.microsoft",)
    )
    with pytest.raises(CannotRun) as caught:
        Session(proto)
    assert "rejects the graph" in sentence(caught.value) and "Nothing" in str(caught.value)


def test_wrong_options_are_refused() -> None:
    proto = linear_model()
    with pytest.raises(UnknownName, match="optimisation level 'most'"):
        Session(proto, level="most")
    with pytest.raises(UnknownName, match="runner 'tpu'"):
        Session(proto, runner="tpu")
    with pytest.raises(UnknownName, match="runner 'tpu'"):
        optimised(proto, "all", "tpu")
    with pytest.raises(UsageError, match="no value 'nowhere'"):
        Session(proto, also=["nowhere"])
    with pytest.raises(UsageError, match="takes the inputs x, not z"):
        Session(proto).run({"z": torch.ones(1, 8)})


def test_a_provider_that_is_not_there_is_a_reason_and_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = ["CPUExecutionProvider"]
    monkeypatch.setattr(sessions.onnxruntime, "get_available_providers", lambda: available)
    assert missing_provider("cpu") == ""
    for runner in ("cuda", "tensorrt"):
        assert "onnxruntime-gpu" in missing_provider(runner)
        with pytest.raises(CannotRun, match=f"{runner}: the installed onnxruntime has no"):
            Session(linear_model(), runner=runner)


def test_a_provider_that_is_installed_but_cannot_start_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = [*sessions.onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(sessions.onnxruntime, "get_available_providers", lambda: available)

    def cannot(*args: object) -> object:
        raise RuntimeError("libcublas is missing")

    monkeypatch.setattr(sessions, "_start", cannot)
    sessions._unusable.cache_clear()
    assert "does not start: libcublas is missing" in missing_provider("cuda")
    sessions._unusable.cache_clear()


def test_providers_that_take_what_a_runner_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(sessions.PROVIDERS.values())
    monkeypatch.setattr(sessions.onnxruntime, "get_available_providers", lambda: every)
    cpu, cuda = ("CPUExecutionProvider", {}), ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert sessions._providers("cpu") == [cpu]
    assert sessions._providers("cuda") == [cuda, cpu]
    assert sessions._providers("tensorrt") == [("TensorrtExecutionProvider", {}), cuda, cpu]


def test_a_model_too_large_for_one_message_is_run_by_path_and_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit moved down: the code path of 2 GB without the 2 GB."""
    path = with_external_data(tmp_path)
    x = {"x": torch.randn(2, 64)}
    expected = Session(linear_model(64)).run(x)["y"]
    for module in (sessions, reading):
        monkeypatch.setattr(module, "LARGE_FILE", 1000)

    file = read(path)
    for model in (file, file.proto):
        assert same_bits(Session(model).run(x)["y"], expected)
    inner = Session(file, level="off", also=["h"]).run(x)
    assert judge(inner["h"], Float64Graph(file).run(x, ["h"])["h"]).passed
    assert norm_operators(optimised(file.proto, "all")) == {"LayerNormalization": 1}
