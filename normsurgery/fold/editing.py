"""The edits of a plan on tensors by name: what they need, and what they make, cast once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normsurgery.errors import NormsurgeryError
from normsurgery.fold.casting import Loss, cast
from normsurgery.fold.channel_pad import why_not_held
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.edits import Bake, Copy, Create, Drop, Edit, reads, writes
from normsurgery.fold.running import run
from normsurgery.spec import Source
from normsurgery.steps import Step


class CannotHold(NormsurgeryError):
    """A weight cannot hold what a step makes of it; `step` is the first step at fault."""

    def __init__(self, step: Step, match: NoMatch) -> None:
        self.step, self.match = step, match
        super().__init__(f"{step.site.label}: {match.reason}. {match.hint}")


def needed_by(steps: Sequence[Step]) -> tuple[str, ...]:
    """The tensors that must be there for the edits of the steps, each once."""
    edits = [edit for step in steps for edit in step.edits]
    named = dict.fromkeys(name for edit in edits for name in (*reads(edit), *_changed(edit)))
    made = made_by(steps)
    likes = dict.fromkeys(kept_like(name, made) for name in made)
    return tuple(dict.fromkeys(name for name in (*named, *likes) if name not in made))


def edited(steps: Sequence[Step], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the edits make of tensors by name, each in its own dtype; without those they drop.

    before: at least what is `needed_by` the steps. Raises CannotHold.
    """
    edits = [edit for step in steps for edit in step.edits]
    values = {name: before[name].detach().double() for name in needed_by(steps)}
    _require_finite(steps, values)
    # A tensor that is only dropped (a batch counter) need not be there.
    there = {*values, *made_by(steps)}
    run([e for e in edits if not isinstance(e, Drop) or e.target in there], values)
    made = made_by(steps)
    results: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for edit in edits for name in writes(edit)):
        if name not in values:
            continue
        like = before[kept_like(name, made)]
        results[name], loss = cast(values[name], like.dtype)
        if loss is not None and loss.serious:
            raise _cannot_hold(steps, before, name, loss)
    return results


def made_by(steps: Sequence[Step]) -> dict[str, Create | Copy | Bake]:
    """The tensors that edits bring into being, by name."""
    edits = (edit for step in steps for edit in step.edits)
    return {edit.target: edit for edit in edits if _makes(edit)}  # type: ignore[misc]


def _makes(edit: Edit) -> bool:
    if isinstance(edit, Bake):
        return edit.target not in edit.tensors.values()
    return isinstance(edit, (Create, Copy))


def _changed(edit: Edit) -> tuple[str, ...]:
    return () if isinstance(edit, Drop) else writes(edit)


def kept_like(name: str, made: Mapping[str, Create | Copy | Bake]) -> str:
    """The tensor that was there before, of whose dtype and on whose device this one is."""
    while name in made:
        edit = made[name]
        if isinstance(edit, Bake):
            name = edit.tensors.get("v") or edit.tensors["weight"]
        else:
            name = edit.like if isinstance(edit, Create) else edit.source
    return name


def _require_finite(steps: Sequence[Step], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            step = next(s for s in steps if any(name in reads(edit) for edit in s.edits))
            bad = int((~torch.isfinite(value)).sum())
            raise CannotHold(
                step,
                NoMatch(
                    Check.NOT_FINITE,
                    f"{bad} of {value.numel()} values of {name}",
                    "Repair the model first.",
                ),
            )


def require_padding_held(step: Step, source: Source) -> None:
    """Raises CannotHold where a norm that becomes a padding has no value to pad with."""
    why_not = why_not_held(source, step.options) if "pad" in step.options else None
    if why_not is not None:
        raise CannotHold(step, why_not)


def _cannot_hold(
    steps: Sequence[Step], before: Mapping[str, Tensor], name: str, loss: Loss
) -> CannotHold:
    """The error of the first step after which the tensor cannot be held."""
    values = {key: before[key].detach().double() for key in needed_by(steps)}
    made = made_by(steps)
    for step in steps:
        run(step.edits, values)
        if name not in values or not any(name in writes(edit) for edit in step.edits):
            continue
        found = cast(values[name], before[kept_like(name, made)].dtype)[1]
        if found is not None and found.serious:
            return CannotHold(step, _lost(name, found))
    return CannotHold(steps[-1], _lost(name, loss))


def _lost(name: str, loss: Loss) -> NoMatch:
    check = Check.NOT_FINITE if loss.kind == "not finite" else Check.DTYPE
    wider = f"Convert the model to {loss.wider} first." if loss.wider else ""
    return NoMatch(check, f"of {name}, {loss}", wider)
