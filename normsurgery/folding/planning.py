"""What a fold will do, decided from recorded runs alone: no weight is needed, none is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from normsurgery.collector import uncollected
from normsurgery.folding.centring import centre
from normsurgery.folding.checks import NoMatch
from normsurgery.folding.ground import Choices, Ground
from normsurgery.folding.measuring import Measured, located_in, measured
from normsurgery.folding.parametrizations import apply_baked, baked_steps
from normsurgery.folding.steps import skip
from normsurgery.folding.unlisted import is_unlisted
from normsurgery.folding.untying import with_own_copies
from normsurgery.folding.worklist import Key, Worklist
from normsurgery.inputs import Inputs
from normsurgery.plans import MeasuredCall, Plan, versions
from normsurgery.selection import is_meant, select
from normsurgery.spec import Fidelity
from normsurgery.steps import Step
from normsurgery.survey import Skip, Survey
from normsurgery.swapping.planning import with_children
from normsurgery.treecopy import tree_copy

DEFAULT = Choices()
NOT_SELECTED = "not selected"


@dataclass(frozen=True)
class Request:
    """Which norms of a model may be folded, what the caller allows, and on which further calls."""

    kind: str | None = None
    only: Sequence[str | int] = ()
    exclude: Sequence[str | int] = ()
    choices: Choices = DEFAULT
    calls: Sequence[Any] = ()


def plan_fold(
    model: nn.Module,
    inputs: Inputs,
    *,
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    choices: Choices = DEFAULT,
    calls: Sequence[Any] = (),
) -> Plan:
    """Every norm of the model as a Step with its Edits, or as a Skip with the check that failed.

    model: in eval mode; on the meta device it needs no memory. It is run on `inputs`, on the calls
        that are one argument away from it (`flow.measured_calls`), and on `calls`: a fold must
        hold for all of them.
    kind, only, exclude: which norms may be folded.

    Raises CannotTrace where the model does not run, UsageError for a selection that is empty.
    """
    request = Request(kind, only, exclude, choices, calls)
    return Planner(model, inputs, request).plan({})


class Planner:
    """Plans folds of one model; the runs that they are measured on are made once."""

    @uncollected()
    def __init__(
        self, model: nn.Module, inputs: Inputs, request: Request, survey: Survey | None = None
    ) -> None:
        """survey: what was found before; found anew without."""
        self.model, self.inputs, self.request = model, inputs, request
        self.baked, self.left, self.ready = _baked(model, request)
        example = located_in(self.ready, inputs, survey)
        self.measured = measured(self.ready, inputs, example, request.choices, request.calls)
        self.survey = self.measured.example.survey
        sites = (*self.survey.sites, *(step.site for step in self.baked))
        chosen = select(sites, request.kind, request.only, request.exclude)
        self.chosen = frozenset(site.index for site in chosen)

    def plan(self, refused: Mapping[Key, NoMatch]) -> Plan:
        """refused: what turned out to be impossible, with the reason."""
        made, blocked = self.decided(refused, {})
        if not blocked or self.request.choices.keep_classes:
            return made
        return with_own_copies(self, made, blocked, refused)

    def on(self, model: nn.Module) -> Planner:
        """The same for another model that takes the same inputs."""
        return Planner(model, self.inputs, self.request)

    @uncollected()
    def decided(
        self, refused: Mapping[Key, NoMatch], hints: Mapping[int, str]
    ) -> tuple[Plan, frozenset[int]]:
        """The plan for the model with its modules as they are, and the norms that stay, or stay an
        affine, because a module is called again.

        hints: what would help, by site index.
        """
        grounds = self.measured.grounds(self.request.choices)
        work = Worklist(self.ready, grounds, self.chosen, refused, hints)
        work.run()
        if self.request.choices.rmsnorm:
            centre(grounds, self.ready, self.chosen - refused.keys(), work)
        skips = [*self.left, *self._skips(work)]
        done = {step.site.label for step in work.made.values()}
        skips += [skip for skip in self.survey.skips if skip.path not in done]
        steps = list(work.made.values())
        plan = Plan(
            type(self.model).__name__,
            with_children(self.ready, [*self.baked, *steps]),
            tuple(skips),
            versions=versions(),
            calls=_calls(self.measured, grounds),
        )
        return plan, work.called_again

    def _skips(self, work: Worklist) -> list[Skip]:
        known = {skip.path for skip in self.left}
        found: list[Skip] = []
        for site in self.survey:
            if site.index in work.made or is_unlisted(site) or site.label in known:
                continue
            chosen = site.index in self.chosen
            left = work.why_left(site.index) if chosen else None
            found.append(
                Skip(site.label, NOT_SELECTED, "", site.kind) if left is None else skip(site, left)
            )
        return found


def _calls(measured: Measured, grounds: Sequence[Ground]) -> tuple[MeasuredCall, ...]:
    """What was measured, and which outputs beside those of the example hold other numbers."""
    ran = [MeasuredCall(g.call or "the example", True, g.changed_outputs()) for g in grounds]
    return (*ran, *(MeasuredCall(name, False, ()) for name in measured.left_out))


def _baked(model: nn.Module, request: Request) -> tuple[list[Step], list[Skip], nn.Module]:
    """The weights that are baked in first, those that cannot be, and the model after that."""
    if request.choices.keep_classes:
        return [], [], model
    steps, skips = baked_steps(model, Survey(type(model).__name__, (), ()))
    # A norm may be folded into the baked weight as well: only the whole model is the same then.
    steps = [
        replace(step, fidelity=Fidelity.EVAL)
        for step in steps
        if is_meant(step.site, request.kind, request.only, request.exclude)
    ]
    ready = tree_copy(model) if steps else model
    for step in steps:
        ready = apply_baked(ready, step)
    return steps, skips, ready
