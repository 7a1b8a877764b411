"""The forms that a model takes on its way, each judged apart, so that blame is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normsurgery.errors import CannotRun, NormsurgeryError
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import OnnxFile, norm_operators
from normsurgery.onnxfile.sessions import LEVELS, optimised
from normsurgery.verifying.compare import Results, one_line
from normsurgery.verifying.sources import Candidate, OnnxCandidate, Tensors, fed
from normsurgery.verifying.stages import Stage
from normsurgery.verifying.trials import Trial, hold, worst_of

if TYPE_CHECKING:
    from onnx import ModelProto

# Few, since every stage pays for them; the last one, which users run, is judged on all.
STAGED_ON = ("example", "mean 1000", "tiny variance", "zeros", "random ids")


@dataclass(frozen=True)
class Form:
    """One form of the model: its name as a stage, and how it is run."""

    name: str
    runner: str
    candidate: Candidate
    operators: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 0


@dataclass(frozen=True)
class Meaning:
    """What a graph says, computed in float64: a candidate without any kernel."""

    graph: Float64Graph
    file: OnnxFile
    order: tuple[str, ...]

    def run(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        values = self.graph.run(fed(self.file, inputs, self.order))
        return {port.name: values[port.name] for port in self.file.outputs}

    def missing(self, runner: str) -> str:
        return ""


class Stages:
    """Every stage of one comparison, judged trial by trial; none without a float64 truth."""

    def __init__(
        self,
        candidate: Candidate,
        before: Sequence[Form],
        runners: Sequence[str],
        *,
        truth: bool = True,
    ) -> None:
        self.notes: list[str] = []
        self._forms = list(before) if truth else []
        if truth and isinstance(candidate, OnnxCandidate):
            self._forms += self._of_graph(candidate, runners)
        self._results: list[Results] = [[] for _ in self._forms]

    def add(self, trial: Trial) -> None:
        """Judge every stage on this trial, if it is one of those that stages are judged on."""
        if trial.case.label not in STAGED_ON:
            return
        for form, results in zip(self._forms, self._results, strict=True):
            results += hold(trial, form.candidate, form.runner)

    def finished(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(form.name, form.runner, worst_of(results), form.operators, form.nodes)
            for form, results in zip(self._forms, self._results, strict=True)
        )

    def _of_graph(self, last: OnnxCandidate, runners: Sequence[str]) -> list[Form]:
        proto = last.file.proto
        counts: dict[str, Any] = {
            "operators": norm_operators(proto),
            "nodes": len(proto.graph.node),
        }
        forms = []
        try:
            meaning = Meaning(Float64Graph(last.file), last.file, last.order)
            forms.append(Form("graph in float64", "float64", meaning, **counts))
        except CannotRun as error:
            self.notes.append(f"the graph was not run in float64: {error}")
        for runner in runners:
            for level in LEVELS:
                candidate = (
                    last if level == last.level else OnnxCandidate(last.file, last.order, level)
                )
                made = counts if level == "off" else self._rewritten(proto, level, runner)
                forms.append(Form(f"onnxruntime {level}", runner, candidate, **made))
        return forms

    def _rewritten(self, proto: ModelProto, level: str, runner: str) -> dict[str, Any]:
        """What onnxruntime makes of the graph; nothing is known of one that it rejects."""
        try:
            made = optimised(proto, level, runner)
        except NormsurgeryError as error:
            self.notes.append(
                f"onnxruntime {level} ({runner}) was not looked into: {one_line(error)}"
            )
            return {}
        return {"operators": norm_operators(made), "nodes": len(made.graph.node)}
