"""What an exported model went through, judged step by step, and what was compared inside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from normsurgery.verifying.judge import Verdict


@dataclass(frozen=True)
class Stage:
    """One form of the model on its way: judged by its outputs, with the norm operators it has.

    name: "exported program", "graph in float64" (what the graph says, without any kernel), "raw
        graph", "optimised graph", "onnxruntime off" (basic, extended, all), each of the last for
        the runner it names.
    runner: "float64", "cpu", "cuda" or "tensorrt".
    operators: norm operators, name -> count; a fusion that did not happen is seen here.
    verdict: of the output that would need the largest tolerance, over the inputs of the stage.
    """

    name: str
    runner: str
    verdict: Verdict
    operators: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 0

    def __str__(self) -> str:
        norms = ", ".join(f"{count} {name}" for name, count in self.operators.items()) or "no norm"
        return f"{self.name} ({self.runner}): {norms}; {self.verdict}"


@dataclass(frozen=True)
class InnerValue:
    """One floating value inside the graph, in graph order.

    value, node, operator: names in the ONNX file. module: path in the source model ("" unknown).
    source: "file.py:123 in forward: code". against: "source" where the source model has that value
        too, "graph" where the truth is the graph's own float64 run.
    verdict: of the local error: the runner's value against the float64 value of this node for what
        the runner itself fed to it.
    total_ulps: distance of the runner's value from the float64 run of the whole graph (local error
        and all that came before), in ulp of the largest value.
    """

    value: str
    node: str
    operator: str
    module: str
    source: str
    against: Literal["source", "graph"]
    verdict: Verdict
    total_ulps: float = math.nan

    def __str__(self) -> str:
        place = f" of {self.module}" if self.module else ""
        return f"{self.value} ({self.operator}{place}): {self.verdict}"


@dataclass(frozen=True)
class Coverage:
    """How much of a graph was compared.

    floating: floating values of the graph. compared: those compared with a float64 truth.
    corresponding: those of them that the source model has too.
    """

    floating: int
    compared: int
    corresponding: int

    @property
    def share(self) -> float:
        return self.compared / self.floating if self.floating else 0.0

    def __str__(self) -> str:
        return (
            f"{self.compared} of {self.floating} floating values compared ({self.share:.0%}), "
            f"{self.corresponding} of them with a value of the source"
        )


@dataclass(frozen=True)
class Blame:
    """The first operation that diverges.

    kind: "graph": the operation says something else than the source (shown in float64); "kernel":
        it says the same, and the runner computes it badly; "input": nothing in the graph computes
        what the source computes there (an input or a constant is another).
    node, operator, value: of the ONNX file. fx_node: of the traced source. module: its path.
    source: "file.py:123 in forward: code".
    verdict: its local error, fed with the reference's own inputs. inherited: the largest relative
        error that its inputs had in the run that diverged.
    case: label of the input. detail: one sentence on what differs, e.g. "epsilon 1e-06, the source
        has 1e-05".
    """

    kind: Literal["graph", "kernel", "input"]
    node: str
    operator: str
    value: str
    fx_node: str
    module: str
    source: str
    verdict: Verdict
    inherited: float
    case: str
    detail: str = ""

    def __str__(self) -> str:
        place = f" of {self.module}" if self.module else ""
        text = f"{self.node} ({self.operator}){place} diverges first ({self.kind}, {self.case})"
        parts = [text, self.detail, str(self.verdict), self.source]
        return "; ".join(part for part in parts if part)
