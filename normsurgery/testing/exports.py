"""What compilers and exporters make of a norm: torch.compile, torch.export, ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.spec import NormSpec
from normsurgery.testing.cases import hard_inputs, made, modes, random_input, require, run
from normsurgery.verifying.judge import Verdict, judge

OPSETS = (18, 20, 21, 23, 24)  # where an operator of a norm begins or changes
BATCHES = (1, 7)


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
        """The first example, with a dynamic batch, becomes the operators that the norm says; the
        checker takes them, and onnxruntime computes them as well as torch on hard inputs."""
        if spec.onnx is None:
            assert spec.why_not_onnx, f"{spec.name}: neither onnx nor why_not_onnx"
            return
        module, x = _onnx_case(spec)
        model = onnx_model(module, x, opset, dynamic_batch=spec.attach != "weight")
        operators = tuple(node.op_type for node in model.graph.node)
        expected = spec.onnx.at(opset)
        assert operators == expected, (
            f"{spec.name}: opset {opset} has {operators}, declared are {expected}"
        )
        session = _session(model)
        for label, hard in _onnx_inputs(x, spec.attach != "weight"):
            verdict = _judged(spec, module, _computed(session, hard), hard)
            if not _within(verdict):
                raise AssertionError(f"{spec.name}, opset {opset}, onnxruntime, {label}: {verdict}")

    return check


def _onnx_case(spec: NormSpec) -> tuple[nn.Module, Tensor]:
    example = spec.examples()[0]
    torch.manual_seed(0)
    return example.module().eval(), random_input(example.inputs[0]).float()


def onnx_model(module: nn.Module, x: Tensor, opset: int, *, dynamic_batch: bool = False) -> Any:
    """The onnx.ModelProto that `normsurgery.export` writes for a module in eval, on one input."""
    from normsurgery.exporting.canonical import canonicalised
    from normsurgery.exporting.tracing import trace
    from normsurgery.exporting.translating import translate
    from normsurgery.inputs import Inputs
    from normsurgery.treecopy import tree_copy

    inputs = Inputs((x,), {})
    canonical, _ = canonicalised(tree_copy(module, clone=True), inputs)
    program = trace(canonical, inputs, {0: "batch"} if dynamic_batch else None)
    return translate(program, opset).optimised


def _onnx_inputs(x: Tensor, dynamic_batch: bool) -> Iterator[tuple[str, Tensor]]:
    shape = tuple(x.shape)
    yield "example", x
    for label, hard in hard_inputs(shape):
        yield label, hard.float()
    yield "mean 1e3", (random_input(shape, seed=2) + 1e3).float()
    yield "constant 100.3", torch.full(shape, 100.3)
    yield "zeros", torch.zeros(shape)
    for batch in BATCHES if dynamic_batch else ():
        yield f"batch {batch}", random_input((batch, *shape[1:])).float()


def _session(model: Any) -> Any:
    import onnx
    import onnxruntime

    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _computed(session: Any, x: Tensor) -> Tensor:
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def _judged(spec: NormSpec, module: nn.Module, y: Tensor, x: Tensor) -> Verdict:
    """Judged with what one rounding of the input moves: at a large mean that is much, and torch
    may be spared it by luck."""
    moved = torch.nextafter(
        x, torch.where(random_input(tuple(x.shape), seed=3) > 0.6, 1e38, -1e38).float()
    )
    return judge(y, spec.reference(module, x), run(module, x), spec.reference(module, moved))


def _within(verdict: Verdict) -> bool:
    """Passed; or UNDECIDED, since the input is ill-conditioned, and yet within what is allowed."""
    return verdict.passed is True or (verdict.passed is None and verdict.factor <= 1.0)
