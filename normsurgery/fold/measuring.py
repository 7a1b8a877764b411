"""The recorded calls that a fold is planned on, and must hold for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normsurgery.errors import CannotTrace
from normsurgery.find import Located, locate, locate_again
from normsurgery.fold.ground import Choices, Ground
from normsurgery.fold.unlisted import with_unlisted, with_unlisted_ends
from normsurgery.graph.measured_calls import Call, added, relatives
from normsurgery.inputs import Inputs
from normsurgery.survey import Survey


@dataclass(frozen=True)
class Measured:
    """The example and the other calls of a model, each recorded once, with the norms in it.

    left_out: the names of the calls that do not run.
    """

    example: Located
    others: tuple[tuple[Call, Located], ...]
    left_out: tuple[str, ...]

    def grounds(self, choices: Choices) -> list[Ground]:
        """What the rules see of each call, the example first, with nothing folded yet."""
        names = list(self.example.recording.outputs)
        others = [
            Ground(located, choices, call.name, None if call.binds else names)
            for call, located in self.others
        ]
        return [Ground(self.example, choices), *others]


def located_in(model: nn.Module, inputs: Inputs, survey: Survey | None) -> Located:
    """The norms of a survey, or those that are found now, in a run on the inputs.

    Raises CannotTrace where the model does not run.
    """
    return locate(model, inputs) if survey is None else locate_again(survey, model, inputs)


def measured(
    model: nn.Module,
    inputs: Inputs,
    example: Located,
    choices: Choices,
    calls: Sequence[Any] = (),
) -> Measured:
    """Record the relatives of the example, and the further `calls` of the user.

    Raises CannotTrace where a call of the user's does not run.
    """
    if not choices.keep_classes:
        example = with_unlisted(example)
    others: list[tuple[Call, Located]] = []
    left_out: list[str] = []
    for call in (*relatives(model, inputs), *added(inputs, calls)):
        try:
            others.append((call, _first_that_runs(example, model, call)))
        except CannotTrace:
            if call.binds:
                raise
            left_out.append(call.name)
    return Measured(example, tuple(others), tuple(left_out))


def _first_that_runs(example: Located, model: nn.Module, call: Call) -> Located:
    *rest, last = call.alternatives
    for inputs in rest:
        try:
            return _located(example, model, inputs)
        except CannotTrace:
            continue
    return _located(example, model, last)


def _located(example: Located, model: nn.Module, inputs: Inputs) -> Located:
    """Recorded without values where the model runs so, for that takes a fraction of the time."""
    try:
        found = locate_again(example.survey, model, inputs, meta=True)
    except CannotTrace:
        found = locate_again(example.survey, model, inputs)
    return with_unlisted_ends(found)
