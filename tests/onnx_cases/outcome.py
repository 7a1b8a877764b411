"""What normsurgery says of a case."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import normsurgery as ns
from normsurgery.verifying import Evidence
from onnx_cases.case import Case, Sides


@dataclass(frozen=True)
class Outcome:
    """verdict: "pass", "fail", "undecided" or "refused". told: all that was said against it."""

    verdict: str
    told: str

    def fits(self, case: Case) -> bool:
        """The verdict is one that the cause allows, and the reason is the planted one."""
        named = case.good or re.search(case.why, self.told, re.IGNORECASE) is not None
        return self.verdict in case.verdict.split(" or ") and named


def outcome(sides: Sides) -> Outcome:
    """Verified, or exported and verified. Errors that are no NormsurgeryError are not caught."""
    try:
        evidence = _exported(sides) if sides.file is None else _verified(sides)
    except ns.NormsurgeryError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    if evidence.passed:
        return Outcome("pass", "")
    open_reasons = [c.verdict.reason for c in evidence.comparisons if c.verdict.passed is None]
    told = "\n".join((*evidence.failures, *open_reasons, *evidence.notes))
    return Outcome("fail" if _has_failed(evidence) else "undecided", told)


def _verified(sides: Sides) -> Evidence:
    file = str(sides.file) if isinstance(sides.file, Path) else sides.file
    return ns.verify(sides.source, file, sides.inputs, **sides.options)


def _exported(sides: Sides) -> Evidence:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        report = ns.export(sides.source, path, inputs=sides.inputs, **sides.export)
        assert report.evidence is not None
        assert report.passed == path.exists()
    return report.evidence


def _has_failed(evidence: Evidence) -> bool:
    """Something is wrong, or nothing was compared; not merely open."""
    judged = [*evidence.comparisons, *evidence.stages, *evidence.inner]
    nothing = not any(comparison.verdict.compared for comparison in evidence.comparisons)
    return nothing or any(item.verdict.passed is False for item in judged)
