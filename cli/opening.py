"""From the words of a command to what the verbs take: models, inputs, where to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import CannotTrace, UsageError

from .session import note, progress

if TYPE_CHECKING:
    from normsurgery.artefacts import Loaded
    from normsurgery.inputs import Inputs
    from normsurgery.plans import Plan


def open_model(
    path: str,
    arguments: Sequence[str] | None = None,
    weights: Path | None = None,
    trust: Sequence[str] | None = None,
    *,
    meta: bool = False,
) -> Loaded:
    """Load a model; what the loader has to say about it goes to stderr."""
    from normsurgery import artefacts

    with progress(f"loading {path}"):
        loaded = artefacts.load(
            path,
            arguments=named_values(arguments),
            weights=weights,
            trust=trust or (),
            meta=meta,
        )
    for text in loaded.notes:
        note(f"{path}: {text}")
    return loaded


def open_pair(
    a: str,
    b: str,
    arguments: Sequence[str] | None,
    weights: Path | None,
    trust: Sequence[str] | None,
) -> tuple[Loaded, Loaded]:
    """Load two models to compare; the factory's arguments and weights go to whichever is one.

    Weights alone (`.safetensors`) beside a factory are loaded into what that factory makes.
    """
    from normsurgery.artefacts.factory import is_factory

    if a == b or (Path(a).exists() and Path(b).exists() and Path(a).samefile(b)):
        raise UsageError(f"{a} and {b} are the same: comparing it with itself proves nothing.")

    def opened(side: str, other: str) -> Loaded:
        if is_factory(side):
            return open_model(side, arguments, weights, trust)
        if side.endswith(".safetensors") and is_factory(other):
            return open_model(other, arguments, Path(side), trust)
        return open_model(side, trust=trust)

    return opened(a, b), opened(b, a)


def named_values(words: Sequence[str] | None) -> dict[str, Any]:
    """`name=value` words as a dict; a value is JSON where it reads as JSON, else text."""
    from normsurgery.selection import parse_options

    return parse_options(words or ())


def example_inputs(texts: Sequence[str] | None, model: Any) -> Inputs | None:
    """The inputs as spelled, else inferred.

    None where none can be inferred: a verb may be able to do without, and says what that costs.
    """
    try:
        return spelled_or_inferred(texts, model)
    except CannotTrace as error:
        note(f"no inputs: {error}")
        return None


def spelled_or_inferred(texts: Sequence[str] | None, model: Any) -> Inputs:
    """The inputs as spelled, else inferred, and then the spelling that repeats them is said.

    Raises CannotTrace where none can be inferred.
    """
    from normsurgery import inputs

    if texts:
        return inputs.parse(list(texts))
    with progress("looking for inputs that the model accepts"):
        inferred = inputs.infer(model)
    note_inferred(inferred.spelling)
    return inferred


def note_inferred(spelling: Sequence[str]) -> None:
    note("inputs inferred: " + " ".join(f"--input '{text}'" for text in spelling))


def batches(texts: Sequence[str] | None) -> list[Inputs] | None:
    """Each text as one batch of inputs, or None where there are none."""
    from normsurgery import inputs

    return [inputs.parse([text]) for text in texts] if texts else None


def output_path(loaded: Loaded, suffix: str, out: Path | None, *, force: bool) -> Path:
    """Where to write; raises UsageError now, and not after minutes, where that cannot be done."""
    from normsurgery.artefacts.saving import check_name, check_target

    if out is not None:
        check_name(out, loaded.kind)
    path = out or loaded.output(suffix)
    check_target(path, force=force)
    return path


def keep_plan(plan: Plan, file: Path | None) -> None:
    if file is not None:
        plan.save(file)
        note(f"wrote {file}")
