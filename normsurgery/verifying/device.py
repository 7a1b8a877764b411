"""Would a device that computes in half precision overflow, where a CPU computes wider?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from normsurgery.errors import NormsurgeryError
from normsurgery.onnxfile.feeding import as_tensor
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import OnnxFile, origin, value_types
from normsurgery.verifying.compare import one_line
from normsurgery.verifying.evidence import Comparison
from normsurgery.verifying.half_device import computes_wider, overflow_on_device
from normsurgery.verifying.judge import Verdict
from normsurgery.verifying.sources import fed
from normsurgery.verifying.trials import Trial, compared

HALF = (torch.float16, torch.bfloat16)
EMULATED_ON = ("example", "300 to 60000", "outlier channel 10000", "mean 1000", "random ids")


@dataclass
class Emulation:
    """A graph in half precision, every operation rounded to the type that the file declares.

    program: the traced source, to tell what the model does anyway from what the graph adds.
    """

    file: OnnxFile
    order: tuple[str, ...]
    dtype: torch.dtype
    program: ExportedProgram | None

    def notes(self, runner: str) -> list[str]:
        """That a runner computes wider than the graph says, if it does."""
        try:
            wider = computes_wider(self.file, runner)
        except NormsurgeryError:  # that it does not run there is said elsewhere
            return []
        return [str(wider)] if wider.wider else []

    def judged(self, trial: Trial) -> tuple[list[Comparison], list[str]]:
        """A failed Comparison where the graph overflows and the source, emulated the same way, does
        not; a note where both do."""
        if trial.case.label not in EMULATED_ON or isinstance(trial.truth, Exception):
            return [], []
        if not all(bool(t.isfinite().all()) for t in trial.truth.values() if t.is_floating_point()):
            return [], []
        try:
            place = self._overflow(trial)
        except NormsurgeryError as error:
            return [], [f"the graph could not be emulated in half precision: {one_line(error)}"]
        if not place:
            return [], []
        name = str(self.dtype).removeprefix("torch.")
        reason = f"a device that computes in {name} overflows on {trial.case.label!r}, {place}"
        own = self._of_source(trial)
        if own is None or own:
            return [], [f"device risk: {reason}{f'; {own}' if own else ''}"]
        verdict = Verdict(False, f"{reason}; the source, computed in the same way, does not")
        label = trial.case.label
        return [Comparison(label, "emulated", "eval", "plain", "range", verdict)], []

    def _of_source(self, trial: Trial) -> str | None:
        """Where the source overflows; "" nowhere, None unknown."""
        if self.program is None:
            return None
        try:
            found = overflow_on_device(self.program, trial.case.inputs, self.dtype, seed=trial.seed)
        except NormsurgeryError:
            return None
        events = [event for event in found.events if event.kind == "overflow"]
        return f"so does the source: {events[0]}" if events else ""

    def _overflow(self, trial: Trial) -> str:
        """Where a finite value first becomes infinite, if an output is wrong in the end."""
        graph = Float64Graph(self.file)
        types = value_types(self.file.proto)
        values = {n: _doubled(as_tensor(a)) for n, a in self._feeds(trial).items()}
        values.update(graph.constants)
        first = ""
        for step in graph.steps:
            for name, value in step.run(values).items():
                port = types.get(name)
                narrow = port is not None and port.dtype in HALF and value.is_floating_point()
                stored = value.to(port.dtype).double() if narrow and port is not None else value
                if narrow and not first and bool((stored.isinf() & value.isfinite()).any()):
                    module = origin(step.node).module
                    of = f" of {module}" if module else ""
                    first = f"first at {step.node.name or name} ({step.node.op_type}{of})"
                values[name] = stored
        outputs = {port.name: values[port.name].to(port.dtype) for port in self.file.outputs}
        wrong = first and any(c.verdict.passed is False for c in _compared(trial, outputs))
        return first if wrong else ""

    def _feeds(self, trial: Trial) -> dict[str, Any]:
        return fed(self.file, trial.case.inputs, self.order)


def _compared(trial: Trial, outputs: dict[str, Tensor]) -> list[Comparison]:
    return [c for c in compared(trial, outputs, "cpu") if isinstance(c, Comparison)]


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
