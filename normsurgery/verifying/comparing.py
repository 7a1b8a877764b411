"""Both sides of a comparison with an ONNX graph, made ready: types, inputs, axes, cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotTrace
from normsurgery.inputs import Inputs, infer
from normsurgery.onnxfile.feeding import DoesNotFit
from normsurgery.onnxfile.reading import OnnxFile
from normsurgery.verifying.axes import Axis, dynamic_axes
from normsurgery.verifying.compare import Results
from normsurgery.verifying.graph_inputs import inputs_of, rows_by_position
from normsurgery.verifying.hard_inputs import Case, inputs_of_a_graph
from normsurgery.verifying.hard_tables import embedding_rows
from normsurgery.verifying.judge import coarsest
from normsurgery.verifying.rounding import losses_of_rounding
from normsurgery.verifying.sides import as_module, float_type, parameter_names
from normsurgery.verifying.sources import (
    Candidate,
    OnnxCandidate,
    OnnxSource,
    Source,
    TorchCandidate,
    TorchSource,
    as_taken,
    fed,
    torch_source,
)
from normsurgery.verifying.staging import Form

if TYPE_CHECKING:
    from normsurgery.verifying.sides import Loaded


@dataclass(frozen=True)
class Options:
    """What `verify` was asked, as far as it concerns graphs; see there."""

    on: Sequence[str] = ("cpu",)
    require_runner: Sequence[str] = ()
    hard: bool = True
    intermediates: bool = True
    seed: int = 0
    memory: int | None = None
    allow_batch_stats: bool = False
    save: str | Path | None = None

    @property
    def runners(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.on, *self.require_runner)))


@dataclass
class Comparing:
    """One comparison as it goes: the two sides, the inputs, and what was found so far."""

    source: Source
    candidate: Candidate
    graph: OnnxFile
    example: Case
    options: Options
    precision: torch.dtype | None
    forms: tuple[Form, ...] = ()
    program: ExportedProgram | None = None
    traced: ExportedProgram | None = None
    untraceable: str = ""
    master: nn.Module | None = None  # what the source's weights were rounded from, if they were
    results: Results = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepared(a: Loaded, b: Loaded, inputs: Inputs | None, options: Options) -> Comparing:
    """Both sides, ready to be run, and the example in the type that the graph takes.

    Raises UsageError where the inputs do not fit the graph.
    """
    graph = b if isinstance(b, OnnxFile) else a
    assert isinstance(graph, OnnxFile)
    given = inputs if inputs is not None else _inferred(a, b, graph)
    return _set_up(a, b, graph, given, options)


def _set_up(a: Loaded, b: Loaded, graph: OnnxFile, given: Inputs, options: Options) -> Comparing:
    precision = _coarsest(float_type(a), float_type(b))
    notes: list[str] = []
    results: Results = []
    source: Source
    master = None
    if isinstance(a, OnnxFile):
        source = OnnxSource(a)
    else:
        source = torch_source(a, float_type(graph))
        if source.rounded_to is not None:
            given = given.to(dtype=source.rounded_to)
            name = str(source.rounded_to).removeprefix("torch.")
            notes.append(f"the truth is the original with its weights rounded to {name}")
            master = as_module(a)
            results += losses_of_rounding(master, source.rounded_to)
    candidate: Candidate
    if isinstance(b, OnnxFile):
        fed(b, given, source.order)
        candidate = OnnxCandidate(b, source.order)
        if isinstance(source, TorchSource):
            source = _with_all_outputs(source, b, given, options.seed)
    else:
        candidate = TorchCandidate(as_module(b))
    example = Case("example", given)
    return Comparing(
        source,
        candidate,
        graph,
        example,
        options,
        precision,
        master=master,
        results=results,
        notes=notes,
    )


def _with_all_outputs(
    source: TorchSource, graph: OnnxFile, given: Inputs, seed: int
) -> TorchSource:
    """The source with its caches as outputs, where the graph has them."""
    try:
        outputs = source.native(given, seed, "cpu")
    except Exception:  # a kernel may be missing in this type; the truth will tell
        return source
    if len(outputs) == len(graph.outputs):
        return source
    everything = replace(source, everything=True)
    same = len(everything.native(given, seed, "cpu")) == len(graph.outputs)
    return everything if same else source


def axes_of(this: Comparing) -> tuple[Axis, ...]:
    """What may vary: the dynamic axes of the graph that both sides leave free."""
    given, order = this.example.inputs, this.source.order
    axes = dynamic_axes(this.graph, as_taken(this.graph, given), order, this.traced)
    if not isinstance(this.source, OnnxSource) or this.source.file is this.graph:
        return axes
    own = dynamic_axes(this.source.file, as_taken(this.source.file, given), order)
    free = {place for axis in own for place in axis.places}
    return tuple(axis for axis in axes if set(axis.places) <= free)


def cases_of(this: Comparing, axes: Sequence[Axis]) -> tuple[Case, ...]:
    if not this.options.hard:
        return (this.example,)
    given, order = this.example.inputs, this.source.order
    rows = rows_by_position(this.graph, as_taken(this.graph, given), order)
    padding = None
    if isinstance(this.source, TorchSource):
        rows |= embedding_rows(this.source.module, given)
        padding = _padding(this.source.module)
    return inputs_of_a_graph(given, axes, rows=rows, padding=padding, seed=this.options.seed)


def _padding(module: nn.Module) -> int | None:
    """The id that pads a sequence, where the model says it."""
    known = getattr(getattr(module, "config", None), "pad_token_id", None)
    if isinstance(known, int) and known >= 0:
        return known
    tables = (m.padding_idx for m in module.modules() if isinstance(m, nn.Embedding))
    return next((index for index in tables if index is not None), None)


def _coarsest(*dtypes: torch.dtype | None) -> torch.dtype | None:
    known = [dtype for dtype in dtypes if dtype is not None]
    return coarsest(known) if known else None


def _inferred(a: Loaded, b: Loaded, graph: OnnxFile) -> Inputs:
    """Inputs that the graph takes: those the torch side suggests if they fit, else its own."""
    model = a if not isinstance(a, OnnxFile) else b
    if isinstance(model, OnnxFile):
        return inputs_of(graph)
    declared = inputs_of(graph)
    try:
        given = infer(model)
        fed(graph, given, parameter_names(model))
    except (CannotTrace, DoesNotFit):
        known = set(parameter_names(model))
        if known.issuperset(declared.kwargs):
            return declared
        return Inputs(tuple(declared.kwargs.values()))
    return given
