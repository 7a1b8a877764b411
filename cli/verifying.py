"""The parts of `verify` and `blame` around the verbs: two sides of any kind, what is written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError

from .exporting import source_words
from .opening import example_inputs, open_model, open_pair
from .session import progress

if TYPE_CHECKING:
    from normsurgery.inputs import Inputs
    from normsurgery.verifying import Evidence


@dataclass(frozen=True)
class Typed:
    """The options that open a source model."""

    arguments: Sequence[str] | None
    weights: Path | None
    trust: Sequence[str] | None


def check_files(save: Path | None, report: Path | None, *, force: bool) -> None:
    """Raise UsageError now, and not after the work, where a file cannot be written."""
    from normsurgery.artefacts.saving import check_folder
    from normsurgery.reporting import check_report

    if report is not None:
        check_report(report, force=force)
    if save is None:
        return
    if save.suffix != ".safetensors":
        raise UsageError(f"{save}: a run is saved as .safetensors; give a name that ends in it.")
    check_folder(save)
    if save.exists() and not force:
        raise UsageError(f"{save} exists already. Give another name, or --force.")


def open_sides(
    a: str,
    b: str,
    arguments: Sequence[str] | None,
    weights: Path | None,
    trust: Sequence[str] | None,
) -> tuple[Any, Any]:
    """Both sides as `verify` takes them: torch models, ONNX files, and a saved run by its path."""
    from normsurgery.verifying.sides import is_onnx, is_saved_run, refuse_same_file

    refuse_same_file(a, b)
    special = [is_onnx(side) or is_saved_run(side, other) for side, other in ((a, b), (b, a))]
    if not any(special):
        first, second = open_pair(a, b, arguments, weights, trust)
        return first.model, second.model
    return (
        _side(a, arguments, weights, trust, special=special[0]),
        _side(b, arguments, weights, trust, special=special[1]),
    )


def open_suspects(
    a: str,
    b: str,
    arguments: Sequence[str] | None,
    weights: Path | None,
    trust: Sequence[str] | None,
) -> tuple[Any, Any]:
    """Both sides as `blame` takes them: B may also be the JSON of a plan or a report."""
    if not b.endswith(".json"):
        return open_sides(a, b, arguments, weights, trust)
    from normsurgery.plans import Plan

    plan = Plan.load(b)
    return open_model(a, arguments, weights, trust).model, plan


def _side(
    path: str,
    arguments: Sequence[str] | None,
    weights: Path | None,
    trust: Sequence[str] | None,
    *,
    special: bool,
) -> Any:
    from normsurgery.artefacts.factory import is_factory
    from normsurgery.verifying.sides import is_onnx

    if is_onnx(path):
        from normsurgery.onnxfile.reading import read

        with progress(f"reading {path}"):
            return read(path)
    if special:
        return path
    if is_factory(path):
        return open_model(path, arguments, weights, trust).model
    return open_model(path, trust=trust).model


def example_of(texts: Sequence[str] | None, model: Any) -> Inputs | None:
    """The inputs as spelled; else inferred from a torch model, which is said. `verify` itself makes
    those of an ONNX file or a saved run."""
    from normsurgery import inputs
    from normsurgery.verifying.sides import is_onnx

    if texts:
        return inputs.parse(list(texts))
    if isinstance(model, str) or is_onnx(model):
        return None
    return example_inputs(None, model)


def command(
    a: str,
    b: str,
    evidence: Evidence,
    arguments: Sequence[str] | None,
    weights: Path | None,
    trust: Sequence[str] | None,
) -> str:
    """The line that compares the two again, on the same inputs."""
    words = ["normsurgery", "verify", a, b, "--seed", str(evidence.seed)]
    typed = shlex.join([*words, *source_words(Typed(arguments, weights, trust), ())])
    return f"{typed} {evidence.inputs}" if evidence.inputs.startswith("--input") else typed


def written(
    evidence: Evidence, title: str, line: str, save: Path | None, report: Path | None
) -> tuple[Path, ...]:
    """Write the report that was asked for. Returns what was written; `verify` has saved the run."""
    from normsurgery.reporting import write_report

    files = [save] if save is not None and save.exists() else []
    if report is not None:
        files.append(write_report(evidence, report, title=title, command=line, force=True))
    return tuple(files)
