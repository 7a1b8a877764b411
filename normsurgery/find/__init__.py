"""find: every normalization of a model, by structure, identified by measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotTrace, UsageError
from normsurgery.find.by_run import functions
from normsurgery.find.by_type import typed_norms
from normsurgery.find.drafts import Drafts
from normsurgery.find.places import layer_sites
from normsurgery.find.reader import Ends, Reader, Tree, key_of, place_of
from normsurgery.graph import Flow, record
from normsurgery.inputs import Inputs, as_inputs, infer
from normsurgery.survey import Survey, renumbered

Model = nn.Module | fx.GraphModule | ExportedProgram


def watched() -> frozenset[Callable[..., Any]]:
    """The functions whose calls are recorded whole."""
    return functions()


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
    if attach != "norm":
        found = layer_sites(module, recordings[0] if recordings else None, attach)
        return Survey(
            type(inner).__name__, renumbered(list(found)), (), _spelling(given), tuple(notes)
        )
    return _surveyed(inner, module, recordings, given, notes)[0]


@dataclass(frozen=True)
class Located:
    """A Survey with an eval run of the model.

    ends: by a site's index, the values that each of its runs begins and ends with; not there for
    what did not run, or where a run could not be told from its surroundings.
    """

    survey: Survey
    recording: Flow
    ends: Mapping[int, Ends]


def locate(model: Model, inputs: Inputs) -> Located:
    """What `find` finds in eval mode, and where it stands in the recording of that run.

    Raises CannotTrace, UsageError as `find`.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    recording = record(module, inputs, watched=watched())
    survey, drafts = _surveyed(model, module, [recording], inputs, ())
    ends = {site.index: drafts.ends[key] for site in survey if (key := key_of(site)) in drafts.ends}
    return Located(survey, recording, ends)


def locate_again(survey: Survey, model: Model, inputs: Inputs, *, meta: bool = False) -> Located:
    """Where the norms of a Survey stand in a run of the same model.

    meta: the run needs no values (see `record`). Raises CannotTrace where it does not run.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    recording = record(module, inputs, watched=watched(), meta=meta)
    known = {site.path: site for site in survey if site.form == "module"}
    reader = Reader(Tree.of(module), recording, known, {})
    for _ in reader.sites():
        pass
    ends = {place_of(key): spots for key, spots in reader.ends.items()}
    places = {site.index: place_of(key_of(site)) for site in survey}
    found = {index: ends[place] for index, place in places.items() if place in ends}
    return Located(survey, recording, found)


def _surveyed(
    model: Model,
    module: nn.Module,
    recordings: Sequence[Flow],
    inputs: Inputs | None,
    notes: Sequence[str],
) -> tuple[Survey, Drafts]:
    drafts = Drafts(module, tuple(typed_norms(module)))
    for recording in recordings:
        drafts.read(recording)
    drafts.read_dormant(watched())
    sites, skips = drafts.finish(ran=bool(recordings))
    label = type(model).__name__
    survey = Survey(label, renumbered(sites), tuple(skips), _spelling(inputs), tuple(notes))
    return survey, drafts


def _inputs(model: Model, inputs: Any) -> tuple[Inputs | None, list[str]]:
    if inputs is not None:
        return as_inputs(inputs), []
    try:
        return infer(model), []
    except CannotTrace as error:
        return None, [f"Found by class only, no run: {error}"]


def _spelling(inputs: Inputs | None) -> str | None:
    return " ".join(f"--input {text}" for text in inputs.spelling) if inputs is not None else None


def _recordings(model: nn.Module, inputs: Inputs, notes: list[str]) -> Sequence[Flow]:
    """The eval run, and where it works the train run, which may reach other norms."""
    found = [record(model, inputs, watched=watched())]
    if isinstance(model, fx.GraphModule):
        return found
    try:
        found.append(record(model, inputs, training=True, watched=watched()))
    except CannotTrace as error:
        notes.append(f"Train mode was not searched: {error}")
    return found


__all__ = ["Located", "find", "locate", "locate_again"]
