"""A plan carried out; what turns out impossible then is planned again without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from normsurgery.errors import UsageError
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.editing import CannotHold
from normsurgery.fold.worklist import Key
from normsurgery.plan import Plan
from normsurgery.steps import Merge, MergedNorm, Step


class Outcome(Protocol):
    """What carrying out a plan gives: `plan` holds the steps that were, and a Skip for the rest."""

    @property
    def plan(self) -> Plan: ...


Result = TypeVar("Result", bound=Outcome)
Decide = Callable[[Mapping[Key, NoMatch]], Plan]


def carried_out(
    plan: Plan | None, decide: Decide | None, apply: Callable[[Plan], Result]
) -> Result:
    """What `apply` makes of the plan; or, where `decide` makes the plans, of the first that works.

    Raises UsageError and CannotHold where a step of a given plan is impossible.
    """
    refused: dict[Key, NoMatch] = {}
    while True:
        made = decide(refused) if decide is not None else plan
        assert made is not None
        try:
            applied = apply(made)
        except CannotHold as error:
            if decide is None or _key(error.step) in refused:
                raise
            refused[_key(error.step)] = error.match
            continue
        impossible = _impossible(made, applied)
        if not impossible:
            return applied
        if decide is None or impossible.keys() <= refused.keys():
            match = next(iter(impossible.values()))
            raise UsageError(f"{match.reason}. Make a new plan without it (exclude).")
        refused |= impossible


def _impossible(made: Plan, applied: Outcome) -> dict[Key, NoMatch]:
    """The steps that were not carried out, with the reason."""
    done = {id(step) for step in applied.plan.steps}  # two steps may have one label
    reasons = {skip.path: skip.reason for skip in applied.plan.skips}
    return {
        _key(step): NoMatch(Check.NOT_REWRITABLE, _without_head(reasons[step.site.label]))
        for step in made.steps
        # A norm that would have gone with a merge: without it, other rules may take it.
        if id(step) not in done and not isinstance(step, MergedNorm)
    }


def _key(step: Step) -> Key:
    return step.site.label if isinstance(step, Merge) else step.site.index


def _without_head(reason: str) -> str:
    return reason.removeprefix(f"{Check.NOT_REWRITABLE.value}: ")
