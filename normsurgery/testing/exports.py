"""What compilers and exporters make of a norm: torch.compile, torch.export, ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.spec import NormSpec
from normsurgery.testing.cases import made, modes, random_input, require, run
from normsurgery.verify.judge import judge

OPSETS = (20, 23)


def check_compile(spec: NormSpec) -> None:
    """`torch.compile(fullgraph=True, backend="aot_eager")` computes the same."""
    for training in modes(spec):
        torch._dynamo.reset()
        example = spec.examples()[0]
        module, x = made(example, training), random_input(example.inputs[0])
        expected = spec.reference(module, x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        require(judge(run(compiled, x), expected), f"{spec.name}, training={training}")


def check_export(spec: NormSpec) -> None:
    """`torch.export` takes every example, and its program computes the same."""
    for example in spec.examples():
        module, x = made(example, False), random_input(example.inputs[0])
        program = torch.export.export(module, (x,), strict=False)
        require(
            judge(run(program.module(), x), spec.reference(module, x)),
            f"{spec.name} ({example.label}), exported",
        )


def onnx_check(opset: int) -> Callable[[NormSpec], None]:
    def check(spec: NormSpec) -> None:
        """The first example becomes the operators the norm says, and onnxruntime computes it."""
        if spec.onnx is None:
            assert spec.why_not_onnx, f"{spec.name}: neither onnx nor why_not_onnx"
            return
        module, x = _onnx_case(spec)
        model = onnx_model(module, x, opset)
        operators = tuple(node.op_type for node in model.graph.node)
        expected = spec.onnx.at(opset)
        assert operators == expected, (
            f"{spec.name}: opset {opset} has {operators}, declared are {expected}"
        )
        _compare_onnx(spec, module, model, x)

    return check


def check_onnx_dynamic_batch(spec: NormSpec) -> None:
    """Exported with a dynamic batch it computes other batch sizes too."""
    if spec.onnx is None or spec.attach == "weight":
        return
    module, x = _onnx_case(spec)
    model = onnx_model(module, x, OPSETS[0], dynamic_batch=True)
    for batch in (1, 7):
        _compare_onnx(spec, module, model, random_input((batch, *x.shape[1:])).float())


def _onnx_case(spec: NormSpec) -> tuple[nn.Module, Tensor]:
    example = spec.examples()[0]
    return example.module().eval(), random_input(example.inputs[0]).float()


def onnx_model(module: nn.Module, x: Tensor, opset: int, *, dynamic_batch: bool = False) -> Any:
    """The optimised onnx.ModelProto of a module in eval."""
    sizes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    program = torch.onnx.export(
        module, (x,), dynamo=True, opset_version=opset, dynamic_shapes=sizes, verbose=False
    )
    assert program is not None
    return program.model_proto


def _compare_onnx(spec: NormSpec, module: nn.Module, model: Any, x: Tensor) -> None:
    import onnx
    import onnxruntime

    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    verdict = judge(torch.from_numpy(y), spec.reference(module, x), run(module, x))
    require(verdict, f"{spec.name} in onnxruntime, input {tuple(x.shape)}")
