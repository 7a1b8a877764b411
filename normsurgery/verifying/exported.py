"""An export, verified: every form that the model took on its way to the file, and the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotRead
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import OnnxFile, norm_operators, of_proto
from normsurgery.verifying.comparing import Options
from normsurgery.verifying.evidence import Evidence
from normsurgery.verifying.graphs import verify_graph
from normsurgery.verifying.sides import parameter_names
from normsurgery.verifying.sources import Candidate, OnnxCandidate, Tensors, TorchCandidate
from normsurgery.verifying.staging import Form

if TYPE_CHECKING:
    from onnx import ModelProto

_NO_NORMS = frozenset({"aten::linalg_vector_norm", "aten::norm", "aten::normal"})


def verify_export(
    source: nn.Module | ExportedProgram,
    inputs: Inputs,
    written: OnnxFile,
    *,
    program: ExportedProgram | None = None,
    raw: ModelProto | None = None,
    optimised: ModelProto | None = None,
    on: Sequence[str] = ("cpu",),
    require_runner: Sequence[str] = (),
    hard: bool = True,
    intermediates: bool = True,
    allow_batch_stats: bool = False,
    seed: int = 0,
    memory: int | None = None,
) -> Evidence:
    """Judge the written file as `verify` does, and each form before it as a stage of its own.

    Args:
        source: the model as the user gave it: before folding, before rounding to fp16, in any mode.
        inputs: of one call of it, in its own types.
        program: what was traced, in the type of the graph; its values are looked for inside the
            graph. raw, optimised: the graph before and after the optimiser.
        allow_batch_stats: a sample may depend on its batch; it is said, and no failure.
        Everything else as `verify` takes it, and what is raised as there.
    """
    options = Options(
        on, require_runner, hard, intermediates, seed, memory, allow_batch_stats=allow_batch_stats
    )
    order = parameter_names(source)
    forms = [*_programs(program), *_graphs(order, raw, optimised, written)]
    return verify_graph(source, written, inputs, options, forms=forms, program=program)


def _programs(program: ExportedProgram | None) -> Iterator[Form]:
    if program is not None:
        calls = sum(node.op == "call_function" for node in program.graph.nodes)
        candidate = TorchCandidate(program.module())
        yield Form("exported program", "cpu", candidate, _norm_calls(program), calls)


def _norm_calls(program: ExportedProgram) -> dict[str, int]:
    """Norms that the trace left whole: operator of torch -> count."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        name = str(getattr(getattr(node.target, "_schema", None), "name", ""))
        if node.op == "call_function" and "norm" in name and name not in _NO_NORMS:
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _graphs(
    order: tuple[str, ...],
    raw: ModelProto | None,
    optimised: ModelProto | None,
    written: OnnxFile,
) -> Iterator[Form]:
    for name, proto in (("raw graph", raw), ("optimised graph", optimised)):
        if proto is None or proto is written.proto:
            continue
        candidate: Candidate
        try:
            candidate = OnnxCandidate(of_proto(proto), order, level="off")
        except CannotRead as error:
            candidate = _Invalid(str(error))
        yield Form(name, "cpu", candidate, norm_operators(proto), len(proto.graph.node))


class _Invalid:
    """A graph that is not valid ONNX, which no runtime need run."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def run(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        raise CannotRead(self._reason)

    def missing(self, runner: str) -> str:
        return ""
