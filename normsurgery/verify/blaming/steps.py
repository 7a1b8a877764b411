"""Which steps of a plan broke what they promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from normsurgery.errors import CannotTrace, NormsurgeryError
from normsurgery.inputs import Inputs
from normsurgery.plan import Plan
from normsurgery.report import Report
from normsurgery.spec import Fidelity
from normsurgery.steps import FoldStep, Step
from normsurgery.verify.evidence import Evidence


@dataclass(frozen=True)
class BlamedStep:
    """number: of the step in the plan, from 0. reason: what was measured, and with which others.
    evidence: of the smallest part of the plan that breaks it; None where it cannot be carried out.
    """

    number: int
    step: Step
    reason: str
    evidence: Evidence | None = None

    def __str__(self) -> str:
        step = self.step
        place = step.site.label or "(the model itself)"
        by = f" by {step.rule}" if step.rule else ""
        return (
            f"step {self.number}: {place} ({step.site.kind} -> {step.to}{by}), promised "
            f"{step.fidelity.name.lower()}: {self.reason}"
        )


@dataclass(frozen=True)
class StepsBlame:
    """steps: those that broke a promise. unpromised: numbers of the steps that promise nothing
    (RETRAIN): outputs move by them as they should."""

    steps: tuple[BlamedStep, ...]
    unpromised: tuple[int, ...] = ()

    def __str__(self) -> str:
        lines = [str(step) for step in self.steps] or ["every promise holds"]
        if self.unpromised:
            named = ", ".join(map(str, self.unpromised))
            lines.append(f"steps that promise nothing, and change the outputs by design: {named}")
        return "\n".join(lines)


def blame_steps(model: nn.Module, plan: Plan, inputs: Inputs | None) -> StepsBlame | None:
    """The steps of `plan` that break what they promise of `model`, and those that promise nothing.

    Parts of the plan are carried out on copies and measured as a swap or a fold is: halves of those
    that fail, down to single steps. Where only several together fail, the one that completes them
    is named. None where every step promises something, and keeps it.

    Raises CannotTrace where there are no inputs to measure on.
    """
    numbers = range(len(plan.steps))
    unpromised = tuple(n for n in numbers if plan.steps[n].fidelity is Fidelity.RETRAIN)
    promised = [n for n in numbers if n not in unpromised]
    parts = _Parts(model, plan, inputs)
    found = tuple(sorted(parts.broken(promised), key=lambda blamed: blamed.number))
    return StepsBlame(found, unpromised) if found or unpromised else None


@dataclass
class _Parts:
    """Parts of a plan, each carried out on a copy of the model and measured."""

    model: nn.Module
    plan: Plan
    inputs: Inputs | None

    def broken(self, numbers: Sequence[int]) -> list[BlamedStep]:
        if not numbers:
            return []
        evidence = self._measured(numbers)
        if isinstance(evidence, Evidence) and evidence.passed:
            return []
        if len(numbers) == 1:
            return [self._blamed(numbers[0], evidence, ())]
        middle = len(numbers) // 2
        found = [*self.broken(numbers[:middle]), *self.broken(numbers[middle:])]
        # A part of a fold may need what comes before it, and fail for that alone.
        able = [blamed for blamed in found if blamed.evidence is not None]
        return able or [self._completing(numbers)]

    def _completing(self, numbers: Sequence[int]) -> BlamedStep:
        """The last step of the shortest beginning that fails."""
        low, high = 1, len(numbers)
        while low < high:
            middle = (low + high) // 2
            evidence = self._measured(numbers[:middle])
            if isinstance(evidence, Evidence) and evidence.passed:
                low = middle + 1
            else:
                high = middle
        return self._blamed(numbers[low - 1], self._measured(numbers[:low]), numbers[: low - 1])

    def _blamed(self, number: int, evidence: Evidence | str, others: Sequence[int]) -> BlamedStep:
        with_others = f"together with steps {', '.join(map(str, others))}: " if others else ""
        if isinstance(evidence, str):
            reason = f"{with_others}it cannot be carried out: {evidence}"
            return BlamedStep(number, self.plan.steps[number], reason)
        reason = with_others + next(iter(evidence.failures), "it fails")
        return BlamedStep(number, self.plan.steps[number], reason, evidence)

    def _measured(self, numbers: Sequence[int]) -> Evidence | str:
        """What a part of the plan gives, or why it cannot be carried out."""
        part = replace(self.plan, steps=tuple(self.plan.steps[n] for n in numbers))
        try:
            report = _carried_out(self.model, part, self.inputs)
        except CannotTrace:
            raise
        except NormsurgeryError as error:
            return str(error)
        evidence = report.evidence
        if evidence is None:
            notes = "; ".join(report.notes)
            raise CannotTrace(f"nothing was measured ({notes}). Give inputs that the model takes.")
        return evidence


def _carried_out(model: nn.Module, plan: Plan, inputs: Inputs | None) -> Report:
    if any(isinstance(step, FoldStep) for step in plan.steps):
        from normsurgery.fold.folding import fold

        return fold(model, plan=plan, inputs=inputs, eval=True)[1]
    from normsurgery.surgery import swap

    return swap(model, plan=plan, inputs=inputs)[1]
