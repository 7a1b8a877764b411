"""What was done to a model: the plan, what was measured, and how its state_dict keys moved."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError
from normsurgery.jsonfiles import read_json, write_json
from normsurgery.plans import Plan
from normsurgery.spec import Fidelity

if TYPE_CHECKING:
    from torch import nn

    from normsurgery.exporting.facts import OnnxFacts
    from normsurgery.folding.speed import Speed
    from normsurgery.rewriting.journal import Journal
    from normsurgery.rewriting.keymap import KeyMap
    from normsurgery.verifying import Evidence

OUTPUTS_CHANGE = "outputs change; train or calibrate"


@dataclass(frozen=True)
class Report:
    """Plan, Evidence, KeyMap and versions of one verb; what is printed and what is saved.

    evidence: None where nothing could be measured; `notes` then say why.
    speed: of a fold that was timed. onnx: of an export.
    """

    verb: str
    plan: Plan
    keymap: KeyMap
    evidence: Evidence | None
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    journal: Journal | None = field(default=None, compare=False, repr=False)
    speed: Speed | None = None
    onnx: OnnxFacts | None = None

    @property
    def passed(self) -> bool:
        """Whether what was measured is what was promised; nothing measured breaks no promise."""
        return self.evidence is None or self.evidence.passed

    @property
    def exit_code(self) -> int:
        """0: done, and as promised; 1: a promise was broken."""
        return 0 if self.passed else 1

    @property
    def changes_outputs(self) -> bool:
        return self.plan.fidelity is Fidelity.RETRAIN

    def undo(self) -> nn.Module:
        """Take an in-place change back: the same objects, the same bits, the same ties.

        Returns the model (the old module, where the model itself was one norm). Raises UsageError
        where a copy was changed, or on a report read from a file.
        """
        if self.journal is None:
            raise UsageError(
                "there is nothing to undo: the change was made on a copy and the model that was "
                "given is untouched (undo works on the report of a call with inplace=True)."
            )
        return self.journal.undo()

    def to_json(self) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "passed": self.passed,
            "changes_outputs": self.changes_outputs,
            "plan": self.plan.to_json(),
            "evidence": None if self.evidence is None else self.evidence.to_json(),
            "speed": None if self.speed is None else self.speed.to_json(),
            "onnx": None if self.onnx is None else self.onnx.to_json(),
            "keymap": self.keymap.to_json(),
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_json` wrote, without what `undo` needs."""
        from normsurgery.exporting.facts import OnnxFacts
        from normsurgery.folding.speed import Speed
        from normsurgery.rewriting.keymap import KeyMap
        from normsurgery.verifying import Evidence

        try:
            made = Plan.from_json(data["plan"])
            evidence, speed, onnx = data["evidence"], data.get("speed"), data.get("onnx")
            return cls(
                verb=data["verb"],
                plan=made,
                keymap=KeyMap.from_json(data["keymap"], made),
                evidence=None if evidence is None else Evidence.from_json(evidence),
                versions=dict(data["versions"]),
                notes=tuple(data["notes"]),
                speed=None if speed is None else Speed.from_json(speed),
                onnx=None if onnx is None else OnnxFacts.from_json(onnx),
            )
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"this is not a report: {type(error).__name__}: {error}. "
                "A report stands beside each output as <out>.report.json."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        return cls.from_json(read_json(path, "a report"))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        drifts = [] if self.evidence is None else [f"  {drift}" for drift in self.evidence.drifts]
        if self.changes_outputs:
            yield OUTPUTS_CHANGE
            yield from drifts
        steps, skips = len(self.plan.steps), len(self.plan.skips)
        yield f"{self.verb} {self.plan.model}: {steps} changed, {skips} left alone"
        yield from (f"  {line}" for line in str(self.plan).splitlines())
        if self.evidence is not None:
            said = {OUTPUTS_CHANGE, *drifts} if self.changes_outputs else set()
            yield from (line for line in str(self.evidence).splitlines() if line not in said)
        if self.speed is not None:
            yield from str(self.speed).splitlines()
        yield from self._keymap_lines()
        yield from (f"note: {note}" for note in self.notes)
        yield "versions: " + ", ".join(f"{name} {text}" for name, text in self.versions.items())

    def _keymap_lines(self) -> Iterator[str]:
        counts = {
            "moved": len(self.keymap.moved),
            "created": len(self.keymap.created),
            "computed": len(self.keymap.made) - len(self.keymap.created),
            "dropped": len(self.keymap.dropped),
        }
        if any(counts.values()):
            told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            yield f"state_dict keys: {told}"

    def _repr_html_(self) -> str:
        head = f"<p><b>{OUTPUTS_CHANGE}</b></p>" if self.changes_outputs else ""
        table = self.plan._repr_html_()
        speed = () if self.speed is None else str(self.speed).splitlines()
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in (*speed, *self.notes))
        return head + table + notes + ("" if self.evidence is None else self.evidence._repr_html_())
