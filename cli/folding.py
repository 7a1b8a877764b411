"""The parts of `fold` around the verb: models in memory, checkpoint directories, what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError

from .opening import note_inferred, open_model, output_path, spelled_or_inferred
from .session import bars, note, progress

if TYPE_CHECKING:
    from normsurgery.artefacts import Loaded
    from normsurgery.plan import Plan
    from normsurgery.report import Report

SUFFIX = "folded"
# What is done or would be, the report of what was, and what was written.
Folded = tuple["Plan", "Report | None", tuple[Path, ...]]


@dataclass(frozen=True)
class Request:
    """One `fold` as it was typed, but for what the function `fold` takes too.

    wanted: the keyword arguments of the function, without plan and inputs.
    """

    model: str
    wanted: Mapping[str, Any]
    plan: Plan | None
    inputs: list[str] | None
    drop: bool
    dry_run: bool
    out: Path | None
    force: bool
    arguments: list[str] | None = None
    weights: Path | None = None
    trust: list[str] | None = None


def ready_plan(
    file: Path | None, save_plan: Path | None, selection: Mapping[str, Any]
) -> Plan | None:
    """The plan of a file, or None where one is to be made.

    Whatever is wrong with the words whichever model is meant is told here, before one is loaded.
    Raises UsageError, UnknownName.
    """
    from normsurgery.artefacts.saving import check_folder
    from normsurgery.plan import Plan
    from normsurgery.spec import canonical
    from normsurgery.steps import FoldStep

    if save_plan is not None:
        check_folder(save_plan)
    if selection["kind"] is not None:
        canonical(selection["kind"])
    if file is None:
        return None
    if any(selection.values()):
        raise UsageError("a plan is complete: leave out --kind, --only and --exclude.")
    made = Plan.load(file)
    if any(not isinstance(step, FoldStep) for step in made.steps):
        raise UsageError(f"{file} is a plan of swaps: carry it out with `normsurgery swap --plan`.")
    return made


def fold_model(asked: Request) -> Folded:
    """Fold a model that fits into memory, on an eval copy, and write it in the form it came in."""
    import normsurgery as ns

    if asked.drop:
        raise UsageError(
            "--drop is for a checkpoint directory, whose folded norms keep neutral tensors: a "
            "folded model in a file keeps none, so leave it out."
        )
    loaded = open_model(asked.model, asked.arguments, asked.weights, asked.trust)
    target = output_path(loaded, SUFFIX, asked.out, force=asked.force or asked.dry_run)
    example = spelled_or_inferred(asked.inputs, loaded.model)
    measuring = {"verify": False, "time": False} if asked.dry_run else {}
    given: Any = loaded.model
    with progress("folding the norms and measuring the result"):
        changed, report = ns.fold(
            given,
            plan=asked.plan,
            inputs=example,
            eval=True,
            **{**asked.wanted, **measuring},
        )
    if asked.dry_run:
        return report.plan, None, ()
    return report.plan, report, _save(asked, loaded, changed, report, target)


def _save(
    asked: Request, loaded: Loaded, changed: Any, report: Report, target: Path
) -> tuple[Path, ...]:
    """Write the model and its report, where something was folded and every promise was kept.

    What `--force` insists on and what `-o` names is written in any case: a script that goes on with
    that file finds it there.
    """
    from normsurgery import artefacts

    if not report.passed and not asked.force:
        note("nothing was written: what was measured is less than what was promised (see above).")
        return ()
    if not report.plan.steps and asked.out is None:
        note("nothing was folded, so nothing was written (with -o the model is written as it is).")
        return ()
    return artefacts.save(loaded, changed, report, target, force=asked.force)


def fold_directory(asked: Request) -> Folded:
    """Fold a transformers checkpoint into another, streaming: it need not fit into memory."""
    from normsurgery import inputs
    from normsurgery.artefacts.saving import check_target
    from normsurgery.fold.checkpoint import fold_checkpoint, plan_checkpoint
    from normsurgery.fold.ground import Choices

    _refuse_for_directory(asked)
    directory = Path(asked.model)
    target = asked.out or _beside(directory)
    beside = check_target(target, force=asked.force or asked.dry_run)
    choices = ("untie", "rmsnorm")
    how: dict[str, Any] = {name: asked.wanted[name] for name in ("kind", "only", "exclude")}
    how["calls"] = asked.wanted["calls"]
    how["choices"] = Choices(**{name: asked.wanted[name] for name in choices})
    how["inputs"] = inputs.parse(asked.inputs) if asked.inputs else None
    with bars(f"planning the fold of {directory.name}") as advance:
        if asked.dry_run:
            return asked.plan or plan_checkpoint(directory, **how), None, ()
        report = fold_checkpoint(
            directory,
            target,
            plan=asked.plan,
            drop=asked.drop,
            force=asked.force,
            verify=asked.wanted["verify"],
            progress=advance,
            **how,
        )
    if report.evidence is not None and not asked.inputs:
        note_inferred(report.evidence.inputs.split())
    if not report.plan.steps:
        return report.plan, report, ()
    report.save(beside)
    return report.plan, report, (target, beside)


def _beside(directory: Path) -> Path:
    """DIR.folded, whatever way the directory is written."""
    if directory.name in ("", ".."):
        directory = directory.resolve()
    return directory.with_name(f"{directory.name}.{SUFFIX}")


def _refuse_for_directory(asked: Request) -> None:
    """Raise UsageError for options that a checkpoint directory has no use for."""
    given = {
        "--pad explicit": asked.wanted["pad"] != "refuse",
        "--prune": asked.wanted["prune"],
        "--arg": asked.arguments,
        "--weights": asked.weights,
        "--trust": asked.trust,
    }
    named = " and ".join(name for name, is_given in given.items() if is_given)
    if named:
        raise UsageError(
            f"{asked.model} is a checkpoint directory, which stock transformers code loads, so its "
            f"modules stay as they are: leave out {named}."
        )
