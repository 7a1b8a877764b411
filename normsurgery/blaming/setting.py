"""Both sides of a comparison, the inputs on which to look for a fault, and the truth there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.blaming.rebuilding import Rebuilt, rebuilt
from normsurgery.blaming.reference import TRACED, Reference
from normsurgery.blaming.views import Values, View
from normsurgery.errors import CannotTrace, NormsurgeryError
from normsurgery.onnxfile.feeding import as_tensor
from normsurgery.onnxfile.origins import source_line
from normsurgery.onnxfile.reading import OnnxFile, Origin
from normsurgery.verifying.compare import one_line
from normsurgery.verifying.comparing import Comparing
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.sources import OnnxSource, Source, TorchSource, fed
from normsurgery.verifying.trials import Trial, pairs
from normsurgery.verifying.values import SourceValues

MOST_CASES = 5
_POOR = ("one NaN", "one Inf", "squares overflow", "subnormal", "1e19", "1e-20")


@dataclass
class Looked:
    """One input: what feeds the graph, its own float64 values, the outputs it should have."""

    trial: Trial
    fed: Values
    plain: Values
    truth: Mapping[str, Tensor]
    verdict: Verdict

    @property
    def case(self) -> Case:
        return self.trial.case


@dataclass
class Setting:
    """Everything blame works on.

    graph: the file. source: the side that is right. looked: the inputs, those first on which the
    float64 meaning of the graph is wrong. reference: over the same inputs.
    """

    file: OnnxFile
    graph: View
    source: Source
    looked: list[Looked]
    reference: Reference
    seed: int

    @property
    def fed(self) -> list[Values]:
        return [one.fed for one in self.looked]

    @property
    def plain(self) -> list[Values]:
        return [one.plain for one in self.looked]


def set_up(
    comparing: Comparing,
    cases: Sequence[Case],
    original: nn.Module | ExportedProgram | OnnxFile,
    seed: int,
) -> Setting:
    """Look at every case, choose the telling ones, and make the reference for those.

    Raises CannotTrace where the source takes none of the inputs.
    """
    file, source = comparing.graph, comparing.source
    graph = View(file.proto)
    looked = [one for case in cases for one in _looked(graph, file, source, case, seed)]
    if not looked:
        raise CannotTrace(
            "the source gives nothing to compare with on any input. Give inputs that it takes."
        )
    chosen = chosen_cases(looked)
    if isinstance(source, OnnxSource):
        reference = _of_graph(source, chosen)
    else:
        assert isinstance(source, TorchSource)
        reference, chosen = _of_torch(_traceable(original, source), file, source, chosen)
    return Setting(file, graph, source, chosen, reference, seed)


def _looked(graph: View, file: OnnxFile, source: Source, case: Case, seed: int) -> list[Looked]:
    trial = Trial(source, case, seed)
    truth = trial.truth
    if isinstance(truth, Exception):
        return []
    try:
        given = doubled(fed(file, case.inputs, source.order))
    except NormsurgeryError:
        return []
    plain = graph.run(given)
    verdict = worst(outputs_judged(graph, plain, truth))
    return [Looked(trial, given, plain, truth, verdict)]


def chosen_cases(looked: Sequence[Looked]) -> list[Looked]:
    """The example, a few on which the outputs are wrong, worst first, and a few of the others;
    ordinary numbers before infinities."""

    def order(item: tuple[int, Looked]) -> tuple[bool, bool, int]:
        position, one = item
        return (one.case.label in _POOR, one.verdict.passed is not False, position)

    ranked = [one for _, one in sorted(enumerate(looked), key=order)]
    chosen = ranked[: MOST_CASES - 1]
    if looked[0] not in chosen:
        chosen.append(looked[0])
    wrong = [one for one in ranked if one.verdict.passed is False]
    if wrong and wrong[0] not in chosen:
        chosen.append(wrong[0])
    return chosen


def outputs_judged(
    graph: View, values: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, Verdict]:
    """Each output of the graph in float64 against the source's, but for rounded constants."""
    paired = pairs(truth, dict.fromkeys(graph.outputs, torch.empty(0)))
    if isinstance(paired, str):
        return {"": Verdict(False, paired)}
    return {new: _judged(graph, values, new, truth[old]) for old, new in paired}


def _judged(graph: View, values: Mapping[str, Tensor], name: str, truth: Tensor) -> Verdict:
    if name not in values:
        return Verdict(False, "the graph does not run in float64 on this input")
    dtype = graph.dtype(name)
    floating = dtype is not None and dtype.is_floating_point
    return judge(values[name], truth, precision=dtype if floating else None)


def worst(verdicts: Mapping[str, Verdict]) -> Verdict:
    """The failed verdict, else any, that would need the largest tolerance."""
    severity = {False: 2, True: 1, None: 0}
    return max(
        verdicts.values(),
        key=lambda v: (severity[v.passed], v.factor if v.factor == v.factor else 0.0),
    )


def doubled(fed: Mapping[str, Any]) -> Values:
    tensors = {name: as_tensor(array) for name, array in fed.items()}
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def _of_graph(source: OnnxSource, looked: Sequence[Looked]) -> Reference:
    """The source is an ONNX graph itself."""
    view = View(source.file.proto)
    cases = []
    for one in looked:
        cases.append(view.run(doubled(fed(source.file, one.case.inputs, source.order))))
    return Reference(view, cases, view.inputs, view.outputs)


def _of_torch(
    model: Any, file: OnnxFile, source: TorchSource, looked: list[Looked]
) -> tuple[Reference, list[Looked]]:
    """The first ONNX form of the source that computes what the source does, and its traced values;
    the traced values alone where there is no such form."""
    last: tuple[Reference, list[Looked]] | None = None
    reason = ""
    for made in rebuilt(model, file, looked[0].case.inputs):
        try:
            traced, kept = _traced(made.program, looked)
        except Exception as error:  # the traced program may refuse what the model takes
            reason = one_line(error)
            continue
        graph = made.like(file)
        found = None if graph is None else _with_graph(made, graph, source, traced, kept)
        if found is not None:
            return found, kept
        last = last or (_of_program(made.program, traced), kept)
    if last is None:
        raise CannotTrace(
            f"the source cannot be traced, so its inner values are not known ({reason})."
            " Give an ONNX file of the source instead."
        )
    return last


def _traceable(original: Any, source: TorchSource) -> nn.Module | ExportedProgram:
    """The program that was given, or the module with the weights as they are in the graph."""
    whole = isinstance(original, ExportedProgram) and source.rounded_to is None
    return original if whole else source.module


def _traced(
    program: ExportedProgram, looked: Sequence[Looked]
) -> tuple[list[Values], list[Looked]]:
    """The traced values of every case that the program takes: it may be fixed to one size."""
    values = SourceValues(program)
    found, kept = [], []
    failure: Exception | None = None
    for one in looked:
        try:
            found.append(values.float64(one.case.inputs))
            kept.append(one)
        except Exception as error:  # sizes that the tracing has fixed
            failure = error
    if failure is not None and not kept:
        raise failure
    names = values.constants
    renamed = [{names.get(n, n): value for n, value in case.items()} for case in found]
    return [{f"{TRACED}{n}": value for n, value in case.items()} for case in renamed], kept


def _of_program(program: ExportedProgram, traced: list[Values]) -> Reference:
    inputs = [f"{TRACED}{n}" for n in program.graph_signature.user_inputs if isinstance(n, str)]
    outputs = [f"{TRACED}{n}" for n in program.graph_signature.user_outputs if isinstance(n, str)]
    return Reference(None, traced, inputs, outputs, origins_of(program), dtypes_of(program))


def _with_graph(
    made: Rebuilt,
    graph: ModelProto,
    source: TorchSource,
    traced: list[Values],
    looked: Sequence[Looked],
) -> Reference | None:
    """The reference with an ONNX form; None where that form computes something else itself."""
    from normsurgery.onnxfile.reading import of_proto

    try:
        file = of_proto(graph)
        view = View(graph)
        cases = []
        for one, extra in zip(looked, traced, strict=True):
            values = view.run(doubled(fed(file, one.case.inputs, source.order)))
            if worst(outputs_judged(view, values, one.truth)).passed is False:
                return None
            cases.append({**values, **extra})
    except NormsurgeryError:
        return None
    origins, dtypes = origins_of(made.program), dtypes_of(made.program)
    return Reference(view, cases, view.inputs, view.outputs, origins, dtypes)


def origins_of(program: ExportedProgram) -> dict[str, Origin]:
    """Module and source line of every node of a traced program."""
    found = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        module = next((str(path) for path, _ in reversed(list(stack.values()))), "")
        if node.op == "call_function":
            found[node.name] = Origin(node.name, module, source_line(node.meta.get("stack_trace")))
    return found


def dtypes_of(program: ExportedProgram) -> dict[str, torch.dtype]:
    """The types in which a traced program computes its values."""
    values = ((node.name, node.meta.get("val")) for node in program.graph.nodes)
    return {f"{TRACED}{name}": v.dtype for name, v in values if isinstance(v, Tensor)}
