"""The parts of `swap` around the verb: its plan alone, and what happens to its result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError

from .session import note, progress

if TYPE_CHECKING:
    from normsurgery.artefacts import Loaded
    from normsurgery.inputs import Inputs
    from normsurgery.plan import Plan
    from normsurgery.report import Report

_CHOICES = ("rules", "kind", "only", "exclude", "options")


def planned(
    model: Any, to: str | None, file: Path | None, example: Inputs | None, **wanted: Any
) -> Plan:
    """The plan that `swap` would carry out: of a file, or made from what is wanted."""
    import normsurgery as ns
    from normsurgery.surgery import survey_for
    from normsurgery.surgery.wrapped import unwrapped

    if file is not None:
        if to is not None or any(wanted[name] for name in _CHOICES):
            raise UsageError("a plan is complete: leave out the target, the rules, the selection.")
        return ns.Plan.load(file)
    inner, notes = unwrapped(model)
    for text in notes:
        note(text)
    with progress("finding the norms"):
        survey = survey_for(inner, to, wanted["rules"], example)
    return ns.plan(survey, inner, to, **wanted)


def keep_plan(plan: Plan, file: Path | None) -> None:
    if file is not None:
        plan.save(file)
        note(f"wrote {file}")


def save(
    loaded: Loaded, changed: Any, report: Report, target: Path, *, force: bool
) -> tuple[Path, ...]:
    """Write the model and its report, unless a promise was broken and `force` does not insist."""
    from normsurgery import artefacts

    if not report.passed and not force:
        note("nothing was written: what was measured is less than what was promised (see above).")
        return ()
    return artefacts.save(loaded, changed, report, target, force=force)


def next_command(
    loaded: Loaded, written: tuple[Path, ...], arguments: Mapping[str, Any]
) -> str | None:
    """What to type after a swap that changes the outputs: it opens the model, ready to train."""
    if not written:
        return None
    words = [json.dumps(str(written[0]))]
    if loaded.kind == "factory":
        words = [json.dumps(loaded.path), f"weights={words[0]}"]
        words += [f"arguments={dict(arguments)}"] if arguments else []
    ready = "module()" if loaded.kind == "exported" else "train()"
    load = f"artefacts.load({', '.join(words)}).model.{ready}"
    program = f"from normsurgery import artefacts; model = {load}"
    return f"python -i -c {shlex.quote(program)}"
