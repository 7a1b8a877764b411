"""The parts of `swap` around the verb: its plan alone, and what happens to its result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError

from .session import note, progress

if TYPE_CHECKING:
    from normsurgery.artefacts import Loaded
    from normsurgery.inputs import Inputs
    from normsurgery.plan import Plan
    from normsurgery.report import Report
    from normsurgery.selection import Rule

_CHOICES = ("rules", "kind", "only", "exclude", "options")


def ready_plan(
    to: str | None, file: Path | None, save_plan: Path | None, **wanted: Any
) -> Plan | None:
    """The plan of a file, or None where one is to be made from what is wanted.

    Whatever is wrong with the words whichever model is meant is told here, before one is loaded.
    Raises UsageError, UnknownName.
    """
    from normsurgery.artefacts.saving import check_folder
    from normsurgery.plan import Plan
    from normsurgery.selection import as_rules
    from normsurgery.spec import Fidelity, canonical

    if save_plan is not None:
        check_folder(save_plan)
    if wanted["require"] is not None:
        Fidelity.parse(wanted["require"])
    if file is not None:
        chosen = to is not None or any(wanted[name] for name in _CHOICES)
        if chosen or wanted["init"] != "copy":
            raise UsageError(
                "a plan is complete: leave out the target, rules, selection, options and init."
            )
        return Plan.load(file)
    if wanted["kind"] is not None:
        canonical(wanted["kind"])
    for rule in as_rules(to, wanted["rules"], wanted["options"]):
        _check_option_names(rule)
    return None


def _check_option_names(rule: Rule) -> None:
    """Raise UsageError for an option that no conversion to the rule's norm takes."""
    from normsurgery.spec import get

    if not rule.options:
        return
    conversions = get(rule.to).conversions.values()
    valid = dict.fromkeys(name for each in conversions for name in each.option_names())
    for name in rule.options:
        if name not in valid:
            listed = ", ".join(valid) or "none"
            raise UsageError(f"{rule.to} has no option {name!r}. Valid: {listed}.")


def suffix(to: str | None) -> str:
    """What the name of a swapped model says of the swap."""
    from normsurgery.spec import canonical

    return canonical(to) if to else "swapped"


def planned(model: Any, to: str | None, example: Inputs | None, **wanted: Any) -> Plan:
    """The plan that `swap` would make and carry out."""
    import normsurgery as ns
    from normsurgery.surgery import survey_for
    from normsurgery.surgery.wrapped import unwrapped

    inner, notes = unwrapped(model)
    for text in notes:
        note(text)
    with progress("finding the norms"):
        survey = survey_for(inner, to, wanted["rules"], example)
    return ns.plan(survey, inner, to, **wanted)


def save(
    loaded: Loaded, changed: Any, report: Report, target: Path, *, force: bool
) -> tuple[Path, ...]:
    """Write the model and its report, unless a promise was broken and `force` does not insist."""
    from normsurgery import artefacts

    if not report.passed and not force:
        note("nothing was written: what was measured is less than what was promised (see above).")
        return ()
    written = artefacts.save(loaded, changed, report, target, force=force)
    if loaded.kind == "directory":
        note(
            "transformers alone (from_pretrained) brings the old norms back, untrained: load it "
            f"with normsurgery.load({json.dumps(str(target))})."
        )
    return written


def next_command(
    loaded: Loaded,
    written: tuple[Path, ...],
    arguments: Mapping[str, Any],
    trust: Sequence[str] = (),
) -> str | None:
    """What to type after a swap that changes the outputs: it opens the model, ready to train."""
    if not written:
        return None
    words = [json.dumps(str(written[0]))]
    if loaded.kind == "factory":
        words = [json.dumps(loaded.path), f"weights={words[0]}"]
        words += [f"arguments={dict(arguments)}"] if arguments else []
    if loaded.kind == "pickle" and trust:
        words.append(f"trust={list(trust)}")
    ready = "module()" if loaded.kind == "exported" else "train()"
    load = f"artefacts.load({', '.join(words)}).model.{ready}"
    program = f"from normsurgery import artefacts; model = {load}"
    return f"python -i -c {shlex.quote(program)}"
