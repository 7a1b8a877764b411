"""find: every normalization of a model, by structure, identified by measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import fx, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotTrace, UsageError
from normsurgery.find.by_run import FUNCTIONS
from normsurgery.find.by_type import typed_norms
from normsurgery.find.drafts import Drafts
from normsurgery.find.places import layer_sites
from normsurgery.graph import Recording, record
from normsurgery.inputs import Inputs, as_inputs, infer
from normsurgery.survey import Survey, renumbered

Model = nn.Module | fx.GraphModule | ExportedProgram
WATCHED: frozenset[Callable[..., Any]] = frozenset(FUNCTIONS)


def find(
    model: Model,
    inputs: Any = None,
    *,
    attach: Literal["norm", "weight", "layer"] = "norm",
) -> Survey:
    """All normalizations of a model: Sites, and Skips with a reason for what stays unexplained.

    model: a module (in any mode, on any device, meta too), a fx.GraphModule or an ExportedProgram;
        it is not changed. A compiled module is read through.
    inputs: positional arguments as a tuple, keyword arguments as a dict, or `Inputs`; inferred
        where it is None and that is possible. Without any, norms are found by class only.
    attach: "norm" lists what normalises activations (and, marked as such, what normalises a
        weight); "weight" and "layer" list the places for norms that attach there.

    Raises CannotTrace if the model does not run on the inputs given, UsageError for a model that
    is wrapped for distributed training.
    """
    if attach not in ("norm", "weight", "layer"):
        raise UsageError(f"attach is one of norm, weight, layer, not {attach!r}.")
    from normsurgery.surgery.wrapped import unwrapped

    inner, wrapper = (model, ()) if isinstance(model, ExportedProgram) else unwrapped(model)
    given, inference = _inputs(inner, inputs)
    module = inner.module() if isinstance(inner, ExportedProgram) else inner
    notes = [*wrapper, *inference]
    recordings = _recordings(module, given, notes) if given is not None else []
    label = type(inner).__name__
    if attach != "norm":
        found = layer_sites(module, recordings[0] if recordings else None, attach)
        return Survey(label, renumbered(list(found)), (), _spelling(given), tuple(notes))
    drafts = Drafts(module, tuple(typed_norms(module)))
    for recording in recordings:
        drafts.read(recording)
    drafts.read_dormant(WATCHED)
    sites, skips = drafts.finish(ran=bool(recordings))
    return Survey(label, renumbered(sites), tuple(skips), _spelling(given), tuple(notes))


def _inputs(model: Model, inputs: Any) -> tuple[Inputs | None, list[str]]:
    if inputs is not None:
        return as_inputs(inputs), []
    try:
        return infer(model), []
    except CannotTrace as error:
        return None, [f"Found by class only, no run: {error}"]


def _spelling(inputs: Inputs | None) -> str | None:
    return " ".join(f"--input {text}" for text in inputs.spelling) if inputs is not None else None


def _recordings(model: nn.Module, inputs: Inputs, notes: list[str]) -> Sequence[Recording]:
    """The eval run, and where it works the train run, which may reach other norms."""
    found = [record(model, inputs, watched=WATCHED)]
    if isinstance(model, fx.GraphModule):
        return found
    try:
        found.append(record(model, inputs, training=True, watched=WATCHED))
    except CannotTrace as error:
        notes.append(f"Train mode was not searched: {error}")
    return found


__all__ = ["find"]
