"""The graph says the right thing; which node does the runtime compute badly?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from normsurgery.blaming.setting import Looked, Setting
from normsurgery.errors import NormsurgeryError
from normsurgery.onnxfile.reading import OnnxFile, of_proto
from normsurgery.onnxfile.sessions import optimised
from normsurgery.verifying.evidence import Comparison
from normsurgery.verifying.inside import look_inside
from normsurgery.verifying.judge import Verdict
from normsurgery.verifying.sources import OnnxCandidate, as_taken
from normsurgery.verifying.stages import InnerValue
from normsurgery.verifying.trials import hold

LEVELS = ("off", "all")


@dataclass(frozen=True)
class Kernel:
    """value, node, operator: as the runtime has them, where `level` is not "off" maybe fused ones.
    verdict: the node's own error. case: label of the input."""

    value: str
    node: str
    operator: str
    verdict: Verdict
    case: str
    level: str
    detail: str


def badly_computed(setting: Setting) -> Kernel | None:
    """The first node that onnxruntime computes worse than it may on what it is given there.

    On the inputs where an output is wrong, first as the graph is written, then as onnxruntime
    rewrites it; at last on the example, where the outputs are right everywhere.
    """
    for level in LEVELS:
        candidate = OnnxCandidate(setting.file, setting.source.order, level)
        for one in setting.looked:
            verdict = _wrong(candidate, one)
            if verdict is not None:
                return _first(setting, one, level, verdict)
    return next(_failing(setting, setting.file, setting.looked[0], "off"), None)


def _wrong(candidate: OnnxCandidate, one: Looked) -> Verdict | None:
    """The verdict on the first output that is wrong, or that overflows where the truth does not."""
    for result in hold(one.trial, candidate, "cpu"):
        if not isinstance(result, Comparison):
            continue
        verdict = result.verdict
        lost = verdict.passed is None and any((verdict.nonfinite or {}).values())
        if verdict.passed is False or lost:
            return verdict
    return None


def _first(setting: Setting, one: Looked, level: str, outputs: Verdict) -> Kernel:
    try:
        file = setting.file
        if level != "off":
            file = of_proto(optimised(file.proto, level))
        found = next(_failing(setting, file, one, level), None)
        return found or _largest(setting, file, one, level, outputs)
    except NormsurgeryError as error:
        return _refused(setting, one, level, outputs, str(error))


def _failing(setting: Setting, file: OnnxFile, one: Looked, level: str) -> Iterator[Kernel]:
    """Nodes whose result is wrong, in graph order; then those that overflow the type they have."""
    values = _values(setting, file, one)
    for value in values:
        if value.verdict.passed is False:
            yield _kernel(value, one, level, "the operation is right, its kernel is not")
    for value in values:
        if any((value.verdict.nonfinite or {}).values()):
            yield _kernel(value, one, level, "its result exceeds the type the graph computes in")


def _values(setting: Setting, file: OnnxFile, one: Looked) -> tuple[InnerValue, ...]:
    given = as_taken(file, one.case.inputs)
    order = setting.source.order
    return look_inside(file, given, order=order, seed=setting.seed).values


def _largest(setting: Setting, file: OnnxFile, one: Looked, level: str, outputs: Verdict) -> Kernel:
    """Every node is as good as it may be on what it reads, and together they are not: the node that
    multiplies the errors of what it reads by most, as the difference of two large numbers does."""
    values = {value.value: value for value in _values(setting, file, one)}
    nodes = {name: node for node in file.proto.graph.node for name in node.output}

    def growth(value: InnerValue) -> float:
        read = [values[name].total_ulps for name in nodes[value.value].input if name in values]
        before = max([1.0, *(ulps for ulps in read if ulps == ulps)])
        return value.total_ulps / before if value.total_ulps == value.total_ulps else 0.0

    if not values:
        return _refused(setting, one, level, outputs, "")
    worst = max(values.values(), key=growth)
    detail = (
        f"every node is right on what it reads, and this one multiplies the error it inherits by "
        f"{growth(worst):.3g}"
    )
    return _kernel(worst, one, level, detail)


def _kernel(value: InnerValue, one: Looked, level: str, detail: str) -> Kernel:
    fused = "" if level == "off" else f"in the graph as onnxruntime ({level}) rewrites it: "
    return Kernel(
        value.value,
        value.node,
        value.operator,
        value.verdict,
        one.case.label,
        level,
        f"{fused}{detail}",
    )


def _refused(setting: Setting, one: Looked, level: str, outputs: Verdict, reason: str) -> Kernel:
    """The runtime does not run it; it often says which node it is."""
    nodes = setting.graph.nodes
    text = f"{reason} {outputs.reason}"
    named = re.search(r"[Nn]ode '([^']+)'", text)
    node = next((n for n in nodes if named and n.name == named.group(1)), nodes[-1])
    detail = reason or outputs.reason
    value = next((name for name in node.output if name), "")
    return Kernel(value, node.name, node.op_type, outputs, one.case.label, level, detail)


def producer_of(setting: Setting, kernel: Kernel) -> onnx.NodeProto | None:
    """The node of the file that makes the value, or had the name, which the runtime kept."""
    position = setting.graph.producer.get(kernel.value)
    if position is not None:
        return setting.graph.nodes[position]
    return next((n for n in setting.graph.nodes if n.name == kernel.node), None)
